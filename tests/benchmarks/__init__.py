"""Benchmarks: side by side, in one run, as ratios. ``make bench`` runs those of ``__main__``."""
