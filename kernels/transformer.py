"""From trial points to losses of a decoder-only transformer, in one kernel.

One program serves one trial point and one group of whole sequences, M rows. It starts at the
changed tensor from the incumbent's cache (plus a rank-1 term), keeps the residual stream in
registers through all later blocks, and stores one number: how much the summed cross-entropy of
its rows differs from the incumbent's. ``reduce_losses`` adds these in float64, in a fixed
order, so a trial point's loss does not depend on the block it is in.

The incumbent runs through the same code (``CACHE``), which then also stores what the starts
need. Rows that a change cannot reach contribute exactly zero, and a program none of whose rows
is reached stops before it computes anything: exact no-ops have the incumbent's loss, bitwise.

Shapes below: M rows of a program; TP positions of a sequence (a power of two >= T); R all
padded rows; DP, FP, VP: d_model, d_ff and the vocabulary, padded; DK: d_k, padded; AP: heads
times DK, padded. Padded weights are zero.
"""

import triton
import triton.language as tl
from psfast.kernels.tiles import (
    attend,
    from_heads,
    layer_norm,
    linear,
    linear_of_norm,
    split,
    stage,
    to_heads,
)

# Kinds of tensors, in pairs of weight and bias (the first pair: the two embeddings).
TOKEN = tl.constexpr(0)
POSITION = tl.constexpr(1)
LN1_WEIGHT = tl.constexpr(2)
LN1_BIAS = tl.constexpr(3)
QKV_WEIGHT = tl.constexpr(4)
QKV_BIAS = tl.constexpr(5)
OUT_WEIGHT = tl.constexpr(6)
OUT_BIAS = tl.constexpr(7)
LN2_WEIGHT = tl.constexpr(8)
LN2_BIAS = tl.constexpr(9)
FF1_WEIGHT = tl.constexpr(10)
FF1_BIAS = tl.constexpr(11)
FF2_WEIGHT = tl.constexpr(12)
FF2_BIAS = tl.constexpr(13)
NORM_WEIGHT = tl.constexpr(14)
NORM_BIAS = tl.constexpr(15)
HEAD_WEIGHT = tl.constexpr(16)
HEAD_BIAS = tl.constexpr(17)

LOG2E = tl.constexpr(1.4426950408889634)


