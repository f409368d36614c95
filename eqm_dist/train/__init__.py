"""Training: the loop, its engines, the optimizer that carries the averages, and the checkpoints."""
