"""The serial loop on the device: evaluate a block, accept its first lower point, refresh, go on."""

import torch
from psfast.kernels import losses as kernel
from psfast.kernels.configs import take_first_constants
from psfast.kernels.plan import PROGRAMS, Cache, Rows, TransformerPlan
from torch import Tensor

from psfast.capture import captured

CAPACITY = 4096  # trial points that the device holds at a time
_ROUND = 8  # blocks between two looks at the state
_INTERPRETED_BLOCK = 4  # where a program costs what it costs


class DescentLoop:
    """A few blocks of a descent, on a GPU captured as a CUDA graph, and the loop around it.

    plan, cache, params, rows: as of ``TransformerPlan.losses``. The graph reads and writes them
    where they are now: with other ones (``parts`` has these) another loop is needed.
    """

    def __init__(self, plan: TransformerPlan, cache: Cache, params: Tensor, rows: Rows):
        self.parts = plan, cache, params, rows
        self.plan, self.cache, self.params, self.rows = self.parts
        device = params.device
        is_on_gpu = device.type == "cuda"
        filling = min(32, max(4, PROGRAMS // rows.groups)) if is_on_gpu else _INTERPRETED_BLOCK
        self._block = min(filling, plan.most(rows))  # one launch, which `take_first` looks into

        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._index, self._delta = zeros(CAPACITY, torch.int64), zeros(CAPACITY, torch.float32)
        self._losses = zeros(CAPACITY, torch.float64)
        self._places = zeros(CAPACITY, torch.int64)
        self._incumbents = zeros(CAPACITY, torch.float64)
        self._state, self._margin = zeros(6, torch.int64), zeros(1, torch.float64)
        self._first = zeros(1, torch.int32)
        self._partial = zeros(self._block * rows.parts, torch.float32).view(-1, rows.parts)
        self._scratch = plan.new_scratch(self._block, rows)
        self._where = self._scratch, cache, params, rows
        self._describe_block(0)
        self._step()  # with nothing to decide: compiles what is not compiled yet
        self._replay = captured(self._steps, device).replay if is_on_gpu else self._step

    def run(
        self, index: Tensor, delta: Tensor, margin: float, most: int
    ) -> tuple[Tensor, list[int], list[float], int]:
        """Descend along K trial points, or the first CAPACITY of them, from the cached incumbent.

        index: (K,) int64; delta: (K,) float32 -> losses (K',) float64 on the CPU, places of the
        accepted ones, the loss after each but the last, trial points evaluated
        """
        index, delta = index[:CAPACITY], delta[:CAPACITY]
        count = len(index)
        self._index[:count].copy_(index)
        self._delta[:count].copy_(delta)
        self._margin.fill_(margin)
        self._state.copy_(torch.tensor([0, 0, 0, count, most, 0]))
        self._describe_block(count)
        decided = accepted = evaluated = 0
        while decided < count and accepted < most:
            self._replay()
            decided, accepted, evaluated, _, _, is_open = self._state.tolist()
            if is_open:
                self._step_again()
                decided, accepted, evaluated, *_ = self._state.tolist()
        self.plan.fill_again(*self._where)
        losses, places = self._losses[:decided].cpu(), self._places[:accepted].tolist()
        # Each block notes the loss that the one before it came to.
        incumbents = self._incumbents[: max(0, accepted - 1)].tolist()
        return losses, places, incumbents, evaluated

    def _describe_block(self, count: int) -> None:
        """Begin with the first of ``count`` trial points; the rest of the block changes nothing."""
        index, delta = (values[: self._block].clone() for values in (self._index, self._delta))
        index[count:], delta[count:] = 0, 0.0
        self.plan.describe(self._scratch, self.params, index, delta)

    def _steps(self) -> None:
        for _ in range(_ROUND):
            self._step()

    def _step(self) -> None:
        """Evaluate the block and decide it; what left fp16's range stays open."""
        self.plan.evaluate(*self._where, self._partial)
        self._take_first(is_final=not self.plan.repairs)
        self.plan.fill(*self._where, self._first)

    def _step_again(self) -> None:
        """The same where something was left open: whatever is not finite now is none."""
        self.plan.fill_again(*self._where)
        self.plan.evaluate(*self._where, self._partial)
        self.plan.evaluate_again(*self._where, self._partial)
        self._take_first(is_final=True)
        # After an accept from block 0 on: what was filled again is no start for another mode.
        self._first.mul_(self._first > self.plan.sizes.n_layers)
        self.plan.fill(*self._where, self._first)

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
                num_warps=1,
            )
