"""Batching rules of whole layers: products, attention, images, normalisation, the loss."""

import torch
from torch import Tensor

from psfast.objectives.batched import arithmetic
from psfast.objectives.batched.dense import (
    RULES,
    align,
    of_point,
    one_by_one,
    rule,
    shift,
    stack,
    weight_like,
)
from psfast.objectives.batched.program import kept
from psfast.objectives.batched.values import Batch

aten = torch.ops.aten


# --- products -------------------------------------------------------------------------------


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (K, rows, in), weight: (in, out), bias: (out,) -> (K, rows, out), one product."""
    K, rows, _ = x.shape
    flat = x.reshape(K * rows, -1)
    return arithmetic.linear(flat, weight, bias, K).view(K, rows, -1)


def products(K: int, x, weight, bias=None) -> Tensor:
    """The same where the weights are the trial points' own: one product each."""
    return torch.stack([arithmetic.linear(*of_point(k, x, weight, bias)) for k in range(K)])


@rule(aten.mm.default)
def _mm(node, K, x, weight):
    if isinstance(x, Batch) and not isinstance(weight, Batch) and weight_like(node, 1):
        return product(x.tensor, weight)
    if weight_like(node, 1):
        return products(K, x, weight)
    return torch.bmm(stack(x, K), stack(weight, K))


@rule(aten.addmm.default)
def _addmm(node, K, bias, x, weight, *, beta=1, alpha=1):
    if beta != 1 or alpha != 1:
        return NotImplemented
    if isinstance(x, Batch) and not isinstance(weight, Batch) and weight_like(node, 2):
        if not isinstance(bias, Batch) and bias.ndim == 1:
            return product(x.tensor, weight, bias)
        return product(x.tensor, weight) + align(bias, 2)
    if weight_like(node, 2):
        return products(K, x, weight, bias)
    return torch.bmm(stack(x, K), stack(weight, K)) + align(bias, 2)


@rule(aten.mv.default, aten.dot.default, aten.vdot.default)
def _of_weights(node, K, *args):
    """The norm of a weight, say: alone it is a product of other shapes than of K of them."""
    return one_by_one(node, K, *args) if node.weight else NotImplemented


@rule(aten.bmm.default)
def _bmm(node, K, a, b):
    a, b = stack(a, K), stack(b, K)
    out = torch.bmm(a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:]))
    return out.view(K, -1, *out.shape[1:])


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
def attention(node, K, q, k, v, *args, **kwargs):
    if any(isinstance(a, (Batch, Tensor)) for a in (*args, *kwargs.values())):
        return NotImplemented
    # not as a view: (K, B) merge for any layout of the heads that follow
    q, k, v = (stack(x, K).flatten(0, 1) for x in (q, k, v))
    out = node.op(q, k, v, *args, **kwargs)[0]
    return (out.unflatten(0, (K, -1)), *[None] * 8)


# --- what is first in N: images -----------------------------------------------------------------


def images(x: Tensor) -> Tensor:
    """(K, N, ...) -> (K N, ...)"""
    return x.reshape(-1, *x.shape[2:])


@rule(aten.convolution.default)
def _convolution(node, K, x, weight, bias, *args):
    if isinstance(weight, Batch) or isinstance(bias, Batch):
        return one_by_one(node, K, x, weight, bias, *args)
    if x.tensor.ndim != weight.ndim + 1:
        return NotImplemented
    out = node.op(images(x.tensor), weight, bias, *args)
    return out.view(K, -1, *out.shape[1:])


@rule(
    aten.max_pool2d_with_indices.default, aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
)  # fmt: skip
def pool(node, K, x, *args):
    if x.tensor.ndim != 5:
        return NotImplemented
    out = node.op(images(x.tensor), *args)
    if isinstance(out, tuple):
        return (out[0].view(K, -1, *out[0].shape[1:]), None)
    return out.view(K, -1, *out.shape[1:])


# --- normalisation ------------------------------------------------------------------------------


@rule(aten.native_layer_norm.default)
def _layer_norm(node, K, x, shape, weight, bias, eps):
    if isinstance(weight, Batch) or isinstance(bias, Batch):
        out = node.op(stack(x, K), shape, None, None, eps)[0]
        ndim = out.ndim - 1
        out = out * align(weight, ndim) if weight is not None else out
        out = out + align(bias, ndim) if bias is not None else out
        return (out, None, None)
    return (node.op(x.tensor, shape, weight, bias, eps)[0], None, None)


