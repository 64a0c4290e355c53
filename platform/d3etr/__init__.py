"""d3etr: knowledge distillation for detection transformers.

From Python::

    d3etr.load("weights.safetensors").predict("picture.jpg")
    d3etr.train("recipe.yaml", optimisation={"epochs": 12})
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d3etr.drawing import draw
    from d3etr.engine.hooks import Hook, TrainingEvent
    from d3etr.inference import Predictor
    from d3etr.launch.api import train
    from d3etr.loading import load
    from d3etr.predictions import Detections

    __version__: str

__all__ = ["Detections", "Hook", "Predictor", "TrainingEvent", "draw", "load", "train"]

# Looked up when first used: importing the package loads neither torch nor Ray.
_HOMES = {
    "Detections": "d3etr.predictions",
    "Hook": "d3etr.engine.hooks",
    "Predictor": "d3etr.inference",
    "TrainingEvent": "d3etr.engine.hooks",
    "draw": "d3etr.drawing",
    "load": "d3etr.loading",
    "train": "d3etr.launch.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'd3etr' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def _version() -> str:
    """The installed version; ``0+unknown`` where the source is used without an installation."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("d3etr")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
