"""From trial points to the residual stream behind the last attention, in one kernel.

One program serves one trial point and one group of whole sequences, M rows. It starts at the
changed tensor from the incumbent's cache (plus a rank-1 term) and keeps the residual stream in
registers from there to the end of the last attention. Behind that a row matters to itself only:
the supervised rows go to memory, packed, for ``tail``, and the others end here. A trial point
that changes nothing before is not met here at all.

The incumbent runs through the same code (``CACHE``), which then also stores what the starts
need. Rows that a change cannot reach are marked, not computed.

Shapes below: M rows of a program; TP positions of a sequence (a power of two >= T); R all
padded rows, C all packed ones; DP, FP: d_model and d_ff, padded; DK: d_k, padded; AP: heads
times DK, padded. Padded weights are zero.
"""

import triton
import triton.language as tl
from psfast.kernels.points import (
    FF1_WEIGHT,
    FF2_WEIGHT,
    LN1_BIAS,
    LN1_WEIGHT,
    LN2_BIAS,
    LN2_WEIGHT,
    OUT_WEIGHT,
    POSITION,
    QKV_BIAS,
    QKV_WEIGHT,
    TOKEN,
    columns_at,
    is_behind_attention,
    is_of,
    moved_by,
    weights_at,
)
from psfast.kernels.tiles import (
    attend,
    by_kind,
    feed_forward,
    from_heads,
    inverse,
    is_finite,
    layer_norm,
    linear,
    linear_of_norm,
    own_rows,
    split,
    stage,
    to_heads,
)


@triton.jit
def _is_broken(out_ptr, k, mask, parts):
    """In how many parts the result of trial points ``k`` is not finite."""
    broken = tl.zeros_like(k).to(tl.int32)
    for part in range(parts):
        value = tl.load(out_ptr + k * parts + part, mask=mask, other=0.0)
        broken += (is_finite(value) == 0).to(tl.int32)
    return broken


