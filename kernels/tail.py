"""From the residual stream behind the last attention to the loss, in one kernel.

Here every row is for itself, so the supervised ones are packed: one program serves M of them, of
several trial points where one has fewer. It takes up the rows of ``blocks``, or those of the
incumbent's cache where the change lies behind the last attention, runs the last feed-forward, the
final LayerNorm and the head, and stores one number a trial point: how much the summed
cross-entropy of its rows differs from the incumbent's. ``reduce_losses`` adds these in float64,
in a fixed order. No row sees another one, so a trial point's loss does not depend on the block
that it is in.

The incumbent runs through the same code (``CACHE``), which then also stores what the starts
need. Rows that a change does not reach contribute exactly zero, and a program none of whose rows
is reached stops before it computes anything: exact no-ops have the incumbent's loss, bitwise.

Shapes as in ``blocks``; a trial point has C packed rows, EACH of them in a program; VP: the
vocabulary, padded.
"""

import triton
import triton.language as tl
from psfast.kernels.points import (
    FF1_WEIGHT,
    FF2_WEIGHT,
    HEAD_WEIGHT,
    LN2_WEIGHT,
    NORM_WEIGHT,
    OUT_WEIGHT,
    columns_at,
    is_behind_attention,
    is_of,
    moved_by,
    weights_at,
)
from psfast.kernels.tiles import (
    by_kind,
    feed_forward,
    inverse,
    is_finite,
    linear_of_norm,
    log1p,
    normalise,
    own_rows,
    split,
    stage,
)

LOG2E = tl.constexpr(1.4426950408889634)


# What some row of a tile needs.
REACHED = tl.constexpr(1)
NEW = tl.constexpr(2)
OLD = tl.constexpr(4)
MOVES = tl.constexpr(8)
HIDDEN_UNIT = tl.constexpr(16)
BEFORE = tl.constexpr(32)
LN2_PATCH = tl.constexpr(64)
NORM_PATCH = tl.constexpr(128)
HEAD_PATCH = tl.constexpr(256)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _bit(mask, bit):
    return tl.where(mask, bit, 0)


@triton.jit
def _patched_norm(x, at, patched, kind, WEIGHT, row, delta, w_ptr, eps, D, DP):
    """LayerNorm by the weight and bias at ``at``, of which, if ``patched``, some rows have one
    number changed."""
    cols = tl.arange(0, DP)
    normal = normalise(x, eps, D, DP)
    n = normal * tl.load(w_ptr + at + cols)[None, :] + tl.load(w_ptr + at + DP + cols)[None, :]
    if patched:
        here = is_of(kind, WEIGHT)
        patch = tl.where((kind == WEIGHT)[:, None], normal, 1.0) * delta[:, None]
        n += tl.where(here[:, None] & (cols[None, :] == row[:, None]), patch, 0.0)
    return n


