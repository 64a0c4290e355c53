"""Digit scenes: the embedded detection benchmark of real handwritten digits in clutter."""

from d3etr.data.digit_scenes.folder import (
    VERSION,
    find_damage,
    scenes_folder,
    write_digit_scenes,
)

__all__ = ["VERSION", "find_damage", "scenes_folder", "write_digit_scenes"]
