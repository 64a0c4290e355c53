"""Detectors as files for runtimes: one graph from pixels to boxes, checked against the original."""
