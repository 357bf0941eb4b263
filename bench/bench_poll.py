"""Trial points a second of every backend, in five regimes, beside the three baselines.

Each case checks its losses against the float64 serial ones before it is timed.
"""

from functools import partial

import pytest
import torch
from harness import (
    ForcedOutcomes,
    agreement,
    failing_reference_poll,
    forced,
    poll_block,
    run_points,
    search_from_start,
    search_on_batches,
    serial_accepts,
    serial_loop,
    serial_search_from_start,
    serial_search_on_batches,
    state_tracking,
    values_of,
)
from work import complete_poll_flops

import psfast
from psfast.flat import FlatParameters

BACKENDS = ["serial", "batched", "fused"]
CASES = [("small", 4), ("small", 64), ("medium", 4), ("large", 4)]
# How many improve, forced; None: as the losses themselves say, from a fresh model on (0.43 of the
# first thousands), where psfast takes 100 changes a step.
REGIMES = {"complete poll": 0.0, "p = 0.001": 1e-3, "p = 0.4": 0.4, "start of training": None}
# Trial points of a case: a complete poll of the small model for the fastest, else what takes
# a few seconds, so that blocks reach the size that they have in most of a poll.
POINTS = {
    "serial": {("small", 4): 400, ("small", 64): 100, ("medium", 4): 100, ("large", 4): 40},
    "batched": {
        ("small", 4): 65_536,
        ("small", 64): 2_048,
        ("medium", 4): 4_096,
        ("large", 4): 1_024,
    },
    "fused": {
        ("small", 4): 242_892,
        ("small", 64): 8_192,
        ("medium", 4): 16_384,
        ("large", 4): 1_024,
    },
}
TOLERANCE = 2e-5


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]
pytestmark = pytest.mark.parametrize("device", DEVICES)


def name(size, batch, device):
    return f"{size}, B = {batch}, T = 16, {device}"


def build(backend, size, batch, device):
    """The objective, after its losses are found right; skips, by name, what is not there."""
    model, criterion, inputs, targets = state_tracking(size, batch, device=device)
    try:
        objective = psfast.objective(model, criterion, inputs, targets, backend=backend)
    except ValueError as reason:
        pytest.skip(f"{backend}: {reason}")
    exact = state_tracking(size, batch, dtype=torch.float64)
    error = agreement(objective, psfast.objective(*exact, backend="serial"))
    assert error < TOLERANCE, f"{backend} is off by {error}: no timing of wrong losses"
    return objective


def points_of(backend, size, batch, regime, quick):
    if quick:
        return 64
    points = POINTS[backend][size, batch]
    most = {
        "complete poll": points,
        "p = 0.001": 40_000,
        "p = 0.4": 4_000 if (size, batch) == ("small", 4) else 500,
        "start of training": 4_000 if (size, batch) == ("small", 4) else 500,
    }
    return min(points, most[regime])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size, batch", CASES)
@pytest.mark.parametrize("regime", REGIMES)
def test_backend(measure, quick, regime, size, batch, backend, device):
    if quick and (size, batch) != ("small", 4):
        pytest.skip("one size is enough without timing")
    objective = build(backend, size, batch, device)
    points = points_of(backend, size, batch, regime, quick)
    if REGIMES[regime] is None:
        run = partial(search_from_start, objective, values_of(objective.params), points)
    else:
        outcomes = ForcedOutcomes(objective, REGIMES[regime])
        optimizer = psfast.PatternSearch(objective.params, radius=1e-3)
        run = partial(run_points, optimizer, outcomes, points)
    flops = None
    if regime == "complete poll" and device == "cpu":
        model, criterion, inputs, targets = state_tracking(size, batch)
        flops = complete_poll_flops(model, inputs, targets != criterion.ignore_index)
    case = f"{regime}: {name(size, batch, device)}"
    measure("poll", case, backend, run, points, flops=flops)


@pytest.mark.parametrize("size, batch", CASES)
@pytest.mark.parametrize("regime", REGIMES)
def test_serial_loop(measure, quick, regime, size, batch, device):
    if quick and (size, batch) != ("small", 4):
        pytest.skip("one size is enough without timing")
    model, criterion, inputs, targets = state_tracking(size, batch, device=device)
    flat = FlatParameters(list(model.parameters()))
    points = points_of("serial", size, batch, regime, quick)
    block = poll_block(flat, 0, points, radius=1e-3)

    def closure():
        return criterion(model(inputs), targets)

    if REGIMES[regime] is None:
        block = poll_block(flat, 0, points)
        run = partial(serial_search_from_start, closure, flat, values_of(flat.params), block)
    elif REGIMES[regime]:
        accepted = [forced(position, REGIMES[regime]) for position in range(points)]
        run = partial(serial_accepts, closure, flat, block, accepted)
    else:
        run = partial(serial_loop, closure, flat, *block)
    measure(
        "poll",
        f"{regime}: {name(size, batch, device)}",
        "serial loop",
        run,
        points,
    )


def other_batches(size, batch, device):
    *_, inputs, targets = state_tracking(size, 8 * batch, device=device)
    return list(zip(inputs.split(batch), targets.split(batch), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size, batch", CASES[:2])
def test_batch_a_step(measure, quick, size, batch, backend, device):
    if quick and batch != 4:
        pytest.skip("one size is enough without timing")
    objective, batches = build(backend, size, batch, device), other_batches(size, batch, device)
    points = points_of(backend, size, batch, "start of training", quick)
    run = partial(search_on_batches, objective, batches, values_of(objective.params), points)
    measure("poll", f"a batch a step: {name(size, batch, device)}", backend, run, points)


@pytest.mark.parametrize("size, batch", CASES[:2])
def test_batch_a_step_serial_loop(measure, quick, size, batch, device):
    if quick and batch != 4:
        pytest.skip("one size is enough without timing")
    model, criterion, _, _ = state_tracking(size, batch, device=device)
    flat, batches = FlatParameters(list(model.parameters())), other_batches(size, batch, device)
    points = points_of("serial", size, batch, "start of training", quick)
    loss = lambda inputs, targets: criterion(model(inputs), targets)  # noqa: E731
    block, values = poll_block(flat, 0, points), values_of(flat.params)
    run = partial(serial_search_on_batches, loss, batches, flat, values, block)
    measure("poll", f"a batch a step: {name(size, batch, device)}", "serial loop", run, points)


@pytest.mark.parametrize("size, batch", CASES[:2])
def test_reference(measure, quick, size, batch, device):
    model, criterion, inputs, targets = state_tracking(size, batch, device=device)
    count = 20 if quick else 150
    run = failing_reference_poll(model, lambda: criterion(model(inputs), targets), count)
    measure("poll", f"complete poll: {name(size, batch, device)}", "reference", run, count)
