"""Finished runs side by side: what they reached, what it cost, how they differ."""

from d3etr.tracking.compare.comparison import Comparison, compare
from d3etr.tracking.compare.groups import RunGroup, Spread

__all__ = ["Comparison", "RunGroup", "Spread", "compare"]
