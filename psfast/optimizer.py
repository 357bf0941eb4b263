"""``PatternSearch``: the optimizer around the search functions and an objective."""

import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from psfast import search
from psfast.checks import check_count, check_number
from psfast.flat import (
    FlatParameters,
    check_no_inference_mode,
    same_parameters,
    trainable,
)
from psfast.notices import warn_caller
from psfast.objectives.base import Descent, Objective
from psfast.objectives.serial import SerialObjective
from psfast.polling import CompletePoll, WorkingSetPoll
from psfast.search import Decision, PollState
from psfast.search_simplex import SimplexGradient

_LARGEST_BLOCK = 65536
_LARGEST_DESCENT = 16_384
_BEST_BLOCK = 256
_SEARCH_BLOCK = 256
_BLOCK_SECONDS = 0.25
_PROGRESS_SECONDS = 0.1
_NOT_COPIED = ("progress", "step", "_flat", "_serial", "_spread", "_rule")
_NOISE_POINTS = 8
_ROUNDINGS = 8.0  # that a loss may be off by; 1.6 were seen
_GROUP_ENTRIES = {"params", "radius", "name", "param_names"}
_ACCEPTANCES = {
    "first": search.first_improvement,
    "best": search.best_improvement,
}


class PollReport(NamedTuple):
    """What one ``step`` did.

    evaluations: trial points decided, as the serial loop counts them
    speculated: trial points evaluated beyond those, because a block was already under way
    accepted: (index, delta) of the accepted changes, in order
    loss_before, loss_after: the incumbent's loss, on this step's objective
    radius: the largest radius of the param groups during the step
    failed: whether the poll failed, so that the radius was shrunk
    seconds: wall-clock time
    """

    evaluations: int
    speculated: int
    accepted: list[tuple[int, float]]
    loss_before: float
    loss_after: float
    radius: float
    failed: bool
    seconds: float


class _Block(NamedTuple):
    """Trial points that are being evaluated.

    index, delta: (K,) of them; losses: (K',), K' <= K; bar: what one must lie below
    arrived: when ``losses`` are on the CPU, where they are on their way to it
    """

    index: Tensor
    delta: Tensor
    losses: Tensor
    bar: float
    arrived: torch.cuda.Event | None


class _Group(dict):
    """A param group that tells learning-rate schedulers why they find no "lr" in it."""

    def __missing__(self, key):
        raise KeyError(
            f"PatternSearch has no {key!r}, only a radius: leave out schedulers and monitors of "
            "the learning rate, and set optimizer.radius"
        )


