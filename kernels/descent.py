"""The serial loop on the device: evaluate a block, accept its first lower point, refresh, go on."""

import math

import torch
from psfast.kernels import losses as kernel
from psfast.kernels.configs import take_first_constants, take_first_options
from psfast.kernels.evaluation import Refresh
from psfast.kernels.plan import PROGRAMS, Cache, Operands, Rows, TransformerPlan
from torch import Tensor

from psfast.capture import Beside, Repeated, captured

CAPACITY = 16_384  # trial points that the device holds at a time
_ROUND = 256  # trial points that the blocks of one graph hold
_BLOCKS = (32, 128, 512, 2048)
_INTERPRETED_BLOCKS = (4, 8)  # where a program costs what it costs


def block_size(plan: TransformerPlan, rows: Rows, gap: float, overhead: float) -> int:
    """Trial points of a block, where one in ``gap`` is accepted.

    overhead: what a block costs beside its trial points, in trial points: by launches, of which a
        graph spares the host most
    """
    sizes = _BLOCKS if plan.device.type == "cuda" else _INTERPRETED_BLOCKS
    at_once = max(4, PROGRAMS // rows.groups)
    best = max(min(0.8 * gap, math.sqrt(0.12 * overhead * gap)), min(at_once, 2.0 * gap))
    suits = min(sizes, key=lambda size: abs(math.log(size / best)))
    return min(suits, plan.most(rows))  # one launch, which `take_first` looks into


class DescentLoop:
    """A few blocks of a descent, on a GPU captured as a CUDA graph, and the loop around it.

    block: trial points of a block
    plan, cache, params, rows: as of ``evaluation.Refresh``. The graph reads and writes them
    where they are now: with other ones (``parts`` has these) another loop is needed.
    """

    def __init__(self, block: int, plan: TransformerPlan, cache: Cache, params: Tensor, rows: Rows):
        self._block, self._round = block, max(1, _ROUND // block)
        self.parts = plan, cache, params, rows
        self.plan, self.cache, self.params, self.rows = self.parts
        device = params.device

        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._index, self._delta = zeros(CAPACITY, torch.int64), zeros(CAPACITY, torch.float32)
        self._losses = zeros(CAPACITY, torch.float64)
        self._places = zeros(CAPACITY, torch.int64)
        self._incumbents = zeros(CAPACITY, torch.float64)
        self._state, self._margin = zeros(6, torch.int64), zeros(1, torch.float64)
        self._first = zeros(1, torch.int32) + plan.sizes.n_layers + 1  # nothing to fill
        self._partial = zeros(self._block * rows.parts, torch.float32).view(-1, rows.parts)
        self._scratch = plan.new_scratch(self._block, rows)
        self._evaluated = Operands(self._scratch, cache, params, rows)
        # Of its own, because the cache is filled while a block is evaluated.
        filling = plan.new_scratch(1, rows, cache=True)
        self._filled = Operands(filling, cache, params, rows)
        self._beside = Beside(device)
        self._begin, self._end = Repeated(device), Repeated(device)
        self._span = zeros(2, torch.int64)
        self._describe_first()
        self._step()  # with nothing to decide: compiles what is not compiled yet
        is_on_gpu = device.type == "cuda"
        self._replay = captured(self._steps, device).replay if is_on_gpu else self._step

    def run(
        self, index: Tensor, delta: Tensor, margin: float, most: int, refreshed: Refresh
    ) -> tuple[Tensor, list[int], list[float], int]:
        """Descend along K trial points, or the first CAPACITY of them, from the cached incumbent.

        index: (K,) int64; delta: (K,) float32; refreshed: whose ``loss`` is to be the last one
            -> losses (K',) float64 on the CPU, places of the accepted ones, the loss after each,
            trial points evaluated
        """
        index, delta = index[:CAPACITY], delta[:CAPACITY]
        count = len(index)
        self._index[:count].copy_(index)
        self._delta[:count].copy_(delta)
        self._margin.fill_(margin)
        self._state.copy_(torch.tensor([0, 0, 0, count, most, 0]), non_blocking=True)
        self._span[1:].fill_(count)
        self._first.fill_(self.plan.sizes.n_layers + 1)
        self._begin(self._describe_first)
        decided = accepted = evaluated = 0
        while decided < count and accepted < most:
            # A block accepts one trial point at most: so many are needed in any case.
            blocks = min(most - accepted, -(-(count - decided) // self._block))
            for _ in range(max(1, blocks // self._round)):
                self._replay()
            decided, accepted, evaluated, _, _, is_open = self._state.tolist()
            if is_open:
                self._step_again()
                decided, accepted, evaluated, *_ = self._state.tolist()
        self._end(self._fill_rest)
        refreshed.reduce()
        if accepted:  # each block has noted the loss that the one before it came to
            self._incumbents[accepted - 1] = refreshed.loss[0]
        places, incumbents = self._places[:accepted].double(), self._incumbents[:accepted]
        # In one piece: each that is copied for itself waits for the device.
        found = torch.cat([self._losses[:decided], places, incumbents]).cpu()
        losses, places, incumbents = found.split([decided, accepted, accepted])
        return losses, places.long().tolist(), incumbents.tolist(), evaluated

    def _describe_first(self) -> None:
        """Begin with the first trial points."""
        block = self._index, self._delta, self._span, self._block
        self.plan.describe(self._scratch, self.params, *block)

    def _fill_rest(self) -> None:
        self.plan.fill(self._filled, self._first, half="tail")
        self.plan.fill_again(self._filled)

    def _steps(self) -> None:
        for _ in range(self._round):
            self._step()

    def _step(self) -> None:
        """Evaluate the block and decide it; what left fp16's range stays open.

        What the block's way to the end of the last attention does not read of the cache is
        filled beside it.
        """
        with self._beside:
            self.plan.fill(self._filled, self._first, half="tail")
        self.plan.evaluate(self._evaluated, self._partial, half="blocks")
        self._beside.join()
        self.plan.evaluate(self._evaluated, self._partial, half="tail")
        self._take_first(is_final=not self.plan.repairs)
        self.plan.fill(self._filled, self._first, half="blocks")

    def _step_again(self) -> None:
        """The same where something was left open: whatever is not finite now is none."""
        self.plan.fill_again(self._filled)
        self.plan.evaluate(self._evaluated, self._partial)
        self.plan.evaluate_again(self._evaluated, self._partial)
        self._take_first(is_final=True)
        self.plan.fill(self._filled, self._first)

    def _take_first(self, is_final: bool) -> None:
        plan, cache = self.plan, self.cache
        constants = take_first_constants(plan.sizes, plan.config, self._block)
        with torch.cuda.device_of(self.params):
            kernel.take_first[(1,)](
                self._index,
                self._delta,
                self._losses,
                self._places,
                self._incumbents,
                self._state,
                self._margin,
                self.params,
                plan.places,
                cache.w,
                cache.hi,
                cache.lo,
                plan.table,
                self._scratch.points,
                self._scratch.delta,
                self._first,
                cache.summed,
                self._partial,
                self.rows.count,
                self._block,
                self.rows.parts,
                plan.n_params,
                plan.sizes.n_layers,
                int(is_final),
                **constants,
                **take_first_options(constants),
            )
