"""``fit``: the plain training loop, for those without Lightning."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import nn

from psfast.checks import check_count, check_number
from psfast.data import ResumableLoader
from psfast.evaluation import BatchObjectives, Scores, evaluate, modes_of, set_modes, unpack
from psfast.optimizer import PatternSearch, PollReport
from psfast.random_state import seeded
from psfast.search import derive_seed

_LINE_SECONDS = 5.0
_END_OF_PASS = object()


class History(NamedTuple):
    """What ``fit`` did.

    polls: one ``PollReport`` a step, but none of a step that was cut by ``max_seconds`` or Ctrl-C
    validation: (step, ``Scores``) of every validation, the first before any step
    stopped: why it ended: "max_steps", "max_seconds", "end of loader", "converged", "callback"
        or "interrupted"
    """

    polls: list[PollReport]
    validation: list[tuple[int, Scores]]
    stopped: str


class _Stop(Exception):
    """Raised to leave the loop from wherever it is; its argument is the reason."""


def fit(
    model: nn.Module,
    criterion: Callable,
    loader: Iterable,
    optimizer: PatternSearch,
    *,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    val_loader: Iterable | None = None,
    val_every: int | None = None,
    callback: Callable[[int, PollReport], object] | None = None,
    progress: bool = True,
) -> History:
    """Train ``criterion(model(inputs), targets)``: one ``optimizer.step`` a batch, no gradient.

    loader: batches, as (inputs, targets) or {"x": inputs, "y": targets}, each a tensor or a nest
        of lists, tuples and dicts that holds tensors; gone through again and again until
        ``max_steps`` or ``max_seconds``, and just once if neither is given. A sampler that has
        ``set_epoch`` is told which pass it is, from its own ``epoch`` on. A
        ``psfast.data.ResumableLoader`` goes on behind the last batch of the call before, or where
        the state that it has loaded was saved.
        A batch equal to the one before is the same objective, so full-batch training (a
        loader of one batch) completes its polls over as many steps as they take.
    max_seconds: also ends a step in the middle of its poll, behind a block of trial points
    val_loader: scored in eval mode before the first step, after each pass over ``loader``
        (with ``val_every``: after so many steps) and at the end
    callback: called as ``callback(step, report)`` after each step; training stops when it
        returns something true

    Ctrl-C ends the loop as ``max_steps`` does: the model holds the incumbent, and the history
    is returned. Buffers (BatchNorm statistics) are updated once a step, by one forward pass
    of the accepted state. A model in eval mode is put into training mode as a whole; in one that
    trains, a module in eval mode stays so. All are left in the mode that they came in.

    Raises TypeError for another optimizer or a batch of another form, ValueError for an empty
    loader or a batch without supervised positions.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, got {type(criterion).__name__}")
    if not isinstance(optimizer, PatternSearch):
        raise TypeError(f"optimizer must be a psfast.PatternSearch, got {type(optimizer).__name__}")
    scored = () if val_loader is None else val_loader
    for name, value in (("loader", loader), ("val_loader", scored)):
        if not (hasattr(value, "__iter__") or hasattr(value, "__getitem__")):
            raise TypeError(f"{name} must be an iterable of batches, got {type(value).__name__}")
    if isinstance(scored, Iterator):  # which ends with the first validation
        raise TypeError(
            "val_loader must be an iterable that starts anew each time, like a list or a "
            f"DataLoader, got {type(scored).__name__}"
        )
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable or None, got {type(callback).__name__}")
    for name, value in (("max_steps", max_steps), ("val_every", val_every)):
        check_count(name, value, optional=True)
    if max_seconds is not None:
        check_number("max_seconds", max_seconds, above=0.0)
    run = _Run(model, criterion, optimizer, val_loader, _Display(max_steps, progress))
    deadline = None if max_seconds is None else time.perf_counter() + max_seconds
    told, modes = optimizer.progress, modes_of(model)

    def inside_poll(tried: int, total: int) -> None:
        if told is not None:
            told(tried, total)
        run.display.poll(tried, total)
        if deadline is not None and time.perf_counter() >= deadline:
            raise _Stop("max_seconds")

    optimizer.progress = inside_poll
    try:
        run.validate()
        with closing(_batches(loader, max_steps is None and max_seconds is None)) as batches:
            for batch in batches:
                if batch is _END_OF_PASS:
                    if not val_every:
                        run.validate()
                    continue
                report = run.step(batch)
                if val_every and run.steps % val_every == 0:
                    run.validate()
                if callback is not None and callback(run.steps, report):
                    raise _Stop("callback")
                if run.steps == max_steps:
                    raise _Stop("max_steps")
                if deadline is not None and time.perf_counter() >= deadline:
                    raise _Stop("max_seconds")
                if optimizer.converged:
                    raise _Stop("converged")
        stopped = "end of loader"
    except _Stop as stop:
        stopped = stop.args[0]
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:
        optimizer.progress = told
        run.display.close()
        set_modes(modes)
    try:
        if stopped != "interrupted":
            run.validate()
    except KeyboardInterrupt:
        stopped = "interrupted"
    return History(run.polls, run.validation, stopped)


