"""Rules for what is still sparse: a parameter with one element changed, a value with one column.

``LIGHT`` rules turn ``OneHot`` and ``Column`` arguments into ``OneHot`` or ``Column`` results:
work of one column a trial point, where the op itself would do all of them. ``HEAVY`` rules end
that: sparse arguments, stacked results, at less work than stacking the arguments first. A rule
returns ``NotImplemented`` where it does not apply.
"""

import math

import torch
from torch import Tensor

from psfast.objectives.batched import dense
from psfast.objectives.batched.program import kept
from psfast.objectives.batched.trace import Node
from psfast.objectives.batched.values import Batch, Column, OneHot, columns

aten = torch.ops.aten
LIGHT: dict = {}
HEAVY: dict = {}


def _register(table):
    def rule(*ops):
        def register(function):
            table.update(dict.fromkeys(ops, function))
            return function

        return register

    return rule


light, heavy = _register(LIGHT), _register(HEAVY)


def light_rule(node: Node):
    if node.op in VIEWS:
        return _view
    if node.op in LIGHT:
        return LIGHT[node.op]
    return _pointwise if torch.Tag.pointwise in getattr(node.op, "tags", ()) else None


def _is_base(*values) -> bool:
    return not any(isinstance(v, (OneHot, Column, Batch)) for v in values)


def as_column(x: OneHot, memo: dict) -> Column:
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
        places = [_inverse(out, count) for out in (outs if _many(outs) else (outs,))]
        node.shapes["places"] = places
    if any(p is None for p in places):
        return NotImplemented
    bases = node.value if _many(node.value) else (node.value,)
    found = tuple(_seen_through(x, base, place) for base, place in zip(bases, places, strict=True))
    return found if _many(node.value) else found[0]


def _seen_through(x: OneHot, base: Tensor, place: Tensor) -> OneHot:
    """``x`` in a view ``base`` that has element i at ``place[i]``."""
    at = place.index_select(0, x.reach()[0])
    if not x.whole:
        at = torch.where(x.at < 0, -1, at)
    return OneHot(base, at, x.delta, x.whole and base.numel() == x.base.numel())


def _many(value) -> bool:
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
    if not isinstance(x, Column) or not _is_base(index) or dim % x.base.ndim == x.dim + x.base.ndim:
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


@light(
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
)
def _attention(node: Node, q, k, v, *args, **kwargs):
    """One head of a trial point changes: attention of that head alone."""
    heads = [x for x in (q, k, v) if isinstance(x, Column)]
    if not heads or any(x.dim != -3 or x.at is not heads[0].at for x in heads):
        return NotImplemented
    if not _is_base(*(x for x in (q, k, v) if x not in heads), *args, *kwargs.values()):
        return NotImplemented
    taken = [_take(x, heads[0]) for x in (q, k, v)]
    out = dense._attention(node, len(heads[0].at), *taken, *args, **kwargs)
    if out is NotImplemented:
        return NotImplemented
    return (Column(node.value[0], -3, heads[0].at, out[0]), *[None] * 8)


def _split_column(node: Node, x: Column, dim: int, args):
    is_unbind = node.op is aten.unbind.int
    along = args[-1] if dense._ends_with_dim(node, args) else 0
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
    if _many(value) or not _is_base(*kwargs.values()) or any(_many(a) for a in args):
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
    taken = [_take(a, first) for a in args]
    return Column(value, first.dim, first.at, dense._pointwise(node, K, *taken, **kwargs))


def _widest(x, value: Tensor):
    if isinstance(x, OneHot) and x.base.ndim and x.base.shape[-1] == value.shape[-1]:
        return as_column(x, {})
    return x


def _take(x, like: Column):
    """The columns of an argument that the trial points change."""
    if isinstance(x, Column):
        return Batch(x.new)
    if not isinstance(x, Tensor) or x.ndim < -like.dim or x.shape[like.dim] == 1:
        return x
    return Batch(columns(x, like.dim, like.at))


# --- first uses of a parameter ------------------------------------------------------------------


def _changed(node: Node, dim: int, at: Tensor, delta: Tensor, slope: Tensor | None):
    """The node's value plus delta * slope in column ``at``."""
    value = node.value[0] if _many(node.value) else node.value
    new = columns(value, dim, at)
    step = delta.view(-1, *[1] * (new.ndim - 1))
    return Column(value, dim, at, new + (step if slope is None else step * slope))


