"""Many samplers of one trained model: the sweep of ``tuning/sweep_stepsize.py``."""
