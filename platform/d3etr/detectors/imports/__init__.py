"""Weights of other implementations under this project's names."""
