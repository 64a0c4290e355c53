"""Finished runs side by side: what they reached, what it cost, how they differ."""

from d3etr.tracking.compare.comparison import Comparison, RunGroup, Spread, compare

__all__ = ["Comparison", "RunGroup", "Spread", "compare"]
