"""Distillation methods: which queries are decoded, which are paired, and what is compared."""
