"""Losses as pure functions: on ground truth, and between teacher and student."""
