"""Boxes, costs and batched one-to-one assignment: pure tensors."""
