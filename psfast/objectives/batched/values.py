"""How K trial points of one block differ from the incumbent, at one node of the graph.

A node's value is one of three, besides "as at the incumbent" (a plain tensor):

``OneHot``  a parameter, or a view of one, with one element changed
``Column``  an activation with one column changed, in one dimension the same for all K
``Batch``   anything: K whole values, stacked
"""

import torch
from torch import Tensor


class Batch:
    """tensor: (K, *shape)"""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def dense(self) -> Tensor:
        return self.tensor


class OneHot:
    """Trial point k has ``base`` plus ``delta[k]`` at the flat (row-major) place ``at[k]``.

    base: (*shape); at: (K,) int64, -1 for "not in this view"; delta: (K,)
    whole: whether the view has every element, so that no ``at`` is -1
    """

    __slots__ = ("at", "base", "delta", "whole")

    def __init__(self, base: Tensor, at: Tensor, delta: Tensor, whole: bool):
        self.base = base
        self.at = at
        self.delta = delta
        self.whole = whole

    def reach(self) -> tuple[Tensor, Tensor]:
        """(place, delta) with a change of zero at place 0 for "not in this view"."""
        if self.whole:
            return self.at, self.delta
        return self.at.clamp(min=0), self.delta.masked_fill(self.at < 0, 0)

    def parts(self) -> tuple[Tensor, Tensor]:
        return self.at, self.delta

    def changes(self) -> Tensor:
        """(K,) bool: whether the trial point's value may differ from the incumbent's."""
        moved = self.delta != 0
        return moved if self.whole else moved & (self.at >= 0)

    def select(self, which: Tensor | slice, memo: dict) -> "OneHot":
        at, delta = _select(self.at, which, memo), _select(self.delta, which, memo)
        return OneHot(self.base, at, delta, self.whole)

    def dense(self) -> Tensor:
        K = len(self.at)
        at, delta = self.reach()
        flat = self.base.reshape(-1).expand(K, -1).clone(memory_format=torch.contiguous_format)
        flat.scatter_add_(1, at[:, None], delta[:, None])
        return flat.view(K, *self.base.shape)


class Column:
    """Trial point k has ``base``, but ``new[k]`` in column ``at[k]`` of dimension ``dim``.

    base: (*shape); dim: counted from the end, so < 0; at: (K,) int64;
    new: (K, *shape with 1 at dim)

    Columns with the same ``at`` (the object) change the same columns.
    """

    __slots__ = ("at", "base", "dim", "new")

    def __init__(self, base: Tensor, dim: int, at: Tensor, new: Tensor):
        self.base = base
        self.dim = dim
        self.at = at
        self.new = new

    def old(self) -> Tensor:
        """The incumbent's columns, as ``new`` has the trial points': (K, *shape with 1 at dim)"""
        return columns(self.base, self.dim, self.at)

    def parts(self) -> tuple[Tensor, Tensor]:
        return self.at, self.new

    def changes(self) -> Tensor:
        """(K,) bool: whether the trial point's value differs from the incumbent's (NaN does)."""
        return (self.new != self.old()).flatten(1).any(1)

    def select(self, which: Tensor | slice, memo: dict) -> "Column":
        at, new = _select(self.at, which, memo), _select(self.new, which, memo)
        return Column(self.base, self.dim, at, new)

    def dense(self) -> Tensor:
        K = len(self.at)
        out = self.base.expand(K, *self.base.shape)
        out = out.clone(memory_format=torch.contiguous_format)
        return out.scatter_(self.dim, spread(self.at, self.new), self.new)


def columns(base: Tensor, dim: int, at: Tensor) -> Tensor:
    """Column ``at[k]`` of dimension ``dim`` < 0, for every k: (K, *shape with 1 at dim)"""
    taken = base.movedim(dim, 0).index_select(0, at)
    return taken.unsqueeze(dim) if dim == -1 else taken.unsqueeze(1).movedim(1, dim)


def spread(at: Tensor, like: Tensor) -> Tensor:
    """``at`` (K,) as an index of the shape of ``like`` (K, ...)."""
    return at.view(-1, *[1] * (like.ndim - 1)).expand(like.shape)


def _select(tensor: Tensor, which: Tensor | slice, memo: dict) -> Tensor:
    """Once a tensor: columns that share ``at`` go on sharing it."""
    key = id(tensor)
    if key not in memo:
        is_slice = isinstance(which, slice)
        memo[key] = tensor[which] if is_slice else tensor.index_select(0, which)
    return memo[key]