def _matrix(node: Node, x, weight: OneHot):
    """x @ weight, one element (i, j) of it changed: column j gets delta * x's column i."""
    at, delta = weight.reach()
    width = weight.base.shape[1]
    i = torch.div(at, width, rounding_mode="floor")
    return _changed(node, -1, (at % width).contiguous(), delta, columns(x, -1, i))


@light(aten.mm.default)
def _mm(node: Node, x, weight):
    if isinstance(weight, OneHot) and _is_base(x):
        return _matrix(node, x, weight)
    return NotImplemented


@light(aten.addmm.default)
def _addmm(node: Node, bias, x, weight, *, beta=1, alpha=1):
    if beta != 1 or alpha != 1:
        return NotImplemented
    if isinstance(weight, OneHot) and _is_base(x, bias):
        return _matrix(node, x, weight)
    if isinstance(bias, OneHot) and _is_base(x, weight) and bias.base.ndim == 1:
        return _changed(node, -1, *bias.reach(), None)
    return NotImplemented


@light(aten.embedding.default)
def _embedding(node: Node, weight, indices, *_):
    if not isinstance(weight, OneHot) or not _is_base(indices):
        return NotImplemented
    at, delta = weight.reach()
    width = weight.base.shape[1]
    row = torch.div(at, width, rounding_mode="floor").view(-1, *[1] * indices.ndim)
    hit = (indices == row).unsqueeze(-1)
    # where, not a product: 0 * delta would turn an infinite step into NaN
    column = _changed(node, -1, (at % width).contiguous(), delta, None)
    column.new = torch.where(hit, column.new, column.old())
    return column


@light(aten._embedding_bag_forward_only.default, aten._embedding_bag.default)
def _embedding_bag(node: Node, weight, indices, offsets, by_frequency, mode, *rest):
    """Sums and means: a bag's output moves as often as it holds the row."""
    per_sample = rest[1] if len(rest) > 1 else None
    padding = rest[3] if len(rest) > 3 else -1
    if not isinstance(weight, OneHot) or mode > 1 or per_sample is not None or padding >= 0:
        return NotImplemented
    at, delta = weight.reach()
    width = weight.base.shape[1]
    bags = len(node.value[0])
    places = torch.arange(len(indices), device=indices.device)
    bag = torch.bucketize(places, offsets[:bags], right=True) - 1
    row = torch.div(at, width, rounding_mode="floor")
    hits = (indices == row.unsqueeze(1)).to(delta.dtype)
    count = delta.new_zeros(len(at), bags).index_add_(1, bag, hits)
    if mode == 1:
        count /= delta.new_zeros(bags).index_add_(0, bag, hits.new_ones(len(bag))).clamp_(min=1)
    column = _changed(node, -1, (at % width).contiguous(), delta, count.unsqueeze(2))
    return (column, None, None, None)


@light(aten.native_layer_norm.default)
def _layer_norm(node: Node, x, shape, weight, bias, eps):
    if not _is_base(x) or len(shape) != 1:
        return NotImplemented
    if isinstance(weight, OneHot) and _is_base(bias):
        at, delta = weight.reach()
        normal = kept(node.memo, "normal", lambda: node.op(x, shape, None, None, eps)[0])
        slope = columns(normal, -1, at)
        return (_changed(node, -1, at, delta, slope), None, None)
    if isinstance(bias, OneHot) and _is_base(weight):
        return (_changed(node, -1, *bias.reach(), None), None, None)
    return NotImplemented


# --- images ----------------------------------------------------------------------------------


