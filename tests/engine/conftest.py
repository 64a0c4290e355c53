"""The tiny scenes, teacher and runs of the training tests."""

from training_fixtures import make_config, scenes, teacher_weights

__all__ = ["make_config", "scenes", "teacher_weights"]