class PatternSearch(torch.optim.Optimizer):
    """Pattern search: change one coordinate by +-radius, keep it if the loss fell.

    One ``step`` polls the incumbent's 2N trial points in a keyed pseudo-random order until
    one is accepted (or ``max_accepts`` are, each polled from the one before), until all have
    failed (then the radius is multiplied by ``shrink``) or until ``max_evaluations`` trial points
    are decided; the next step goes on where this one stopped, and counts on the failures so far
    only if the objective is still the same: its incumbent's loss, and an ``Objective``'s batch.

    params: parameters or param groups; a group may set its own ``radius``. Frozen parameters
        are left alone, tied ones count once. All trainable ones need one dtype and device.
    radius: the first step length, > 0, in the parameters' units
    acceptance: "first" (the first lower loss in poll order, as the serial loop) or "best"
        (the lowest of a block)
    search: a ``SimplexGradient``, to try points along the slopes that the block measures
        before its trial points; None polls only
    shrink: factor in (0, 1) applied to the radius when a poll fails, and only then
    expand: factor >= 1 applied to the radius when a trial point is accepted
    decrease: a loss counts as lower only if it is below the incumbent's by more than
        decrease radius^2 (sufficient decrease; Kolda, Lewis & Torczon 2003). Points of the
        search lie off the poll's lattice and need at least 1e-4 radius^2.
    noise: standard deviation of the loss's own error, from sampling or from rounding; what it
        can feign does not count as lower. None measures it, by 8 evaluations along a tiny
        line, before the first poll and after every failed one (Moré & Wild 2011).
    min_radius: below it, a radius counts as converged; when all are, ``step`` is free
    max_evaluations: most trial points decided in one step; None: until accepted or failed. The
        points of a ``search`` count too, but those of the last block come on top.
    max_accepts: changes accepted in one step, on its one batch and dropout mask. Where many trial
        points are lower, as in early training, 100 cost far less so than in a step each. A point
        of a ``search`` counts as one, however many coordinates it changes.
    block_size: trial points evaluated together; None adapts. With "first" it changes the
        speed only, never a decision.
    seed: of the poll order, and of the dropout masks of a closure, one a poll; an ``Objective``
        has a mask of its own

    ``last_poll`` is the ``PollReport`` of the last step. ``progress``, if set, is called as
    ``progress(tried, total)`` at most ten times a second inside a long step; ``tried`` is 0 again
    after each accepted change.

    Keeps the conditions of Torczon (1997): with a rational ``expand`` and ``shrink`` and one
    fixed smooth objective, liminf of the gradient norm is 0.

    All searched parameters lie in one buffer, each a view of it: a part of the model's state is
    best saved as ``{name: value.clone() for name, value in part.state_dict().items()}``, as
    ``torch.save`` writes the whole storage behind a view.

    Raises ValueError or TypeError for arguments out of range, naming them.
    """

    def __init__(
        self,
        params,
        radius: float = 0.1,
        *,
        acceptance: str = "first",
        shrink: float = 0.5,
        expand: float = 1.0,
        decrease: float = 0.0,
        noise: float | None = 0.0,
        min_radius: float = 0.0,
        max_evaluations: int | None = None,
        max_accepts: int = 1,
        block_size: int | None = None,
        search: SimplexGradient | None = None,
        seed: int = 0,
    ):
        check_number("radius", radius, above=0.0)
        check_number("shrink", shrink, above=0.0, below=1.0)
        check_number("expand", expand, at_least=1.0)
        check_number("decrease", decrease, at_least=0.0)
        if noise is not None:
            check_number("noise", noise, at_least=0.0)
        check_number("min_radius", min_radius, at_least=0.0)
        check_count("max_evaluations", max_evaluations, optional=True)
        check_count("max_accepts", max_accepts)
        check_count("block_size", block_size, optional=True)
        if not isinstance(acceptance, str) or acceptance not in _ACCEPTANCES:
            names = ", ".join(map(repr, _ACCEPTANCES))
            raise ValueError(f"acceptance must be one of {names}, got {acceptance!r}")
        if search is not None and not isinstance(search, SimplexGradient):
            raise TypeError(f"search must be a psfast.SimplexGradient or None, got {search!r}")
        check_count("seed", seed, least=0)
        if isinstance(params, torch.nn.Module):
            raise TypeError("params must be a model's parameters(), got the model")
        super().__init__(params, {"radius": radius})
        self.acceptance = acceptance
        self.shrink, self.expand, self.min_radius = shrink, expand, min_radius
        self.decrease, self.noise = decrease, noise
        self.max_evaluations, self.max_accepts = max_evaluations, max_accepts
        self.block_size = block_size
        self.search, self.seed = search, seed
        self.progress: Callable[[int, int], None] | None = None
        self.last_poll: PollReport | None = None
        self._poll = PollState()
        self._loss_dtype = torch.float64
        self._seconds_per_point: float | None = None
        self._told = 0.0
        self._attach()
        self._fingerprint: int | None = None
        self._radii = self._read_radii()

    # -- what a user reads and sets ------------------------------------------------------

    @property
    def radius(self) -> float:
        """The largest radius of the param groups; setting it sets all of them."""
        return max(group["radius"] for group in self.param_groups)

    @radius.setter
    def radius(self, value: float) -> None:
        check_number("radius", value, above=0.0)
        for group in self.param_groups:
            group["radius"] = value

    def add_param_group(self, param_group: dict) -> None:
        """Search these parameters too.

        Raises ValueError for entries of a group that mean nothing here, and for a "radius" out of
        range.
        """
        if isinstance(param_group, dict):
            unknown = param_group.keys() - _GROUP_ENTRIES
            if unknown:
                raise ValueError(
                    f"a param group must have no entries but {sorted(_GROUP_ENTRIES)}, got "
                    f"{sorted(unknown)}"
                )
            if "radius" in param_group:
                check_number("radius", param_group["radius"], above=0.0)
        super().add_param_group(param_group)
        self.param_groups[-1] = _Group(self.param_groups[-1])

    @property
    def converged(self) -> bool:
        """Whether every radius has shrunk below ``min_radius`` (or to zero)."""
        return all(
            group["radius"] < self.min_radius or group["radius"] == 0.0
            for group in self.param_groups
        )

    @property
    def evaluations(self) -> int:
        """Trial points decided so far, over all steps."""
        return self._poll.evaluations

    @property
    def polls(self) -> int:
        """Polls ended so far, by success or by failure."""
        return self._poll.polls

    # -- one step ------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable | Objective) -> Tensor:
        """Poll until a success, a failed poll or ``max_evaluations``.

        closure: an ``Objective`` over this optimizer's parameters, or any callable that
            returns a scalar loss. Nothing needs to call ``backward``. Its loss must depend on
            the parameters alone, on one batch that was drawn outside: a batch or a number drawn
            at random in it (but by torch) would be searched for the luckiest draw.

        Returns the incumbent's loss, a scalar tensor; once converged, the last known one. An
        exception in ``closure`` leaves the incumbent in place and is raised on.
        """
        started = time.perf_counter()
        check_no_inference_mode()
        objective = self._objective(closure)
        if self.converged and self._poll.incumbent is not None:
            return self._report(started, self._poll)
        with objective.undisturbed():
            try:
                return self._step(objective, started)
            finally:
                self._flat.changed()  # what the step itself wrote is nobody else's change

    def _step(self, objective: Objective, started: float) -> Tensor:
        current = self._evaluate_incumbent(objective)
        if self._seconds_per_point is None:
            self._seconds_per_point = time.perf_counter() - started
        before, radius, accepted, evaluated, failed = self._poll, self.radius, [], 0, False
        accepts = 0  # a point of the search is one, whatever it changes
        is_stale = False  # whether the incumbent's loss is only as its trial point had it
        ahead: _Block | None = None  # comes next, and is under way
        while accepts < self.max_accepts and not failed:
            last, current = current, self._evaluator(objective, self._poll.tried)
            size = self._block_size(current, self._poll, before)
            if size < 1:
                break
            if is_stale or current is not last:
                if current is not last:
                    current.look_again()
                self._poll = self._poll._replace(incumbent=self._loss_of(current))
                is_stale = False
            radius = max(radius, self.radius)
            block_started = time.perf_counter()
            if self._descends(current, self._poll):
                most = self.max_accepts - accepts
                decision, changes, count = self._descend(current, size, most)
                accepts += len(changes)
            else:
                block = ahead or self._begin_block(current, self._poll, size)
                ahead = self._look_ahead(current, before, block)
                decision, changes, count = self._poll_block(current, block)
                accepts += bool(changes)
                is_stale = bool(changes) and not current.keeps_losses
            seconds = time.perf_counter() - block_started
            self._seconds_per_point = max(1e-9, seconds / max(1, count))
            if ahead and (changes or decision.decided < len(block.index)):
                count += len(ahead.losses)
                ahead = None
            accepted += changes
            evaluated += count
            failed = decision is not None and self._commit(decision)
            self._tell_progress(started)
        return self._report(started, before, radius, accepted, evaluated, failed)

    def _objective(self, closure: Callable | Objective) -> Objective:
        """One type for the core: a plain closure becomes a ``SerialObjective``."""
        self._follow_settings()
        self._follow_values()
        if isinstance(closure, Objective):
            if not same_parameters(closure.params, self._params):
                raise ValueError(
                    "the objective's params must be the optimizer's trainable parameters in the "
                    f"same order, got {len(closure.params)} tensors for {len(self._params)}; "
                    "pass params=... to psfast.objective"
                )
            return closure
        if not callable(closure):
            raise TypeError(
                "step needs a closure that returns the loss, or a psfast.objective, "
                f"got {type(closure).__name__}"
            )
        if self._serial is None:
            self._serial = SerialObjective(closure, self._params)
        self._serial.closure = closure
        self._serial.seed = search.derive_seed(self.seed, self._poll.polls)
        return self._serial

    def _settle(self) -> None:
        """Before the state is read, which may be inside of ``torch.inference_mode()``."""
        with torch.inference_mode(False):
            self._follow_settings()
            if self._fingerprint is None:  # else the parameters' values may be still to come
                self._follow_values()

    def _follow_values(self) -> None:
        """Take up parameters that were moved or written since the last step."""
        if self._flat.changed() and self._fingerprint != self._flat.fingerprint():
            self._restart_poll()
        self._fingerprint = None

    def _follow_settings(self) -> None:
        """Take up what was frozen, added or set since the last step."""
        if not same_parameters(self._listed(), self._known):
            self._attach()
        elif (self._rule.seed, self._rule.settings) != (self.seed, self.search):
            self._start_over()
        if self._radii != self._read_radii():  # set by hand, or by a schedule
            for group in self.param_groups:
                check_number("radius", group["radius"], at_least=0.0)
            self._radii = self._read_radii()
            self._restart_poll()

    def _read_radii(self) -> tuple[float, ...]:
        return tuple(group["radius"] for group in self.param_groups)

    def _attach(self) -> None:
        known = self._listed()
        params = trainable(known)
        if not params:
            raise ValueError("params must hold at least one trainable parameter, got none")
        self._flat = FlatParameters(params)  # which may refuse them: nothing has changed then
        self._known, self._params = known, params
        self._start_over()

    def _start_over(self) -> None:
        """Other trial points than before, from the first one on."""
        self._begin()
        self._poll = self._poll._replace(position=0, window=0)
        self._restart_poll()

    def _begin(self) -> None:
        self._serial: SerialObjective | None = None
        self._spread: tuple | None = None
        self._rule = self._new_rule(self.seed)

    def _new_rule(self, seed: int) -> CompletePoll | WorkingSetPoll:
        if self.search is None:
            return CompletePoll(seed, self._flat)
        return WorkingSetPoll(seed, self._flat, self.search)

    def _listed(self) -> list[torch.nn.Parameter]:
        """The trainable parameters as the groups list them, tied ones as often as they do."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _evaluator(self, objective: Objective, tried: int) -> Objective:
        """Which of an objective and its opening evaluates the trial point behind ``tried`` ones."""
        opening = objective.opening
        if opening is None or self.acceptance != "first" or self.search is not None:
            return objective
        opens = search.is_opening(self._poll.mean_gap, tried, opening.patience)
        return opening if opens else objective

    def _evaluate_incumbent(self, objective: Objective) -> Objective:
        """Another loss than the known one means another objective, and so does another batch.

        Returns who has evaluated it: the one of the last trial point, which knows the loss to the
        bit, or the one of the next, where a step ended between the two with an exception.
        """
        batch, known = objective.batch_checksum(), self._poll.incumbent
        is_known = known is not None and batch == self._poll.batch
        if not is_known:
            self._restart_poll()
        tried = self._poll.tried
        last, following = (self._evaluator(objective, n) for n in (max(0, tried - 1), tried))
        for current in dict.fromkeys((last, following)):
            value = self._loss_of(current)
            if not is_known or value == known or (math.isnan(value) and math.isnan(known)):
                break
        else:
            self._restart_poll()
        self._poll = self._poll._replace(incumbent=value, batch=batch)
        if self.noise is None and self._poll.noise is None:
            self._measure_noise(current)
        return current

    def _loss_of(self, objective: Objective) -> float:
        """The incumbent's."""
        loss = objective()
        self._loss_dtype = loss.dtype
        return loss.item()

    def _measure_noise(self, objective: Objective) -> None:
        """Losses along a line on which only the last few bits of the parameters change."""
        buffer = self._flat.buffer
        scale = max(buffer.abs().max().item(), self.radius)
        index = torch.arange(len(buffer), device=buffer.device)
        size = 4 * torch.finfo(buffer.dtype).eps * scale
        delta = torch.ones_like(buffer) * size  # not full_like, which refuses to overflow
        losses = [objective.loss_at(index, k * delta).item() for k in range(1, _NOISE_POINTS + 1)]
        self._poll = self._poll._replace(noise=search.noise_level(losses))

    def _margin(self, decrease: float) -> float:
        """How much lower than the incumbent's a loss must be now, ``decrease`` in squared radii."""
        noise = self._poll.noise if self.noise is None else self.noise
        floor = search.noise_floor(noise, 2 * self._flat.size) if noise else 0.0
        return search.acceptance_margin(max(self._radii), decrease, floor)

    def _bar(self, decrease: float) -> float:
        return search.acceptance_bar(self._poll.incumbent, self._margin(decrease))

    def _restart_poll(self) -> None:
        self._poll = self._poll._replace(tried=0, nan=0, window_tried=0)

    def _descends(self, objective: Objective, poll: PollState) -> bool:
        """Whether the objective is to accept by itself what comes next at ``poll``."""
        return (
            objective.descends
            and self.max_accepts > 1
            and self.acceptance == "first"
            and self.search is None
            and self.expand == 1.0  # else the radius moves with every accepted one
            and search.current_gap(poll) <= objective.largest_gap
        )

    def _looks_ahead(self, objective: Objective, poll: PollState) -> bool:
        """Whether blocks are evaluated while the ones before them are decided.

        Where one improves, the next one was for nothing: worth it where that is rare.
        """
        return (
            objective.is_asynchronous
            and self.acceptance == "first"
            and self.search is None
            and search.current_gap(poll) > 2.0 * objective.overhead
        )

    def _block_size(self, objective: Objective, poll: PollState, before: PollState) -> int:
        """Trial points to evaluate at ``poll``; 0 when ``max_evaluations`` are used up."""
        left = 2 * self._flat.size - poll.tried
        if self.max_evaluations is not None:
            left = min(left, before.evaluations + self.max_evaluations - poll.evaluations)
        left = min(left, self._rule.most(poll))
        if poll.tried or not self._descends(objective, poll):  # which would end there by itself
            left = min(left, objective.patience - poll.tried)
        if self.block_size is not None:
            return min(self.block_size, left)
        if self.search is not None:
            return min(_SEARCH_BLOCK, left)
        if self.acceptance != "first":
            return min(_BEST_BLOCK, left)
        # Blocks of a fraction of a second keep progress and Ctrl-C alive. Under "first" the
        # size of a block decides nothing, so the clock may have a say in it.
        timely = max(1, int(_BLOCK_SECONDS / self._seconds_per_point))
        if self._descends(objective, poll):
            return min(left, timely, _LARGEST_DESCENT)
        ahead = self._looks_ahead(objective, poll)
        size = search.block_size(poll, objective.overhead, objective.at_once, ahead)
        return min(left, timely, _LARGEST_BLOCK, size)

    def _trial_points(self, poll: PollState, count: int) -> tuple[Tensor, Tensor]:
        """index and delta (count,) of the next trial points."""
        index, sign = self._rule.block(poll, count)
        return index, sign * self._radius_of(index)

    def _radius_of(self, index: Tensor) -> float | Tensor:
        """The radius of all coordinates, or (K,) of each where the groups' differ."""
        if len(self.param_groups) == 1:
            return self.radius
        radii, bounds = self._spread_radii(index.device)
        return radii[torch.bucketize(index, bounds, right=True)]

    def _spread_radii(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Each tensor's radius, and where it ends; kept, as making them waits for the device."""
        dtype = self._flat.buffer.dtype
        key = self._radii, device, dtype
        if self._spread is None or self._spread[0] != key:
            radius_of = {p: g["radius"] for g in self.param_groups for p in g["params"]}
            radii = [radius_of[p] for p in self._params]
            radii = torch.tensor(radii, dtype=dtype, device=device)
            self._spread = key, radii, torch.tensor(self._flat.offsets[1:], device=device)
        return self._spread[1:]

    def _begin_block(self, objective: Objective, poll: PollState, size: int) -> _Block:
        """Have the next ``size`` trial points evaluated; may not wait for their losses."""
        index, delta = self._trial_points(poll, size)
        bar, whole = self._bar(self.decrease), self._rule.whole_blocks
        stop_below = bar if self.acceptance == "first" and not whole else None
        losses = objective.losses(index, delta, stop_below=stop_below)
        arrived = None
        if whole:  # all of them matter, where the search counts
            losses = losses.to(index.device)
        elif losses.is_cuda and self._looks_ahead(objective, poll):
            # What comes from there now does not wait for the next block, as it would later.
            losses, device = losses.to("cpu", non_blocking=True), losses.device
            arrived = torch.cuda.current_stream(device).record_event()
        return _Block(index, delta, losses, bar, arrived)

    def _look_ahead(self, objective: Objective, before: PollState, block: _Block) -> _Block | None:
        """What comes next if ``block`` fails, under way before that is known; or None."""
        if not self._looks_ahead(objective, self._poll):
            return None
        failure = Decision(None, math.nan, len(block.index), 0)
        poll, has_ended = self._rule.advance(self._poll, failure)
        if has_ended or self._descends(objective, poll):
            return None
        size = self._block_size(objective, poll, before)
        return self._begin_block(objective, poll, size) if size else None

    def _poll_block(self, objective: Objective, block: _Block) -> tuple:
        """Decide a block and accept at most one change: the decision, what changed, and how many
        trial points were evaluated."""
        index, delta, losses, _, arrived = block
        if arrived is not None:
            arrived.synchronize()
        points = self._rule.points(self._poll, index, delta, losses)
        decision = self._decide(objective, block, points)
        changes = []
        if decision.success:
            changes = self._accept(objective, index, delta, points, decision)
        self._poll = self._poll._replace(evaluations=self._poll.evaluations + len(points))
        return decision, changes, len(losses) + len(points)

    def _descend(self, objective: Objective, size: int, most: int) -> tuple:
        """Let the objective accept by itself; returns as ``_poll_block``, with the decision on what
        failed behind the last accepted trial point, if there is any."""
        index, delta = self._trial_points(self._poll, size)
        values = self._flat.buffer.clone()
        try:
            descent = objective.descend(
                index,
                delta,
                incumbent=self._poll.incumbent,
                margin=self._margin(self.decrease),
                most=most,
                gap=search.current_gap(self._poll),
            )
            decision = self._take_in(descent)
        except BaseException:
            if objective.interrupted is None:
                self._flat.buffer.copy_(values)
                self._flat.note_write()
            elif decision := self._take_in(objective.interrupted):
                self._commit(decision)
            raise
        places = torch.tensor(descent.places, dtype=torch.int64, device=index.device)
        kept = index[places].tolist(), delta[places].tolist()
        return decision, list(zip(*kept, strict=True)), descent.evaluated

    def _take_in(self, descent: Descent) -> Decision | None:
        """Enter what was accepted into the state; the decision on what failed behind it."""
        losses, places, incumbents, _ = descent
        rest, decision = losses[places[-1] + 1 if places else 0 :], None
        if len(rest):
            decision = Decision(None, math.nan, len(rest), int(rest.isnan().sum()))
        self._poll = search.advance_through(self._poll, places, incumbents, 2 * self._flat.size)
        return decision

    def _decide(self, objective: Objective, block: _Block, points: list) -> Decision:
        losses, bar = block.losses, block.bar
        decision = _ACCEPTANCES[self.acceptance](losses, bar)
        if objective.confirms and losses.is_floating_point():
            decision = self._confirm(objective, block, decision)
        if self._rule.whole_blocks:
            decision = decision._replace(decided=len(losses))
        if not points:
            return decision
        losses = [objective.loss_at(index, delta) for index, delta in points]
        values = torch.stack(losses).tolist()  # one wait for all of them
        bar = self._bar(max(self.decrease, self._rule.least_decrease))
        return search.with_points(decision, values, bar)

    def _confirm(self, objective: Objective, block: _Block, decision: Decision) -> Decision:
        """The decision by the losses that the trial points would have as incumbents.

        One that is lower by rounding alone is none: else points could be found, each lower than
        the one before, in a ring, and the radius would never shrink.
        """
        index, delta, losses, bar, _ = block
        close = _ROUNDINGS * torch.finfo(losses.dtype).eps * max(1.0, abs(bar))
        while decision.chosen is not None and bar - decision.loss <= close:
            place = slice(decision.chosen, decision.chosen + 1)
            loss = objective.loss_at(index[place], delta[place]).item()
            if -math.inf < loss < bar:
                return decision._replace(loss=loss)
            losses = losses.clone()
            losses[place] = loss
            decision = _ACCEPTANCES[self.acceptance](losses, bar)
        return decision

    @staticmethod
    def _accept(objective, index, delta, points, decision) -> list[tuple[int, float]]:
        if decision.point is not None:
            index, delta = points[decision.point]
        else:
            place = slice(decision.chosen, decision.chosen + 1)
            index, delta = index[place], delta[place]
        changes = list(zip(index.tolist(), delta.tolist(), strict=True))  # no wait for what follows
        objective.accept(index, delta)
        return changes

    def _commit(self, decision: Decision) -> bool:
        """Take the decision into the state; returns whether the poll failed."""
        total, nan = 2 * self._flat.size, self._poll.nan + decision.nan
        poll, failed = self._rule.advance(self._poll, decision)
        self._poll = poll._replace(noise=None) if failed else poll
        factor = self.shrink if failed else self.expand if decision.success else 1.0
        if factor != 1.0:
            for group in self.param_groups:  # an infinite one could never shrink again
                group["radius"] = min(group["radius"] * factor, sys.float_info.max)
            self._radii = self._read_radii()
        if failed and nan == total:
            message = f"the loss was NaN at all {total} trial points; the poll failed"
            warn_caller(message, RuntimeWarning)
        return failed

    def _tell_progress(self, started: float) -> None:
        now = time.perf_counter()
        if self.progress and now - max(started, self._told) > _PROGRESS_SECONDS:
            self._told = now
            self._flat.changed()  # it may ask for the state
            self.progress(self._poll.tried, 2 * self._flat.size)

    def _report(
        self, started, before, radius=None, accepted=(), evaluated=0, failed=False
    ) -> Tensor:
        decided = self._poll.evaluations - before.evaluations
        self.last_poll = PollReport(
            evaluations=decided,
            speculated=evaluated - decided,
            accepted=list(accepted),
            loss_before=before.incumbent,
            loss_after=self._poll.incumbent,
            radius=self.radius if radius is None else radius,
            failed=failed,
            seconds=time.perf_counter() - started,
        )
        return self._flat.buffer.new_tensor(self._poll.incumbent, dtype=self._loss_dtype)

    # -- copies and checkpoints ----------------------------------------------------------

    def __getstate__(self) -> dict:
        """For ``copy.deepcopy((model, optimizer))`` and pickle: the copy goes on as this one does.

        Hooks, as in torch's own optimizers, and ``progress`` stay behind.
        """
        self._settle()
        own = {name: value for name, value in vars(self).items() if name not in _NOT_COPIED}
        return {
            **{name: value for name, value in own.items() if not name.startswith("_optimizer_")},
            "slopes": self._rule.state_dict(self._poll),
        }

    def __setstate__(self, state: dict) -> None:
        # torch's load_state_dict comes here too, with the param groups alone.
        slopes = state.pop("slopes", None)
        super().__setstate__(state)
        self.param_groups = [_Group(group) for group in self.param_groups]
        if slopes is None:
            return
        self.progress = None
        self._flat = FlatParameters(self._params)
        self._begin()
        self._rule.load_state_dict(self._poll, slopes)
        if self._fingerprint is not None:
            self._flat.mark_changed()

    def state_dict(self) -> dict:
        """Plain numbers: radii in the param groups, the rest under "search". With a search
        step also the (W,) tensors that it has measured, under "slopes".

        Loaded beside the parameters of the same moment, in either order, the search goes on
        bit for bit, also from the middle of a poll.
        """
        self._settle()
        state = super().state_dict()
        state["search"] = {
            **self._poll._asdict(),
            "seed": self.seed,
            "size": self._flat.size,
            "fingerprint": (
                self._flat.fingerprint() if self._fingerprint is None else self._fingerprint
            ),
        }
        learned = self._rule.state_dict(self._poll)
        if learned:
            state["slopes"] = learned
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up a state from ``state_dict``.

        Raises KeyError if it is no PatternSearch's, ValueError if it is not of a search like this
        one: of as many coordinates, and with the same ``working_set`` if any. Nothing has
        changed then.
        """
        if "search" not in state_dict:
            raise KeyError(
                "state_dict must come from a psfast.PatternSearch: it has no entry 'search', "
                f"only {sorted(state_dict)}"
            )
        saved = dict(state_dict["search"])
        if not same_parameters(self._listed(), self._known):
            self._attach()
        names = {*PollState._fields, "seed", "fingerprint", "size"}
        if saved.keys() != names:
            raise ValueError(
                f"the state's 'search' must have the entries {sorted(names)}, got {sorted(saved)}"
            )
        seed, fingerprint, size = (saved.pop(name) for name in ("seed", "fingerprint", "size"))
        check_count("the state's seed", seed, least=0)
        if size != self._flat.size:
            raise ValueError(
                f"the state must come from a search over the same parameters, got one over {size} "
                f"coordinates for {self._flat.size}"
            )
        for group in state_dict["param_groups"]:
            check_number("the state's radius", group["radius"], at_least=0.0)
        poll, rule = PollState(**saved), self._new_rule(seed)
        search.check_state(poll, 2 * size)
        rule.load_state_dict(poll, state_dict.get("slopes", {}))
        super().load_state_dict(state_dict)
        self.seed, self._fingerprint = seed, fingerprint
        self._poll, self._rule = poll, rule
        self._radii = self._read_radii()
        self._flat.mark_changed()