@light(aten.convolution.default)
def _convolution(node: Node, x, weight, bias, stride, padding, dilation, transposed, _, groups):
    spatial = node.value.ndim - 2
    if not _is_base(x) or x.ndim != node.value.ndim or spatial > 2:
        return NotImplemented
    if isinstance(bias, OneHot) and _is_base(weight):
        return _changed(node, -spatial - 1, *bias.reach(), None)
    if not isinstance(weight, OneHot) or not _is_base(bias) or transposed:
        return NotImplemented
    patches = kept(
        node.memo, "patches", lambda: _patches(node, x, weight.base, stride, padding, dilation)
    )
    at, delta = weight.reach()
    per_channel = weight.base[0].numel()
    channel = torch.div(at, per_channel, rounding_mode="floor")
    group = torch.div(channel, weight.base.shape[0] // groups, rounding_mode="floor")
    slope = columns(patches, -spatial - 1, at % per_channel + group * per_channel)
    return _changed(node, -spatial - 1, channel, delta, slope)


def _patches(node: Node, x: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    """What each output pixel reads: (N, channels * kernel, *pixels)"""
    kernel = list(weight.shape[2:])
    if len(kernel) == 1:  # a picture of one line
        x, kernel, padding = x.unsqueeze(2), [1, *kernel], [0, *padding]
        stride, dilation = [1, *stride], [1, *dilation]
    patches = torch.nn.functional.unfold(x, kernel, dilation, padding, stride)
    return patches.unflatten(2, node.value.shape[2:])


@light(
    aten.max_pool2d_with_indices.default, aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default
)
def _pool(node: Node, x, *args):
    if not isinstance(x, Column) or x.dim != -3 or x.base.ndim != 4:
        return NotImplemented
    out = dense._pool(node, len(x.at), Batch(x.new), *args)
    if _many(out):
        return (Column(node.value[0], -3, x.at, out[0]), None)
    return Column(node.value, -3, x.at, out)


@light(aten.native_batch_norm.default)
def _batch_norm(node: Node, x, weight, bias, mean, var, training, momentum, eps):
    value = node.value[0]
    channel = 1 - value.ndim
    if isinstance(x, Column) and x.dim == channel and _is_base(weight, bias):
        taken = [None if v is None else v[x.at].unsqueeze(1) for v in (weight, bias, mean, var)]
        out = dense.batch_norm(x.new, *taken, training, eps)
        return (Column(value, channel, x.at, out), None, None)
    if not _is_base(x):
        return NotImplemented
    if isinstance(weight, OneHot) and _is_base(bias):
        at, delta = weight.reach()
        normal = kept(
            node.memo,
            "normal",
            lambda: dense.batch_norm(x[None], None, None, mean, var, training, eps)[0],
        )
        slope = columns(normal, channel, at)
        return (_changed(node, channel, at, delta, slope), None, None)
    if isinstance(bias, OneHot) and _is_base(weight):
        return (_changed(node, channel, *bias.reach(), None), None, None)
    return NotImplemented


for name in ("_native_batch_norm_legit_functional", "_batch_norm_with_update_functional"):
    if hasattr(aten, name):

        def _functional(node, x, weight, bias, mean, var, *rest):
            training, momentum, eps = rest if len(rest) == 3 else (True, *rest)
            out = _batch_norm(node, x, weight, bias, mean, var, training, momentum, eps)
            return out if out is NotImplemented else (*out, None, None)

        LIGHT[getattr(aten, name).default] = _functional


# --- the end of sparsity ------------------------------------------------------------------------


def _product(node: Node, x, weight, K: int, with_bias=None):
    """x @ weight where x is a Column or a Batch or the weight is a OneHot."""
    base_weight = weight.base if isinstance(weight, OneHot) else weight
    if isinstance(x, Column):
        if x.dim != -1:
            return NotImplemented
        step = x.new - x.old()  # (K, rows, 1)
        out = step * base_weight.index_select(0, x.at).unsqueeze(1)
        out += node.value
    elif isinstance(x, Batch):
        out = dense.product(x.tensor, base_weight, with_bias)
    else:
        return NotImplemented
    if isinstance(weight, OneHot):
        at, delta = weight.reach()
        width = base_weight.shape[1]
        i = torch.div(at, width, rounding_mode="floor")
        rows = x.dense()
        used = rows.gather(2, i.view(-1, 1, 1).expand(-1, rows.shape[1], 1))
        j = (at % width).view(-1, 1, 1).expand_as(used)
        out.scatter_add_(2, j, used * delta.view(-1, 1, 1))
    return out


@heavy(aten.mm.default)
def _mm_out(node: Node, K: int, x, weight):
    if isinstance(weight, (Batch, Column)) or not dense.weight_like(node, 1):
        return NotImplemented
    return _product(node, x, weight, K)


@heavy(aten.addmm.default)
def _addmm_out(node: Node, K: int, bias, x, weight, *, beta=1, alpha=1):
    if isinstance(weight, (Batch, Column)) or not dense.weight_like(node, 2):
        return NotImplemented
    base_bias = bias.base if isinstance(bias, OneHot) else bias
    if beta != 1 or alpha != 1 or not _is_base(base_bias) or base_bias.ndim != 1:
        return NotImplemented
    out = _product(node, x, weight, K, base_bias)
    if out is not NotImplemented and isinstance(bias, OneHot):
        at, delta = bias.reach()
        j = at.view(-1, 1, 1).expand(-1, out.shape[1], 1)
        out.scatter_add_(2, j, delta.view(-1, 1, 1).expand_as(j))
    return out
