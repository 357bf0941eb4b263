"""Objectives: one file a backend, and ``objective``, the one place that chooses."""

import inspect
from collections.abc import Callable, Iterable
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
    params: Iterable[nn.Parameter] | None = None,
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
    seed: of the dropout mask that all trial points share, in every poll until ``set_batch`` is
        given another (``fit`` and Lightning's mixin draw one a poll)
    options: of a backend named explicitly, such as ``workspace`` (bytes) for "batched"

    The batch is fixed; go on with another by ``set_batch(inputs, targets)``. What is done later to
    the model's parameters, buffers, submodules and mode, and to the batch in place, is followed,
    or raises ValueError where it cannot be. Plain attributes (a dropout's ``p``), hooks, and the
    entries of a batch that is a dict or list are to stay as they are now, with "vmap" also tensors
    that only a function knows (``criterion``'s weights); writes through ``.data`` go unseen.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, got {type(criterion).__name__}")
    check_backend(backend)
    if backend == "auto" and options:
        raise TypeError(f"options need an explicit backend, got {sorted(options)} with 'auto'")
    _check_seed(seed)
    arguments = dict(params=_listed(params), seed=seed, **options)
    why_not: dict[str, str] = {}
    for name in BACKENDS if backend == "auto" else (backend,):
        chosen = _class(name, model)
        inspect.signature(chosen).bind(model, criterion, inputs, targets, **arguments)
        try:
            built = chosen(model, criterion, inputs, targets, **arguments)
        except Exception as error:  # whatever keeps one backend from serving, another may
            if name == "serial" or (name == backend and isinstance(error, ValueError)):
                raise
            why_not[name] = _reason(error)
            if name == backend:
                raise ValueError(why_not[name]) from error
        else:
            built.why_not = why_not
            return built
    raise AssertionError("the serial backend either serves or raises")


def check_backend(backend: str) -> None:
    """Raise ValueError unless ``objective`` takes this ``backend``."""
    if backend not in ("auto", *BACKENDS):
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be one that torch.manual_seed takes, got {seed}")


def _listed(params: Iterable[nn.Parameter] | None) -> list[nn.Parameter] | None:
    if params is None:
        return None
    found = list(params)
    for p in found:
        if not isinstance(p, nn.Parameter):
            raise TypeError(f"params must hold torch.nn.Parameters, got {type(p).__name__}")
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, ValueError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _class(name: str, model: nn.Module) -> type[Objective]:
    device = next((p.device.type for p in model.parameters()), "cpu")
    module, attribute = _CLASSES.get(device, _CLASSES["cpu"])[name]
    return getattr(import_module(f"psfast.objectives.{module}"), attribute)
