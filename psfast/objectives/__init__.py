"""Objectives: one file a backend, and ``objective``, the one place that chooses."""

from collections.abc import Callable

from torch import nn

from psfast.objectives.base import Objective
from psfast.objectives.serial import SerialModelObjective

__all__ = ["Objective", "objective"]

# Fastest first; "serial" serves everything.
_BACKENDS = ("serial",)


def objective(
    model: nn.Module,
    criterion: Callable,
    inputs,
    targets,
    *,
    params: list[nn.Parameter] | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> Objective:
    """The loss ``criterion(model(inputs), targets)`` as a function of the parameters.

    params: the parameters that are searched; default: the model's trainable ones, tied ones
        once. Pass the optimizer's if it has only some of them.
    backend: "auto" takes the fastest that fits and keeps in ``why_not`` the reason of each
        faster one that does not; a named one raises ValueError with its reason instead.
    seed: of the dropout mask that all trial points share

    The batch is fixed; go on with another by ``set_batch(inputs, targets)``.
    """
    if not callable(model):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, got {type(criterion).__name__}")
    if backend != "auto" and backend not in _BACKENDS:
        names = ", ".join(map(repr, ("auto", *_BACKENDS)))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")
    return SerialModelObjective(model, criterion, inputs, targets, params=params, seed=seed)
