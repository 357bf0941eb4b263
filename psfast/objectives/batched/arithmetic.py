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
_MOST_PROBED = 512  # rows of a product that all smaller ones are compared with
_COMPARED = 4096  # elements of the products of each size
_MOST_CLASSES = 15  # with more, torch's log_softmax works in vectors
_ROWS_AT_A_TIME = 64  # a multiple of what log_softmax takes at a time, on every thread


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, points: int = 1) -> Tensor:
    """x @ weight + bias. x: (rows, in), weight: (in, out), bias: (out,) -> (rows, out)

    points: how many trial points the rows are of, as many each
    bias: or any that can be added to the result

    On CPU a row of the result has the same bits in every product, however many rows it has: MKL
    sums up to fifteen rows otherwise than more of them (measured: on an Intel Xeon; on AMD
    Zen 4 and 5 a single one), so as many rows as it takes are filled up.

    torch computes float32 products with MKL, which leaves half of the machine unused where it
    does not know the processor (measured: 105 of 256 GFLOP/s a core on an AMD Zen 5; oneDNN
    200 to 250, at 10 to 20 us more a call). Where the two differ in bits, the work of one trial
    point decides, and all of its blocks go the same way.
    """
    if x.device.type != "cpu" or not x.is_floating_point() or not weight.numel():
        return _product(x, weight, bias)
    if bias is not None and bias.shape != weight.shape[1:]:
        if bias.dim() != 1:
            return linear(x, weight, None, points) + bias
        bias = bias.expand(weight.shape[1]).contiguous()
    if x.dtype == torch.float32 and weight.shape[1] >= _LEAST_WIDTH:
        work = len(x) * weight.numel()
        if _products_agree(*weight.shape, torch.get_num_threads()):
            is_worth_it = work > _LEAST_BLOCK
        else:
            is_worth_it = work // points > _LEAST_WORK and _has_onednn()
        if is_worth_it:
            return _onednn(x, weight, bias)
    return _in_enough_rows(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _in_enough_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product by MKL, with as many rows as its bits do not depend on the number from."""
    rows, out = len(x), weight.shape[1]
    if out == 1:  # a matrix and a vector: its sums depend on the row's place
        weight = weight.expand(-1, 2).contiguous()
        bias = None if bias is None else bias.expand(2)
    kind = weight.shape, weight.stride(), x.dtype, bias is not None
    least = _least_rows(*kind, torch.get_num_threads())
    if rows < least:
        x = torch.nn.functional.pad(x, (0, 0, 0, least - rows))
    found = _product(x, weight, bias)
    found = found[:rows] if rows < least else found
    return found[:, :1].contiguous() if out == 1 else found


@cache
def _least_rows(
    shape: tuple, stride: tuple, dtype: torch.dtype, with_bias: bool, threads: int
) -> int:
    """From how many rows on a product with such a weight has a row's bits; a power of two."""
    width, out = shape
    memory = 1 + (width - 1) * stride[0] + (out - 1) * stride[1]
    x, weight, bias = _random((_MOST_PROBED, width), (memory,), (out,), dtype=dtype)
    weight = weight.as_strided(shape, stride)
    bias = bias if with_bias else None
    expected = _product(x, weight, bias)

    def is_right(rows: int) -> bool:
        most = rows * max(1, _COMPARED // (rows * out))
        starts = range(0, min(most, _MOST_PROBED - rows + 1), rows)
        return all(
            torch.equal(_product(x[i : i + rows], weight, bias), expected[i : i + rows])
            for i in starts
        )

    least = _MOST_PROBED
    while least > 1:
        # each size where few rows are worth a program of their own, and a sample of the others
        sizes = range(least // 2, least, max(1, least // 32))
        if not all(is_right(rows) for rows in sizes):
            break
        least //= 2
    return least


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
def _products_agree(width: int, out: int, threads: int) -> bool:
    """Whether oneDNN is there and has MKL's bits.

    Both add in the same order up to some width, and MKL in blocks beyond.
    """
    if not _has_onednn():
        return False
    x, weight, bias = _random((_MOST_PROBED, width), (width, out), (out,))
    return all(torch.equal(_product(x, weight, b), _onednn(x, weight, b)) for b in (bias, None))


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


def _random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
