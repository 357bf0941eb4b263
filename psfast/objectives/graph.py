"""One CUDA graph per trial point: change, evaluate, compare, keep or restore, move on."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from psfast.capture import captured
from psfast.flat import trainable
from psfast.objectives.base import (
    CompositeLoss,
    Descent,
    check_block,
    named_state,
    sharing_memory,
)
from psfast.objectives.serial import SerialObjective, closure_of
from psfast.objectives.watch import Watch
from psfast.search import acceptance_bar, kept_places

_CAPACITY = 4096  # trial points that the device holds at a time
_ROUND = 32  # replays between two looks at the losses, where the caller may stop early


class Cursor(NamedTuple):
    """A block of trial points on the device, and where the next step stands in it.

    place: (1,) int64; index: (C,) int64; delta: (C,), in the parameters' dtype
    losses: (C,) float64, filled up to ``place``
    bar: (1,) float64: a loss below it is kept, and ``margin`` (1,) float64 below that one is the
        next bar
    left: (1,) int64: how many may still be kept
    """

    place: Tensor
    index: Tensor
    delta: Tensor
    losses: Tensor
    bar: Tensor
    margin: Tensor
    left: Tensor

    @classmethod
    def on(cls, buffer: Tensor) -> "Cursor":
        device = buffer.device
        return cls(
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(_CAPACITY, dtype=torch.int64, device=device),
            torch.zeros(_CAPACITY, dtype=buffer.dtype, device=device),
            torch.zeros(_CAPACITY, dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def load(
        self, index: Tensor, delta: Tensor, bar: float = 0.0, margin: float = 0.0, most: int = 0
    ) -> None:
        """Put a block of K <= C trial points there and go to its start, to keep ``most``."""
        self.index[: len(index)].copy_(index, non_blocking=True)
        self.delta[: len(delta)].copy_(delta, non_blocking=True)
        self.bar.fill_(bar)
        self.margin.fill_(margin)
        self.left.fill_(most)
        self.place.zero_()


def trial_step(closure: Callable[[], Tensor], buffer: Tensor, cursor: Cursor) -> None:
    """Evaluate the trial point at the cursor; device work alone, so that it can be captured.

    buffer: (N,): the flat parameters. Afterwards they are as before, or, if the loss fell
    below the bar and one may still be kept, the trial point itself.
    """
    at = cursor.index.index_select(0, cursor.place)
    old = buffer.index_select(0, at)
    new = old + cursor.delta.index_select(0, cursor.place)
    buffer.index_copy_(0, at, new)
    try:
        loss = closure().detach().reshape(1).double()
    except BaseException:
        buffer.index_copy_(0, at, old)
        raise
    # NaN compares false, so it is never kept.
    keeps = (loss < cursor.bar) & (loss > -math.inf) & (cursor.left > 0)
    buffer.index_copy_(0, at, torch.where(keeps, new, old))
    cursor.bar.copy_(torch.where(keeps, loss - cursor.margin, cursor.bar))
    cursor.left.sub_(keeps.long())
    cursor.losses.index_copy_(0, cursor.place, loss)
    cursor.place.add_(1)


class GraphObjective(SerialObjective):
    """The serial objective with ``trial_step`` captured once and replayed for every trial point.

    closure: () -> scalar loss tensor, the same work at every call, without a host sync: reads
        its tensors from fixed places, has no branch on their values
    params: the parameters it depends on, on a CUDA device
    seed: of the random state that every evaluation starts from
    capture: False runs the same steps without a graph, on any device: the twin for tests

    Raises ValueError with the reason if the closure cannot be captured.
    """

    backend = "graph"
    descends = True

    def __init__(
        self, closure: Callable, params: list[nn.Parameter], *, seed: int = 0, capture: bool = True
    ):
        super().__init__(closure, params, seed=seed)
        if capture and self.flat.buffer.device.type != "cuda":
            raise ValueError(f"params must be on a CUDA device, got {self.flat.buffer.device}")
        self._capturing = capture
        self._prepare()

    def __call__(self) -> Tensor:
        self._follow()
        for buffer in self._buffers:
            if buffer.has_no_trace:
                buffer.note()
        zero = torch.zeros(1, dtype=torch.int64, device=self.flat.buffer.device)
        # A change by zero: the same graph, so an exact no-op has this loss to the bit.
        return self.losses(zero, zero.to(self.flat.buffer.dtype))[0]

    def losses(self, index: Tensor, delta: Tensor, *, stop_below: float | None = None) -> Tensor:
        check_block(index, delta)
        self._follow()
        found = []
        for block in zip(index.split(_CAPACITY), delta.split(_CAPACITY), strict=True):
            self._cursor.load(*block)
            found.append(self._run(len(block[0]), lambda losses: _any_below(losses, stop_below)))
            if len(found[-1]) < len(block[0]):
                break
        return torch.cat(found)

    def loss_at(self, index: Tensor, delta: Tensor) -> Tensor:
        self._follow()
        return super().loss_at(index, delta)

    def descend(self, index, delta, *, incumbent, margin, most, gap) -> Descent:
        """As every objective's; a host sync serves 32 trial points, whatever is accepted."""
        check_block(index, delta)
        self._follow()
        index, delta = index[:_CAPACITY], delta[:_CAPACITY]
        cursor = self._cursor
        cursor.load(index, delta, acceptance_bar(incumbent, margin), margin, most)
        try:
            losses = self._run(len(index), lambda _: not cursor.left.item()).cpu()
        except BaseException:
            self.flat.note_write()  # some may have been accepted
            raise
        values, evaluated = losses.tolist(), len(losses)
        places = kept_places(values, incumbent, margin, most)
        if places:
            self.flat.note_write()
            if len(places) == most:
                losses = losses[: places[-1] + 1]
        return Descent(losses, places, [values[place] for place in places], evaluated)

    def _run(self, count: int, is_over: Callable[[Tensor], bool]) -> Tensor:
        """The losses of the cursor's first ``count`` trial points.

        is_over: of a round's losses, whether to leave out those behind
        """
        cursor, done = self._cursor, 0
        with self._evaluation():
            while done < count:
                first, done = done, min(done + _ROUND, count)
                for _ in range(first, done):
                    self._seed_all()
                    self._replay()
                if is_over(cursor.losses[first:done]):
                    break
        return cursor.losses[:done].clone()

    def _follow(self) -> None:
        """Capture again if the parameters have moved, or autocast is another: a graph keeps the
        precision of its capture. New values are read by any replay."""
        self.flat.changed()
        buffer = self.flat.buffer
        if buffer.data_ptr() != self._address or self._autocast != _autocast(buffer.device):
            self._prepare()
        if any(buffer.is_written() for buffer in self._buffers):
            for buffer in self._buffers:
                buffer.note()

    def _prepare(self) -> None:
        self._address: int | None = None  # none is served until all of this is done
        self._cursor = Cursor.on(self.flat.buffer)
        with self._evaluation(), self._found_buffers():
            self._checked_closure()
        self._replay = self._step
        if self._capturing:
            self._replay = self._captured().replay
        self._autocast = _autocast(self.flat.buffer.device)
        self._address = self.flat.buffer.data_ptr()

    def _step(self) -> None:
        trial_step(self.closure, self.flat.buffer, self._cursor)
        self._restore_buffers()

    def _checked_closure(self) -> None:
        self._seed_all()
        before, versions = self.flat.buffer.clone(), [p._version for p in self.params]
        try:
            with self._held_in_place():
                loss = self.closure()
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise ValueError("the closure runs backward()") from error
            raise
        if versions != [p._version for p in self.params]:
            self.flat.buffer.copy_(before)
            raise ValueError("the closure writes to parameters")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"the closure must return a scalar tensor, got {type(loss).__name__}")
        if loss.device != self.flat.buffer.device:
            raise ValueError(
                f"the loss must be on {self.flat.buffer.device} like the parameters, "
                f"got {loss.device}"
            )

    def _captured(self) -> torch.cuda.CUDAGraph:
        try:
            with self._evaluation():
                return captured(self._step, self.flat.buffer.device)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the closure cannot be captured: {reason}") from error


