"""The core: what is distilled between two decoder outputs, over which pairs."""
