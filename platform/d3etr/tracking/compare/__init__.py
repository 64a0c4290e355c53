"""Finished runs side by side: what they reached, what it cost, what sets them apart."""

from d3etr.tracking.compare.comparison import Comparison, RunGroup, Spread, compare

__all__ = ["Comparison", "RunGroup", "Spread", "compare"]
