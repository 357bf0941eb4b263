"""The incumbent's cache, and the losses of whole blocks: launches that repeat as CUDA graphs."""

import functools

import torch
from psfast.kernels.plan import Cache, Operands, Rows, TransformerPlan
from torch import Tensor

from psfast.capture import Repeated

CAPACITY = 65_536  # trial points that the device holds at a time
_SORTED = 1024  # trial points from which on their order pays
_INTERPRETED_CHUNK = 16  # where a program costs what it costs


class Refresh:
    """Fills ``cache`` at ``params`` as they are at the moment; ``loss`` (1,) float64 is the loss.

    plan: whose kernels; the cache, ``params`` (N,) and the batch stay where they are (``parts``):
    for other ones another refresh is needed.
    """

    def __init__(self, plan: TransformerPlan, cache: Cache, params: Tensor, rows: Rows):
        self.parts = plan, cache, params, rows
        self.loss = torch.zeros(1, dtype=torch.float64, device=plan.device)
        self._span = torch.tensor([0, 1], device=plan.device)
        self._nothing = torch.zeros(1, rows.parts, dtype=torch.float32, device=plan.device)
        self._scratch = plan.new_scratch(1, rows, cache=True)
        self._repeated = Repeated(plan.device)

    def __call__(self) -> None:
        self._repeated(self._step)

    def _step(self) -> None:
        plan, cache, params, rows = self.parts
        on = Operands(self._scratch, cache, params, rows)
        plan.pack(cache, params)
        plan.fill(on)
        plan.fill_again(on)
        self.reduce()

    def reduce(self) -> None:
        """Take the loss from the cache, which somebody else has filled."""
        plan, cache, _, rows = self.parts
        plan.reduce(cache, self._nothing, rows, self._span, self.loss)


class BlockLoop:
    """The losses of any number of trial points, a chunk at a time, at the cached incumbent.

    plan, cache, params, rows: as of ``Refresh``
    """

    def __init__(self, plan: TransformerPlan, cache: Cache, params: Tensor, rows: Rows):
        self.parts = plan, cache, params, rows
        device = plan.device
        self._most = plan.most(rows)
        if device.type == "cpu":
            self._most = min(self._most, _INTERPRETED_CHUNK)
        self._index = torch.zeros(CAPACITY, dtype=torch.int64, device=device)
        self._change = torch.zeros(CAPACITY, dtype=torch.float32, device=device)
        self._losses = torch.zeros(CAPACITY, dtype=torch.float64, device=device)
        self._partial = torch.zeros(self._most, rows.parts, dtype=torch.float32, device=device)
        self._span = torch.zeros(2, dtype=torch.int64, device=device)
        self._first, self._end = self._span.split(1)
        self._known: tuple[int, int] | None = None  # what the span is
        self._scratch = plan.new_scratch(self._most, rows)
        self._chunks: dict[int, Repeated] = {}

    def losses(self, index: Tensor, delta: Tensor) -> Tensor:
        """index: (K,) int64; delta: (K,) float32 -> (K,) float64. Does not wait for the device."""
        pieces = zip(index.split(CAPACITY), delta.split(CAPACITY), strict=True)
        found = [self._piece(*piece) for piece in pieces]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _piece(self, index: Tensor, delta: Tensor) -> Tensor:
        count = len(index)
        places, changes = self._index[:count], self._change[:count]
        if count < _SORTED:
            places.copy_(index)
            changes.copy_(delta)
        else:
            # Trial points that share a tile then mostly start at the same place, the long ones
            # first. Half the bits are enough to sort by.
            order = index.int().argsort()
            torch.index_select(index, 0, order, out=places)
            torch.index_select(delta, 0, order, out=changes)
        first = 0
        while first < count:
            size = self._chunk(count - first)
            self._move_to(first, count)
            repeated = self._chunks.setdefault(size, Repeated(self._span.device))
            repeated(functools.partial(self._step, size))
            first += size
        found = self._losses[:count]
        if count < _SORTED:
            return found.clone()
        return torch.empty_like(found).scatter_(0, order, found)

    def _chunk(self, left: int) -> int:
        """How many trial points to launch: powers of two, for each is another graph."""
        return min(self._most, 1 << (left - 1).bit_length())

    def _move_to(self, first: int, end: int) -> None:
        """Go on at trial point ``first`` of ``end``."""
        known, self._known = self._known, None  # until both are written
        if known is None or known[0] != first:
            self._first.fill_(first)
        if known is None or known[1] != end:
            self._end.fill_(end)
        self._known = first, end

    def _step(self, size: int) -> None:
        plan, cache, params, rows = self.parts
        on, out = Operands(self._scratch, cache, params, rows), self._partial[:size]
        plan.describe(self._scratch, params, self._index, self._change, self._span, size)
        plan.evaluate(on, out)
        plan.evaluate_again(on, out)
        plan.reduce(cache, out, rows, self._span, self._losses)
