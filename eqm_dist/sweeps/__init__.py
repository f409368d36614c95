"""Sweeps: which points of a search space are tried, what came out, and the picture of it. For ``tuning/*.py``.

What all sweeps share is here, and ``sweep.py`` says what happens in which order. ``stepsize`` and ``decay`` hold what
is each one's own: its plan, its results, its work, its pictures.
"""
