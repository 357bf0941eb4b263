"""Batching rules: one op on K stacked values, over shared weights.

``run(node, args, kwargs, K)`` evaluates a node whose changed arguments are ``Batch``es and
returns what the op returns, each tensor with K in front. A rule exists where one call of the
op itself does it; ``torch.vmap`` of the op does the rest.

What the rules take care of: a trial point's bits depend neither on K nor on its place.
"""

import math

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from psfast.objectives.batched import arithmetic
from psfast.objectives.batched.interrupts import Uninterrupted
from psfast.objectives.batched.trace import Node
from psfast.objectives.batched.values import Batch

aten = torch.ops.aten
RULES: dict = {}


def rule(*ops):
    def register(function):
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def run(node: Node, args: list, kwargs: dict, K: int):
    """args, kwargs: the op's, with ``Batch`` for what is stacked and tensors for what is not."""
    function = RULES.get(node.op)
    if function is None and torch.Tag.pointwise in getattr(node.op, "tags", ()):
        function = pointwise
    if function is not None:
        out = function(node, K, *args, **kwargs)
        if out is not NotImplemented:
            return out
    return _vmap(node, args, kwargs)


def plain(node: Node):
    """The function that does for one value what the rule does for one stacked; None if none does.

    For weights that are the same for all, as they are at the incumbent.
    """
    op = node.op
    if op in _RESHAPES:
        return torch.reshape
    if op in _PLAIN:
        return op
    if op in _OWN:
        return _OWN[op]
    if op is aten.mm.default:
        return arithmetic.linear if weight_like(node, 1) and not weight_like(node, 0) else None
    if op is aten.addmm.default:
        is_linear = weight_like(node, 2) and weight_like(node, 0) and not weight_like(node, 1)
        return _linear_with_bias if is_linear and not node.kwargs else None
    if torch.Tag.pointwise not in getattr(op, "tags", ()) or op in RULES:
        return None
    if op in PADDED:
        return None
    return op if op not in STEADY or _has_no_tail(node.value) else None


def _linear_with_bias(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return arithmetic.linear(x, weight, bias)


_OWN = {aten._log_softmax.default: arithmetic.log_softmax, aten.tanh.default: arithmetic.tanh}
_PLAIN = {
    aten.transpose.int, aten.t.default, aten.permute.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.expand.default, aten.clone.default, aten.detach.default,
    aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.unbind.int, aten.cat.default, aten.stack.default,
    aten.embedding.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten.native_layer_norm.default, aten._softmax.default,
}  # fmt: skip


def weight_like(node: Node, place: int) -> bool:
    """Whether this argument is a weight: then even as the base it has no batch dimension."""
    return place in node.shapes["weights"]


IN_PLACE = {
    aten.relu.default: torch.relu_,
    aten.neg.default: torch.neg_,
    aten.exp.default: torch.exp_,
    aten.add.Tensor: Tensor.add_,
    aten.mul.Tensor: Tensor.mul_,
    aten.sub.Tensor: Tensor.sub_,
    aten.div.Tensor: Tensor.div_,
}
_EITHER_FIRST = {aten.add.Tensor, aten.mul.Tensor}


def overwrite(node: Node, args: list, spare: int) -> Tensor | None:
    """The result written over the stacked argument at ``spare``; None where that cannot be."""
    function = IN_PLACE.get(node.op)
    if function is None or node.kwargs or len(args) > 2 or (spare and node.op not in _EITHER_FIRST):
        return None
    target = args[spare]
    if not isinstance(target, Batch) or target.tensor.shape[1:] != node.value.shape:
        return None
    if not target.tensor.is_contiguous() or target.tensor.dtype != node.value.dtype:
        return None
    others = [align(a, node.value.ndim) for place, a in enumerate(args) if place != spare]
    return function(target.tensor, *others)


def _vmap(node: Node, args: list, kwargs: dict):
    leaves, spec = pytree.tree_flatten((args, kwargs))
    stacked = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Batch)]

    def one(*tensors):
        values = list(leaves)
        for i, tensor in zip(stacked, tensors, strict=True):
            values[i] = tensor
        inner_args, inner_kwargs = pytree.tree_unflatten(values, spec)
        return node.op(*inner_args, **inner_kwargs)

    with Uninterrupted():
        return torch.vmap(one)(*(leaves[i].tensor for i in stacked))