# A new block size must not mean a new compilation, nor a block cut from a longer one.
@triton.jit(do_not_specialize=["index_ptr", "delta_ptr", "K", "n_params", "n_layers"])
def evaluate(
    index_ptr,  # (K,) int64
    delta_ptr,  # (K,) fp32
    out_ptr,  # CACHE: (groups,) float64 summed loss; else (K, groups) fp32 differences
    params_ptr,  # (N,) fp32: the flat parameters
    w_ptr,  # packed weights: fp32,
    hi_ptr,  # and times SCALE in fp16, hi
    lo_ptr,  # and lo
    table_ptr,  # (5, TENSORS) int64: first index, kind, layer, slot, row length
    rows_ptr,  # (3, R) int32: token, target or -1, whether a supervised row can see this one
    keep_ptr,  # (L, R, DP) int8: the dropout masks
    x_ptr,  # (2 L + 1, R, DP) residual stream: before block 0, after its attention, ...
    qkv_ptr,  # (L, 3, R, AP)
    columns_ptr,  # (L * COLUMNS + DP, R): what a changed weight's column multiplies
    nll_ptr,  # (R,)
    staged_ptr,  # (programs, 2, M, DP) fp16, (programs, M, DP) fp32: a wide model's normalised rows
    K,
    R,
    n_params,
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
    V: tl.constexpr,
    VP: tl.constexpr,
    VC: tl.constexpr,  # vocabulary entries at a time
    TENSORS: tl.constexpr,
    SCALE: tl.constexpr,
    MODE: tl.constexpr,
    DROPOUT: tl.constexpr,
    CACHE: tl.constexpr,
    REPAIR: tl.constexpr,  # only where the output is not finite
    POINTS: tl.constexpr,  # trial points a program looks at
):
    """Differences of the summed loss for K trial points; with CACHE the incumbent's cache.

    grid: (ceil(K / POINTS), groups); with CACHE (1, groups)

    Equivalent to, for every trial point and group of sequences: the sum over supervised rows of
    ``cross_entropy(model(tokens)) `` at the trial point minus the same at the incumbent.
    """
    S: tl.constexpr = M // TP
    DC: tl.constexpr = HC * DK
    INV: tl.constexpr = 1.0 / SCALE if MODE == "fp16x3" else 1.0
    # Offsets in a layer's packed weights.
    WQ: tl.constexpr = 2 * DP
    BQ: tl.constexpr = WQ + 3 * DP * AP
    WO: tl.constexpr = BQ + 3 * AP
    BO: tl.constexpr = WO + AP * DP
    LN2: tl.constexpr = BO + DP
    W1: tl.constexpr = LN2 + 2 * DP
    B1: tl.constexpr = W1 + DP * FP
    W2: tl.constexpr = B1 + FP
    B2: tl.constexpr = W2 + FP * DP
    LAYER: tl.constexpr = B2 + DP
    # Rows in a layer's columns.
    MIXED: tl.constexpr = DP
    N2: tl.constexpr = MIXED + AP
    HIDDEN: tl.constexpr = N2 + DP
    COLUMNS: tl.constexpr = HIDDEN + FP

    weights = (w_ptr, hi_ptr, lo_ptr)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    HALVES: tl.constexpr = 2 if MODE == "fp16x3" else 1
    staged = staged_ptr + (tl.program_id(0) * groups + group) * (HALVES * M * DP)
    rows = group * M + tl.arange(0, M)
    cols = tl.arange(0, DP)
    token = tl.load(rows_ptr + rows)
    target = tl.load(rows_ptr + R + rows)
    supervised = target >= 0
    position = tl.arange(0, M) % TP

    for point in range(POINTS):
        k = tl.program_id(0) * POINTS + point
        where_to = out_ptr + k.to(tl.int64) * groups + group
        todo = k < K
        if REPAIR:
            value = tl.load(where_to, mask=todo, other=0.0)
            # Infinite or NaN: a finite number minus itself is zero.
            todo = todo & (value - value != 0)
        if todo:
            # 1. Where the trial point starts and what changes there: u (M,) times a vector.
            if CACHE:
                kind = -1
                layer = 0
                slot = 0
                row = 0
                column = 0
                part = 0
                delta = 0.0
                u = tl.zeros((M,), tl.float32)
                alive = True
                scored = target
            else:
                index = tl.load(index_ptr + k)
                valid = (index >= 0) & (index < n_params)
                index = tl.where(valid, index, 0)
                starts = tl.load(table_ptr + tl.arange(0, TENSORS))
                tensor = tl.sum((starts <= index).to(tl.int32), 0) - 1
                kind = tl.load(table_ptr + TENSORS + tensor).to(tl.int32)
                layer = tl.load(table_ptr + 2 * TENSORS + tensor).to(tl.int32)
                slot = tl.load(table_ptr + 3 * TENSORS + tensor).to(tl.int32)
                length = tl.load(table_ptr + 4 * TENSORS + tensor).to(tl.int32)
                local = (index - tl.load(table_ptr + tensor)).to(tl.int32)
                row = local // length
                column = local % length
                old = tl.load(params_ptr + index)
                delta = (old + tl.load(delta_ptr + k)) - old
                delta = tl.where(valid, delta, float("nan"))
                part = (row % (3 * D_K)) // D_K  # of a qkv row: query, key or value

                u = tl.full((M,), 1.0, tl.float32)
                if (kind == TOKEN) | (kind == POSITION):
                    u = tl.where(tl.where(kind == TOKEN, token, position) == row, 1.0, 0.0)
                source = column
                if kind == OUT_WEIGHT:
                    source = MIXED + (column // D_K) * DK + column % D_K
                if kind == FF1_WEIGHT:
                    source = N2 + column
                if kind == FF2_WEIGHT:
                    source = HIDDEN + column
                has_source = (kind == QKV_WEIGHT) | (kind == OUT_WEIGHT) | (kind == FF1_WEIGHT)
                has_source = has_source | (kind == FF2_WEIGHT) | (kind == HEAD_WEIGHT)
                if has_source:
                    u = tl.load(columns_ptr + (layer * COLUMNS + source) * R + rows)
                if kind == FF2_WEIGHT:
                    u = tl.where(u < 0, 0.0, u)
                u = u * delta
                if (kind == FF1_WEIGHT) | (kind == FF1_BIAS):
                    hidden = tl.load(columns_ptr + (layer * COLUMNS + HIDDEN + row) * R + rows)
                    changed = hidden + u
                    u = tl.where(changed < 0, 0.0, changed) - tl.where(hidden < 0, 0.0, hidden)
                if (kind == QKV_BIAS) & (part == 1):
                    u = u * 0.0  # the same number on all of a row's scores: softmax drops it
                # Behind the last attention, and in its queries, a row matters to itself only.
                is_qkv = (kind == QKV_WEIGHT) | (kind == QKV_BIAS)
                own = (slot >= 2 * n_layers - 1) & ((part == 0) | (is_qkv == 0))
                seen = tl.load(rows_ptr + 2 * R + rows) > 0
                u = tl.where(tl.where(own, supervised, seen), u, 0.0)
                alive = tl.sum((u != 0).to(tl.int32), 0) > 0
                # Elsewhere it matters to itself and to what follows.
                earlier = tl.cumsum(tl.reshape((u != 0).to(tl.int32), (S, TP)), 1)
                earlier = tl.reshape(earlier, (M,)) > 0
                reached = tl.where(own, u != 0, earlier)
                scored = tl.where(reached, target, -1)

            if alive:
                # 2. The residual stream there.
                if CACHE:
                    inside = (token >= 0)[:, None] & (cols < D)[None, :]
                    at = (token_offset + token * D)[:, None] + cols[None, :]
                    x = tl.load(params_ptr + at, mask=inside, other=0.0)
                    at = (position_offset + position * D)[:, None] + cols[None, :]
                    x += tl.load(params_ptr + at, mask=inside, other=0.0)
                    tl.store(x_ptr + (rows * DP)[:, None] + cols[None, :], x)
                else:
                    x = tl.load(x_ptr + ((slot * R + rows) * DP)[:, None] + cols[None, :])
                    if (kind == QKV_WEIGHT) | (kind == QKV_BIAS):
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
                    is_ff1 = (kind == FF1_WEIGHT) | (kind == FF1_BIAS)
                    is_ff = is_ff1 | (kind == FF2_WEIGHT) | (kind == FF2_BIAS)
                    is_embedding = (kind == TOKEN) | (kind == POSITION)
                    if is_embedding | (kind == OUT_WEIGHT) | (kind == OUT_BIAS) | is_ff:
                        v = tl.where(cols == tl.where(is_embedding, column, row), 1.0, 0.0)
                        if is_ff1:
                            v = tl.load(w_ptr + layer * LAYER + W2 + row * DP + cols)
                        change = u[:, None] * v[None, :]
                        if is_ff & DROPOUT:
                            at = ((layer * R + rows) * DP)[:, None] + cols[None, :]
                            keep = tl.load(keep_ptr + at) != 0
                            change = tl.where(keep, change * inv_keep, 0.0)
                        x += change

                # 3. The rest of the way, one half of a block a step. The LayerNorm that a trial
                # point may change is the first one. n is carried over the steps, as hi and lo:
                # wgmma reads what a loop carries from shared memory, not from registers.
                tail = n_layers * LAYER
                norm_at = slot // 2 * LAYER + slot % 2 * LN2
                ln_w = tl.load(w_ptr + norm_at + cols)
                ln_b = tl.load(w_ptr + norm_at + DP + cols)
                if not CACHE:
                    patch = tl.where(cols == row, delta, 0.0)
                    is_weight = (kind == LN1_WEIGHT) | (kind == LN2_WEIGHT) | (kind == NORM_WEIGHT)
                    is_bias = (kind == LN1_BIAS) | (kind == LN2_BIAS) | (kind == NORM_BIAS)
                    ln_w += tl.where(is_weight, patch, 0.0)
                    ln_b += tl.where(is_bias, patch, 0.0)
                n = layer_norm(x, ln_w, ln_b, eps, D, DP)
                if CACHE:
                    tl.store(columns_ptr + cols[None, :] * R + rows[:, None], n)
                n = split(n, MODE)
                stage(n, staged, M, DP, KC, MODE)
                for step in range(slot, 2 * n_layers):
                    block = step // 2
                    base = block * LAYER
                    column_0 = block * COLUMNS
                    acc = tl.zeros((M, DP), tl.float32)
                    if step % 2 == 0:
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
                        for f in range(0, FP, FC):
                            hidden = tl.zeros((M, FC), tl.float32)
                            w_at = base + W1 + f
                            hidden = linear_of_norm(
                                n, staged, weights, w_at, hidden, M, DP, FC, FP, KC, MODE
                            )
                            f_cols = f + tl.arange(0, FC)
                            hidden = hidden * INV + tl.load(w_ptr + base + B1 + f_cols)[None, :]
                            if CACHE:
                                hidden_at = (column_0 + HIDDEN + f_cols)[None, :] * R
                                tl.store(columns_ptr + hidden_at + rows[:, None], hidden)
                            hidden = tl.maximum(hidden, 0.0, tl.PropagateNan.ALL)
                            hidden = split(hidden, MODE)
                            w_at = base + W2 + f * DP
                            acc = linear(hidden, weights, w_at, acc, FC, DP, DP, MODE)
                        acc = acc * INV + tl.load(w_ptr + base + B2 + cols)[None, :]
                        if DROPOUT:
                            keep_at = ((block * R + rows) * DP)[:, None] + cols[None, :]
                            acc = tl.where(tl.load(keep_ptr + keep_at) != 0, acc * inv_keep, 0.0)
                    x += acc
                    after = step + 1
                    norm_at = after // 2 * LAYER + after % 2 * LN2
                    ln_w = tl.load(w_ptr + norm_at + cols)
                    ln_b = tl.load(w_ptr + norm_at + DP + cols)
                    n = layer_norm(x, ln_w, ln_b, eps, D, DP)
                    if CACHE:
                        tl.store(x_ptr + ((after * R + rows) * DP)[:, None] + cols[None, :], x)
                        n_at = (after // 2 * COLUMNS + after % 2 * N2 + cols)[None, :] * R
                        tl.store(columns_ptr + n_at + rows[:, None], n)
                    n = split(n, MODE)
                    stage(n, staged, M, DP, KC, MODE)

                # 4. Head and cross-entropy.
                top = tl.full((M,), float("-inf"), tl.float32)
                total = tl.zeros((M,), tl.float32)
                picked = tl.zeros((M,), tl.float32)
                is_head = (kind == HEAD_WEIGHT) | (kind == HEAD_BIAS)
                # Compared without `start`: with it, ptxas would compare 64 bits.
                v_cols = tl.arange(0, VC)
                for start in range(0, VP, VC):
                    w_at = tail + 2 * DP + start
                    z = tl.zeros((M, VC), tl.float32)
                    z = linear_of_norm(n, staged, weights, w_at, z, M, DP, VC, VP, KC, MODE)
                    bias = tl.load(w_ptr + w_at + DP * VP + v_cols)
                    # Padded columns of the weight are zero, so their logits are this.
                    z = z * INV + tl.where(v_cols < V - start, bias, float("-inf"))[None, :]
                    if is_head:
                        z += tl.where((v_cols == row - start)[None, :], u[:, None], 0.0)
                    higher = tl.maximum(top, tl.max(z, 1))
                    total = total * tl.exp2((top - higher) * LOG2E)
                    total += tl.sum(tl.exp2((z - higher[:, None]) * LOG2E), 1)
                    top = higher
                    here = v_cols[None, :] == (scored - start)[:, None]
                    picked += tl.sum(tl.where(here, z, 0.0), 1)
                nll = (top - picked) + tl.log(total)

                # 5. One number out.
                if CACHE:
                    tl.store(nll_ptr + rows, nll)
                    tl.store(where_to, tl.sum(tl.where(scored >= 0, nll.to(tl.float64), 0.0), 0))
                else:
                    difference = nll - tl.load(nll_ptr + rows)
                    tl.store(where_to, tl.sum(tl.where(scored >= 0, difference, 0.0), 0))
            else:
                tl.store(where_to, 0.0)


@triton.jit
def pack(
    params_ptr,  # (N,) fp32
    map_ptr,  # (P,) int32: index into params, -1 for padding
    w_ptr,  # (P,) fp32
    hi_ptr,  # (P,) fp16
    lo_ptr,  # (P,) fp16
    P,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weights in the kernel's layout, and times SCALE in fp16 as hi + lo."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < P
    source = tl.load(map_ptr + at, mask=inside, other=-1)
    w = tl.load(params_ptr + source, mask=source >= 0, other=0.0)
    hi, lo = split(w * SCALE, "fp16x3")
    tl.store(w_ptr + at, w, mask=inside)
    tl.store(hi_ptr + at, hi, mask=inside)
    tl.store(lo_ptr + at, lo, mask=inside)
