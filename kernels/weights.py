"""The weights as the kernels read them: which parameter lies where, and the kernel that packs."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from psfast.kernels import points
from psfast.kernels.tiles import split
from torch import Tensor, nn

_END = 2**63 - 1


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


def parameter_ids(model: nn.Module, trainable: list[nn.Parameter]) -> dict:
    """Every parameter's indices, in its shape: the trainable ones in order, then the others."""
    fixed = [p for p in model.parameters() if not any(p is q for q in trainable)]
    ids, start = {}, 0
    for p in [*trainable, *fixed]:
        ids[p] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    return ids


def pack_order(model: nn.Module, ids: dict, layout: dict, VP: int) -> Tensor:
    """For every place of the packed weights the parameter's index there, -1 for padding.

    Per block: ln1, queries, keys, values (each in x out), their biases, out, its bias, ln2,
    ff in and out with their biases; behind the blocks: final LayerNorm, head, its bias.
    """
    DP, D_K, DK, AP, FP = (layout[name] for name in ("DP", "D_K", "DK", "AP", "FP"))

    def vector(p: nn.Parameter, size: int) -> Tensor:
        return F.pad(ids[p], (0, size - len(ids[p])), value=-1)

    def matrix(p: nn.Parameter, rows: int, cols: int) -> Tensor:
        w = ids[p].T
        return F.pad(w, (0, cols - w.shape[1], 0, rows - w.shape[0]), value=-1)

    def heads(w: Tensor) -> Tensor:
        """(H, D_K, n) -> (AP, n)"""
        w = F.pad(w, (0, 0, 0, DK - D_K), value=-1).flatten(0, 1)
        return F.pad(w, (0, 0, 0, AP - len(w)), value=-1)

    parts = []
    for block in model.blocks:
        qkv, out = block.attention.qkv, block.attention.out
        H = block.attention.n_heads
        weight, bias = ids[qkv.weight].view(H, 3, D_K, -1), ids[qkv.bias].view(H, 3, D_K, 1)
        parts += [vector(block.ln1.weight, DP), vector(block.ln1.bias, DP)]
        for part in range(3):
            w = heads(weight[:, part]).T
            parts.append(F.pad(w, (0, 0, 0, DP - len(w)), value=-1))
        parts += [heads(bias[:, part]) for part in range(3)]
        w = heads(ids[out.weight].T.reshape(H, D_K, -1))
        parts.append(F.pad(w, (0, DP - w.shape[1]), value=-1))
        parts += [vector(p, DP) for p in (out.bias, block.ln2.weight, block.ln2.bias)]
        parts += [matrix(block.ff[0].weight, DP, FP), vector(block.ff[0].bias, FP)]
        parts += [matrix(block.ff[2].weight, FP, DP), vector(block.ff[2].bias, DP)]
    norm, head = model.final_norm, model.head
    parts += [vector(norm.weight, DP), vector(norm.bias, DP)]
    parts += [matrix(head.weight, DP, VP), vector(head.bias, VP)]
    return torch.cat([part.flatten() for part in parts])


def places(order: Tensor, size: int) -> Tensor:
    """Where each of ``size`` parameters lies in ``pack_order``, (size,) int32; -1: nowhere."""
    found = torch.full((size,), -1, dtype=torch.int32)
    at = (order >= 0).nonzero()[:, 0]
    found[order[at]] = at.int()
    return found


def tensor_table(model: nn.Module, trainable: list[nn.Parameter], size: int) -> Tensor:
    """(5, size) int64: first index, kind, layer, slot of the residual stream, row length.

    Slot 2 l is the residual stream before block l, 2 l + 1 that behind its attention.
    """
    what, L = {}, len(model.blocks)

    def note(p: nn.Parameter, kind, layer: int, slot: int) -> None:
        what[p] = (kind.value, layer, slot, p.shape[1] if p.ndim == 2 else 1)

    def pair(module: nn.Module, weight, bias, layer: int, slot: int) -> None:
        note(module.weight, weight, layer, slot)
        note(module.bias, bias, layer, slot)

    note(model.token_embedding.weight, points.TOKEN, 0, 0)
    note(model.position_embedding, points.POSITION, 0, 0)
    for i, block in enumerate(model.blocks):
        pair(block.ln1, points.LN1_WEIGHT, points.LN1_BIAS, i, 2 * i)
        pair(block.attention.qkv, points.QKV_WEIGHT, points.QKV_BIAS, i, 2 * i + 1)
        pair(block.attention.out, points.OUT_WEIGHT, points.OUT_BIAS, i, 2 * i + 1)
        pair(block.ln2, points.LN2_WEIGHT, points.LN2_BIAS, i, 2 * i + 1)
        pair(block.ff[0], points.FF1_WEIGHT, points.FF1_BIAS, i, 2 * i + 2)
        pair(block.ff[2], points.FF2_WEIGHT, points.FF2_BIAS, i, 2 * i + 2)
    pair(model.final_norm, points.NORM_WEIGHT, points.NORM_BIAS, L, 2 * L)
    pair(model.head, points.HEAD_WEIGHT, points.HEAD_BIAS, L, 2 * L)

    table, start = [], 0
    for p in trainable:
        table.append((start, *what[p]))
        start += p.numel()
    table += [(_END, 0, 0, 0, 1)] * (size - len(table))
    return torch.tensor(table, dtype=torch.int64).T.contiguous()
