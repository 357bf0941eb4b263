"""psfast's own work around a closure, and its step against the reference's."""

from functools import partial

import pytest
import torch
from harness import (
    failing_reference_poll,
    forced,
    poll_block,
    serial_loop,
    state_tracking,
    with_backward,
)

import psfast
from psfast.flat import FlatParameters


def closure_of(size="small"):
    model, criterion, inputs, targets = state_tracking(size)
    return model, lambda: criterion(model(inputs), targets)


def test_own_work_of_a_failing_poll(measure):
    """A closure that does nothing, over the small model's 121,446 parameters."""
    model, _ = closure_of()
    loss = torch.tensor(1.0)
    optimizer = psfast.PatternSearch(model.parameters(), max_evaluations=20_000)
    measure(
        "step", "own work", "failing poll", lambda: optimizer.step(lambda: loss) and None, 20_000
    )
    assert optimizer.last_poll.evaluations > 0 and not optimizer.last_poll.accepted


def test_own_work_of_an_accepting_step(measure):
    """The same where every trial point improves: one step an accept."""
    model, _ = closure_of()
    optimizer = psfast.PatternSearch(model.parameters())
    level = 0

    def closure():
        nonlocal level
        level -= 1
        return torch.tensor(float(level // 2))  # twice the same: incumbent, then trial point

    def run():
        for _ in range(200):
            optimizer.step(closure)

    measure("step", "own work", "accepting step", run, 200)
    assert optimizer.last_poll.accepted


def test_failing_poll_of_the_serial_loop(measure):
    model, loss = closure_of()
    flat = FlatParameters(list(model.parameters()))
    index, delta = poll_block(flat, 0, 400)
    run = partial(serial_loop, loss, flat, index, delta)
    measure("step", "complete poll", "serial loop", run, 400)


def test_failing_poll_of_psfast(measure):
    model, loss = closure_of()
    optimizer = psfast.PatternSearch(model.parameters(), max_evaluations=400)

    def closure():
        return loss() * 0.0

    def run():
        optimizer.step(closure)

    measure("step", "complete poll", "psfast", run, 400)
    assert not optimizer.last_poll.accepted


def test_failing_poll_of_the_reference(measure):
    model, loss = closure_of()
    measure("step", "complete poll", "reference", failing_reference_poll(model, loss, 150), 150)


@pytest.mark.parametrize("backend", ["reference", "psfast"])
@pytest.mark.parametrize("closure_kind", ["as used", "no backward", "free"])
def test_accepting_steps(measure, backend, closure_kind):
    """p = 0.4, a step an accept; points are the trial points of 12 steps.

    As used: the reference's closure runs backward and psfast's does not. No backward: the
    same closure for both. Free: a closure that costs nothing, so that the step is left.
    """
    model, loss = closure_of()
    steps = 12
    points = accepts_and_points(steps)
    evaluate = loss
    if closure_kind == "free":
        evaluate = partial(torch.tensor, 0.0)
    elif closure_kind == "as used" and backend == "reference":
        evaluate = partial(with_backward, model, loss)
    position, level, incumbent = 0, 1e6, True

    def closure():
        nonlocal position, level, incumbent
        value = evaluate() * 0.0
        if incumbent:
            incumbent = False
            return value + level
        improves = forced(position, 0.4)
        position, level = position + 1, level - improves
        return value + level + (not improves)

    make = psfast.PatternSearch if backend == "psfast" else psfast.ReferencePatternSearch
    optimizer = make(model.parameters(), radius=1e-4)

    def run():
        nonlocal position, incumbent
        position = 0
        for _ in range(steps):
            if backend == "psfast":  # it evaluates the incumbent at the start of every step
                incumbent = True
            optimizer.step(closure)

    measure("step", f"p = 0.4, {closure_kind}", backend, run, points)
    assert position == points


def accepts_and_points(steps: int) -> int:
    """How many trial points the first ``steps`` accepts of the forced sequence take."""
    position = accepted = 0
    while accepted < steps:
        accepted += forced(position, 0.4)
        position += 1
    return position
