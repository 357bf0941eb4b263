"""Where the trial points of a step come from: one permutation of all, or working sets of them.

A rule turns the search's state into the next block, may learn from the block's losses where
else to look, and takes the decision into the state. It keeps nothing that the state and its
own ``state_dict`` do not determine.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from psfast import search, search_simplex
from psfast.flat import FlatParameters
from psfast.search import Decision, PollState
from psfast.search_simplex import SimplexGradient, Window

_CHUNK = 1 << 12  # trial points drawn at a time, at least
_DEVICE_CHUNK = 1 << 18  # where launches cost the same for few and for many


@functools.cache
def _kernel_to_draw(device: torch.device) -> Callable | None:
    """One launch for some four hundred operations of a few microseconds each, where Triton runs."""
    try:
        from psfast.kernels.order import draw

        draw([1] * 6, (2, 2), 0, 4, 4, torch.zeros(1, device=device))
    except Exception:  # no Triton, no C compiler, an old GPU: torch's own operations do it then
        return None
    return draw


class CompletePoll:
    """All 2N trial points in one keyed permutation, which goes on behind an accepted one.

    seed: of the permutations; flat: the parameters
    """

    whole_blocks = False  # what follows the accepted trial point in a block is not decided
    least_decrease = 0.0  # of a point of the search, in squared radii
    settings = None  # of a search step

    def __init__(self, seed: int, flat: FlatParameters):
        self.seed, self.flat = seed, flat
        self._drawn: tuple | None = None

    def most(self, poll: PollState) -> int:
        """Trial points that a block may hold at most."""
        return 2 * self.flat.size - poll.position

    def block(self, poll: PollState, count: int) -> tuple[Tensor, Tensor]:
        """index and sign (count,), the latter in the parameters' dtype, of the next trial points.

        They are cut from a longer piece of the permutation that serves several blocks: many
        small ones cost less so, and on a GPU, where drawing waits for the device, all of a poll.
        """
        start, total, buffer = poll.position, 2 * self.flat.size, self.flat.buffer
        key = (poll.order, total, buffer.device, buffer.dtype)
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = (key, 0, 0, None, None)
        _, low, high, index, sign = self._drawn
        if not low <= start <= start + count <= high:
            least = _CHUNK if buffer.device.type == "cpu" else _DEVICE_CHUNK
            low, high = start, min(total, start + max(4 * count, least))
            index, sign = self._draw(poll.order, low, high - low)
            self._drawn = (key, low, high, index, sign)
        return index[start - low : start - low + count], sign[start - low : start - low + count]

    def _draw(self, order: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        total, buffer = 2 * self.flat.size, self.flat.buffer
        kernel = _kernel_to_draw(buffer.device) if buffer.device.type == "cuda" else None
        if kernel:
            keys, sides = search.permutation(self.seed, order, total)
            return kernel(keys, sides, start, count, total, buffer)
        entries = search.poll_order(self.seed, order, start, count, total, buffer.device)
        index, sign = search.coordinates(entries)
        return index, sign.to(buffer.dtype)

    def points(self, poll: PollState, index: Tensor, delta: Tensor, losses: Tensor) -> list:
        """The search step's points, each as (index, change): none."""
        return []

    def advance(self, poll: PollState, decision: Decision) -> tuple[PollState, bool]:
        """The state after the block, and whether the poll has failed."""
        return search.advance(poll, decision, 2 * self.flat.size)

    def state_dict(self, poll: PollState) -> dict:
        return {}

    def load_state_dict(self, poll: PollState, state: dict) -> None:
        """Raises ValueError for a state that this rule cannot go on from."""
        if state:
            raise ValueError(
                "the state comes from a search with search=SimplexGradient(...), this one has none"
            )
        _check_position(poll, 2 * self.flat.size)


