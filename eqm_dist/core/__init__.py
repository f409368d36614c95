"""The numerics of Equilibrium Matching: pure functions of tensors, without I/O, configuration or global state."""
