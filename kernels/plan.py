"""Configurations of the transformer kernels, and their launches."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from psfast.kernels import blocks, losses, points, tail, weights
from torch import Tensor, nn

MODES = ("fp16x3", "tf32x3", "fp32")
FALLBACK = "tf32x3"  # fp16's range ends at 65,504; tf32 has that of fp32
WEIGHT_SCALE = 64.0  # keeps the low halves of small weights out of fp16's subnormal numbers
PROGRAMS = 128  # about as many as a large GPU runs at once
_REPAIR_POINTS = 32
_REPAIR_TILES = 8
_SORTED = 1024  # trial points from which on their order pays
_STAGED_BYTES = 2**25
_BEHIND_BYTES = 2**26


class Cut(NamedTuple):
    """How a kernel is cut: rows and warps of a program, and what its inner loops take at a time."""

    rows: int
    warps: int
    hidden: int
    queries: int = 16  # columns of whole heads, one head at least
    vocabulary: int = 16
    staged: int = 0  # normalised columns at a time, where they do not stay on chip
    stages: int = 2


class Config(NamedTuple):
    """How the two kernels are cut for one model."""

    blocks: Cut
    tail: Cut


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
    def table_bits(self) -> int:
        return (12 * self.n_layers + 6).bit_length()


def padded_positions(T: int) -> int:
    """The positions that a sequence of T takes in a tile."""
    return _power_of_two(T)


# (compute capability, padded d_model, positions) -> how ``blocks`` is cut, and without the
# positions ``tail``. Each fits into shared memory and, with the Triton that we pin, is free of
# spills in fp16x3: `python -m psfast.kernels.compile` checks all of them. Triton 3.6 spills in
# four of them (up to 1.4 KB), with dropout alone and outside the inner loops. Four warps a tile
# of 64 rows: eight would compute some products twice (which only the one for 64 positions bears;
# with four it spills).
BLOCKS = {
    (9, 64, 16): Cut(64, 4, hidden=32, queries=32),
    (9, 64, 32): Cut(64, 4, hidden=64, queries=32),
    (9, 64, 64): Cut(64, 8, hidden=32, queries=32, staged=16),
    (9, 128, 16): Cut(64, 4, hidden=64, queries=32, staged=32),
    (9, 128, 32): Cut(64, 4, hidden=32, queries=16, staged=32),
    (9, 256, 16): Cut(32, 8, hidden=64, queries=64, staged=64),
    (9, 256, 32): Cut(32, 8, hidden=64, queries=64, staged=64),
    (8, 64, 16): Cut(64, 4, hidden=16, staged=32),
    (8, 64, 32): Cut(32, 4, hidden=32, queries=64),
    (8, 128, 16): Cut(32, 8, hidden=64, queries=64, staged=64),
    (8, 128, 32): Cut(32, 8, hidden=64, queries=64, staged=64),
    (8, 256, 16): Cut(32, 8, hidden=64, queries=64, staged=64),
    (8, 256, 32): Cut(32, 8, hidden=64, queries=64, staged=64),
}
TAILS = {
    (9, 64): Cut(64, 4, hidden=64, vocabulary=128),
    (9, 128): Cut(32, 4, hidden=64, vocabulary=64, staged=64),
    (9, 256): Cut(32, 8, hidden=64, vocabulary=128, staged=64),
    (8, 64): Cut(32, 4, hidden=64, vocabulary=128),
    (8, 128): Cut(32, 8, hidden=64, vocabulary=64, staged=64),
    (8, 256): Cut(32, 8, hidden=64, vocabulary=64, staged=64),
}


def choose_config(sizes: Sizes, capability: int, mode: str) -> Config | None:
    """The configuration for these sizes; None if there is none."""
    # wgmma is Hopper's alone; what came after it has mma, as Ampere has.
    chip, width = 9 if capability == 9 else min(capability, 8), max(64, sizes.padded_model)
    chosen = BLOCKS.get((chip, width, sizes.positions))
    if chosen is None:
        return None
    if mode == "fp32":
        # The CUDA cores take their operands from registers: the smallest tiles there are.
        small = Cut(16, 8, hidden=16, staged=16, stages=1)
        return Config(small._replace(rows=sizes.positions), small)
    return Config(chosen, TAILS[chip, width])


def layout(sizes: Sizes, config: Config) -> dict:
    """How weights and cached columns lie, for all kernels."""
    DK = sizes.padded_head
    return {
        "DP": sizes.padded_model,
        "D_K": sizes.d_model // sizes.n_heads,
        "DK": DK,
        "AP": _round_up(sizes.n_heads, _heads_at_a_time(sizes, config)) * DK,
        "FP": _round_up(sizes.d_ff, max(cut.hidden for cut in config)),
    }


def describe_constants(sizes: Sizes, config: Config) -> dict:
    """The compile-time arguments of ``points.describe``."""
    return {**layout(sizes, config), "TABLE_BITS": sizes.table_bits, "BLOCK": 128}


def blocks_constants(sizes: Sizes, config: Config, mode: str, *, cache: bool, repair: bool) -> dict:
    """The compile-time arguments of ``blocks.run_blocks``."""
    return {
        **layout(sizes, config),
        **_of_cut(sizes, config.blocks, mode),
        "TP": sizes.positions,
        "HC": _heads_at_a_time(sizes, config),
        "CACHE": cache,
        "REPAIR": repair,
        "POINTS": _REPAIR_POINTS if repair and not cache else 1,
    }


def tail_constants(
    sizes: Sizes, config: Config, mode: str, each: int, *, cache: bool, repair: bool
) -> dict:
    """The compile-time arguments of ``tail.run_tail``; each: rows of a trial point in a tile."""
    laid = layout(sizes, config)
    return {
        **{name: laid[name] for name in ("DP", "AP", "FP")},
        **_of_cut(sizes, config.tail, mode),
        "EACH": each,
        "V": sizes.vocab_size,
        "VP": padded_vocabulary(sizes, config),
        "VC": _vocabulary_at_a_time(sizes, config),
        "CACHE": cache,
        "REPAIR": repair,
        "TILES": _REPAIR_TILES if repair and not cache else 1,
    }


def padded_vocabulary(sizes: Sizes, config: Config) -> int:
    return _round_up(sizes.vocab_size, _vocabulary_at_a_time(sizes, config))


def _heads_at_a_time(sizes: Sizes, config: Config) -> int:
    most = _power_of_two(sizes.n_heads, least=1)
    return max(1, min(most, config.blocks.queries // sizes.padded_head))


def _vocabulary_at_a_time(sizes: Sizes, config: Config) -> int:
    return min(config.tail.vocabulary, _power_of_two(sizes.vocab_size))


def _of_cut(sizes: Sizes, cut: Cut, mode: str) -> dict:
    return {
        "M": cut.rows,
        "D": sizes.d_model,
        "KC": min(cut.staged or sizes.padded_model, sizes.padded_model),
        "FC": cut.hidden,
        "SCALE": WEIGHT_SCALE,
        "MODE": mode,
        "DROPOUT": sizes.dropout,
    }


class Rows(NamedTuple):
    """A batch as the kernels read it.

    about: (3, R) int32: token (-1: padding), place among the packed rows (-1: not supervised),
        and whether a supervised row can see this one
    packed: (2, C) int32: a supervised row's place among the R (-1: padding), and its target
    keep: (L, R, DP) int8 dropout masks, or one element without dropout
    count: (1,) float32: supervised rows
    inv_keep: 1 / (1 - dropout)
    groups: of sequences; each fills a tile of ``blocks``
    each: packed rows of a trial point in a tile of ``tail``
    """

    about: Tensor
    packed: Tensor
    keep: Tensor
    count: Tensor
    inv_keep: float
    groups: int
    each: int

    @property
    def parts(self) -> int:
        """Tiles of ``tail`` that one trial point's rows take."""
        return self.packed.shape[1] // self.each

    def take_over(self, other: "Rows") -> bool:
        """Become another batch in place, where a captured graph reads it; False if it differs
        in more than what the tensors hold."""
        tensors = list(zip(self[:4], other[:4], strict=True))
        if self[4:] != other[4:] or any(mine.shape != its.shape for mine, its in tensors):
            return False
        for mine, its in tensors:
            mine.copy_(its)
        return True