def stack(x, K: int) -> Tensor:
    """``x`` as K stacked values, without a copy."""
    return x.tensor if isinstance(x, Batch) else x.expand(K, *x.shape)


def of_point(k: int, *args) -> list:
    """The arguments as trial point k has them."""
    return [a.tensor[k] if isinstance(a, Batch) else a for a in args]


@rule(aten._weight_norm_interface.default, aten._embedding_bag_forward_only.default)
def one_by_one(node: Node, K: int, *args):
    """K calls: for ops that cannot be stacked, and where each trial point has a weight of its
    own: then they alone have the incumbent's bits, which come from one call for all K."""
    outs = [node.op(*of_point(k, *args)) for k in range(K)]
    if isinstance(outs[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*outs, strict=True))
    return torch.stack(outs)


# --- one value after another --------------------------------------------------------------


def align(x, ndim: int):
    """A stacked value with the dimensions of length one that broadcasting to ``ndim`` adds."""
    if not isinstance(x, Batch):
        return x
    t = x.tensor
    missing = ndim - (t.ndim - 1)
    return t.view(t.shape[0], *[1] * missing, *t.shape[1:]) if missing else t


def pointwise(node: Node, K: int, *args, **kwargs):
    ndim = node.value.ndim
    if any(isinstance(a, (list, tuple)) for a in args):
        return NotImplemented
    kwargs = {name: align(a, ndim) for name, a in kwargs.items()}
    args = [align(a, ndim) for a in args]
    if node.op in PADDED:
        return _in_whole_vectors(node.op, *args, **kwargs)
    if node.op not in STEADY:
        return node.op(*args, **kwargs)
    if _has_no_tail(node.value):
        return _in_vectors(node.op, *args, **kwargs)
    return STEADY[node.op](*args, **kwargs)


def _in_vectors(op, x: Tensor, *args, **kwargs) -> Tensor:
    """``op`` of x, of which no element may be one of the last few (columns alone can be)."""
    if x.device.type != "cpu" or x.shape[-1] % _VECTORS == 0:
        return op(x, *args, **kwargs)
    missing = -x.numel() % (_VECTORS * torch.get_num_threads())
    padded = torch.nn.functional.pad(x.reshape(-1), (0, missing))
    return op(padded, *args, **kwargs)[: x.numel()].view(x.shape)


