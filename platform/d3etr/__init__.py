"""d3etr: knowledge distillation for detection transformers."""