# A new block size must not mean a new compilation.
@triton.jit(
    do_not_specialize=["out_ptr", "K", "C", "parts", "n_layers"], repr=by_kind("run_blocks")
)
def run_blocks(
    points_ptr,  # what `tell` says: (FIELDS, K) int32
    delta_ptr,  # and (K,) fp32
    out_ptr,  # what `tail` stores, (K, parts); only REPAIR looks at it
    behind_ptr,  # (K, C, DP) fp32: the packed rows behind the last attention
    reached_ptr,  # (K, C) int8: whether the change reaches them
    first_ptr,  # (1,) int32: only CACHE looks at it: the first block to compute
    params_ptr,  # (N,) fp32: the flat parameters
    w_ptr,  # packed weights: fp32,
    hi_ptr,  # and times SCALE in fp16, hi
    lo_ptr,  # and lo
    rows_ptr,  # (3, R) int32: token, place among the packed rows or -1, whether one sees this row
    keep_ptr,  # (L, R, DP) int8: the dropout masks
    x_ptr,  # (2 L + 1, R, DP) residual stream: before block 0, after its attention, ...
    qkv_ptr,  # (L, 3, R, AP)
    columns_ptr,  # (L * columns_at("end") + DP, R): what a changed weight's column multiplies
    staged_ptr,  # (programs, 2, M, DP) fp16, (programs, M, DP) fp32: a wide model's normalised rows
    K,
    R,
    C,
    parts,
    n_layers,
    token_offset,  # of the token embedding in params
    position_offset,
    eps,
    scale,  # log2(e) / sqrt(d_k)
    inv_keep,  # 1 / (1 - dropout)
    M: tl.constexpr,
    TP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    D_K: tl.constexpr,
    DK: tl.constexpr,
    KC: tl.constexpr,  # normalised columns at a time; DP: all, kept on chip
    HC: tl.constexpr,  # heads at a time
    AP: tl.constexpr,
    FP: tl.constexpr,
    FC: tl.constexpr,  # hidden units at a time
    SCALE: tl.constexpr,
    MODE: tl.constexpr,
    DROPOUT: tl.constexpr,
    CACHE: tl.constexpr,
    REPAIR: tl.constexpr,  # only where the output is not finite
    POINTS: tl.constexpr,  # trial points a program looks at
):
    """The packed residual stream of K trial points; with CACHE the incumbent's cache, from block
    ``first`` on.

    grid: (ceil(K / POINTS), groups); with CACHE (1, groups)
    """
    S: tl.constexpr = M // TP
    DC: tl.constexpr = HC * DK
    INV: tl.constexpr = inverse(SCALE, MODE)
    WQ: tl.constexpr = weights_at("qkv", DP, AP, FP)
    BQ: tl.constexpr = weights_at("qkv_bias", DP, AP, FP)
    WO: tl.constexpr = weights_at("out", DP, AP, FP)
    BO: tl.constexpr = weights_at("out_bias", DP, AP, FP)
    LN2: tl.constexpr = weights_at("ln2", DP, AP, FP)
    W2: tl.constexpr = weights_at("ff2", DP, AP, FP)
    LAYER: tl.constexpr = weights_at("end", DP, AP, FP)
    MIXED: tl.constexpr = columns_at("mixed", DP, AP, FP)
    N2: tl.constexpr = columns_at("n2", DP, AP, FP)
    HIDDEN: tl.constexpr = columns_at("hidden", DP, AP, FP)
    COLUMNS: tl.constexpr = columns_at("end", DP, AP, FP)

    weights = (w_ptr, hi_ptr, lo_ptr)
    staged = own_rows(staged_ptr, M, DP, MODE)
    rows = tl.program_id(1) * M + tl.arange(0, M)
    is_row = rows >= 0
    cols = tl.arange(0, DP)
    token = tl.load(rows_ptr + rows)
    place = tl.load(rows_ptr + R + rows)
    position = tl.arange(0, M) % TP
    end = 2 * n_layers - 1

    count = POINTS
    if REPAIR:
        # Mostly none is to be repaired: that takes one look at all of them.
        every = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
        broken = _is_broken(out_ptr, every.to(tl.int64), every < K, parts)
        count = tl.where(tl.sum(broken, 0) > 0, POINTS, 0)
    for point in range(count):
        k = (tl.program_id(0) * POINTS + point).to(tl.int64)
        todo = k < K
        if REPAIR:
            todo = _is_broken(out_ptr, k, todo, parts) > 0
        if CACHE:
            kind = -1
            layer = 0
            slot = 2 * tl.load(first_ptr)
            row = 0
            column = 0
            delta = 0.0
            todo = todo & (slot < end)
        else:
            about = points_ptr + tl.where(todo, k, 0)
            kind = tl.load(about)
            layer = tl.load(about + K)
            slot = tl.load(about + 2 * K)
            row = tl.load(about + 3 * K)
            column = tl.load(about + 4 * K)
            source = tl.load(about + 5 * K)
            delta = tl.load(delta_ptr + tl.where(todo, k, 0))
            todo = todo & (is_behind_attention(kind, slot, n_layers) == 0)
        if todo:
            # 1. Where the trial point starts and what changes there: u (M,) times a vector.
            part = (row % (3 * D_K)) // D_K  # of a qkv row: query, key or value
            if CACHE:
                u = tl.zeros((M,), tl.float32)
                reached = is_row
            else:
                u = moved_by(
                    kind,
                    layer,
                    row,
                    source,
                    delta,
                    columns_ptr,
                    keep_ptr,
                    R,
                    rows,
                    HIDDEN,
                    COLUMNS,
                    DP,
                    DROPOUT,
                )
                if (kind == TOKEN) | (kind == POSITION):
                    u = tl.where(tl.where(kind == TOKEN, token, position) == row, u, 0.0)
                if (kind == QKV_BIAS) & (part == 1):
                    u = u * 0.0  # the same number on all of a row's scores: softmax drops it
                # In the last attention's queries a row matters to itself only.
                own = (slot == end) & (part == 0)
                seen = tl.load(rows_ptr + 2 * R + rows) > 0
                u = tl.where(tl.where(own, place >= 0, seen), u, 0.0)
                # Elsewhere it matters to itself and to what follows.
                earlier = tl.cumsum(tl.reshape((u != 0).to(tl.int32), (S, TP)), 1)
                earlier = tl.reshape(earlier, (M,)) > 0
                reached = tl.where(own, u != 0, earlier)
                marks = reached_ptr + k * C + place
                tl.store(marks, reached.to(tl.int8), mask=place >= 0)

            if tl.sum((reached & (place >= 0)).to(tl.int32), 0) > 0:
                # 2. The residual stream there.
                there = x_ptr + ((slot * R + rows) * DP)[:, None] + cols[None, :]
                if CACHE:
                    if slot == 0:
                        inside = (token >= 0)[:, None] & (cols < D)[None, :]
                        at = (token_offset + token * D)[:, None] + cols[None, :]
                        x = tl.load(params_ptr + at, mask=inside, other=0.0)
                        at = (position_offset + position * D)[:, None] + cols[None, :]
                        x += tl.load(params_ptr + at, mask=inside, other=0.0)
                        tl.store(there, x)
                    else:
                        x = tl.load(there)
                else:
                    x = tl.load(there)
                    if is_of(kind, QKV_WEIGHT):
                        # One head's attention again, and what that changes behind `out`.
                        lanes = tl.arange(0, DK)
                        head = row // (3 * D_K) * DK
                        at = ((layer * 3 * R + rows) * AP + head)[:, None] + lanes[None, :]
                        one = u[:, None] * tl.where(lanes == row % D_K, 1.0, 0.0)[None, :]
                        q = tl.load(qkv_ptr + at) + tl.where(part == 0, one, 0.0)
                        key = tl.load(qkv_ptr + R * AP + at) + tl.where(part == 1, one, 0.0)
                        v = tl.load(qkv_ptr + 2 * R * AP + at) + tl.where(part == 2, one, 0.0)
                        q = tl.reshape(q, (S, TP, DK))
                        key = tl.reshape(key, (S, TP, DK))
                        v = tl.reshape(v, (S, TP, DK))
                        mixed = tl.reshape(attend(q, key, v, scale, S, TP, DK, MODE), (M, DK))
                        at = (layer * COLUMNS + MIXED + head + lanes)[None, :] * R + rows[:, None]
                        moved = split(mixed - tl.load(columns_ptr + at), MODE)
                        start = layer * LAYER + WO + head * DP
                        zero = tl.zeros((M, DP), tl.float32)
                        x += linear(moved, weights, start, zero, DK, DP, DP, MODE) * INV
                    is_ff1 = is_of(kind, FF1_WEIGHT)
                    is_ff = is_ff1 | is_of(kind, FF2_WEIGHT)
                    is_embedding = (kind == TOKEN) | (kind == POSITION)
                    if is_embedding | is_of(kind, OUT_WEIGHT) | is_ff:
                        v = tl.where(cols == tl.where(is_embedding, column, row), 1.0, 0.0)
                        if is_ff1:
                            v = tl.load(w_ptr + layer * LAYER + W2 + row * DP + cols)
                        moved = u[:, None] * v[None, :]
                        if is_ff & DROPOUT:
                            at = ((layer * R + rows) * DP)[:, None] + cols[None, :]
                            keep = tl.load(keep_ptr + at) != 0
                            moved = tl.where(keep, moved * inv_keep, 0.0)
                        x += moved

                # 3. The rest of the way, one half of a block a step. The LayerNorm that a trial
                # point may change is the first one.
                weight_patch = tl.where((kind == LN1_WEIGHT) | (kind == LN2_WEIGHT), delta, 0.0)
                bias_patch = tl.where((kind == LN1_BIAS) | (kind == LN2_BIAS), delta, 0.0)
                for step in range(slot, end):
                    block = step // 2
                    base = block * LAYER
                    column_0 = block * COLUMNS
                    norm_at = w_ptr + base + step % 2 * LN2 + cols
                    ln_w = tl.load(norm_at)
                    ln_b = tl.load(norm_at + DP)
                    if not CACHE:
                        here = (cols == row) & (step == slot)
                        ln_w += tl.where(here, weight_patch, 0.0)
                        ln_b += tl.where(here, bias_patch, 0.0)
                    normal = layer_norm(x, ln_w, ln_b, eps, D, DP)
                    if CACHE:
                        at = (column_0 + step % 2 * N2 + cols)[None, :] * R + rows[:, None]
                        tl.store(columns_ptr + at, normal)
                    n = split(normal, MODE)
                    stage(n, staged, M, DP, KC, MODE)
                    if step % 2 == 0:
                        acc = tl.zeros((M, DP), tl.float32)
                        for c in range(0, AP, DC):
                            zero = tl.zeros((M, DC), tl.float32)
                            bias = w_ptr + base + BQ + c + tl.arange(0, DC)
                            w_at = base + WQ + c
                            q = linear_of_norm(
                                n, staged, weights, w_at, zero, M, DP, DC, AP, KC, MODE
                            )
                            q = q * INV + tl.load(bias)[None, :]
                            w_at += DP * AP
                            key = linear_of_norm(
                                n, staged, weights, w_at, zero, M, DP, DC, AP, KC, MODE
                            )
                            key = key * INV + tl.load(bias + AP)[None, :]
                            w_at += DP * AP
                            v = linear_of_norm(
                                n, staged, weights, w_at, zero, M, DP, DC, AP, KC, MODE
                            )
                            v = v * INV + tl.load(bias + 2 * AP)[None, :]
                            if CACHE:
                                lanes = tl.arange(0, DC)[None, :]
                                qkv_at = ((block * 3 * R + rows) * AP + c)[:, None] + lanes
                                tl.store(qkv_ptr + qkv_at, q)
                                tl.store(qkv_ptr + R * AP + qkv_at, key)
                                tl.store(qkv_ptr + 2 * R * AP + qkv_at, v)
                            q = to_heads(q, S, TP, HC, DK)
                            key = to_heads(key, S, TP, HC, DK)
                            v = to_heads(v, S, TP, HC, DK)
                            mixed = attend(q, key, v, scale, HC * S, TP, DK, MODE)
                            mixed = from_heads(mixed, S, TP, HC, DK)
                            if CACHE:
                                mixed_at = (column_0 + MIXED + c + tl.arange(0, DC))[None, :] * R
                                tl.store(columns_ptr + mixed_at + rows[:, None], mixed)
                            mixed = split(mixed, MODE)
                            w_at = base + WO + c * DP
                            acc = linear(mixed, weights, w_at, acc, DC, DP, DP, MODE)
                        acc = acc * INV + tl.load(w_ptr + base + BO + cols)[None, :]
                    else:
                        hidden_ptr = columns_ptr + (column_0 + HIDDEN) * R
                        acc = feed_forward(
                            n,
                            staged,
                            weights,
                            base,
                            hidden_ptr,
                            rows,
                            is_row,
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
                            keep_at = ((block * R + rows) * DP)[:, None] + cols[None, :]
                            acc = tl.where(tl.load(keep_ptr + keep_at) != 0, acc, 0.0)
                    x += acc
                    if CACHE:
                        at = ((step * R + R + rows) * DP)[:, None] + cols[None, :]
                        tl.store(x_ptr + at, x)

                # 4. The supervised rows out. Their places are read again: kept, they would take
                # registers all the way.
                if not CACHE:
                    place = tl.load(rows_ptr + R + rows)
                    at = ((k * C + place) * DP)[:, None] + cols[None, :]
                    tl.store(behind_ptr + at, x, mask=(place >= 0)[:, None])