def _in_whole_vectors(op, *args, **kwargs) -> Tensor:
    """``op`` of values filled up, so that none of them is among the last few."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if tensors[0].device.type != "cpu":
        return op(*args, **kwargs)
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    missing = -math.prod(shape) % (_VECTORS * torch.get_num_threads())

    def filled(a):
        if not isinstance(a, Tensor) or not a.ndim:  # a number's dtype gives way to a tensor's
            return a
        return torch.nn.functional.pad(a.expand(shape).reshape(-1), (0, missing), value=1.0)

    return op(*map(filled, args), **kwargs)[: math.prod(shape)].view(shape)


@rule(aten.tanh.default)
def _tanh(node, K, x):
    return arithmetic.tanh(x.tensor)


@rule(aten._prelu_kernel.default)
def _prelu(node, K, x, weight):
    x, weight = align(x, node.value.ndim), align(weight, node.value.ndim)
    return torch.where(x > 0, x, x * weight)


def _sigmoid(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1).reciprocal_()


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        inner = (x * x * x).mul_(0.044715).add_(x).mul_(0.7978845608028654)
        return inner.tanh_().add_(1).mul_(x).mul_(0.5)
    return (x * 0.7071067811865476).erf_().add_(1).mul_(x).mul_(0.5)


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    return torch.where(x * beta > threshold, x, (x * beta).exp_().log1p_().div_(beta))


def _elu(x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    negative = (x * input_scale).expm1_().mul_(alpha * scale)
    return torch.where(x > 0, x * scale, negative)


def _has_no_tail(value: Tensor) -> bool:
    """Whether stacked values divide evenly into vectors, on every thread."""
    if value.device.type != "cpu":
        return True
    threads = torch.get_num_threads()
    return value.ndim > 0 and value.shape[-1] % _VECTORS == 0 and not threads & (threads - 1)


_VECTORS = 32  # elements; a multiple of what any CPU kernel takes at a time

# On CPU these kernels compute the last few elements by other code than the rest, so the same
# number gives other bits in another place (measured: torch 2.13, AVX-512). Composed of ops that
# do not, they are steady. (exp, erf, log1p, expm1 and the arithmetic are.)
STEADY = {
    aten.sigmoid.default: _sigmoid,
    aten.silu.default: lambda x: _sigmoid(x).mul_(x),
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
    aten.elu.default: _elu,
    aten.mish.default: lambda x: _softplus(x).tanh_().mul_(x),
}
# The same of ops that are rarer, and simply filled up with other elements.
PADDED = {
    aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.exp2.default,
    aten.sinh.default, aten.cosh.default, aten.atanh.default, aten.atan2.default,
    aten.hypot.default, aten.logaddexp.default, aten.logaddexp2.default, aten.celu.default,
    aten.logit.default, aten.igamma.default, aten.igammac.default, aten.ldexp.Tensor,
}  # fmt: skip


# --- views ----------------------------------------------------------------------------------

_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


def shift(dim: int) -> int:
    """A dimension of the value as one of the stacked values."""
    return dim + 1 if dim >= 0 else dim


@rule(
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.view_copy.default,
    aten._reshape_copy.default,
)  # fmt: skip
def _view(node, K, x, size):
    return x.tensor.reshape(x.tensor.shape[0], *size)


@rule(aten.transpose.int)
def _transpose(node, K, x, a, b):
    return x.tensor.transpose(shift(a), shift(b))


@rule(aten.t.default)
def _t(node, K, x):
    return x.tensor.transpose(1, 2) if x.tensor.ndim == 3 else x.tensor


@rule(aten.permute.default)
def _permute(node, K, x, dims):
    ndim = x.tensor.ndim - 1
    return x.tensor.permute(0, *(d % ndim + 1 for d in dims))


@rule(aten.unsqueeze.default)
def _unsqueeze(node, K, x, dim):
    return x.tensor.unsqueeze(shift(dim))


@rule(aten.squeeze.dim)
def _squeeze(node, K, x, dim):
    return x.tensor.squeeze(shift(dim)) if x.tensor.ndim > 1 else x.tensor


@rule(aten.expand.default)
def _expand(node, K, x, size, *, implicit=False):
    t = align(x, len(size))
    return t.expand(t.shape[0], *size)


@rule(aten.clone.default, aten.detach.default, aten.alias.default, aten.contiguous.default)
def _same(node, K, x, **_):
    return x.tensor


@rule(aten.slice.Tensor)
def _slice(node, K, x, dim=0, start=None, end=None, step=1):
    return aten.slice.Tensor(x.tensor, shift(dim), start, end, step)


@rule(aten.select.int)
def _select(node, K, x, dim, index):
    return x.tensor.select(shift(dim), index)


@rule(aten.index_select.default)
def _index_select(node, K, x, dim, index):
    if isinstance(index, Batch):
        return NotImplemented
    return x.tensor.index_select(shift(dim), index)


@rule(
    aten.split.Tensor, aten.unsafe_split.Tensor, aten.split_with_sizes.default,
    aten.unsafe_split_with_sizes.default, aten.unbind.int,
)  # fmt: skip
def _parts(node, K, x, *args):
    *sizes, dim = args if ends_with_dim(node, args) else (*args, 0)
    return tuple(node.op(x.tensor, *sizes, shift(dim)))


def ends_with_dim(node: Node, args: tuple) -> bool:
    return len(args) == (1 if node.op is aten.unbind.int else 2)


@rule(aten.copy.default)
def _copy(node, K, x, source, non_blocking=False):
    like = stack(x, K)
    return align(source, like.ndim - 1).to(like.dtype).expand(like.shape).clone()


@rule(aten.cat.default)
def _cat(node, K, tensors, dim=0):
    return torch.cat([stack(t, K) for t in tensors], shift(dim))


@rule(aten.stack.default)
def _stack(node, K, tensors, dim=0):
    return torch.stack([stack(t, K) for t in tensors], shift(dim))
