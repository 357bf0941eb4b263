"""What a trial point is to the kernels: a tensor's kind and place, and what its change multiplies.

``weights_at`` and ``columns_at`` say how the packed weights and the cached columns lie in memory.
The functions take a trial point's numbers as scalars or as one of each row.
"""

import triton
import triton.language as tl

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

FIELDS = 6  # of what `tell` says of a trial point, beside its delta


@triton.constexpr_function
def weights_at(part, DP, AP, FP):
    """Where a part of a block's packed weights begins; "end": what a block takes.

    LayerNorms are a weight and a bias of DP; "qkv" is queries, keys and values, (DP, AP) each.
    Behind the last block: the final LayerNorm, the head (DP, VP), its bias.
    """
    sizes = {"ln1": 2 * DP, "qkv": 3 * DP * AP, "qkv_bias": 3 * AP, "out": AP * DP, "out_bias": DP}
    sizes |= {"ln2": 2 * DP, "ff1": DP * FP, "ff1_bias": FP, "ff2": FP * DP, "ff2_bias": DP}
    names = [*sizes, "end"]
    return sum(sizes[name] for name in names[: names.index(part)])


@triton.constexpr_function
def columns_at(part, DP, AP, FP):
    """Where a part of a block's cached columns begins; "end": how many a block has.

    "n1": the normalised rows before the attention; "mixed": what it passes to ``out``; "n2"
    and "hidden": what the feed-forward's two weights multiply. Behind the last block: the rows
    that the head's weight multiplies.
    """
    sizes = {"n1": DP, "mixed": AP, "n2": DP, "hidden": FP}
    names = [*sizes, "end"]
    return sum(sizes[name] for name in names[: names.index(part)])


