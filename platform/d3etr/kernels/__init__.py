"""Kernels for GPUs, in Triton; nothing here is imported where there is none."""
