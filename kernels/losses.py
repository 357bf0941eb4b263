"""What becomes of the differences that ``tail`` stores: losses, and decisions.

All sums are in float64 and in a fixed order: no atomics, so every result is deterministic.
"""

import triton
import triton.language as tl
from psfast.kernels.points import first_block, tell
from psfast.kernels.tiles import is_finite, split


@triton.jit
def _sums(incumbent_ptr, partial_ptr, k, inside, parts, BLOCK: tl.constexpr):
    """The incumbent's summed loss, and what trial points k (BLOCK,) change of it."""
    incumbent = tl.full((BLOCK,), 0.0, tl.float64)
    change = tl.full((BLOCK,), 0.0, tl.float64)
    for part in range(parts):
        incumbent += tl.load(incumbent_ptr + part)
        at = partial_ptr + k.to(tl.int64) * parts + part
        change += tl.load(at, mask=inside, other=0.0).to(tl.float64)
    return incumbent, change


@triton.jit(do_not_specialize=["K", "parts"])
def reduce_losses(
    incumbent_ptr,  # (parts + 1,) float64: summed loss of the incumbent, as of `Cache`
    partial_ptr,  # (K, parts) fp32: differences
    span_ptr,  # (2,) int64, as of `describe`
    loss_ptr,  # (C,) float64
    count_ptr,  # (1,) fp32: supervised rows
    K,
    parts,
    BLOCK: tl.constexpr,
):
    """(sum(incumbent) + sum(partial[k])) / count, added in float64, part by part, is the loss of
    trial point k of those that come next."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(span_ptr) + k
    inside = (k < K) & (at < tl.load(span_ptr + 1))
    incumbent, change = _sums(incumbent_ptr, partial_ptr, k, inside, parts, BLOCK)
    count = tl.load(count_ptr)
    tl.store(loss_ptr + at, (incumbent + change) / count, mask=inside)


@triton.jit(do_not_specialize=["K", "parts", "n_params", "n_layers", "is_final"])
def take_first(
    index_ptr,  # (C,) int64: trial points in poll order
    change_ptr,  # (C,) fp32
    losses_ptr,  # (C,) float64: of those decided
    places_ptr,  # (C,) int64: of the accepted ones
    incumbents_ptr,  # (C,) float64: the loss after each but the last
    state_ptr,  # (6,) int64: decided, accepted, evaluated; how many to decide and to accept; open
    margin_ptr,  # (1,) float64
    params_ptr,  # (N,) fp32
    place_ptr,  # (N,) int32: where a parameter lies among the packed weights, -1: not there
    w_ptr,  # packed weights, as `pack` leaves them
    hi_ptr,
    lo_ptr,
    table_ptr,  # as of `tell`
    points_ptr,  # (FIELDS, K) int32: the block that was evaluated, then the one to evaluate next
    delta_ptr,  # (K,) fp32
    first_ptr,  # (1,) int32: the first block that the next incumbent's cache has to compute
    summed_ptr,  # (parts + 1,) float64, as of `Cache`
    partial_ptr,  # (K, parts) fp32
    count_ptr,  # (1,) fp32: supervised rows
    K,
    parts,
    n_params,
    n_layers,
    is_final,
    TABLE_BITS: tl.constexpr,
    D_K: tl.constexpr,
    DK: tl.constexpr,
    DP: tl.constexpr,
    AP: tl.constexpr,
    FP: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,  # >= K
):
    """Accepts the block's first trial point that is lower by more than the margin, if one is.

    For one program: it reads the state and writes it again.

    Equivalent to a step of the serial loop's: losses up to the accepted one are decided, its
    delta is added to the parameters, and the next block begins behind it. When all is decided
    the next block holds changes by zero, which cost nothing.

    is_final: 0 leaves a block undecided, and marks the state as open, where the incumbent's loss
    or one that counts is not finite and may become so when it is evaluated again
    """
    decided = tl.load(state_ptr)
    accepted = tl.load(state_ptr + 1)
    evaluated = tl.load(state_ptr + 2)
    end = tl.load(state_ptr + 3)
    most = tl.load(state_ptr + 4)
    k = tl.arange(0, BLOCK)
    is_in = (k < K) & (decided + k < tl.where(accepted < most, end, 0))
    incumbent, change = _sums(summed_ptr, partial_ptr, k, k < K, parts, BLOCK)
    count = tl.load(count_ptr)
    losses = (incumbent + change) / count
    before = tl.sum(tl.where(k == 0, incumbent / count, 0.0), 0)
    if accepted > 0:
        tl.store(incumbents_ptr + accepted - 1, before)
    bar = tl.where(is_finite(before), before - tl.load(margin_ptr), float("inf"))
    is_lower = is_in & (losses < bar) & (losses > float("-inf"))
    first = tl.min(tl.where(is_lower, k, BLOCK), 0)
    is_broken = is_in & (k <= first) & (is_finite(losses) == 0)
    is_open = (is_final == 0) & (tl.sum(is_broken.to(tl.int32), 0) > 0)
    first = tl.where(is_open, BLOCK, first)
    tried = tl.where(is_open, 0, tl.sum(is_in.to(tl.int64), 0))
    taken = tl.minimum(first.to(tl.int64) + 1, tried)
    tl.store(losses_ptr + decided + k, losses, mask=k < taken)
    if first < BLOCK:
        place = decided + first
        index = tl.load(index_ptr + place)
        value = tl.load(params_ptr + index) + tl.load(change_ptr + place)
        tl.store(params_ptr + index, value)
        packed = tl.load(place_ptr + index)
        if packed >= 0:
            hi, lo = split(value * SCALE, "fp16x3")
            tl.store(w_ptr + packed, value)
            tl.store(hi_ptr + packed, hi)
            tl.store(lo_ptr + packed, lo)
        tl.store(places_ptr + accepted, place)
        accepted += 1
        kind = tl.load(points_ptr + first)
        layer = tl.load(points_ptr + K + first)
        # What FALLBACK has filled is no start for the usual mode.
        fell_back = tl.load(summed_ptr + parts) > 0
        tl.store(first_ptr, tl.where(fell_back, 0, first_block(kind, layer, n_layers)))
    else:
        tl.store(first_ptr, n_layers + 1)
    decided += taken
    tl.store(state_ptr, decided)
    tl.store(state_ptr + 1, accepted)
    tl.store(state_ptr + 2, evaluated + tried)
    tl.store(state_ptr + 5, is_open.to(tl.int64))
    tl.debug_barrier()  # the parameter may be one that the next block changes as well
    follows = (k < K) & (decided + k < tl.where(accepted < most, end, 0))
    index = tl.load(index_ptr + decided + k, mask=follows, other=0)
    change = tl.load(change_ptr + decided + k, mask=follows, other=0.0)
    where = (table_ptr, params_ptr, points_ptr, delta_ptr)
    tell(k, K, index, change, where, n_params, n_layers, TABLE_BITS, D_K, DK, DP, AP, FP)