class Scratch(NamedTuple):
    """What the kernels of one launch hand on: what the trial points are, packed rows and whether
    they are reached, and the normalised rows of a wide model."""

    points: Tensor
    delta: Tensor
    behind: Tensor
    reached: Tensor
    staged: Tensor


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
        self.scratch: Scratch | None = None
        self.device = trainable[0].device
        self._all = torch.zeros(1, dtype=torch.int32, device=self.device)  # from block 0 on
        self._layout = layout(sizes, config)
        ids = weights.parameter_ids(model, trainable)
        order = weights.pack_order(model, ids, self._layout, padded_vocabulary(sizes, config))
        self.order = order.to(torch.int32).to(self.device)
        table = weights.tensor_table(model, trainable, 1 << sizes.table_bits)
        self.table = table.to(self.device)
        self.n_params = sum(p.numel() for p in trainable)
        self.token_offset = ids[model.token_embedding.weight].flatten()[0].item()
        self.position_offset = ids[model.position_embedding].flatten()[0].item()
        self.eps = model.final_norm.eps
        d_k = sizes.d_model // sizes.n_heads
        self.score_scale = tail.LOG2E.value / d_k**0.5

    def rows(self, tokens: Tensor, targets: Tensor, masks: Tensor | None, dropout: float) -> Rows:
        """The batch as the kernels read it.

        tokens, targets: (B, T) integers, a target of -1 not supervised; masks: (L, B, T, d_model)
        bool, what each block's dropout keeps
        """
        B, T = tokens.shape
        TP, DP = self.sizes.positions, self.sizes.padded_model
        sequences = self.config.blocks.rows // TP
        groups = -(-B // sequences)
        pad = (0, TP - T, 0, groups * sequences - B)
        supervised = targets >= 0
        seen = supervised.flip(1).cummax(1).values.flip(1)
        tokens, targets, seen = (
            F.pad(rows.int(), pad, value=-1).flatten() for rows in (tokens, targets, seen)
        )
        at = (targets >= 0).nonzero()[:, 0]
        count = len(at)
        each = min(self.config.tail.rows, _power_of_two(count, least=4))
        place = torch.full_like(targets, -1)
        place[at] = torch.arange(count, dtype=torch.int32, device=self.device)
        packed = torch.stack([at.int(), targets[at]])
        packed = F.pad(packed, (0, _round_up(max(1, count), each) - count), value=-1)
        if masks is None:
            keep = torch.ones(1, dtype=torch.int8, device=self.device)
        else:
            keep = F.pad(masks.to(torch.int8), (0, DP - self.sizes.d_model, *pad))
        about = torch.stack([tokens, place, seen])
        counted = torch.full((1,), count, dtype=torch.float32, device=self.device)
        inv_keep = 1.0 / (1.0 - dropout)
        return Rows(about, packed, keep.contiguous(), counted, inv_keep, groups, each)

    def cache_sizes(self, rows: Rows) -> dict[str, int]:
        """Elements of every tensor of a ``Cache``."""
        R, L = rows.about.shape[1], self.sizes.n_layers
        DP, AP, FP = (self._layout[name] for name in ("DP", "AP", "FP"))
        packed = len(self.order)
        return {
            "w": packed,
            "hi": packed,
            "lo": packed,
            "x": (2 * L + 1) * R * DP,
            "qkv": L * 3 * R * AP,
            "columns": (L * points.columns_at("end", DP, AP, FP) + DP) * R,
            "nll": rows.packed.shape[1],
            "summed": rows.parts,
        }

    def new_cache(self, rows: Rows) -> Cache:
        kinds = {"hi": torch.float16, "lo": torch.float16, "summed": torch.float64}
        return Cache(
            **{
                name: torch.empty(size, dtype=kinds.get(name, torch.float32), device=self.device)
                for name, size in self.cache_sizes(rows).items()
            }
        )

    def refresh(self, cache: Cache, params: Tensor, rows: Rows) -> Tensor:
        """Fill ``cache`` at ``params`` (N,); returns the loss there, (1,) float64."""
        self.fill(cache, params, rows, self._all)
        return self.loss(cache, rows)

    def fill(self, cache: Cache, params: Tensor, rows: Rows, first: Tensor) -> None:
        """Fill ``cache`` at ``params`` (N,) from block ``first`` (1,) int32 on: n_layers is what
        lies behind the last attention, above it there is nothing to fill."""
        size = len(self.order)
        with torch.cuda.device_of(params):
            weights.pack[(-(-size // 1024),)](
                params,
                self.order,
                cache.w,
                cache.hi,
                cache.lo,
                size,
                first,
                self.sizes.n_layers,
                SCALE=WEIGHT_SCALE,
                BLOCK=1024,
            )
        self._launch(None, None, cache.summed, params, cache, rows, first)

    def loss(self, cache: Cache, rows: Rows) -> Tensor:
        """The loss of the cached incumbent, (1,) float64."""
        zero = torch.zeros(1, rows.parts, dtype=torch.float32, device=self.device)
        return self._reduce(cache, zero, rows)

    def losses(
        self, cache: Cache, params: Tensor, rows: Rows, index: Tensor, delta: Tensor
    ) -> Tensor:
        """index: (K,) int64; delta: (K,) float32 -> (K,) float64, at the cached incumbent."""
        # Trial points that share a tile then mostly start at the same place, the long ones first.
        order = index.argsort() if len(index) >= _SORTED else None
        if order is not None:
            index, delta = index[order], delta[order]
        partial = torch.empty(len(index), rows.parts, dtype=torch.float32, device=self.device)
        self.differences(cache, params, rows, index, delta, partial)
        found = self._reduce(cache, partial, rows)
        return found if order is None else torch.empty_like(found).scatter_(0, order, found)

    def differences(
        self, cache: Cache, params: Tensor, rows: Rows, index: Tensor, delta: Tensor, out: Tensor
    ) -> None:
        """What K trial points change of each part's summed loss: ``out`` (K, parts) float32."""
        most = self.most(rows)
        for start in range(0, len(index), most):
            block = slice(start, start + most)
            self._launch(index[block], delta[block], out[block], params, cache, rows)

    def most(self, rows: Rows) -> int:
        """Trial points of one launch: what its kernels hand on should stay in the L2."""
        DP = self.sizes.padded_model
        most = _BEHIND_BYTES // (4 * rows.packed.shape[1] * DP)
        for cut, tiles in zip(self.config, (rows.groups, rows.parts), strict=True):
            if cut.staged:
                most = min(most, _STAGED_BYTES // (4 * cut.rows * DP * tiles))
        return max(1, most)

    def _launch(
        self, index, delta, out, params, tensors, rows, first: Tensor | None = None
    ) -> None:
        """All kernels of one launch: for trial points, or to fill the cache from ``first`` on."""
        cache = first is not None
        K = 1 if cache else len(index)
        scratch = self._scratch(K, rows, cache)
        if not cache:
            constants = describe_constants(self.sizes, self.config)
            with torch.cuda.device_of(params):
                points.describe[(-(-K // constants["BLOCK"]),)](
                    index,
                    delta,
                    self.table,
                    params,
                    scratch.points,
                    scratch.delta,
                    K,
                    self.n_params,
                    self.sizes.n_layers,
                    **constants,
                )
        self._run(K, scratch, out, params, tensors, rows, self.mode, first, False)
        if self.mode == "fp16x3":
            self._run(K, scratch, out, params, tensors, rows, FALLBACK, first, True)

    def _run(self, K, scratch, out, params, tensors, rows, mode, first, repair) -> None:
        """Both halves of the model; repair: where ``out`` is not finite."""
        R, C, L = rows.about.shape[1], rows.packed.shape[1], self.sizes.n_layers
        kinds = {"cache": first is not None, "repair": repair}
        for_blocks = blocks_constants(self.sizes, self.config, mode, **kinds)
        for_tail = tail_constants(self.sizes, self.config, mode, rows.each, **kinds)
        in_program = for_tail["TILES"] * (for_tail["M"] // rows.each)
        staged = scratch.staged.view(torch.float16) if mode == "fp16x3" else scratch.staged
        first = self._all if first is None else first
        given = (scratch.points, scratch.delta, out, scratch.behind, scratch.reached, first)
        packed = (tensors.w, tensors.hi, tensors.lo)
        with torch.cuda.device_of(params):
            blocks.run_blocks[(-(-K // for_blocks["POINTS"]), rows.groups)](
                *given,
                params,
                *packed,
                rows.about,
                rows.keep,
                tensors.x,
                tensors.qkv,
                tensors.columns,
                staged,
                K,
                R,
                C,
                rows.parts,
                L,
                self.token_offset,
                self.position_offset,
                self.eps,
                self.score_scale,
                rows.inv_keep,
                **for_blocks,
                **_options(self.config.blocks),
            )
            tail.run_tail[(-(-K // in_program), rows.parts)](
                *given,
                *packed,
                rows.packed,
                rows.keep,
                tensors.x,
                tensors.columns,
                tensors.nll,
                staged,
                K,
                R,
                L,
                self.eps,
                rows.inv_keep,
                **for_tail,
                **_options(self.config.tail),
            )

    def _scratch(self, K: int, rows: Rows, cache: bool) -> Scratch:
        DP, C = self.sizes.padded_model, rows.packed.shape[1]
        tiles = zip(self.config, (K * rows.groups, K * rows.parts), strict=True)
        staged = [programs * cut.rows * DP for cut, programs in tiles if cut.staged]
        points_and_rows = (0, 0, 0, 0) if cache else (points.FIELDS * K, K, K * C * DP, K * C)
        need = [max(1, n) for n in (*points_and_rows, max(staged, default=0))]
        have = [len(part) for part in self.scratch] if self.scratch else [0] * len(need)
        if any(n > h for n, h in zip(need, have, strict=True)):
            f32 = torch.float32
            kinds = (torch.int32, f32, f32, torch.int8, f32)
            self.scratch = Scratch(
                *(
                    torch.empty(max(n, h), dtype=kind, device=self.device)
                    for n, h, kind in zip(need, have, kinds, strict=True)
                )
            )
        return self.scratch

    def _reduce(self, cache: Cache, partial: Tensor, rows: Rows) -> Tensor:
        K = len(partial)
        loss = torch.empty(K, dtype=torch.float64, device=self.device)
        with torch.cuda.device_of(partial):
            losses.reduce_losses[(-(-K // 128),)](
                cache.summed, partial, loss, rows.count, K, rows.parts, BLOCK=128
            )
        return loss


def _options(cut: Cut) -> dict:
    return {"num_warps": cut.warps, "num_stages": cut.stages, "enable_fp_fusion": True}


def _power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n; 16 is the least that tl.dot takes."""
    return max(least, 1 << max(0, n - 1).bit_length())


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to
