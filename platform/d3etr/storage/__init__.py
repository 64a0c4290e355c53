"""Data and weights on shared storage: read through a cache on each machine, checked by digest."""
