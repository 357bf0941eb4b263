"""Torch modes: entered so that they are left whatever comes, and one that refuses hidden reads."""

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _pop_mode

from psfast.flat import memory_of

_VALUES = {"numpy", "tolist", "__array__", "__dlpack__"}  # torch does not see what becomes of them
_READS_ITS_ARGUMENT = {"tensor_split"}  # a tensor of places, in C++
_SCALARS = {"item", "__bool__", "__complex__", "__float__", "__index__", "__int__"}


def run_under(mode, function: Callable, *args):
    """``function(*args)`` under a mode, which is off torch's stacks afterwards.

    ``with`` alone does not see to that: Ctrl-C may come inside of its enter and exit.
    """
    functions = torch._C._len_torch_function_stack()
    dispatches = torch._C._len_torch_dispatch_stack()
    try:
        with mode:
            return function(*args)
    finally:
        while torch._C._len_torch_function_stack() > functions:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > dispatches:
            _pop_mode()


@contextmanager
def no_fallback_notes():
    """vmap does not print that an operation has no rule for it: nobody can act on that here."""
    shown = torch._C._debug_only_are_vmap_fallback_warnings_enabled()
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(shown)


class NoReadValues(TorchFunctionMode):
    """Refuses what a trace would take for a constant: values that become Python's own.

    state: the tensors that the trace has stand-ins for, whose own values are not to be read
    """

    def __init__(self, state: Iterable[Tensor]):
        super().__init__()
        self._spans = spans(state)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        hidden = name in _SCALARS and shares_memory(args[0], self._spans)
        if name in _READS_ITS_ARGUMENT:
            hidden = any(isinstance(a, Tensor) for a in (*args[1:], *(kwargs or {}).values()))
        if name in _VALUES or hidden:
            raise ValueError(f"it reads values by {name}(), outside of what torch can follow")
        return function(*args, **(kwargs or {}))


class NoHiddenReads(TorchFunctionMode):
    """Refuses any read of this tensor, which something else stands in for."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self._spans = spans([tensor])

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # these are no reads
            return function(*args, **kwargs)
        if getattr(function, "__name__", "") != "__get__" and any(
            isinstance(a, Tensor) and shares_memory(a, self._spans)
            for a in pytree.tree_leaves((args, kwargs))
        ):
            raise ValueError("it is read behind the module's back, not as the module's own")
        return function(*args, **kwargs)


def spans(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """The memory of each, as (first address, the one behind the last)."""
    return [memory_of(t) for t in tensors if t.numel()]


def shares_memory(tensor: Tensor, known: list[tuple[int, int]]) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or not tensor.numel():
        return False
    start, stop = memory_of(tensor)
    return any(start < high and low < stop for low, high in known)