class WorkingSetPoll:
    """The 2N trial points working set by working set, with points along the slopes they show.

    All that it keeps and computes is on the CPU, whatever the parameters are on: it is little,
    and would be launches of a few microseconds each on a GPU.

    seed, flat: as of ``CompletePoll``; settings: of the search step
    """

    whole_blocks = True
    least_decrease = 1e-4

    def __init__(self, seed: int, flat: FlatParameters, settings: SimplexGradient):
        self.seed, self.flat, self.settings = seed, flat, settings
        self._window: Window | None = None
        self._measured: Window | None = None
        self._place: Tensor | None = None

    def most(self, poll: PollState) -> int:
        return 2 * self.flat.size

    def block(self, poll: PollState, count: int) -> tuple[Tensor, Tensor]:
        """index and sign (K,), K <= count, of distinct coordinates of the working set."""
        window = self._current(poll)
        if poll.position == 0:
            window = self._window = search_simplex.begin_lap(window, poll.lap)
        self._place, sign = search_simplex.window_entries(self.seed, window, poll, count)
        return window.index[self._place], sign.to(self.flat.buffer.dtype)

    def _current(self, poll: PollState) -> Window:
        number = self._number(poll)
        if self._window is None or self._window.number != number:
            self._window = search_simplex.new_window(
                self.seed, poll.order, number, self.flat.size, self.settings, self.flat.buffer.dtype
            )
        return self._window

    def _number(self, poll: PollState) -> int:
        count = search_simplex.window_count(self.flat.size, self.settings.working_set)
        return poll.window % count

    def points(self, poll: PollState, index: Tensor, delta: Tensor, losses: Tensor) -> list:
        """Points along the slopes, each as (index, change).

        What the losses say is kept by ``advance``: an exception before it leaves no trace.
        """
        self._measured = None
        incumbent = search.comparable(poll.incumbent)
        if not math.isfinite(incumbent):
            return []
        slope = (losses - incumbent) / delta
        measured = search_simplex.measure(self._window, self._place, slope, self.settings)
        # A small loss is known more finely than this, but slopes so small need not be amplified.
        size = max(1.0, abs(incumbent))
        noise = 2 * torch.finfo(delta.dtype).eps * size / delta.abs()
        along = search_simplex.direction(measured, self._place, noise, self.settings)
        if self.settings.decay:
            along = along - self.settings.decay * self._values_at(index)
        step = delta.abs() * along
        points = [(index, step * length) for length in self.settings.lengths]
        if self.settings.fade:
            measured = search_simplex.follow(measured, self._place, step, self.settings)
            moved = measured.trail.nonzero().squeeze(1)
            index, step = measured.index[moved], measured.trail[moved]
            points += [(index, step * length) for length in self.settings.lengths]
        self._measured = measured
        return points

    def _values_at(self, index: Tensor) -> Tensor:
        buffer = self.flat.buffer
        return buffer[index.to(buffer.device)].to(index.device)

    def advance(self, poll: PollState, decision: Decision) -> tuple[PollState, bool]:
        self._window = self._measured or self._window
        return search_simplex.advance_window(poll, decision, self._window, 2 * self.flat.size)

    def state_dict(self, poll: PollState) -> dict:
        """What the working set's trial points have shown, (W,) each; {} before the first."""
        if self._window is None or self._window.number != self._number(poll):  # used up
            return {}
        return {name: getattr(self._window, name).clone() for name in search_simplex.LEARNED}

    def load_state_dict(self, poll: PollState, state: dict) -> None:
        if not state:
            if poll.position:
                raise ValueError(
                    "the state comes from a search without search=SimplexGradient(...), this one "
                    "has it"
                )
            return
        window = self._current(poll)
        W, shapes = len(window.index), {name: tuple(v.shape) for name, v in state.items()}
        if shapes != dict.fromkeys(search_simplex.LEARNED, (W,)):
            raise ValueError(
                "the state must come from a search with the same working_set: this one's working "
                f"set has {W} coordinates, the state's slopes are of the shapes {shapes}"
            )
        _check_position(poll, 2 * W)
        learned = {name: value.to(getattr(window, name)) for name, value in state.items()}
        self._window = window._replace(**learned)


def _check_position(poll: PollState, places: int) -> None:
    if poll.position >= places:
        raise ValueError(f"the state's position must be < {places}, got {poll.position}")
