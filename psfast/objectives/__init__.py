"""Objectives: one file a backend, and ``objective``, the one place that chooses."""

from collections.abc import Callable
from importlib import import_module

from torch import nn

from psfast.objectives.base import Objective

__all__ = ["BACKENDS", "Objective", "objective"]

# backend -> (module, class) by the kind of device; fastest first, "serial" serves everything.
_CLASSES = {
    "cpu": {
        "fused": ("fused", "FusedObjective"),
        "batched": ("batched", "BatchedObjective"),
        "vmap": ("batched", "VmapObjective"),
        "graph": ("graph", "GraphModelObjective"),
        "serial": ("serial", "SerialModelObjective"),
    },
    "cuda": {
        "fused": ("fused_cuda", "FusedCudaObjective"),
        "batched": ("batched", "BatchedObjective"),
        "vmap": ("batched", "VmapObjective"),
        "graph": ("graph", "GraphModelObjective"),
        "serial": ("serial", "SerialModelObjective"),
    },
}
BACKENDS = tuple(_CLASSES["cpu"])


def objective(
    model: nn.Module,
    criterion: Callable,
    inputs,
    targets,
    *,
    params: list[nn.Parameter] | None = None,
    backend: str = "auto",
    seed: int = 0,
    **options,
) -> Objective:
    """The loss ``criterion(model(inputs), targets)`` as a function of the parameters.

    params: the parameters that are searched; default: the model's trainable ones, tied ones
        once. Pass the optimizer's if it has only some of them.
    backend: "fused", "batched", "vmap", "graph" or "serial"; raises ValueError with the reason
        if it cannot serve. "auto" takes the first of these that can, and ``why_not`` keeps
        the reason of each one before it.
    seed: of the dropout mask that all trial points share
    options: of a backend named explicitly, such as ``workspace`` (bytes) for "batched"

    The batch is fixed; go on with another by ``set_batch(inputs, targets)``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, got {type(criterion).__name__}")
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")
    if backend == "auto" and options:
        raise TypeError(f"options need an explicit backend, got {sorted(options)} with 'auto'")
    why_not: dict[str, str] = {}
    for name in BACKENDS if backend == "auto" else (backend,):
        try:
            chosen = _class(name, model)(
                model, criterion, inputs, targets, params=params, seed=seed, **options
            )
        except ValueError as reason:
            if name == backend or name == "serial":
                raise
            why_not[name] = str(reason)
        else:
            chosen.why_not = why_not
            return chosen
    raise AssertionError("the serial backend either serves or raises")


def _class(name: str, model: nn.Module) -> type[Objective]:
    device = next((p.device.type for p in model.parameters()), "cpu")
    module, attribute = _CLASSES.get(device, _CLASSES["cpu"])[name]
    return getattr(import_module(f"psfast.objectives.{module}"), attribute)
