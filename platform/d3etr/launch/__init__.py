"""Ray Train and the other launchers; the only place that imports ray."""