def _autocast(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _any_below(losses: Tensor, bar: float | None) -> bool:
    return bar is not None and bool((losses < bar).any())


class GraphModelObjective(GraphObjective):
    """``criterion(model(inputs), targets)`` as a graph; the batch is copied to fixed places."""

    def __init__(
        self, model, criterion, inputs, targets, *, params=None, seed: int = 0, capture: bool = True
    ):
        for name, value in (("inputs", inputs), ("targets", targets)):
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
        self.model, self.criterion = model, criterion
        self._composite = CompositeLoss(model, criterion)
        self._batch = self._loaded = inputs, targets
        _check_memory(list(named_state(self._composite).values()), self._batch)
        self.inputs, self.targets = inputs.clone(), targets.clone()
        super().__init__(
            closure_of(self),
            trainable(model.parameters()) if params is None else params,
            seed=seed,
            capture=capture,
        )
        self._watch = Watch(self._composite, self.params)
        self._watch.look(self._batch)

    def _modules(self) -> Iterable[nn.Module]:
        return self._composite.modules()

    def _follow(self) -> None:
        was_interrupted = self._loaded is not self._batch
        if was_interrupted or self._watch.changed():
            if was_interrupted or self._watch.has_other_parts():
                self._address = None  # it may be captured on places that are none any more
            self._watch.look(self._batch)
            self._load(self._batch)
        super()._follow()

    def set_batch(self, inputs, targets, *, seed: int | None = None) -> None:
        batch = inputs, targets
        self.flat.changed()
        searched = set(self.params)
        others = [t for t in self._watch.parts()[1].values() if t not in searched]
        _check_memory([self.flat.buffer, *others], batch)
        with self._on_batch(self.inputs, self.targets, seed):  # its copies stay where they fit
            self._load(batch)
        self._batch = batch
        self._watch.look(batch)

    def _load(self, batch: tuple[Tensor, Tensor]) -> None:
        """Copy the batch to the fixed places, or to new ones if it has other shapes."""
        self._loaded: tuple | None = None  # an interrupt may leave half of each
        fixed = self.inputs, self.targets
        if all(
            new.shape == old.shape and new.dtype == old.dtype
            for new, old in zip(batch, fixed, strict=True)
        ):
            for new, old in zip(batch, fixed, strict=True):
                old.copy_(new)
        else:
            self.inputs, self.targets = (new.to(fixed[0].device).clone() for new in batch)
            self._prepare()
        self._loaded = batch


def _check_memory(state: Sequence[Tensor], batch: tuple[Tensor, Tensor]) -> None:
    """Raise ValueError for a batch in the memory of the model's ``state``: its copies are not."""
    for numbers in sharing_memory([*state, *batch]):
        if min(numbers) < len(state) <= max(numbers):
            raise ValueError("the batch shares memory with a parameter or buffer of the model")
