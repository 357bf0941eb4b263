"""The serial loop on the device: evaluate a block, accept its first lower point, refresh, go on."""

import torch
from psfast.kernels import losses as kernel
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
        self._state, self._margin = zeros(5, torch.int64), zeros(1, torch.float64)
        self._first = zeros(1, torch.int32)
        self._block_index = zeros(self._block, torch.int64)
        self._block_delta = zeros(self._block, torch.float32)
        self._partial = zeros(self._block * rows.parts, torch.float32).view(-1, rows.parts)
        self._step()  # with nothing to decide: compiles what is not compiled yet
        self._replay = captured(self._steps, device).replay if is_on_gpu else self._step
        self._scratch = plan.scratch  # that the graph writes to, whatever comes after it

    def run(
        self, index: Tensor, delta: Tensor, margin: float, most: int
    ) -> tuple[Tensor, list[int], list[float], int]:
        """Descend along K trial points, or the first CAPACITY of them, from the cached incumbent.

        index: (K,) int64; delta: (K,) float32 -> losses (K',) float64 on the CPU, places of the
        accepted ones, the loss after each but the last, trial points evaluated
        """
        index, delta = index[:CAPACITY], delta[:CAPACITY]
        count, first = len(index), min(len(index), self._block)
        self._index[:count].copy_(index)
        self._delta[:count].copy_(delta)
        self._block_index.zero_()[:first].copy_(index[:first])
        self._block_delta.zero_()[:first].copy_(delta[:first])
        self._margin.fill_(margin)
        self._state.copy_(torch.tensor([0, 0, 0, count, most]))
        decided = accepted = evaluated = 0
        while decided < count and accepted < most:
            self._replay()
            decided, accepted, evaluated, *_ = self._state.tolist()
        losses, places = self._losses[:decided].cpu(), self._places[:accepted].tolist()
        # Each block notes the loss that the one before it came to.
        incumbents = self._incumbents[: max(0, accepted - 1)].tolist()
        return losses, places, incumbents, evaluated

    def _steps(self) -> None:
        for _ in range(_ROUND):
            self._step()

    def _step(self) -> None:
        where = self.cache, self.params, self.rows
        self.plan.differences(*where, self._block_index, self._block_delta, self._partial)
        with torch.cuda.device_of(self.params):
            kernel.take_first[(1,)](
                self._index,
                self._delta,
                self._losses,
                self._places,
                self._incumbents,
                self._state,
                self._margin,
                self._block_index,
                self._block_delta,
                self.params,
                self.plan.scratch.points,
                self._first,
                self.cache.summed,
                self._partial,
                self.rows.count,
                self._block,
                self.rows.parts,
                self.plan.sizes.n_layers,
                BLOCK=1 << (self._block - 1).bit_length(),
                num_warps=1,
            )
        self.plan.fill(*where, self._first)
