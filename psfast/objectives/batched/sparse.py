"""Rules for what is still sparse: a parameter with one element changed, a value with one column.

``LIGHT`` rules turn ``OneHot`` and ``Column`` arguments into ``OneHot`` or ``Column`` results:
work of one column a trial point, where the op itself would do all of them. A rule returns
``NotImplemented`` where it does not apply.
"""

import math

import torch
from torch import Tensor

from psfast.objectives.batched import dense
from psfast.objectives.batched.trace import Node
from psfast.objectives.batched.values import Batch, Column, OneHot, columns

aten = torch.ops.aten
LIGHT: dict = {}


def register_in(table: dict):
    def rule(*ops):
        def register(function):
            table.update(dict.fromkeys(ops, function))
            return function

        return register

    return rule


light = register_in(LIGHT)


def light_rule(node: Node):
    if node.op in VIEWS:
        return _view
    if node.op in LIGHT:
        return LIGHT[node.op]
    return _pointwise if torch.Tag.pointwise in getattr(node.op, "tags", ()) else None


def is_base(*values) -> bool:
    return not any(isinstance(v, (OneHot, Column, Batch)) for v in values)


def as_column(x: OneHot) -> Column:
    """A one-element change as a change of one column of the last dimension."""
    width = x.base.shape[-1]
    at, delta = x.reach()
    column = (at % width).contiguous()
    new = columns(x.base, -1, column)
    row = (at // width).view(-1, *[1] * (new.ndim - 1))
    rows = torch.arange(new[0].numel(), device=at.device).view(1, *new.shape[1:])
    step = delta.view(-1, *[1] * (new.ndim - 1))
    return Column(x.base, -1, column, torch.where(rows == row, new + step, new))


# --- views ----------------------------------------------------------------------------------

_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_SPLITS = {
    aten.split.Tensor, aten.unsafe_split.Tensor, aten.split_with_sizes.default,
    aten.unsafe_split_with_sizes.default,
}  # fmt: skip
_MOVES = {
    aten.transpose.int, aten.t.default, aten.permute.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.clone.default, aten.detach.default, aten.alias.default,
    aten.contiguous.default,
}  # fmt: skip
_TAKES = {aten.slice.Tensor, aten.select.int, aten.unbind.int}
VIEWS = _RESHAPES | _SPLITS | _MOVES | _TAKES | {aten.expand.default}


def _view(node: Node, x, *args, **kwargs):
    if isinstance(x, OneHot):
        return _view_of_parameter(node, x, args, kwargs)
    if isinstance(x, Column):
        return _view_of_column(node, x, args, kwargs)
    return NotImplemented


def _view_of_parameter(node: Node, x: OneHot, args, kwargs):
    """Each element's new place, found once by sending the places through the op."""
    places = node.shapes.get("places")
    if places is None:
        count = x.base.numel()
        start = torch.arange(count, device=x.base.device).view(x.base.shape)
        outs = node.op(start, *args, **kwargs)
        places = [_inverse(out, count) for out in (outs if many(outs) else (outs,))]
        node.shapes["places"] = places
    if any(p is None for p in places):
        return NotImplemented
    bases = node.value if many(node.value) else (node.value,)
    found = tuple(_seen_through(x, base, place) for base, place in zip(bases, places, strict=True))
    return found if many(node.value) else found[0]


def _seen_through(x: OneHot, base: Tensor, place: Tensor) -> OneHot:
    """``x`` in a view ``base`` that has element i at ``place[i]``."""
    at = place.index_select(0, x.reach()[0])
    if not x.whole:
        at = torch.where(x.at < 0, -1, at)
    return OneHot(base, at, x.delta, x.whole and base.numel() == x.base.numel())


def many(value) -> bool:
    return isinstance(value, (tuple, list))


def _inverse(out: Tensor, count: int) -> Tensor | None:
    """element -> its flat place in ``out`` or -1; None if one has several."""
    flat = out.reshape(-1)
    if flat.numel() > count or (flat.numel() > 1 and len(torch.unique(flat)) < flat.numel()):
        return None
    place = torch.full((count,), -1, dtype=torch.int64, device=out.device)
    place[flat] = torch.arange(flat.numel(), device=out.device)
    return place


def _view_of_column(node: Node, x: Column, args, kwargs):
    ndim = x.base.ndim
    dim = x.dim + ndim
    if node.op in _RESHAPES:
        return _reshape_column(node, x, dim)
    if node.op in _SPLITS or node.op is aten.unbind.int:
        return _split_column(node, x, dim, args)
    if node.op in (aten.slice.Tensor, aten.select.int):
        along = (args[0] if args else 0) % ndim
        if along == dim:
            return NotImplemented
    elif node.op not in _MOVES:
        return NotImplemented
    if node.op is aten.squeeze.dim and x.base.shape[args[0]] != 1:  # nothing to squeeze
        return Column(node.value, x.dim, x.at, x.new)
    # follow the dimension through the op by its length, one against two
    marked = torch.empty([2 if d == dim else 1 for d in range(ndim)], device="meta")
    if node.op in (aten.slice.Tensor, aten.select.int):
        new_dim = dim - (node.op is aten.select.int and along < dim)
    elif node.op is aten.squeeze.dim and args[0] % ndim == dim:
        return NotImplemented
    else:
        shape = node.op(marked, *args).shape
        new_dim = list(shape).index(2)
    new = dense.RULES[node.op](node, len(x.at), Batch(x.new), *args, **kwargs)
    return Column(node.value, new_dim - node.value.ndim, x.at, new)


@light(aten.index_select.default)
def _index_select(node: Node, x, dim, index):
    if not isinstance(x, Column) or not is_base(index) or dim % x.base.ndim == x.dim + x.base.ndim:
        return NotImplemented
    new = x.new.index_select(dim % x.base.ndim + 1, index)
    return Column(node.value, x.dim, x.at, new)


def _reshape_column(node: Node, x: Column, dim: int):
    before, length = math.prod(x.base.shape[:dim]), x.base.shape[dim]
    shape = list(node.value.shape)
    for d, size in enumerate(shape):
        if size == length and math.prod(shape[:d]) == before:
            shape[d] = 1
            new = x.new.reshape(len(x.at), *shape)
            return Column(node.value, d - len(shape), x.at, new)
        if math.prod(shape[:d]) == before and length > size > 1:
            return _column_of_a_part(node, x, d)
    return NotImplemented


def _column_of_a_part(node: Node, x: Column, dim: int):
    """The dimension is cut in two, at ``dim`` and the next: heads, say, and what is in a head.

    Then one whole part, which has the changed column, is the column from here on.
    """
    value = node.value
    width = math.prod(value.shape[dim + 1 :])
    if width * value.shape[dim] != x.base.shape[x.dim] or dim + 2 != value.ndim:
        return NotImplemented
    at = torch.div(x.at, width, rounding_mode="floor")
    new = columns(value, dim - value.ndim, at).contiguous()
    inner = (x.at % width).view(-1, *[1] * value.ndim).expand(*new.shape[:-1], 1)
    new.scatter_(-1, inner, x.new.reshape(inner.shape))
    return Column(value, dim - value.ndim, at, new)


def _split_column(node: Node, x: Column, dim: int, args):
    is_unbind = node.op is aten.unbind.int
    along = args[-1] if dense.ends_with_dim(node, args) else 0
    if along % x.base.ndim != dim:
        news = dense.RULES[node.op](node, len(x.at), Batch(x.new), *args)
        new_dim = x.dim + (1 if is_unbind and along % x.base.ndim > dim else 0)
        return tuple(
            Column(base, new_dim, x.at, new) for base, new in zip(node.value, news, strict=True)
        )
    width = node.value[0].shape[dim] if not is_unbind else 0
    if is_unbind or any(part.shape[dim] != width for part in node.value):
        return NotImplemented
    # The parts of one gate layer: column c lies in part c // width. The others take the same
    # column of theirs, as it was, so that all parts go on with one ``at``.
    at = (x.at % width).contiguous()
    part_of = (x.at // width).view(-1, *[1] * (x.new.ndim - 1))
    return tuple(
        Column(part, x.dim, at, torch.where(part_of == i, x.new, columns(part, x.dim, at)))
        for i, part in enumerate(node.value)
    )


# --- one value after another ---------------------------------------------------------------


def _pointwise(node: Node, *args, **kwargs):
    """Columns stay columns: the op on them alone."""
    value = node.value
    if many(value) or not is_base(*kwargs.values()) or any(many(a) for a in args):
        return NotImplemented
    args = [_widest(a, value) for a in args]
    found = [a for a in args if isinstance(a, Column)]
    if any(isinstance(a, (Batch, OneHot)) for a in args) or not found:
        return NotImplemented
    first = found[0]
    if any(c.at is not first.at or c.dim != first.dim for c in found):
        return NotImplemented
    if any(c.base.shape[c.dim] != value.shape[c.dim] for c in found):
        return NotImplemented

    K = len(first.at)
    taken = [take(a, first) for a in args]
    new = dense.RULES.get(node.op, dense.pointwise)(node, K, *taken, **kwargs)
    return Column(value, first.dim, first.at, new)


def _widest(x, value: Tensor):
    if isinstance(x, OneHot) and x.base.ndim and x.base.shape[-1] == value.shape[-1]:
        return as_column(x)
    return x


def take(x, like: Column):
    """The columns of an argument that the trial points change."""
    if isinstance(x, Column):
        return Batch(x.new)
    if not isinstance(x, Tensor) or x.ndim < -like.dim or x.shape[like.dim] == 1:
        return x
    return Batch(columns(x, like.dim, like.at))
