"""Configurations of the transformer kernels, the weights' layout for them, the launches."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from psfast.kernels import losses as loss_kernels
from psfast.kernels import transformer as kernel
from torch import Tensor, nn

MODES = ("fp16x3", "tf32x3", "fp32")
FALLBACK = "tf32x3"  # fp16's range ends at 65,504; tf32 has that of fp32
WEIGHT_SCALE = 64.0  # keeps the low halves of small weights out of fp16's subnormal numbers
PROGRAMS = 128  # about as many as a large GPU runs at once
_REPAIR_POINTS = 32
_STAGED_BYTES = 2**25
_END = 2**63 - 1


class Config(NamedTuple):
    """How a kernel is cut: rows and warps of a program, and what its inner loops take at a time."""

    rows: int
    warps: int
    heads: int
    hidden: int
    vocabulary: int
    stages: int
    staged: int = 0  # normalised columns at a time, where they do not stay on chip


class Sizes(NamedTuple):
    """A transformer's sizes; ``positions`` is the padded length of its sequences."""

    d_model: int
    n_heads: int
    d_ff: int
    vocab_size: int
    n_layers: int
    positions: int
    dropout: bool

    @property
    def padded_model(self) -> int:
        return _power_of_two(self.d_model)

    @property
    def padded_head(self) -> int:
        return _power_of_two(self.d_model // self.n_heads)

    @property
    def tensors(self) -> int:
        return max(32, _power_of_two(12 * self.n_layers + 7))


def padded_positions(T: int) -> int:
    """The positions that a sequence of T takes in a tile."""
    return _power_of_two(T)


# (compute capability, padded d_model, positions) -> configuration. Each is free of spills in
# fp16x3 and fits into shared memory: `python -m psfast.kernels.compile` checks all of them.
CONFIGS = {
    (9, 64, 16): Config(64, 4, 2, 32, 64, 2),
    (9, 64, 32): Config(64, 8, 2, 32, 64, 2),
    (9, 64, 64): Config(64, 8, 1, 32, 32, 2, staged=32),
    (9, 128, 16): Config(64, 8, 1, 16, 32, 2, staged=32),
    (9, 128, 32): Config(64, 8, 1, 16, 32, 2, staged=32),
    (9, 256, 16): Config(32, 8, 1, 32, 16, 2, staged=32),
    (9, 256, 32): Config(32, 8, 1, 32, 16, 2, staged=32),
    (8, 64, 16): Config(64, 4, 1, 16, 32, 2),
    (8, 64, 32): Config(32, 4, 1, 32, 32, 2),
    (8, 128, 16): Config(32, 8, 1, 16, 32, 2, staged=32),
    (8, 128, 32): Config(32, 8, 1, 16, 32, 2, staged=32),
    (8, 256, 16): Config(32, 8, 1, 16, 16, 2, staged=32),
    (8, 256, 32): Config(32, 8, 1, 16, 16, 2, staged=32),
}


def choose_config(sizes: Sizes, capability: int, mode: str) -> Config | None:
    """The configuration for these sizes; None if there is none."""
    config = CONFIGS.get((min(capability, 9), max(64, sizes.padded_model), sizes.positions))
    if config is not None and mode == "fp32":
        # The CUDA cores take their operands from registers: the smallest tiles there are.
        return Config(sizes.positions, 8, 1, 16, 16, 1, staged=16)
    return config


def constants(sizes: Sizes, config: Config, mode: str, *, cache: bool, repair: bool) -> dict:
    """The compile-time arguments of ``transformer.evaluate``."""
    DK = sizes.padded_head
    return {
        "M": config.rows,
        "TP": sizes.positions,
        "D": sizes.d_model,
        "DP": sizes.padded_model,
        "D_K": sizes.d_model // sizes.n_heads,
        "DK": DK,
        "KC": min(config.staged or sizes.padded_model, sizes.padded_model),
        "HC": config.heads,
        "AP": _round_up(sizes.n_heads, config.heads) * DK,
        "FP": _round_up(sizes.d_ff, config.hidden),
        "FC": config.hidden,
        "V": sizes.vocab_size,
        "VP": _round_up(sizes.vocab_size, config.vocabulary),
        "VC": config.vocabulary,
        "TENSORS": sizes.tensors,
        "SCALE": WEIGHT_SCALE,
        "MODE": mode,
        "DROPOUT": sizes.dropout,
        "CACHE": cache,
        "REPAIR": repair,
        "POINTS": _REPAIR_POINTS if repair and not cache else 1,
    }


class Rows(NamedTuple):
    """A batch as the kernel reads it.

    about: (3, R) int32: token (-1: padding), target (-1: not supervised), and whether a
        supervised row can see this one
    keep: (L, R, DP) int8 dropout masks, or one element without dropout
    inv_keep: 1 / (1 - dropout)
    count: supervised rows
    groups: of sequences; each fills one tile
    """

    about: Tensor
    keep: Tensor
    inv_keep: float
    count: float
    groups: int

    def take_over(self, other: "Rows") -> bool:
        """Become another batch in place, where a captured graph reads it; False if it differs
        in more than what the tensors hold."""
        if self[2:] != other[2:] or self.keep.shape != other.keep.shape:
            return False
        self.about.copy_(other.about)
        self.keep.copy_(other.keep)
        return True


class Cache(NamedTuple):
    """What the starts of trial points read, computed by the kernel at one set of parameters."""

    w: Tensor
    hi: Tensor
    lo: Tensor
    x: Tensor
    qkv: Tensor
    columns: Tensor
    nll: Tensor
    summed: Tensor


class TransformerPlan:
    """Launches the kernels for one model's sizes and one batch's shape.

    model: a ``DecoderOnlyTransformer``; trainable: its parameters that ``index`` counts
    through, in order. The other ones are read, never changed.

    mode: how products are computed: "fp16x3" and "tf32x3" in three tensor-core passes, "fp32"
    on the CUDA cores. fp16x3 evaluates again with tf32x3 what leaves fp16's range.

    No launch waits for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: list[nn.Parameter],
        sizes: Sizes,
        config: Config,
        mode: str,
    ):
        self.sizes, self.config, self.mode = sizes, config, mode
        self.scratch: Tensor | None = None
        self.device = trainable[0].device
        ids = parameter_ids(model, trainable)
        packed = pack_order(
            model, ids, constants(sizes, self.config, mode, cache=False, repair=False)
        )
        self.order = packed.to(torch.int32).to(self.device)
        self.table = tensor_table(model, trainable, sizes.tensors).to(self.device)
        self.n_params = sum(p.numel() for p in trainable)
        self.token_offset = ids[model.token_embedding.weight].flatten()[0].item()
        self.position_offset = ids[model.position_embedding].flatten()[0].item()
        self.eps = model.final_norm.eps
        d_k = sizes.d_model // sizes.n_heads
        self.score_scale = kernel.LOG2E.value / d_k**0.5

    def rows(self, tokens: Tensor, targets: Tensor, masks: Tensor | None, dropout: float) -> Rows:
        """The batch as the kernel reads it.

        tokens, targets: (B, T) integers, a target of -1 not supervised; masks: (L, B, T, d_model)
        bool, what each block's dropout keeps
        """
        B, T = tokens.shape
        TP, DP = self.sizes.positions, self.sizes.padded_model
        sequences = self.config.rows // TP
        groups = -(-B // sequences)
        pad = (0, TP - T, 0, groups * sequences - B)
        seen = (targets >= 0).flip(1).cummax(1).values.flip(1)
        about = [F.pad(rows.int(), pad, value=-1) for rows in (tokens, targets, seen)]
        if masks is None:
            keep = torch.ones(1, dtype=torch.int8, device=self.device)
        else:
            keep = F.pad(masks.to(torch.int8), (0, DP - self.sizes.d_model, *pad))
        return Rows(
            torch.stack(about).reshape(3, -1).contiguous(),
            keep.contiguous(),
            1.0 / (1.0 - dropout),
            (targets >= 0).sum().item(),
            groups,
        )

    def cache_sizes(self, groups: int) -> dict[str, int]:
        """Elements of every tensor of a ``Cache``."""
        c = constants(self.sizes, self.config, self.mode, cache=True, repair=False)
        R, L = groups * c["M"], self.sizes.n_layers
        columns = L * (2 * c["DP"] + c["AP"] + c["FP"]) + c["DP"]
        packed = len(self.order)
        return {
            "w": packed,
            "hi": packed,
            "lo": packed,
            "x": (2 * L + 1) * R * c["DP"],
            "qkv": L * 3 * R * c["AP"],
            "columns": columns * R,
            "nll": R,
            "summed": groups,
        }

    def new_cache(self, rows: Rows) -> Cache:
        kinds = {"hi": torch.float16, "lo": torch.float16, "summed": torch.float64}
        return Cache(
            **{
                name: torch.empty(size, dtype=kinds.get(name, torch.float32), device=self.device)
                for name, size in self.cache_sizes(rows.groups).items()
            }
        )

    def refresh(self, cache: Cache, params: Tensor, rows: Rows) -> Tensor:
        """Fill ``cache`` at ``params`` (N,); returns the loss there, (1,) float64."""
        self.fill(cache, params, rows)
        return self.loss(cache, rows)

    def fill(self, cache: Cache, params: Tensor, rows: Rows) -> None:
        """Fill ``cache`` at ``params`` (N,)."""
        size = len(self.order)
        with torch.cuda.device_of(params):
            kernel.pack[(-(-size // 1024),)](
                params,
                self.order,
                cache.w,
                cache.hi,
                cache.lo,
                size,
                SCALE=WEIGHT_SCALE,
                BLOCK=1024,
            )
        none = cache.summed  # of the right device, and never read
        self._launch((1, rows.groups), none, none, cache.summed, params, cache, rows, 1, cache=True)

    def loss(self, cache: Cache, rows: Rows) -> Tensor:
        """The loss of the cached incumbent, (1,) float64."""
        zero = torch.zeros(1, rows.groups, dtype=torch.float32, device=self.device)
        return self._reduce(cache, zero, rows)

    def losses(
        self, cache: Cache, params: Tensor, rows: Rows, index: Tensor, delta: Tensor
    ) -> Tensor:
        """index: (K,) int64; delta: (K,) float32 -> (K,) float64, at the cached incumbent."""
        partial = torch.empty(len(index), rows.groups, dtype=torch.float32, device=self.device)
        self.differences(cache, params, rows, index, delta, partial)
        return self._reduce(cache, partial, rows)

    def differences(
        self, cache: Cache, params: Tensor, rows: Rows, index: Tensor, delta: Tensor, out: Tensor
    ) -> None:
        """What K trial points change of each group's summed loss: ``out`` (K, groups) float32."""
        K = len(index)
        for start in range(0, K, self._most(rows)):
            part = slice(start, start + self._most(rows))
            points = len(index[part])
            self._launch(
                (points, rows.groups),
                index[part],
                delta[part],
                out[part],
                params,
                cache,
                rows,
                points,
                cache=False,
            )

    def _most(self, rows: Rows) -> int:
        """Trial points of one launch: with rows staged in memory, as many as stay in the L2."""
        if not self.config.staged:
            return _END
        tile = 4 * self.config.rows * self.sizes.padded_model
        return max(1, _STAGED_BYTES // (tile * rows.groups))

    def _launch(self, grid, index, delta, out, params, tensors, rows, K, *, cache: bool) -> None:
        self._run(grid, index, delta, out, params, tensors, rows, K, self.mode, cache, False)
        if self.mode == "fp16x3":
            points = 1 if cache else _REPAIR_POINTS
            grid = (-(-K // points), grid[1])
            self._run(grid, index, delta, out, params, tensors, rows, K, FALLBACK, cache, True)

    def _run(self, grid, index, delta, out, params, tensors, rows, K, mode, cache, repair) -> None:
        with torch.cuda.device_of(params):
            kernel.evaluate[grid](
                index,
                delta,
                out,
                params,
                tensors.w,
                tensors.hi,
                tensors.lo,
                self.table,
                rows.about,
                rows.keep,
                tensors.x,
                tensors.qkv,
                tensors.columns,
                tensors.nll,
                self._staged(grid, mode),
                K,
                rows.groups * self.config.rows,
                self.n_params,
                self.sizes.n_layers,
                self.token_offset,
                self.position_offset,
                self.eps,
                self.score_scale,
                rows.inv_keep,
                **constants(self.sizes, self.config, mode, cache=cache, repair=repair),
                num_warps=self.config.warps,
                num_stages=self.config.stages,
                enable_fp_fusion=True,
            )

    def _staged(self, grid: tuple[int, int], mode: str) -> Tensor:
        """Where the programs of a launch put their normalised rows; one element if nowhere."""
        per_program = self.config.rows * self.sizes.padded_model if self.config.staged else 0
        size = max(1, grid[0] * grid[1] * per_program)
        if self.scratch is None or len(self.scratch) < size:
            self.scratch = torch.empty(size, dtype=torch.float32, device=self.device)
        return self.scratch.view(torch.float16) if mode == "fp16x3" else self.scratch

    def _reduce(self, cache: Cache, partial: Tensor, rows: Rows) -> Tensor:
        K = len(partial)
        loss = torch.empty(K, dtype=torch.float64, device=self.device)
        with torch.cuda.device_of(partial):
            loss_kernels.reduce_losses[(-(-K // 128),)](
                cache.summed, partial, loss, K, rows.groups, float(rows.count), BLOCK=128
            )
        return loss


def parameter_ids(model: nn.Module, trainable: list[nn.Parameter]) -> dict:
    """Every parameter's indices, in its shape: the trainable ones in order, then the others."""
    fixed = [p for p in model.parameters() if not any(p is q for q in trainable)]
    ids, start = {}, 0
    for p in [*trainable, *fixed]:
        ids[p] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    return ids


def pack_order(model: nn.Module, ids: dict, c: dict) -> Tensor:
    """For every place of the packed weights the parameter's index there, -1 for padding.

    Per block: ln1, queries, keys, values (each in x out), their biases, out, its bias, ln2,
    ff in and out with their biases; behind the blocks: final LayerNorm, head, its bias.
    """
    DP, DK, AP, FP, VP = c["DP"], c["DK"], c["AP"], c["FP"], c["VP"]
    d_k = c["D_K"]

    def vector(p: nn.Parameter, size: int) -> Tensor:
        return F.pad(ids[p], (0, size - len(ids[p])), value=-1)

    def matrix(p: nn.Parameter, rows: int, cols: int) -> Tensor:
        w = ids[p].T
        return F.pad(w, (0, cols - w.shape[1], 0, rows - w.shape[0]), value=-1)

    def heads(w: Tensor) -> Tensor:
        """(H, d_k, n) -> (AP, n)"""
        w = F.pad(w, (0, 0, 0, DK - d_k), value=-1).flatten(0, 1)
        return F.pad(w, (0, 0, 0, AP - len(w)), value=-1)

    parts = []
    for block in model.blocks:
        qkv, out = block.attention.qkv, block.attention.out
        H = block.attention.n_heads
        weight, bias = ids[qkv.weight].view(H, 3, d_k, -1), ids[qkv.bias].view(H, 3, d_k, 1)
        parts += [vector(block.ln1.weight, DP), vector(block.ln1.bias, DP)]
        for part in range(3):
            w = heads(weight[:, part]).T
            parts.append(F.pad(w, (0, 0, 0, DP - len(w)), value=-1))
        parts += [heads(bias[:, part]) for part in range(3)]
        w = heads(ids[out.weight].T.reshape(H, d_k, -1))
        parts.append(F.pad(w, (0, DP - w.shape[1]), value=-1))
        parts += [vector(p, DP) for p in (out.bias, block.ln2.weight, block.ln2.bias)]
        parts += [matrix(block.ff[0].weight, DP, FP), vector(block.ff[0].bias, FP)]
        parts += [matrix(block.ff[2].weight, FP, DP), vector(block.ff[2].bias, DP)]
    norm, head = model.final_norm, model.head
    parts += [vector(norm.weight, DP), vector(norm.bias, DP)]
    parts += [matrix(head.weight, DP, VP), vector(head.bias, VP)]
    return torch.cat([part.flatten() for part in parts])


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

    note(model.token_embedding.weight, kernel.TOKEN, 0, 0)
    note(model.position_embedding, kernel.POSITION, 0, 0)
    for i, block in enumerate(model.blocks):
        pair(block.ln1, kernel.LN1_WEIGHT, kernel.LN1_BIAS, i, 2 * i)
        pair(block.attention.qkv, kernel.QKV_WEIGHT, kernel.QKV_BIAS, i, 2 * i + 1)
        pair(block.attention.out, kernel.OUT_WEIGHT, kernel.OUT_BIAS, i, 2 * i + 1)
        pair(block.ln2, kernel.LN2_WEIGHT, kernel.LN2_BIAS, i, 2 * i + 1)
        pair(block.ff[0], kernel.FF1_WEIGHT, kernel.FF1_BIAS, i, 2 * i + 2)
        pair(block.ff[2], kernel.FF2_WEIGHT, kernel.FF2_BIAS, i, 2 * i + 2)
    pair(model.final_norm, kernel.NORM_WEIGHT, kernel.NORM_BIAS, L, 2 * L)
    pair(model.head, kernel.HEAD_WEIGHT, kernel.HEAD_BIAS, L, 2 * L)

    table, start = [], 0
    for p in trainable:
        table.append((start, *what[p]))
        start += p.numel()
    table += [(_END, 0, 0, 0, 1)] * (size - len(table))
    return torch.tensor(table, dtype=torch.int64).T.contiguous()


def _power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n; 16 is the least that tl.dot takes."""
    return max(least, 1 << (n - 1).bit_length())


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to
