"""Launches of the transformer kernels: what they read, and what they hand on."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from psfast.kernels import blocks, configs, losses, points, tail, weights
from psfast.kernels.configs import Config, Sizes, power_of_two
from torch import Tensor, nn

PROGRAMS = 128  # about as many as a large GPU runs at once
_STAGED_BYTES = 2**25
_BEHIND_BYTES = 2**26


class Rows(NamedTuple):
    """A batch as the kernels read it.

    about: (3, R) int32: token (-1: padding), place among the packed rows (-1: not supervised),
        and whether a supervised row can see this one
    packed: (2, C) int32: a supervised row's place among the R (-1: padding), and its target
    keep: (L, R, DP) int8 dropout masks, or one element without dropout
    count: (1,) float32: supervised rows
    inv_keep: 1 / (1 - dropout), 0 where all is dropped
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


def _with_room(tiles: int, room: int) -> int:
    """``room`` where ``tiles`` leave no more than half of it empty: a tile of padding costs little,
    another shape new graphs. No loss depends on it."""
    return room if tiles <= room <= 2 * tiles else tiles


class Scratch(NamedTuple):
    """What the kernels of one launch hand on: what the trial points are, packed rows and whether
    they are reached, and the normalised rows of a wide model."""

    points: Tensor
    delta: Tensor
    behind: Tensor
    reached: Tensor
    staged: Tensor


class Cache(NamedTuple):
    """What the starts of trial points read, computed by the kernel at one set of parameters.

    summed: the summed loss of each part of the rows, then 1 if ``FALLBACK`` filled the cache, 0
        if not
    """

    w: Tensor
    hi: Tensor
    lo: Tensor
    x: Tensor
    qkv: Tensor
    columns: Tensor
    nll: Tensor
    summed: Tensor


