"""A recipe that trains in seconds, for tests that start whole runs."""

from typing import Any

import yaml

SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"name": "tiny"},
    "data": {
        "digit_scenes": {
            "train_images": 24,
            "validation_images": 8,
            "test_images": 4,
            "image_size": 32,
            "minimum_scale": 8,
            "maximum_scale": 16,
        },
        "preprocessing": {
            "normalisation": "per_image",
            "shortest_side": None,
            "longest_side": None,
        },
        "augmentation": {"horizontal_flip": 0.0},
        "bucket_by_aspect": False,
        "workers": 0,
    },
    "student": {
        "detector": {
            "backbone": {"name": "small", "stem_width": 8, "stage_widths": [8, 8, 16]},
            "width": 16,
            "heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "feedforward": 16,
            "queries": 6,
            "dropout": 0.0,
        }
    },
    "optimisation": {
        "epochs": 3,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "backbone_rate_factor": 1.0,
    },
    "cluster": {"maximum_failures": 1, "threads_per_worker": 1},
    "tracking": {"enabled": False},
}


def tiny_recipe(**sections: dict[str, Any]) -> str:
    """The recipe as YAML: 18 steps in three epochs of digit scenes, in one process, untracked.

    Args:
        sections: keys that replace or join those of a section, or make a new one.
    """
    names = [*SECTIONS, *(name for name in sections if name not in SECTIONS)]
    tree = {name: {**SECTIONS.get(name, {}), **sections.get(name, {})} for name in names}
    return yaml.safe_dump(tree, sort_keys=False)
