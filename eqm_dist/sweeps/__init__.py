"""Sweeps: which points of a search space are tried, what came out, and the picture of it. For ``tuning/*.py``."""
