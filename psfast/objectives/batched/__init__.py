"""Blocks of trial points for any model, in plain PyTorch."""

from psfast.objectives.batched.objective import BatchedObjective
from psfast.objectives.batched.whole import VmapObjective

__all__ = ["BatchedObjective", "VmapObjective"]
