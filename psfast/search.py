"""The search itself, as pure functions: poll order, block sizes, acceptance, radius.

Nothing here sees a parameter, a closure or a device: plain numbers and small tensors go in,
NamedTuples come out. So a run can be resumed, sharded or speculated without a change of mind.

Sources: Hooke & Jeeves (1961), "Direct search solution of numerical and statistical
problems"; Torczon (1997), "On the convergence of pattern search algorithms"; Kolda, Lewis &
Torczon (2003), "Optimization by direct search".
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from psfast.checks import check_count, check_number

_MASK32 = 0xFFFFFFFF
_FEISTEL_ROUNDS = 6
_FEW = 128  # losses that Python reads sooner than a handful of tensor operations
_NEAR = 4096  # and that come from a GPU sooner than such operations are launched there


class PollState(NamedTuple):
    """Where the search stands. Plain numbers, so that a checkpoint holds all of it.

    order: number of the permutation in use, one more after every failed poll
    position: the next entry of it, in [0, 2N)
    tried: trial points that failed at this incumbent, radius and objective
    polls: polls ended so far, by success or by failure
    evaluations: trial points decided so far
    nan: how many of the tried ones had a NaN loss
    incumbent: the incumbent's loss, or None before the first step
    batch: checksum of the batch that it is of, 0 where that is not known
    noise: the loss's noise as measured before this poll, None if it was not
    mean_gap: running mean of the trial points between two accepted ones
    window: number of the working set that is polled (``psfast.search_simplex``)
    window_tried: how many of the tried ones are its, in this lap
    lap: rounds over its 2W trial points that were completed
    """

    order: int = 0
    position: int = 0
    tried: int = 0
    nan: int = 0
    polls: int = 0
    evaluations: int = 0
    incumbent: float | None = None
    batch: int = 0
    noise: float | None = None
    mean_gap: float = 1.0
    window: int = 0
    window_tried: int = 0
    lap: int = 0


class Decision(NamedTuple):
    """What became of a block.

    chosen: place in the block of the trial point to accept, None if the block failed
    loss: the loss of what is accepted, NaN if nothing is
    decided: trial points of the block that the serial loop would have evaluated too
    nan: how many of the block's losses are NaN
    point: which of the search's points to accept instead, None if none is lower
    """

    chosen: int | None
    loss: float
    decided: int
    nan: int
    point: int | None = None

    @property
    def success(self) -> bool:
        return self.chosen is not None or self.point is not None


def check_state(state: PollState, total: int) -> None:
    """Raise for a state that no search of ``total`` = 2N trial points can be in."""
    for name, value in state._asdict().items():
        if name not in ("incumbent", "noise", "mean_gap"):
            check_count(f"the state's {name}", value, least=0)
    if state.tried >= total:
        raise ValueError(f"the state's tried must be < {total}, got {state.tried}")
    check_number("the state's mean_gap", state.mean_gap, above=0.0)
    if state.noise is not None:
        check_number("the state's noise", state.noise, at_least=0.0)
    if not isinstance(state.incumbent, (int, float, type(None))):
        raise TypeError(f"the state's incumbent must be a number or None, got {state.incumbent!r}")


def derive_seed(seed: int, *stream: int) -> int:
    """A 62-bit seed from ``seed`` and a path of integers (SplitMix64, Steele et al. 2014)."""
    state = seed & 0xFFFFFFFFFFFFFFFF
    for number in (len(stream), *stream):
        state = (state + 0x9E3779B97F4A7C15 * (number + 1)) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 2


def poll_order(
    seed: int, order: int, start: int, count: int, total: int, device: torch.device | str = "cpu"
) -> Tensor:
    """``count`` entries, from place ``start``, of permutation number ``order`` of [0, total).

    A Feistel network on pairs in [0, a) x [0, b), walked until the value lies in range (the
    generalized Feistel cipher of Black & Rogaway 2002), so any part of the permutation costs
    O(1) memory and no list is ever shuffled. a b exceeds ``total`` by less than a, its square
    root: walks are rare and short, whatever ``total`` is.

    Returns int64 (count,) on ``device``, the same values on every one.
    """
    if not 0 <= start <= start + count <= total:
        raise ValueError(f"places {start} to {start + count} lie outside [0, {total}]")
    keys, (a, b) = permutation(seed, order, total)
    value = _feistel(torch.arange(start, start + count, device=device), a, b, keys)
    while True:
        outside = (value >= total).nonzero().squeeze(1)
        if not len(outside):
            return value
        value[outside] = _feistel(value[outside], a, b, keys)


def permutation(seed: int, order: int, total: int) -> tuple[list[int], tuple[int, int]]:
    """The keys of the network's rounds, and its sides a and b."""
    a = math.isqrt(max(total, 1) - 1) + 1
    keys = [derive_seed(seed, order, r) & _MASK32 for r in range(_FEISTEL_ROUNDS)]
    return keys, (a, -(-total // a))


def _feistel(value: Tensor, a: int, b: int, keys: Sequence[int]) -> Tensor:
    left, right = value // b, value % b
    for key in keys:
        # 32-bit words times 31-bit odd constants: int64 products never overflow.
        mixed = ((right ^ key) * 0x7FEB352D) & _MASK32
        mixed = ((mixed ^ (mixed >> 15)) * 0x46A7C56B) & _MASK32
        left, right = right, (left + (mixed ^ (mixed >> 16))) % a
        a, b = b, a
    return left * b + right


def coordinates(entries: Tensor) -> tuple[Tensor, Tensor]:
    """Poll entries in [0, 2N) as (index int64 in [0, N), sign int64 of +1 or -1)."""
    return entries >> 1, 1 - 2 * (entries & 1)


def first_improvement(losses: Tensor, bar: float) -> Decision:
    """Opportunistic acceptance: the first loss below the bar in poll order (Torczon 1997).

    losses: (K,); NaN compares false, so it never wins, and minus infinity is passed over.
    """
    if len(losses) <= _FEW:
        values = losses.tolist()
        nan = sum(map(math.isnan, values))
        for place, loss in enumerate(values):
            if loss < bar and loss != -math.inf:
                return Decision(place, loss, place + 1, nan)
        return Decision(None, math.nan, len(values), nan)
    losses = _near(losses).double()  # a bar that float32 has not must not be rounded for it
    lower = losses < bar
    decision = _decision(losses, lower.to(torch.uint8).argmax(), lower.any())
    if decision.chosen is None:
        return decision
    if decision.loss == -math.inf:
        return first_improvement(losses.masked_fill(losses == -math.inf, math.inf), bar)
    return decision._replace(decided=decision.chosen + 1)


def best_improvement(losses: Tensor, bar: float) -> Decision:
    """The lowest loss of the block, if below the bar; the earliest of equals (Torczon 1997).

    losses: (K,); NaN and infinity never win.
    """
    losses = _near(losses).double()
    finite = losses.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
    best = finite.argmin()
    return _decision(losses, best, finite.take(best) < bar)


def _near(losses: Tensor) -> Tensor:
    """Few losses on the CPU: one copy takes as long as one of the operations that decide."""
    return losses.cpu() if len(losses) <= _NEAR else losses


def _decision(losses: Tensor, place: Tensor, success: Tensor) -> Decision:
    """The decision for the trial point at ``place``, read from the device in one sync."""
    # Not losses[place], which would wait for the device to know where.
    values = [place, success, losses.take(place), losses.isnan().sum()]
    place, success, loss, nan = torch.stack([value.double() for value in values]).tolist()
    if not success:
        return Decision(None, math.nan, len(losses), int(nan))
    return Decision(int(place), loss, len(losses), int(nan))


def with_points(decision: Decision, losses: Sequence[float], bar: float) -> Decision:
    """The block's decision, or the lowest of the search's points if that is lower.

    losses: of the points; NaN and infinity never win. bar: what a point must lie below
    """
    best = min(range(len(losses)), key=lambda k: comparable(losses[k]))
    if decision.chosen is not None:
        bar = min(bar, decision.loss)
    if not comparable(losses[best]) < bar:
        return decision
    return decision._replace(chosen=None, point=best, loss=losses[best])


def kept_places(losses: Sequence[float], incumbent: float, margin: float, most: int) -> list[int]:
    """Which trial points the serial loop accepts: each below the bar that the one before it set.

    incumbent: the loss before the first; margin: as of ``acceptance_bar``; most: to accept
    """
    places, bar = [], acceptance_bar(incumbent, margin)
    for place, loss in enumerate(losses):
        if len(places) < most and -math.inf < loss < bar:
            places.append(place)
            bar = acceptance_bar(loss, margin)
    return places


def acceptance_margin(radius: float, decrease: float, floor: float) -> float:
    """How much lower than the incumbent's a loss must be: decrease radius^2 + floor.

    decrease: any > 0 asks for sufficient decrease, rho(t) = decrease t^2 with rho(t)/t -> 0:
        then the points need no lattice (Kolda, Lewis & Torczon 2003, section 3.7). With 0, the
        simple decrease that suffices on one (Torczon 1997), the bar is the incumbent's loss.
    floor: what the loss's own noise can feign (``noise_floor``)
    """
    return decrease * radius * radius + floor  # ** would overflow


def acceptance_bar(incumbent: float | None, margin: float) -> float:
    """What a loss must lie below to be accepted; infinity beside a loss that is not finite."""
    return comparable(incumbent) - margin


def noise_floor(noise: float, total: int) -> float:
    """The decrease that noise alone hardly ever feigns in a poll of ``total`` = 2N points.

    noise: standard deviation of a loss's error. The difference of two has sqrt(2) times as
    much, and the largest of ``total`` normal ones stays below sqrt(2 ln total) of that.
    """
    return 2.0 * noise * math.sqrt(math.log(total))


def noise_level(losses: Sequence[float]) -> float:
    """The noise of a loss, from its values at equally spaced, hardly different points.

    The k-th differences of a smooth function vanish there, those of independent errors with
    standard deviation s have the mean square s^2 (2k)! / (k!)^2 (ECnoise; Moré & Wild 2011,
    "Estimating computational noise"). The estimate is that of the first k which the next two
    confirm within a factor of 4 and whose differences change sign.

    losses: at least 6. Returns 0.0 where no k does: the loss is smooth as far as they show,
    constant or not finite.
    """
    differences, estimates, signs = list(losses), [], []
    for k in range(1, len(losses) - 1):
        differences = [b - a for a, b in itertools.pairwise(differences)]
        square = sum(d * d for d in differences) / len(differences)
        estimates.append(math.sqrt(square / math.comb(2 * k, k)))
        signs.append(min(differences) < 0.0 < max(differences))
    for level, change, after in zip(estimates, signs, range(3, len(estimates) + 1), strict=False):
        three = estimates[after - 3 : after]
        if change and max(three) <= 4.0 * min(three) < math.inf:
            return level
    return 0.0


def comparable(loss: float | None) -> float:
    """``loss``; infinity for one that is missing or not finite: a failed evaluation never wins."""
    return math.inf if loss is None or not math.isfinite(loss) else loss


def current_gap(state: PollState) -> float:
    """Trial points to the next accepted one, about: many times the mean of failures say more."""
    return float(state.tried) if state.tried > 8 * state.mean_gap else state.mean_gap


def is_opening(mean_gap: float, tried: int, patience: float) -> bool:
    """Whether the trial point behind ``tried`` ones of a poll is one of its first ``patience``,
    where the accepted ones lie no further apart.

    Wherever blocks begin and end, it is the same trial points that are: an accepted one among
    them keeps the mean gap below ``patience``.
    """
    return mean_gap <= patience and tried < patience


def block_size(
    state: PollState, overhead: float = 8.0, at_once: int = 1, ahead: bool = False
) -> int:
    """How many trial points to evaluate next: few while much improves, many while nothing does.

    overhead: what a block costs beside its trial points, in trial points
    at_once: trial points that a block should always have
    ahead: whether the next block is evaluated while this one is decided

    Half of a block that succeeds is thrown away, so with acceptance probability p about
    sqrt(2 overhead / p) trial points cost least, and no more than about 1/p. While nothing
    improves, blocks grow with the number of failures. With ``ahead`` the next block goes with
    it; but most of what one costs beside its trial points is hidden behind them, if they take
    longer.
    """
    gap = current_gap(state)
    if ahead:
        return max(at_once, round(max(1.5 * overhead, math.sqrt(0.05 * overhead * gap))))
    return max(at_once, round(min(0.8 * gap, math.sqrt(2.0 * overhead * gap))), state.tried // 4)


def advance(state: PollState, decision: Decision, total: int) -> tuple[PollState, bool]:
    """The state after a decided block, and whether the poll has failed.

    A poll fails when all ``total`` = 2N trial points failed at one incumbent, radius and
    objective; only then the permutation changes (any earlier change could leave a
    coordinate untried). After a success the poll goes on behind the accepted trial point.
    """
    tried = state.tried + decision.decided
    state = state._replace(
        position=(state.position + decision.decided) % total,
        tried=tried,
        nan=state.nan + decision.nan,
        evaluations=state.evaluations + decision.decided,
    )
    if decision.success:
        gap = _next_mean(state.mean_gap, tried)
        return end_poll(state)._replace(incumbent=decision.loss, mean_gap=gap), False
    if tried < total:
        return state, False
    return end_poll(state)._replace(order=state.order + 1, position=0, mean_gap=float(total)), True


def advance_through(
    state: PollState, places: Sequence[int], incumbents: Sequence[float], total: int
) -> PollState:
    """The state behind the accepted trial points of a descent: ``advance`` of each, at once.

    places: theirs among the descent's trial points; incumbents: the loss after each
    """
    if not places:
        return state
    gap, start = state.mean_gap, -state.tried
    for place in places:
        gap = _next_mean(gap, place + 1 - start)
        start = place + 1
    return end_poll(state)._replace(
        position=(state.position + start) % total,
        polls=state.polls + len(places),
        evaluations=state.evaluations + start,
        incumbent=incumbents[-1],
        mean_gap=gap,
    )


def _next_mean(mean_gap: float, gap: int) -> float:
    return 0.7 * mean_gap + 0.3 * gap


def end_poll(state: PollState) -> PollState:
    """The state with a new poll begun: nothing has been tried in it."""
    return state._replace(tried=0, nan=0, window_tried=0, polls=state.polls + 1)
