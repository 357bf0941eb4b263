"""Blocks of trial points for any model, in plain PyTorch."""

from psfast.objectives.batched.objective import BatchedObjective

__all__ = ["BatchedObjective"]
