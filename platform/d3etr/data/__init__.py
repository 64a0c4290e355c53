"""COCO-format data, transforms, batches, and the embedded digit scenes."""
