"""Sparse rules of whole layers: where a parameter comes in, and where sparsity ends.

``HEAVY`` rules end it: sparse arguments, stacked results, at less work than stacking the
arguments first.
"""

import torch
from torch import Tensor

from psfast.objectives.batched import layers
from psfast.objectives.batched.dense import weight_like
from psfast.objectives.batched.program import kept
from psfast.objectives.batched.sparse import LIGHT, is_base, light, many, register_in, take
from psfast.objectives.batched.trace import Node
from psfast.objectives.batched.values import Batch, Column, OneHot, columns

aten = torch.ops.aten
HEAVY: dict = {}
heavy = register_in(HEAVY)


# --- first uses of a parameter ------------------------------------------------------------------


def _changed(node: Node, dim: int, at: Tensor, delta: Tensor, slope: Tensor | None):
    """The node's value plus delta * slope in column ``at``."""
    value = node.value[0] if many(node.value) else node.value
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
    if isinstance(weight, OneHot) and is_base(x):
        return _matrix(node, x, weight)
    return NotImplemented


@light(aten.addmm.default)
def _addmm(node: Node, bias, x, weight, *, beta=1, alpha=1):
    if beta != 1 or alpha != 1:
        return NotImplemented
    if isinstance(weight, OneHot) and is_base(x, bias):
        return _matrix(node, x, weight)
    if isinstance(bias, OneHot) and is_base(x, weight) and bias.base.shape == node.value.shape[1:]:
        return _changed(node, -1, *bias.reach(), None)
    return NotImplemented


@light(aten.embedding.default)
def _embedding(node: Node, weight, indices, *_):
    if not isinstance(weight, OneHot) or not is_base(indices):
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
def _embedding_bag(node: Node, weight, indices, offsets, by_frequency=False, mode=0, *rest):
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
    if not is_base(x) or len(shape) != 1:
        return NotImplemented
    if isinstance(weight, OneHot) and is_base(bias):
        at, delta = weight.reach()
        normal = kept(node.memo, "normal", lambda: node.op(x, shape, None, None, eps)[0])
        slope = columns(normal, -1, at)
        return (_changed(node, -1, at, delta, slope), None, None)
    if isinstance(bias, OneHot) and is_base(weight):
        return (_changed(node, -1, *bias.reach(), None), None, None)
    return NotImplemented


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
    if not is_base(*(x for x in (q, k, v) if x not in heads), *args, *kwargs.values()):
        return NotImplemented
    values = [x.base if isinstance(x, Column) else x for x in (q, k, v)]
    if len({x.shape[-3] for x in values}) > 1:  # grouped queries: a head of k is of several of q
        return NotImplemented
    taken = [take(x, heads[0]) for x in (q, k, v)]
    out = layers.attention(node, len(heads[0].at), *taken, *args, **kwargs)
    if out is NotImplemented:
        return NotImplemented
    return (Column(node.value[0], -3, heads[0].at, out[0]), *[None] * 8)


# --- images ----------------------------------------------------------------------------------


@light(aten.convolution.default)
def _convolution(node: Node, x, weight, bias, stride, padding, dilation, transposed, _, groups):
    spatial = node.value.ndim - 2
    if not is_base(x) or x.ndim != node.value.ndim or spatial > 2:
        return NotImplemented
    if isinstance(bias, OneHot) and is_base(weight):
        return _changed(node, -spatial - 1, *bias.reach(), None)
    if not isinstance(weight, OneHot) or not is_base(bias) or transposed:
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
    out = layers.pool(node, len(x.at), Batch(x.new), *args)
    if many(out):
        return (Column(node.value[0], -3, x.at, out[0]), None)
    return Column(node.value, -3, x.at, out)


@light(aten.native_batch_norm.default)
def _batch_norm(node: Node, x, weight, bias, mean, var, training, momentum, eps):
    value = node.value[0]
    channel = 1 - value.ndim
    if isinstance(x, Column) and x.dim == channel and is_base(weight, bias):
        taken = [None if v is None else v[x.at].unsqueeze(1) for v in (weight, bias, mean, var)]
        out = layers.batch_norm(x.new, *taken, training, eps)
        return (Column(value, channel, x.at, out), None, None)
    if not is_base(x):
        return NotImplemented
    if isinstance(weight, OneHot) and is_base(bias):
        at, delta = weight.reach()
        normal = kept(
            node.memo,
            "normal",
            lambda: layers.batch_norm(x[None], None, None, mean, var, training, eps)[0],
        )
        slope = columns(normal, channel, at)
        return (_changed(node, channel, at, delta, slope), None, None)
    if isinstance(bias, OneHot) and is_base(weight):
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
        out = layers.product(x.tensor, base_weight, with_bias)
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
    if isinstance(weight, (Batch, Column)) or not weight_like(node, 1):
        return NotImplemented
    return _product(node, x, weight, K)


@heavy(aten.addmm.default)
def _addmm_out(node: Node, K: int, bias, x, weight, *, beta=1, alpha=1):
    if isinstance(weight, (Batch, Column)) or not weight_like(node, 2):
        return NotImplemented
    base_bias = bias.base if isinstance(bias, OneHot) else bias
    if beta != 1 or alpha != 1 or not is_base(base_bias):
        return NotImplemented
    if base_bias.shape != node.value.shape[1:]:  # one number for all, or another for each row
        return NotImplemented
    out = _product(node, x, weight, K, base_bias)
    if out is not NotImplemented and isinstance(bias, OneHot):
        at, delta = bias.reach()
        j = at.view(-1, 1, 1).expand(-1, out.shape[1], 1)
        out.scatter_add_(2, j, delta.view(-1, 1, 1).expand_as(j))
    return out
