"""What a tile of M rows is computed with: products in the three precisions, LayerNorm, attention.

Activations for products come as (hi, lo) and weights as pointers (fp32, hi, lo), of which each
precision reads its own.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from psfast.kernels.points import weights_at


@triton.constexpr_function
def inverse(SCALE, MODE):
    """Of the factor that a product of this precision comes with."""
    return 1.0 / SCALE if MODE == "fp16x3" else 1.0


def by_kind(name: str) -> Callable:
    """For a kernel's ``repr``: what fills the cache and what repairs have names of their own, by
    which profilers tell them apart."""

    def full_name(specialization) -> str:
        flags = (flag for flag in ("CACHE", "REPAIR") if specialization.constants.get(flag))
        return "_".join([name, *map(str.lower, flags)])

    return full_name


@triton.jit
def is_finite(value):
    """A finite number minus itself is zero, an infinite one or NaN is not."""
    return value - value == 0


@triton.jit
def log1p(x):
    """log(1 + x), to a few units in the last place also where x is small (Kahan's quotient)."""
    sum_ = 1.0 + x
    rounded = sum_ - 1.0
    return tl.where(rounded == 0.0, x, tl.log(sum_) * (x / tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit
def split(a, MODE: tl.constexpr):
    """``a`` as fp16 (hi, lo), a = hi + lo to 22 bits; the other modes take ``a`` as it is.

    Beyond 65,504 hi is infinite and lo the opposite infinity, so whatever is computed from
    them is NaN and the caller sees the overflow.
    """
    if MODE == "fp16x3":
        hi = a.to(tl.float16)
        lo = (a - hi.to(tl.float32)).to(tl.float16)
        return hi, lo
    else:
        return a, a


@triton.jit
def dot(a, b, acc, MODE: tl.constexpr):
    """``acc + a @ b`` of two pairs (hi, lo), the small products first."""
    if MODE == "fp16x3":
        acc = tl.dot(a[1], b[0], acc)
        acc = tl.dot(a[0], b[1], acc)
        return tl.dot(a[0], b[0], acc)
    elif MODE == "tf32x3":
        return tl.dot(a[0], b[0], acc, input_precision="tf32x3")
    else:
        return tl.dot(a[0], b[0], acc, input_precision="ieee")


@triton.jit
def linear(
    a,
    weights,
    start,
    acc,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    MODE: tl.constexpr,
):
    """``acc + a @ w`` for w (IN, OUT), packed from ``start`` on; times SCALE in fp16x3.

    ``start`` goes into the column offsets, so that the (IN, OUT) offsets depend on the loop
    around: as loop invariants they would be hoisted and fill the registers.
    """
    at = (start + tl.arange(0, OUT))[None, :] + (tl.arange(0, IN) * STRIDE)[:, None]
    if MODE == "fp16x3":
        return dot(a, (tl.load(weights[1] + at), tl.load(weights[2] + at)), acc, MODE)
    else:
        w = tl.load(weights[0] + at)
        return dot(a, (w, w), acc, MODE)


@triton.jit
def linear_of_norm(
    n,
    staged_ptr,
    weights,
    start,
    acc,
    M: tl.constexpr,
    DP: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    KC: tl.constexpr,
    MODE: tl.constexpr,
):
    """``linear`` of the normalised rows (M, DP), from memory KC columns at a time if KC < DP."""
    if KC < DP:
        for c in range(0, DP, KC):
            at = (c + tl.arange(0, KC))[None, :] + (tl.arange(0, M) * DP)[:, None]
            hi = tl.load(staged_ptr + at)
            lo = tl.load(staged_ptr + M * DP + at) if MODE == "fp16x3" else hi
            acc = linear((hi, lo), weights, start + c * STRIDE, acc, KC, OUT, STRIDE, MODE)
        return acc
    else:
        return linear(n, weights, start, acc, DP, OUT, STRIDE, MODE)


@triton.jit
def own_rows(staged_ptr, M: tl.constexpr, DP: tl.constexpr, MODE: tl.constexpr):
    """Where this program of a grid of two dimensions stages its normalised rows."""
    HALVES: tl.constexpr = 2 if MODE == "fp16x3" else 1
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    return staged_ptr + program * (HALVES * M * DP)


@triton.jit
def stage(n, staged_ptr, M: tl.constexpr, DP: tl.constexpr, KC: tl.constexpr, MODE: tl.constexpr):
    """Put the normalised rows where ``linear_of_norm`` finds them, if it looks in memory."""
    if KC < DP:
        at = (tl.arange(0, M) * DP)[:, None] + tl.arange(0, DP)[None, :]
        tl.debug_barrier()
        tl.store(staged_ptr + at, n[0])
        if MODE == "fp16x3":
            tl.store(staged_ptr + M * DP + at, n[1])
        tl.debug_barrier()


@triton.jit
def layer_norm(x, weight, bias, eps, D: tl.constexpr, DP: tl.constexpr):
    """LayerNorm of the rows of x (M, DP), of which the first D columns count."""
    return normalise(x, eps, D, DP) * weight[None, :] + bias[None, :]


@triton.jit
def normalise(x, eps, D: tl.constexpr, DP: tl.constexpr):
    """LayerNorm without its weight and bias."""
    centred = x - (tl.sum(x, 1) / D)[:, None]
    if D < DP:
        centred = tl.where((tl.arange(0, DP) < D)[None, :], centred, 0.0)
    variance = tl.sum(centred * centred, 1) / D
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return centred * scale[:, None]


@triton.jit
def feed_forward(
    n,
    staged_ptr,
    weights,
    base,
    hidden_ptr,
    rows,
    is_row,
    R,
    factor,
    M: tl.constexpr,
    DP: tl.constexpr,
    AP: tl.constexpr,
    FP: tl.constexpr,
    FC: tl.constexpr,
    KC: tl.constexpr,
    SCALE: tl.constexpr,
    MODE: tl.constexpr,
    CACHE: tl.constexpr,
):
    """``factor`` times a block's feed-forward of rows of which n (M, DP) is the LayerNorm, FC
    hidden units at a time; with CACHE it stores these, ``rows`` of them, at ``hidden_ptr`` (FP, R).

    base: where the block's packed weights begin
    """
    INV: tl.constexpr = inverse(SCALE, MODE)
    W1: tl.constexpr = weights_at("ff1", DP, AP, FP)
    B1: tl.constexpr = weights_at("ff1_bias", DP, AP, FP)
    W2: tl.constexpr = weights_at("ff2", DP, AP, FP)
    B2: tl.constexpr = weights_at("ff2_bias", DP, AP, FP)
    acc = tl.zeros((M, DP), tl.float32)
    for f in range(0, FP, FC):
        hidden = tl.zeros((M, FC), tl.float32)
        hidden = linear_of_norm(
            n, staged_ptr, weights, base + W1 + f, hidden, M, DP, FC, FP, KC, MODE
        )
        columns = f + tl.arange(0, FC)
        hidden = hidden * INV + tl.load(weights[0] + base + B1 + columns)[None, :]
        if CACHE:
            at = columns[None, :] * R + rows[:, None]
            tl.store(hidden_ptr + at, hidden, mask=is_row[:, None])
        hidden = split(tl.maximum(hidden, 0.0, tl.PropagateNan.ALL), MODE)
        acc = linear(hidden, weights, base + W2 + f * DP, acc, FC, DP, DP, MODE)
    bias = tl.load(weights[0] + base + B2 + tl.arange(0, DP))
    return acc * (INV * factor) + (bias * factor)[None, :]


@triton.jit
def attend(
    q, k, v, scale, BATCH: tl.constexpr, TP: tl.constexpr, DK: tl.constexpr, MODE: tl.constexpr
):
    """Causal softmax attention of q, k, v (BATCH, TP, DK); scale = log2(e) / sqrt(d_k)."""
    q, k, v = split(q, MODE), split(tl.permute(k, (0, 2, 1)), MODE), split(v, MODE)
    scores = dot(q, k, tl.zeros((BATCH, TP, TP), tl.float32), MODE)
    t = tl.arange(0, TP)
    scores = tl.where((t[:, None] >= t[None, :])[None, :, :], scores, float("-inf"))
    p = tl.exp2((scores - tl.max(scores, 2)[:, :, None]) * scale)
    total = tl.sum(p, 2)
    mixed = dot(split(p, MODE), v, tl.zeros((BATCH, TP, DK), tl.float32), MODE)
    return mixed / total[:, :, None]


@triton.jit
def to_heads(x, S: tl.constexpr, TP: tl.constexpr, HC: tl.constexpr, DK: tl.constexpr):
    """(S * TP, HC * DK) -> (HC * S, TP, DK)"""
    x = tl.permute(tl.reshape(x, (S, TP, HC, DK)), (2, 0, 1, 3))
    return tl.reshape(x, (HC * S, TP, DK))


@triton.jit
def from_heads(x, S: tl.constexpr, TP: tl.constexpr, HC: tl.constexpr, DK: tl.constexpr):
    """(HC * S, TP, DK) -> (S * TP, HC * DK)"""
    x = tl.permute(tl.reshape(x, (HC, S, TP, DK)), (1, 2, 0, 3))
    return tl.reshape(x, (S * TP, HC * DK))
