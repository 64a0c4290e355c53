"""Sweeps: many trials of one recipe on Ray Tune."""
