"""Operations that other code than torch's own does much faster on CPU.

What runs depends on dtypes and shapes alone, never on time: the bits of a run must not change
from one day to the next. Where two ways share one operation, by size, they give the same bits.
"""

import platform
from functools import cache, lru_cache

import torch
from torch import Tensor

_LEAST_WIDTH = 16  # of a product's result: narrower ones gain little
_LEAST_WORK = 1 << 20  # multiplications of one product from which oneDNN is worth its longer call
_LEAST_BLOCK = 1 << 22  # the same of a block of them, which may be of any size
_MOST_CLASSES = 15  # with more, torch's log_softmax works in vectors
_ROWS_AT_A_TIME = 64  # a multiple of what log_softmax takes at a time, on every thread


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, points: int = 1) -> Tensor:
    """x @ weight + bias. x: (rows, in), weight: (in, out), bias: (out,) -> (rows, out)

    points: how many trial points the rows are of, as many each

    torch computes float32 products with MKL, which leaves half of the machine unused where it
    does not know the processor (measured: 105 of 256 GFLOP/s a core on an AMD Zen 5; oneDNN
    200 to 250, at 10 to 20 us more a call). Where the two differ in bits, the work of one trial
    point decides, and all of its blocks go the same way.
    """
    is_eligible = x.dtype == torch.float32 and x.device.type == "cpu" and weight.dim() == 2
    if (
        is_eligible
        and weight.shape[1] >= _LEAST_WIDTH
        and (bias is None or bias.shape == weight.shape[1:])
    ):
        work = len(x) * weight.numel()
        if _products_agree(*weight.shape):
            is_worth_it = work > _LEAST_BLOCK
        else:
            is_worth_it = work // points > _LEAST_WORK and _has_onednn()
        if is_worth_it:
            return _onednn(x, weight, bias)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight.t(), bias, "none", [], None)


@lru_cache
def _has_onednn() -> bool:
    """Whether this torch has the operator that its own compiler uses for such products."""
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@cache
def _products_agree(width: int, out: int) -> bool:
    """Whether oneDNN is there and has MKL's bits.

    Both add in the same order up to some width, and MKL in blocks beyond.
    """
    if not _has_onednn():
        return False
    x, weight, bias = _random((64, width), (width, out), (out,))
    return torch.equal(torch.addmm(bias, x, weight), _onednn(x, weight, bias)) and torch.equal(
        x @ weight, _onednn(x, weight, None)
    )


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """torch's, over few classes by way of the transposed rows, where it works in vectors."""
    classes = x.shape[-1]
    if (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and dim % x.ndim == x.ndim - 1
        and 1 < classes <= _MOST_CLASSES
        and x.numel() // classes % _ROWS_AT_A_TIME == 0
        and _log_softmax_agrees(classes)
    ):
        return _transposed_log_softmax(x.reshape(-1, classes)).view(x.shape)
    return torch.ops.aten._log_softmax.default(x, dim, half_to_float)


def _transposed_log_softmax(rows: Tensor) -> Tensor:
    return torch.log_softmax(rows.t().contiguous(), 0).t().contiguous()


@cache
def _log_softmax_agrees(classes: int) -> bool:
    (rows,) = _random((4 * _ROWS_AT_A_TIME, classes))
    return torch.equal(torch.log_softmax(rows, 1), _transposed_log_softmax(rows))


def tanh(x: Tensor) -> Tensor:
    """torch's, on CPU to three units in the last place in half the time."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return torch.tanh(x)
    e = (x * 2).clamp_(-40, 40).expm1_()
    return e.div_(e + 2)


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]
