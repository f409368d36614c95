"""Distributed training of Equilibrium Matching models."""

__version__ = "0.1.0"