class Operands(NamedTuple):
    """What a launch works on; params: (N,) float32, the flat parameters."""

    scratch: Scratch
    cache: Cache
    params: Tensor
    rows: Rows


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
        self.repairs = mode == "fp16x3"  # the other modes have fp32's range
        self.device = trainable[0].device
        self._all = torch.zeros(1, dtype=torch.int32, device=self.device)  # from block 0 on
        self._layout = configs.layout(sizes, config)
        ids = weights.parameter_ids(model, trainable)
        order = weights.pack_order(
            model, ids, self._layout, configs.padded_vocabulary(sizes, config)
        )
        self.order = order.to(torch.int32).to(self.device)
        self.places = weights.places(order, sum(map(torch.numel, ids.values()))).to(self.device)
        table = weights.tensor_table(model, trainable, 1 << sizes.table_bits)
        self.table = table.to(self.device)
        self.n_params = sum(p.numel() for p in trainable)
        self.token_offset = ids[model.token_embedding.weight].flatten()[0].item()
        self.position_offset = ids[model.position_embedding].flatten()[0].item()
        self.eps = model.final_norm.eps
        d_k = sizes.d_model // sizes.n_heads
        self.score_scale = tail.LOG2E.value / d_k**0.5

    def rows(
        self,
        tokens: Tensor,
        targets: Tensor,
        masks: Tensor | None,
        dropout: float,
        before: Rows | None = None,
    ) -> Rows:
        """The batch as the kernels read it.

        tokens, targets: (B, T) integers, a target of -1 not supervised; masks: (L, B, T, d_model)
        bool, what each block's dropout keeps; before: a batch whose place this one may take, padded
        """
        B, T = tokens.shape
        TP, DP = self.sizes.positions, self.sizes.padded_model
        sequences = self.config.blocks.rows // TP
        groups = _with_room(-(-B // sequences), before.groups if before else 0)
        pad = (0, TP - T, 0, groups * sequences - B)
        supervised = targets >= 0
        seen = supervised.flip(1).cummax(1).values.flip(1)
        tokens, targets, seen = (
            F.pad(rows.int(), pad, value=-1).flatten() for rows in (tokens, targets, seen)
        )
        at = (targets >= 0).nonzero()[:, 0]
        count = len(at)
        each = min(self.config.tail.rows, power_of_two(count, least=4))
        place = torch.full_like(targets, -1)
        place[at] = torch.arange(count, dtype=torch.int32, device=self.device)
        packed = torch.stack([at.int(), targets[at]])
        room = before.parts if before and before.each == each else 0
        parts = _with_room(-(-max(1, count) // each), room)
        packed = F.pad(packed, (0, parts * each - count), value=-1)
        if masks is None:
            keep = torch.ones(1, dtype=torch.int8, device=self.device)
        else:
            keep = F.pad(masks.to(torch.int8), (0, DP - self.sizes.d_model, *pad))
        about = torch.stack([tokens, place, seen])
        counted = torch.full((1,), count, dtype=torch.float32, device=self.device)
        inv_keep = 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
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
            "summed": rows.parts + 1,
        }

    def new_cache(self, rows: Rows) -> Cache:
        kinds = {"hi": torch.float16, "lo": torch.float16, "summed": torch.float64}
        return Cache(
            **{
                name: torch.empty(size, dtype=kinds.get(name, torch.float32), device=self.device)
                for name, size in self.cache_sizes(rows).items()
            }
        )

    def pack(self, cache: Cache, params: Tensor) -> None:
        """Write the weights in ``params`` (N,) as the kernels read them."""
        size = len(self.order)
        with torch.cuda.device_of(params):
            weights.pack[(-(-size // 1024),)](
                params,
                self.order,
                cache.w,
                cache.hi,
                cache.lo,
                size,
                SCALE=configs.WEIGHT_SCALE,
                BLOCK=1024,
            )

    def fill(self, on: Operands, first: Tensor | None = None, half: str = "both") -> None:
        """Fill the cache, whose packed weights are those of the parameters, from block ``first``
        (1,) int32 on, None: all; n_layers is what lies behind the last attention, above it
        nothing is to fill."""
        first = self._all if first is None else first
        self._run(on, 1, on.cache.summed, self.mode, first=first, half=half)

    def fill_again(self, on: Operands) -> None:
        """Fill all of the cache by ``FALLBACK`` where its loss is not finite."""
        if self.repairs:
            self._run(on, 1, on.cache.summed, configs.FALLBACK, first=self._all, repair=True)

    def describe(
        self, scratch: Scratch, params: Tensor, index: Tensor, change: Tensor, span: Tensor, K: int
    ) -> None:
        """Note down the K trial points that are evaluated next, at most ``most``.

        index: (C,) int64; change: (C,) float32; span: (2,) int64, the first of them that comes
        next and the one behind the last; beyond that, trial points change nothing
        """
        constants = configs.describe_constants(self.sizes, self.config)
        with torch.cuda.device_of(params):
            points.describe[(-(-K // constants["BLOCK"]),)](
                index,
                change,
                span,
                self.table,
                params,
                scratch.points,
                scratch.delta,
                K,
                self.n_params,
                self.sizes.n_layers,
                **constants,
            )

    def evaluate(self, on: Operands, out: Tensor, half: str = "both") -> None:
        """What the K described trial points change of each part's summed loss: ``out`` (K, parts)
        float32."""
        self._run(on, len(out), out, self.mode, half=half)

    def evaluate_again(self, on: Operands, out: Tensor) -> None:
        """The same by ``FALLBACK`` of those whose results are not finite."""
        if self.repairs:
            self._run(on, len(out), out, configs.FALLBACK, repair=True)

    def most(self, rows: Rows) -> int:
        """Trial points of one launch: what its kernels hand on should stay in the L2."""
        DP = self.sizes.padded_model
        most = _BEHIND_BYTES // (4 * rows.packed.shape[1] * DP)
        for cut, tiles in zip(self.config, (rows.groups, rows.parts), strict=True):
            if cut.staged:
                most = min(most, _STAGED_BYTES // (4 * cut.rows * DP * tiles))
        return max(1, most)

    def _run(
        self,
        on: Operands,
        K: int,
        out: Tensor,
        mode: str,
        *,
        first: Tensor | None = None,
        repair: bool = False,
        half: str = "both",
    ) -> None:
        """Both halves of the model for K trial points; with ``first`` for the cache.

        repair: only where ``out`` is not finite
        half: "blocks", "tail" or "both"
        """
        scratch, cache, params, rows = on
        kinds = {"cache": first is not None, "repair": repair}
        staged = scratch.staged.view(torch.float16) if mode == "fp16x3" else scratch.staged
        # What fills the cache looks at ``first``, the others at none.
        first = self._all if first is None else first
        given = (scratch.points, scratch.delta, out, scratch.behind, scratch.reached, first)
        with torch.cuda.device_of(params):
            if half != "tail":
                self._run_blocks(given, staged, cache, params, rows, K, mode, kinds)
            if half != "blocks":
                self._run_tail(given, staged, cache, rows, K, mode, kinds)

    def _run_blocks(self, given, staged, cache, params, rows, K, mode, kinds) -> None:
        constants = configs.blocks_constants(self.sizes, self.config, mode, **kinds)
        blocks.run_blocks[(-(-K // constants["POINTS"]), rows.groups)](
            *given,
            params,
            *cache[:3],
            rows.about,
            rows.keep,
            cache.x,
            cache.qkv,
            cache.columns,
            staged,
            K,
            rows.about.shape[1],
            rows.packed.shape[1],
            rows.parts,
            self.sizes.n_layers,
            self.token_offset,
            self.position_offset,
            self.eps,
            self.score_scale,
            rows.inv_keep,
            **constants,
            **configs.options(self.config.blocks, mode),
        )

    def _run_tail(self, given, staged, cache, rows, K, mode, kinds) -> None:
        constants = configs.tail_constants(self.sizes, self.config, mode, rows.each, **kinds)
        in_program = constants["TILES"] * (constants["M"] // rows.each)
        tail.run_tail[(-(-K // in_program), rows.parts)](
            *given,
            *cache[:3],
            rows.packed,
            rows.keep,
            cache.x,
            cache.columns,
            cache.nll,
            staged,
            K,
            rows.about.shape[1],
            self.sizes.n_layers,
            self.eps,
            rows.inv_keep,
            **constants,
            **configs.options(self.config.tail, mode),
        )

    def reduce(self, cache: Cache, partial: Tensor, rows: Rows, span: Tensor, out: Tensor) -> None:
        """What ``partial`` (K, parts) comes to, as losses: ``span`` of ``out`` (C,) float64."""
        K = len(partial)
        with torch.cuda.device_of(partial):
            losses.reduce_losses[(-(-K // 128),)](
                cache.summed, partial, span, out, rows.count, K, rows.parts, BLOCK=128
            )

    def new_scratch(self, K: int, rows: Rows, cache: bool = False) -> Scratch:
        """For launches of K trial points at most, or of ``fill`` alone."""
        DP, C = self.sizes.padded_model, rows.packed.shape[1]
        tiles = zip(self.config, (K * rows.groups, K * rows.parts), strict=True)
        staged = [programs * cut.rows * DP for cut, programs in tiles if cut.staged]
        points_and_rows = (0, 0, 0, 0) if cache else (points.FIELDS * K, K, K * C * DP, K * C)
        sizes = (*points_and_rows, max(staged, default=0))
        kinds = (torch.int32, torch.float32, torch.float32, torch.int8, torch.float32)
        return Scratch(
            *(
                torch.empty(max(1, size), dtype=kind, device=self.device)
                for size, kind in zip(sizes, kinds, strict=True)
            )
        )
