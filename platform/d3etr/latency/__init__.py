"""How fast trained detectors are, measured in turns in one process, beside how good they are."""
