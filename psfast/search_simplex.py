"""The simplex-gradient search step: what a block's trial points say about the slopes, put to use.

A poll throws away the size of the differences it measures. The search step keeps them: each
trial point is also a one-sided difference of the loss along its coordinate, a block of them
the simplex gradient of a random face of the poll (Bortz & Kelley 1998; Custódio & Vicente
2007). Averaged over the visits of a coordinate and scaled by their root mean square (Kingma &
Ba 2015), they make a direction; points along it are evaluated, and the lowest is accepted if
it is lower than the incumbent and than every trial point of the block. More points take the
directions of the last blocks along, fading: a block is too small a part of all coordinates
for its step to be a whole step, and what helped a moment ago mostly still helps.

Pure functions, as in ``psfast.search``.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from psfast.checks import check_count, check_number
from psfast.search import Decision, PollState, advance, derive_seed, poll_order

_NO_REST_EVERY = 8  # laps
_FADED = 2.0**-8  # of the largest change of the present block; smaller earlier ones are dropped


@dataclass(frozen=True)
class SimplexGradient:
    """Settings of the search step; give it as ``PatternSearch(..., search=SimplexGradient())``.

    working_set: coordinates that are polled at a time. The 2N trial points are polled working
        set by working set: the next one is taken up when all points of this one have failed
        at one incumbent. So one working set may be all that a training run ever changes: a
        random subspace suffices (Li et al. 2018), and its slopes are never old. Coordinates
        that never changed the loss (rows that no batch reads, say) are polled in every eighth
        lap only, and before a lap counts as failed.
    lengths: of the points along the direction, in radii a coordinate
    fade: what is left of a block's direction when the next one's is added to it, at every
        length one more point that moves both; 0 for the present block's coordinates only
    momentum: weight of the earlier differences of a coordinate in their running mean
    square_momentum: the same for their mean square
    decay: pull of the points towards zero, as a share of the value a unit of step length
        (decoupled, as in AdamW; Loshchilov & Hutter 2019); 0 for none

    The theory holds: the points are a finite set, one is accepted only on its own evaluated
    decrease of at least 1e-4 radius^2 (they lie off the poll's lattice), a search that fails
    falls through to the best trial point of the block, and then to the rest of the poll.

    Raises ValueError or TypeError for settings out of range, naming them.
    """

    working_set: int = 20_000
    lengths: Sequence[float] = (0.5, 1.0, 2.0, 4.0)
    fade: float = 0.0
    momentum: float = 0.9
    square_momentum: float = 0.99
    decay: float = 0.0

    def __post_init__(self):
        check_count("working_set", self.working_set)
        if not isinstance(self.lengths, Sequence):
            raise TypeError(f"lengths must be a sequence of numbers, got {self.lengths!r}")
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not self.lengths:
            raise ValueError("lengths must hold at least one number, got none")
        for length in self.lengths:
            check_number("lengths", length, above=0.0)
        check_number("fade", self.fade, at_least=0.0, below=1.0)
        check_number("momentum", self.momentum, at_least=0.0, below=1.0)
        check_number("square_momentum", self.square_momentum, at_least=0.0, below=1.0)
        check_number("decay", self.decay, at_least=0.0)


LEARNED = ("visits", "mean", "square", "resting", "trail")


class Window(NamedTuple):
    """A working set, and what its trial points have shown.

    number: which of the working sets that [0, N) is cut into
    index: (W,) int64, its coordinates in poll order
    visits: (W,) differences measured so far
    mean: (W,) their running mean, still biased towards zero
    square: (W,) the running mean of their squares, likewise
    resting: (W,) bool, the coordinates that this lap leaves for its end
    trail: (W,) the step, at length 1, of the blocks so far, faded
    """

    number: int
    index: Tensor
    visits: Tensor
    mean: Tensor
    square: Tensor
    resting: Tensor
    trail: Tensor


def window_count(size: int, working_set: int) -> int:
    """How many working sets the N = ``size`` coordinates are cut into."""
    return -(-size // working_set)


def new_window(
    seed: int, order: int, number: int, size: int, settings: SimplexGradient, dtype: torch.dtype
) -> Window:
    """Working set ``number``, about an equal part of a keyed permutation of [0, size).

    dtype: of the slopes
    """
    count = window_count(size, settings.working_set)
    start, stop = number * size // count, (number + 1) * size // count
    index = poll_order(seed, order, start, stop - start, size)
    zeros = torch.zeros(stop - start, dtype=dtype)
    return Window(number, index, zeros, zeros, zeros, zeros.bool(), zeros)


def begin_lap(window: Window, lap: int) -> Window:
    """The window with the coordinates at rest whose differences have all been exactly zero.

    Every eighth lap lets none rest, as another batch may read what the earlier ones did not.
    """
    resting = (window.visits > 0) & (window.square == 0)
    if lap % _NO_REST_EVERY == 0 or resting.all():
        resting = torch.zeros_like(resting)
    return window._replace(resting=resting)


def live_total(window: Window) -> int:
    """Trial points of a lap over the coordinates that are not at rest."""
    return 2 * int((~window.resting).sum())


def window_entries(seed: int, window: Window, state: PollState, most: int) -> tuple[Tensor, Tensor]:
    """Places in the working set and signs (K,), K <= ``most``, of its poll's next trial points.

    The 2W trial points of a lap are two rounds over the W coordinates, the second with the
    opposite signs, so that the curvature in one-sided differences cancels in a coordinate's
    mean; then two more over those at rest. A block lies in one round, so its coordinates are
    distinct. Each round has an order of its own: fixed blocks learn worse, as the same
    coordinates then always move together.
    """
    live = live_total(window)
    late = state.position >= live
    places = (window.resting if late else ~window.resting).nonzero().squeeze(1)
    n = len(places)
    second, start = divmod(state.position - live if late else state.position, n)
    n_blocks = -(-(n - start) // most)
    count = -(-(n - start) // n_blocks)  # equal blocks, not full ones and a small rest
    order_seed = derive_seed(seed, state.order, window.number)
    order = _whole_order(order_seed, 2 * state.lap + second, n)
    place = places[order[start : start + count]]
    return place, 1 - 2 * ((place + second) & 1)


@functools.lru_cache(maxsize=4)
def _whole_order(seed: int, order: int, total: int) -> Tensor:
    """A round's order, to be read only: it serves all blocks of the round."""
    return poll_order(seed, order, 0, total, total)


def measure(window: Window, place: Tensor, slope: Tensor, settings: SimplexGradient) -> Window:
    """The window with one more difference at each of the distinct ``place`` (K,).

    slope: (K,); one that is not finite says nothing and is left out
    """
    known = slope.isfinite()
    place, slope = place[known], slope[known].to(window.mean.dtype)
    beta, gamma = settings.momentum, settings.square_momentum
    mean = window.mean[place] * beta + slope * (1 - beta)
    square = window.square[place] * gamma + slope.square() * (1 - gamma)
    return window._replace(
        visits=window.visits.index_copy(0, place, window.visits[place] + 1),
        mean=window.mean.index_copy(0, place, mean),
        square=window.square.index_copy(0, place, square),
    )


def direction(window: Window, place: Tensor, noise: Tensor, settings: SimplexGradient) -> Tensor:
    """Downhill at ``place`` (K,): minus the mean difference over its root mean square.

    noise: (K,) slopes below it are not amplified: what rounding makes of a difference where the
        loss is of order one (Adam's epsilon; without it small losses fall more slowly)

    Returns (K,), each in about [-1, 1]; 0 where nothing was measured.
    """
    visits = window.visits[place].clamp(min=1)
    mean = window.mean[place] / (1 - settings.momentum**visits)
    square = window.square[place] / (1 - settings.square_momentum**visits)
    return -mean / (square.sqrt() + noise)


def follow(window: Window, place: Tensor, step: Tensor, settings: SimplexGradient) -> Window:
    """The window whose trail, faded once more, ends in this block's ``step`` (K,) at ``place``."""
    trail = (window.trail * settings.fade).index_copy(0, place, step)
    faded = trail.abs() < _FADED * step.abs().max()
    return window._replace(trail=trail.masked_fill(faded, 0.0))


def advance_window(
    state: PollState, decision: Decision, window: Window, total: int
) -> tuple[PollState, bool]:
    """``psfast.search.advance`` for a poll that goes working set by working set.

    total: 2N. The next working set is taken up when all 2W trial points of a lap have failed at
    one incumbent, radius and objective; the poll fails when those of all have. A lap that began
    before the last success proves nothing: it ends before the coordinates at rest, and the next
    one starts anew.
    """
    after, failed = advance(state, decision, total)
    if failed:  # the permutation stays, so that what is known of the slopes is kept
        return after._replace(order=state.order, lap=state.lap + 1), True
    tried = 0 if decision.success else state.window_tried + decision.decided
    position = state.position + decision.decided
    window_total = 2 * len(window.index)
    all_failed = tried == position  # of the lap's trial points, so far
    if position < (window_total if all_failed else live_total(window)):
        return after._replace(position=position, window_tried=tried), False
    after = after._replace(position=0, lap=state.lap + 1, window_tried=0)
    if tried == window_total:
        return after._replace(window=state.window + 1), False
    return after._replace(tried=max(0, after.tried - tried)), False
