"""No distillation: a student, or a teacher-to-be, that learns from ground truth alone."""

from __future__ import annotations

from typing import Literal

from d3etr.config.distillation import MethodConfig
from d3etr.methods.base import Method


class NoDistillationConfig(MethodConfig):
    """Nothing to set."""

    method: Literal["none"] = "none"

    @property
    def needs_teacher(self) -> bool:
        """There is none."""
        return False


class NoDistillation(Method):
    """Adds nothing to the losses on ground truth."""

    config_class = NoDistillationConfig
