"""Training: the loop, its engines, the optimizer that carries the EMAs, and the checkpoints."""