@rule(aten.native_batch_norm.default)
def _batch_norm(node, K, x, weight, bias, mean, var, training, momentum, eps):
    weight, bias, mean, var = (
        v.tensor if isinstance(v, Batch) else None if v is None else v.unsqueeze(0)
        for v in (weight, bias, mean, var)
    )
    return (batch_norm(stack(x, K), weight, bias, mean, var, training, eps), None, None)


def batch_norm(x: Tensor, weight, bias, mean, var, training: bool, eps: float) -> Tensor:
    """x: (K, N, C, ...); the others (K or 1, C) or None -> as x

    One channel of one trial point is one row of the sums: its bits depend on no other row.
    """
    shape = [-1, 1, x.shape[2], *[1] * (x.ndim - 3)]
    if training or mean is None:
        rows = x.transpose(1, 2).flatten(2).contiguous()
        mean = rows.mean(2)
        rows = rows - mean.unsqueeze(2)
        var = rows.mul_(rows).mean(2)
    scale = (var + eps).rsqrt_()
    scale = scale if weight is None else scale * weight
    out = (x - mean.view(shape)).mul_(scale.view(shape))
    return out if bias is None else out.add_(bias.view(shape))


@rule(aten.native_group_norm.default)
def _group_norm(node, K, x, weight, bias, N, C, *rest):
    x = stack(x, K)
    out = node.op(x.flatten(0, 1).contiguous(), None, None, K * N, C, *rest)[0].view(x.shape)
    shape = [-1, 1, C, *[1] * (x.ndim - 3)]
    for value, apply in ((weight, out.mul_), (bias, out.add_)):
        if value is not None:
            apply((value.tensor if isinstance(value, Batch) else value).reshape(shape))
    return (out, None, None)


for name in ("_native_batch_norm_legit_functional", "_batch_norm_with_update_functional"):
    if hasattr(aten, name):
        op = getattr(aten, name).default

        def _functional(node, K, x, weight, bias, mean, var, *rest, op=op):
            training, momentum, eps = rest if len(rest) == 3 else (True, *rest)
            out = _batch_norm(node, K, x, weight, bias, mean, var, training, momentum, eps)
            return (*out, None, None)

        RULES[op] = _functional


# --- the loss -----------------------------------------------------------------------------------


@rule(aten._softmax.default)
def _softmax(node, K, x, dim, half_to_float):
    return node.op(x.tensor, shift(dim), half_to_float)


@rule(aten._log_softmax.default)
def _log_softmax(node, K, x, dim, half_to_float):
    return arithmetic.log_softmax(x.tensor, shift(dim), half_to_float)


@rule(aten.nll_loss_forward.default)
def _nll_loss(node, K, x, target, weight, reduction, ignore_index):
    if isinstance(target, Batch) or isinstance(weight, Batch) or reduction == 0:
        return NotImplemented
    if not isinstance(x, Batch) or x.tensor.ndim != 3:
        return NotImplemented
    if not {1, *([] if weight is None else [2])} <= node.shapes["fixed"]:
        return NotImplemented

    dtype, classes = x.tensor.dtype, x.tensor.shape[2]

    def read_targets():
        counted = (target != ignore_index).nonzero().squeeze(1)
        own = target[counted]
        # of the shape that own has in the batch at hand: a number would be recorded for all
        weights = torch.ones_like(own, dtype=dtype) if weight is None else weight[own]
        # the number itself comes from the tensor, so that it follows another batch
        return counted * classes + own, weights, weights.sum()

    places, weights, total = kept(node.batch_memo, "targets", read_targets)
    picked = x.tensor.flatten(1).index_select(1, places)
    if weight is not None:
        picked = picked * weights
    # A GPU cuts a sum by how many there are, K of them here: in float64 that shows no more.
    exact = picked.dtype if picked.device.type == "cpu" else torch.float64
    loss = picked.neg_().sum(1, dtype=exact).to(dtype)
    return (loss.div_(total) if reduction == 1 else loss, None)