class _Run:
    """The model, what it is trained with, and what has happened so far."""

    def __init__(self, model, criterion, optimizer, val_loader, display):
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.val_loader, self.display = val_loader, display
        self.device = optimizer.param_groups[0]["params"][0].device
        self.objectives = BatchObjectives(model, criterion, optimizer)
        self.steps = 0
        self.polls: list[PollReport] = []
        self.validation: list[tuple[int, Scores]] = []
        self._validated: tuple[int, int] | None = None
        self._has_buffers = any(True for _ in model.buffers())
        # In a model that trains, a module in eval mode is one held still.
        self.modes = [(module, mode or not model.training) for module, mode in modes_of(model)]

    def step(self, batch) -> PollReport:
        inputs, targets = unpack(batch, self.device)
        set_modes(self.modes)  # a callback may have changed them
        seed = derive_seed(self.optimizer.seed, self.optimizer.polls)
        self.optimizer.step(self.objectives.on(inputs, targets, seed))
        if self._has_buffers:
            with torch.no_grad(), seeded(seed, self.device):
                self.model(inputs)
        self.steps += 1
        self.polls.append(self.optimizer.last_poll)
        self.display.step(self.steps, self.polls[-1])
        return self.polls[-1]

    def validate(self) -> None:
        """Score the model as it is now, unless that has been done."""
        now = self.steps, self.optimizer.evaluations  # a step that was cut is not counted
        if self.val_loader is not None and now != self._validated:
            scores = evaluate(self.model, self.criterion, self.val_loader)
            self.validation.append((self.steps, scores))
            self._validated = now
            self.display.validation(scores)


def _batches(loader: Iterable, one_pass: bool):
    """The batches, and ``_END_OF_PASS`` after each pass: without end, unless ``one_pass``."""
    sampler = getattr(loader, "sampler", None)
    epoch, passes, empty = getattr(sampler, "epoch", 0), 0, False
    is_resumable = isinstance(loader, ResumableLoader)
    while True:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch + passes)
        passes += 1
        was_empty, empty = empty, True
        try:
            for batch in loader:
                empty = False
                yield batch
        except GeneratorExit:  # in the middle of a pass
            if is_resumable:
                loader.load_state_dict(loader.state_dict())
            elif hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch + passes)  # another order in the next `fit`
            raise
        if empty and was_empty:  # once is what a loader resumed at the end of its epoch gives
            raise ValueError(
                f"loader gave no batch in pass {passes - 1}; "
                "it must be an iterable that starts anew each time, like a list or a DataLoader"
            )
        if not empty:
            yield _END_OF_PASS
            if one_pass:
                break
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch + passes)


class _Display:
    """A tqdm bar; a line now and then where tqdm is not installed; nothing."""

    def __init__(self, max_steps: int | None, shown: bool):
        self._bar = None
        self._shown, self._total = shown, max_steps
        self._last_line, self._scores = 0.0, ""
        if shown:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=max_steps, unit="step", dynamic_ncols=True)

    def step(self, steps: int, report: PollReport) -> None:
        speed = report.evaluations / max(report.seconds, 1e-9)
        text = f"loss {report.loss_after:.4g}, radius {report.radius:.3g}, {speed:,.0f} points/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text + self._scores, refresh=False)
            self._bar.update()
        else:
            self._line(f"step {steps}/{self._total or '?'}: {text}{self._scores}")

    def poll(self, tried: int, total: int) -> None:
        if not tried:  # just accepted: `step` is about to say so
            return
        text = f"poll {tried:,} of {total:,}"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            self._line(text)

    def validation(self, scores: Scores) -> None:
        self._scores = f", val loss {scores.loss:.4g}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self, text: str) -> None:
        now = time.perf_counter()
        if self._shown and now - self._last_line > _LINE_SECONDS:
            self._last_line = now
            print(text, file=sys.stderr)
