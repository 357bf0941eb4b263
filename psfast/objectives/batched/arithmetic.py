"""Operations that other code than torch's own does much faster on CPU.

What runs depends on dtypes and shapes alone, never on time: the bits of a run must not change
from one day to the next. Where two ways share one operation, by size, they give the same bits.
"""

import itertools
import platform
from collections.abc import Callable
from functools import cache, lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_WIDTH = 16  # of a product's result: narrower ones gain little
_LEAST_WORK = 1 << 20  # multiplications of one product from which oneDNN is worth its longer call
_LEAST_BLOCK = 1 << 22  # the same of a block of them, which may be of any size
_ROWS = (1, 4, 16, 64, 256)  # multiples to fill a product up to
_COLUMNS = (1, 2, 16)  # a single one would be a matrix times a vector, which is other code
_TERMS = (1, 16)  # then every row begins at a multiple of 64 bytes
_ROWS_PROBED = 512  # of a product that smaller ones are compared with
_MULTIPLES_PROBED = (*range(1, 17), 23, 31, 61, 125)  # as many as there is room for
_COMPARED = 4096  # elements of the products of each size, of at most so many products
_MOST_SAMPLES = 64
_MOST_CLASSES = 15  # with more, torch's log_softmax works in vectors
_ROWS_AT_A_TIME = 64  # a multiple of what log_softmax takes at a time, on every thread


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, points: int = 1) -> Tensor:
    """x @ weight + bias. x: (rows, in), weight: (in, out), bias: (out,) -> (rows, out)

    points: how many trial points the rows are of, as many each
    bias: or any that can be added to the result

    On CPU a row of the result has the same bits in every product, however many rows it has and
    wherever it stands. MKL has other code for few rows, for those left over (measured: of 16 on
    an Intel Xeon, of 4 on an AMD Zen 4) and, on the latter, for rows that begin at an odd
    address, so products are filled up with zeros as far as it takes.

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
    kind = weight.shape, weight.stride(), x.dtype, bias is not None, torch.get_num_threads()
    if x.dtype == torch.float32 and weight.shape[1] >= _LEAST_WIDTH and _has_onednn():
        work = len(x) * weight.numel()
        agrees = _onednn_agrees(*kind)
        if work > _LEAST_BLOCK if agrees else work // points > _LEAST_WORK:
            return _onednn(x, weight, bias)
    return _steady_product(x, weight, bias, kind)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _steady_product(x: Tensor, weight: Tensor, bias: Tensor | None, kind: tuple) -> Tensor:
    """The product by MKL, in which a row's bits do not depend on the other rows."""
    multiples = _steady_multiples(*kind)
    if multiples is None:  # row by row
        found = torch.bmm(x[:, None], weight.expand(len(x), *weight.shape)).squeeze(1)
        return found if bias is None else found + bias
    return _product_in_multiples(x, weight, bias, *multiples)


def _product_in_multiples(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int, inner: int
) -> Tensor:
    """The product, with rows, columns and terms of zeros up to multiples of these numbers."""
    width, out = weight.shape
    terms, more = -width % inner, -out % columns
    if terms:
        x = F.pad(x, (0, terms))
    if terms or more:
        weight = F.pad(weight, (0, more, 0, terms))
        bias = None if bias is None else F.pad(bias, (0, more))
    over = len(x) % rows
    if not over:
        found = _product(x, weight, bias)
    else:
        whole = len(x) - over
        found = _product(F.pad(x[whole:], (0, 0, 0, rows - over)), weight, bias)[:over]
        if whole:
            found = torch.cat([_product(x[:whole], weight, bias), found])
    return found[:, :out].contiguous() if more else found


@cache
def _steady_multiples(*kind) -> tuple[int, int, int] | None:
    """The least multiples of rows, columns and terms in which a product with such a weight
    computes each row by the same bits; None if there are none."""
    x, weight, bias = _operands(*kind)
    for inner, columns, rows in itertools.product(_TERMS, _COLUMNS, _ROWS):
        multiples = {"rows": rows, "columns": columns, "inner": inner}
        product = partial(_product_in_multiples, weight=weight, bias=bias, **multiples)
        if _is_steady(product, x, rows):
            return rows, columns, inner
    return None


def _is_steady(product: Callable[[Tensor], Tensor], x: Tensor, multiple: int) -> bool:
    """Whether rows have the same bits in products of other numbers of rows, at other places, and
    in a memory of their own."""
    expected = product(x)
    for rows in (multiple * count for count in _MULTIPLES_PROBED):
        if rows >= len(x):
            break
        samples = min(_MOST_SAMPLES, -(-_COMPARED // expected[:rows].numel()))
        step = (len(x) - rows) // samples | 1  # odd, so that all places in a multiple come up
        for i in range(1, len(x) - rows + 1, step):
            part, same = x[i : i + rows], expected[i : i + rows]
            if not (torch.equal(product(part), same) and torch.equal(product(part.clone()), same)):
                return False
    return True


def _operands(
    shape: tuple, stride: tuple, dtype: torch.dtype, with_bias: bool, threads: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random ones of a product with such a weight."""
    width, out = shape
    memory = 1 + (width - 1) * stride[0] + (out - 1) * stride[1]
    x, weight, bias = _random((_ROWS_PROBED, width), (memory,), (out,), dtype=dtype)
    return x, weight.as_strided(shape, stride), bias if with_bias else None


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
def _onednn_agrees(*kind) -> bool:
    """Whether oneDNN's bits are MKL's.

    Both add in the same order up to some width, and MKL in blocks beyond.
    """
    operands = _operands(*kind)
    return torch.equal(_steady_product(*operands, kind), _onednn(*operands))


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