@triton.jit(do_not_specialize=["K", "n_params", "n_layers"])
def describe(
    index_ptr,  # (C,) int64
    change_ptr,  # (C,) fp32
    span_ptr,  # (2,) int64: which of them come next: the first, and the one behind the last
    table_ptr,
    params_ptr,
    points_ptr,
    delta_ptr,
    K,
    n_params,
    n_layers,
    TABLE_BITS: tl.constexpr,
    D_K: tl.constexpr,
    DK: tl.constexpr,
    DP: tl.constexpr,
    AP: tl.constexpr,
    FP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``tell`` of the next K trial points, BLOCK of them in a program; where fewer are left the
    others change nothing."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(span_ptr) + k
    inside = (k < K) & (at < tl.load(span_ptr + 1))
    index = tl.load(index_ptr + at, mask=inside, other=0)
    change = tl.load(change_ptr + at, mask=inside, other=0.0)
    where = (table_ptr, params_ptr, points_ptr, delta_ptr)
    tell(k, K, index, change, where, n_params, n_layers, TABLE_BITS, D_K, DK, DP, AP, FP)


@triton.jit
def tell(
    k,
    K,
    index,
    change,
    where,
    n_params,
    n_layers,
    TABLE_BITS: tl.constexpr,
    D_K: tl.constexpr,
    DK: tl.constexpr,
    DP: tl.constexpr,
    AP: tl.constexpr,
    FP: tl.constexpr,
):
    """Write down for the other kernels what the trial points ``k`` < K change.

    where: pointers to
        the table (5, 2 ** TABLE_BITS) int64: first index, kind, layer, slot, row length
        the flat parameters (N,) fp32
        the trial points (FIELDS, K) int32: kind, layer, slot, row, column, source
        by how much they change in fp32, (K,)

    An index without a parameter becomes a change of the head's bias by NaN, which reaches all.
    source: which of the cached columns a weight's change multiplies, -1 for what is no weight
    """
    table_ptr, params_ptr, points_ptr, delta_ptr = where
    SIZE: tl.constexpr = 1 << TABLE_BITS
    inside = k < K
    valid = (index >= 0) & (index < n_params)
    index = tl.where(valid, index, 0)
    tensor = tl.zeros_like(k).to(tl.int32)
    for i in tl.static_range(TABLE_BITS):
        later = tensor + (SIZE >> (i + 1))
        tensor = tl.where(tl.load(table_ptr + later) <= index, later, tensor)
    local = (index - tl.load(table_ptr + tensor)).to(tl.int32)
    kind = tl.where(valid, tl.load(table_ptr + SIZE + tensor).to(tl.int32), HEAD_BIAS)
    layer = tl.load(table_ptr + 2 * SIZE + tensor).to(tl.int32)
    slot = tl.where(valid, tl.load(table_ptr + 3 * SIZE + tensor).to(tl.int32), 2 * n_layers)
    length = tl.load(table_ptr + 4 * SIZE + tensor).to(tl.int32)
    column = local % length
    source = column
    by_head = columns_at("mixed", DP, AP, FP) + (column // D_K) * DK + column % D_K
    source = tl.where(kind == OUT_WEIGHT, by_head, source)
    source = tl.where(kind == FF1_WEIGHT, columns_at("n2", DP, AP, FP) + column, source)
    source = tl.where(kind == FF2_WEIGHT, columns_at("hidden", DP, AP, FP) + column, source)
    multiplies = (kind == QKV_WEIGHT) | (kind == OUT_WEIGHT) | (kind == FF1_WEIGHT)
    multiplies = multiplies | (kind == FF2_WEIGHT) | (kind == HEAD_WEIGHT)
    source = tl.where(multiplies, layer * columns_at("end", DP, AP, FP) + source, -1)
    old = tl.load(params_ptr + index)
    delta = tl.where(valid, (old + change) - old, float("nan"))
    tl.store(points_ptr + k, kind, mask=inside)
    tl.store(points_ptr + K + k, layer, mask=inside)
    tl.store(points_ptr + 2 * K + k, slot, mask=inside)
    tl.store(points_ptr + 3 * K + k, local // length, mask=inside)
    tl.store(points_ptr + 4 * K + k, column, mask=inside)
    tl.store(points_ptr + 5 * K + k, source, mask=inside)
    tl.store(delta_ptr + k, delta, mask=inside)


@triton.jit
def is_of(kind, WEIGHT):
    """Whether it changes this weight or the bias beside it."""
    return (kind == WEIGHT) | (kind == WEIGHT + 1)


@triton.jit
def is_behind_attention(kind, slot, n_layers):
    """Whether it changes nothing before the end of the last attention."""
    return (slot >= 2 * n_layers - 1) & (is_of(kind, QKV_WEIGHT) == 0)


@triton.jit
def first_block(kind, layer, n_layers):
    """The first block that a change leaves to compute anew; n_layers: only what lies behind the
    last attention."""
    return tl.where((layer == n_layers - 1) & (kind >= LN2_WEIGHT), n_layers, layer)


@triton.jit
def moved_by(
    kind, layer, row, source, delta, columns_ptr, keep_ptr, R, rows, HIDDEN, COLUMNS, DP, DROPOUT
):
    """How far the change moves each of ``rows`` (M,) along one direction.

    The direction is the changed output's; of the feed-forward's first layer, the changed hidden
    unit's weights out. A row whose changed output is dropped is not moved.
    """
    is_ff1 = is_of(kind, FF1_WEIGHT)
    # Where there is nothing to read, the first column is read for nothing: the interpreter of
    # Triton 3.9 takes no scalar as a mask.
    u = tl.load(columns_ptr + tl.where(source >= 0, source, 0) * R + rows)
    u = tl.where(source >= 0, u, 1.0)
    u = tl.where((kind == FF2_WEIGHT) & (u < 0), 0.0, u) * delta
    if DROPOUT:
        is_ff2 = is_of(kind, FF2_WEIGHT)
        at = tl.where(is_ff2, layer * R * DP + row, 0)
        keep = tl.load(keep_ptr + at + rows * DP)
        u = tl.where(is_ff2 & (keep == 0), 0.0, u)
    hidden = tl.where(is_ff1, layer * COLUMNS + HIDDEN + row, 0)
    hidden = tl.load(columns_ptr + hidden * R + rows)
    changed = hidden + u
    changed = tl.where(changed < 0, 0.0, changed) - tl.where(hidden < 0, 0.0, hidden)
    return tl.where(is_ff1, changed, u)
