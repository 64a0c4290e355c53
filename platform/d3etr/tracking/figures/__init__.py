"""Pictures of what a run learned: pure functions from arrays to matplotlib figures."""