@triton.jit(do_not_specialize=["out_ptr", "K", "n_layers"], repr=by_kind("run_tail"))
def run_tail(
    points_ptr,  # what `tell` says: (FIELDS, K) int32
    delta_ptr,  # and (K,) fp32
    out_ptr,  # CACHE: (parts + 1,) float64 as of `Cache`; else (K, parts) fp32 differences
    behind_ptr,  # (K, C, DP) fp32: the packed rows behind the last attention
    reached_ptr,  # (K, C) int8: whether the change reaches them
    first_ptr,  # (1,) int32: only CACHE looks at it: above n_layers nothing is to compute
    w_ptr,  # packed weights: fp32,
    hi_ptr,  # and times SCALE in fp16, hi
    lo_ptr,  # and lo
    packed_ptr,  # (2, C) int32: the row among all R, -1 for padding, and its target
    keep_ptr,  # (L, R, DP) int8: the dropout masks
    x_ptr,  # (2 L + 1, R, DP) residual stream: before block 0, after its attention, ...
    columns_ptr,  # (L * columns_at("end") + DP, R): what a changed weight's column multiplies
    nll_ptr,  # (C,)
    staged_ptr,  # (programs, 2, M, DP) fp16, (programs, M, DP) fp32: a wide model's normalised rows
    K,
    R,
    n_layers,
    eps,
    inv_keep,  # 1 / (1 - dropout)
    M: tl.constexpr,
    EACH: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    KC: tl.constexpr,  # normalised columns at a time; DP: all, kept on chip
    AP: tl.constexpr,
    FP: tl.constexpr,
    FC: tl.constexpr,  # hidden units at a time
    V: tl.constexpr,
    VP: tl.constexpr,
    VC: tl.constexpr,  # vocabulary entries at a time
    SCALE: tl.constexpr,
    MODE: tl.constexpr,
    DROPOUT: tl.constexpr,
    CACHE: tl.constexpr,
    REPAIR: tl.constexpr,  # only where the output is not finite
    TILES: tl.constexpr,  # tiles a program looks at
):
    """Differences of the summed loss for K trial points; with CACHE the incumbent's cache.

    grid: (ceil(K / (TILES * (M // EACH))), parts)

    Equivalent to, for every trial point and part of the packed rows: the sum over these of
    ``cross_entropy(model(tokens))`` at the trial point minus the same at the incumbent.
    """
    POINTS: tl.constexpr = M // EACH
    INV: tl.constexpr = inverse(SCALE, MODE)
    LN2: tl.constexpr = weights_at("ln2", DP, AP, FP)
    W2: tl.constexpr = weights_at("ff2", DP, AP, FP)
    LAYER: tl.constexpr = weights_at("end", DP, AP, FP)
    N2: tl.constexpr = columns_at("n2", DP, AP, FP)
    HIDDEN: tl.constexpr = columns_at("hidden", DP, AP, FP)
    COLUMNS: tl.constexpr = columns_at("end", DP, AP, FP)

    weights = (w_ptr, hi_ptr, lo_ptr)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    C = parts * EACH
    staged = own_rows(staged_ptr, M, DP, MODE)
    cols = tl.arange(0, DP)
    packed = part * EACH + tl.arange(0, M) % EACH
    at_row = tl.load(packed_ptr + packed)
    target = tl.load(packed_ptr + C + packed)
    is_row = at_row >= 0
    at_row = tl.where(is_row, at_row, 0)
    if CACHE:
        K = tl.where(tl.load(first_ptr) <= n_layers, 1, 0)
    last = n_layers - 1
    tail = n_layers * LAYER

    count = TILES
    if REPAIR:
        # Mostly none is to be repaired: that takes one look at all of them.
        every = tl.program_id(0) * (TILES * POINTS) + tl.arange(0, TILES * POINTS)
        result = tl.load(out_ptr + every.to(tl.int64) * parts + part, mask=every < K, other=0.0)
        count = tl.where(tl.sum((is_finite(result) == 0).to(tl.int32), 0) > 0, TILES, 0)
    for tile in range(count):
        first = ((tl.program_id(0) * TILES + tile) * POINTS).to(tl.int64)
        # Of each row, and of each trial point.
        k = first + tl.arange(0, M) // EACH
        k_out = first + tl.arange(0, POINTS)
        out_at = out_ptr + k_out * parts + part
        todo = is_row & (k < K)
        todo_out = k_out < K
        if REPAIR:
            value = tl.load(out_ptr + k * parts + part, mask=todo, other=0.0)
            todo = todo & (is_finite(value) == 0)
            value = tl.load(out_at, mask=todo_out, other=0.0)
            todo_out = todo_out & (is_finite(value) == 0)

        # 1. Which rows change, and those that do so only here: u (M,) times a direction.
        if CACHE:
            reached = todo
            is_new = todo
            row = tl.zeros((M,), tl.int32)
            kind = row - 1
            slot = row + (2 * n_layers - 1)
            delta = tl.zeros((M,), tl.float32)
            u = delta
        else:
            about = points_ptr + k
            kind = tl.load(about, mask=todo, other=-1)
            slot = tl.load(about + 2 * K, mask=todo, other=0)
            row = tl.load(about + 3 * K, mask=todo, other=0)
            source = tl.load(about + 5 * K, mask=todo, other=-1)
            delta = tl.load(delta_ptr + k, mask=todo, other=0.0)
            is_new = todo & is_behind_attention(kind, slot, n_layers)
            kind = tl.where(is_new, kind, -1)
            source = tl.where(is_new, source, -1)
            u = moved_by(
                kind,
                last,
                row,
                source,
                delta,
                columns_ptr,
                keep_ptr,
                R,
                at_row,
                HIDDEN,
                COLUMNS,
                DP,
                DROPOUT,
            )
            u = tl.where(is_new, u, 0.0)
            marks = reached_ptr + k * C + packed
            reached = tl.load(marks, mask=todo & (is_new == 0), other=0) != 0
            reached = reached | (u != 0)
            is_new = is_new & reached

        # Asked all at once, for each answer costs the program a barrier.
        is_old = reached & (is_new == 0)
        is_before = reached & (slot < 2 * n_layers)
        is_ff1 = is_of(kind, FF1_WEIGHT)
        is_ff = is_ff1 | is_of(kind, FF2_WEIGHT)
        moves = is_ff | is_of(kind, OUT_WEIGHT)
        is_head = is_of(kind, HEAD_WEIGHT)
        need = _bit(reached, REACHED) | _bit(is_new, NEW) | _bit(is_old, OLD)
        need |= _bit(moves, MOVES) | _bit(is_ff1, HIDDEN_UNIT) | _bit(is_before, BEFORE)
        need |= _bit(is_of(kind, LN2_WEIGHT), LN2_PATCH) | _bit(is_head, HEAD_PATCH)
        need |= _bit(is_of(kind, NORM_WEIGHT), NORM_PATCH)
        need = tl.reduce(need, 0, _or)

        if need & REACHED:
            # 2. The residual stream there.
            x = tl.zeros((M, DP), tl.float32)
            if need & NEW:
                at = ((slot * R + at_row) * DP)[:, None] + cols[None, :]
                x += tl.load(x_ptr + at, mask=is_new[:, None], other=0.0)
            if need & OLD:
                old = behind_ptr + ((k * C + packed) * DP)[:, None] + cols[None, :]
                x += tl.load(old, mask=is_old[:, None], other=0.0)
            if need & MOVES:
                v = tl.where(cols[None, :] == row[:, None], 1.0, 0.0)
                if need & HIDDEN_UNIT:
                    at = (last * LAYER + W2 + row * DP)[:, None] + cols[None, :]
                    v_ff1 = tl.load(w_ptr + at, mask=is_ff1[:, None], other=0.0)
                    v = tl.where(is_ff1[:, None], v_ff1, v)
                moved = u[:, None] * v
                if DROPOUT:
                    at = ((last * R + at_row) * DP)[:, None] + cols[None, :]
                    keep = tl.load(keep_ptr + at, mask=is_ff[:, None], other=0) != 0
                    dropped = tl.where(keep, moved * inv_keep, 0.0)
                    moved = tl.where(is_ff[:, None], dropped, moved)
                x += tl.where(moves[:, None], moved, 0.0)

            # 3. The last feed-forward, where the change does not lie behind it.
            if need & BEFORE:
                at = last * LAYER + LN2
                patched = (need & LN2_PATCH) != 0
                n = _patched_norm(x, at, patched, kind, LN2_WEIGHT, row, delta, w_ptr, eps, D, DP)
                if CACHE:
                    at = (last * COLUMNS + N2 + cols)[None, :] * R + at_row[:, None]
                    tl.store(columns_ptr + at, n, mask=todo[:, None])
                n = split(n, MODE)
                stage(n, staged, M, DP, KC, MODE)
                hidden_ptr = columns_ptr + (last * COLUMNS + HIDDEN) * R
                acc = feed_forward(
                    n,
                    staged,
                    weights,
                    last * LAYER,
                    hidden_ptr,
                    at_row,
                    todo,
                    R,
                    inv_keep,
                    M,
                    DP,
                    AP,
                    FP,
                    FC,
                    KC,
                    SCALE,
                    MODE,
                    CACHE,
                )
                if DROPOUT:
                    at = ((last * R + at_row) * DP)[:, None] + cols[None, :]
                    keep = tl.load(keep_ptr + at, mask=is_before[:, None], other=0) != 0
                    x += tl.where(keep, acc, 0.0)
                else:
                    x += tl.where(is_before[:, None], acc, 0.0)

            # 4. Final LayerNorm, head and cross-entropy.
            patched = (need & NORM_PATCH) != 0
            n = _patched_norm(x, tail, patched, kind, NORM_WEIGHT, row, delta, w_ptr, eps, D, DP)
            if CACHE:
                at = (2 * n_layers * R + at_row) * DP
                tl.store(x_ptr + at[:, None] + cols[None, :], x, mask=todo[:, None])
                at = (n_layers * COLUMNS + cols)[None, :] * R + at_row[:, None]
                tl.store(columns_ptr + at, n, mask=todo[:, None])
            n = split(n, MODE)
            stage(n, staged, M, DP, KC, MODE)
            top = tl.full((M,), float("-inf"), tl.float32)
            others = tl.zeros((M,), tl.float32)
            picked = tl.zeros((M,), tl.float32)
            # Compared without `start`: with it, ptxas would compare 64 bits.
            v_cols = tl.arange(0, VC)
            for start in range(0, VP, VC):
                w_at = tail + 2 * DP + start
                z = tl.zeros((M, VC), tl.float32)
                z = linear_of_norm(n, staged, weights, w_at, z, M, DP, VC, VP, KC, MODE)
                bias = tl.load(w_ptr + w_at + DP * VP + v_cols)
                # Padded columns of the weight are zero, so their logits are this.
                z = z * INV + tl.where(v_cols < V - start, bias, float("-inf"))[None, :]
                if need & HEAD_PATCH:
                    here = is_head[:, None] & (v_cols[None, :] == (row - start)[:, None])
                    z += tl.where(here, u[:, None], 0.0)
                higher = tl.maximum(top, tl.max(z, 1))
                others = others * tl.exp2((top - higher) * LOG2E)
                here = v_cols[None, :] == (target - start)[:, None]
                each = tl.exp2((z - higher[:, None]) * LOG2E)
                others += tl.sum(tl.where(here, 0.0, each), 1)
                top = higher
                picked += tl.sum(tl.where(here, z, 0.0), 1)
            # Where the target is on top, 1 + others would round a small loss to 6e-8.
            total = others + tl.exp2((picked - top) * LOG2E)
            nll = tl.where(picked == top, log1p(others), (top - picked) + tl.log(total))

            # 5. One number out.
            if CACHE:
                tl.store(nll_ptr + packed, nll, mask=todo)
                nll = tl.where(reached, nll.to(tl.float64), 0.0)
                tl.store(out_ptr + parts, 1.0 if REPAIR else 0.0)
            else:
                nll = nll - tl.load(nll_ptr + packed, mask=reached, other=0.0)
                nll = tl.where(reached, nll, 0.0)
            tl.store(out_at, tl.sum(tl.reshape(nll, (POINTS, EACH)), 1), mask=todo_out)
        elif not REPAIR:
            tl.store(out_at, tl.zeros((POINTS,), tl.float32), mask=todo_out)
