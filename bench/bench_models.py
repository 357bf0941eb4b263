"""Models that have no kernel of their own: a complete poll, and the start of training, where
about half of the trial points are lower, on one batch and on one for each step, beside the
serial loop.

Each case checks its losses against the float64 serial ones before it is timed.
"""

from functools import partial

import pytest
import torch
from harness import (
    ForcedOutcomes,
    agreement,
    poll_block,
    run_points,
    search_from_start,
    search_on_batches,
    serial_loop,
    serial_search_from_start,
    serial_search_on_batches,
    values_of,
)
from torch import nn

import psfast
from psfast.flat import FlatParameters

TOLERANCE = 2e-5
POINTS = {"serial loop": 400, "batched": 65_536}
START = 1_500  # trial points
ALONE = ", blocks alone"  # without the opening


class LastState(nn.Module):
    """A recurrent layer and a head on its last output."""

    def __init__(self, layer: nn.Module, n_classes: int):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size, n_classes)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def mlp(batch):
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    return model, torch.randn(batch, 64)


def cnn(batch):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return model, torch.randn(batch, 3, 16, 16)


def gru(hidden, batch):
    return LastState(nn.GRU(16, hidden, batch_first=True), 10), torch.randn(batch, 16, 16)


CASES = {
    "MLP 64-128-128-10": (mlp, 16),
    "CNN 16-32 with BatchNorm, 16 x 16 pixels": (cnn, 4),
    "GRU H = 32, T = 16": (partial(gru, 32), 4),
    "GRU H = 64, T = 16": (partial(gru, 64), 4),
}


def build(name, dtype=torch.float32):
    """model, criterion, inputs, targets"""
    make, batch = CASES[name]
    torch.manual_seed(0)
    model, inputs = make(batch)
    targets = torch.randint(0, 10, (batch,))
    return model.to(dtype), nn.CrossEntropyLoss(), inputs.to(dtype), targets


def label(regime, name):
    return f"{regime}: {name}, B = {CASES[name][1]}, cpu"


def right_objective(name, backend):
    """The objective, after its losses are found right."""
    objective = psfast.objective(*build(name), backend=backend)
    exact = psfast.objective(*build(name, torch.float64), backend="serial")
    error = agreement(objective, exact)
    assert error < TOLERANCE, f"{backend} is off by {error}: no timing of wrong losses"
    return objective


@pytest.mark.parametrize("name", CASES)
def test_batched(measure, quick, name):
    objective = right_objective(name, "batched")
    outcomes = ForcedOutcomes(objective, 0.0)
    points = 64 if quick else POINTS["batched"]
    optimizer = psfast.PatternSearch(objective.params, radius=1e-3)
    run = partial(run_points, optimizer, outcomes, points)
    measure("models", label("complete poll", name), "batched", run, points)


@pytest.mark.parametrize("name", CASES)
def test_serial_loop(measure, quick, name):
    model, criterion, inputs, targets = build(name)
    flat = FlatParameters(list(model.parameters()))
    points = 64 if quick else POINTS["serial loop"]
    block = poll_block(flat, 0, points, radius=1e-3)
    run = partial(serial_loop, lambda: criterion(model(inputs), targets), flat, *block)
    measure("models", label("complete poll", name), "serial loop", run, points)


def run_as(backend, objective, search):
    """``search()``, without the opening if the backend says so."""
    if backend.endswith(ALONE):
        objective()  # which may build one anew, for another number of threads
        objective.opening = None
    seconds = search()
    assert backend in ("serial", "batched", "vmap") or objective.opening is None
    return seconds


BACKENDS = [(name, b) for name in CASES for b in ("serial", "batched", "batched" + ALONE)]
BACKENDS += [("MLP 64-128-128-10", b) for b in ("vmap", "vmap" + ALONE)]


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_start(measure, quick, name, backend):
    objective = right_objective(name, backend.removesuffix(ALONE))
    points = 64 if quick else START
    search = partial(search_from_start, objective, values_of(objective.params), points)
    run = partial(run_as, backend, objective, search)
    measure("models", label("start of training", name), backend, run, points)


def other_batches(name):
    _, _, inputs, targets = build(name)
    return [(torch.randn_like(inputs), targets) for _ in range(8)]


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_batch_a_step(measure, quick, name, backend):
    objective, batches = right_objective(name, backend.removesuffix(ALONE)), other_batches(name)
    points, values = 64 if quick else START, values_of(objective.params)
    search = partial(search_on_batches, objective, batches, values, points)
    run = partial(run_as, backend, objective, search)
    measure("models", label("a batch a step", name), backend, run, points)


@pytest.mark.parametrize("name", CASES)
def test_batch_a_step_serial_loop(measure, quick, name):
    model, criterion, _, _ = build(name)
    flat = FlatParameters(list(model.parameters()))
    points = 64 if quick else START
    block, values = poll_block(flat, 0, points), values_of(flat.params)
    loss = lambda inputs, targets: criterion(model(inputs), targets)  # noqa: E731
    run = partial(serial_search_on_batches, loss, other_batches(name), flat, values, block)
    measure("models", label("a batch a step", name), "serial loop", run, points)


@pytest.mark.parametrize("name", CASES)
def test_start_serial_loop(measure, quick, name):
    model, criterion, inputs, targets = build(name)
    flat = FlatParameters(list(model.parameters()))
    points = 64 if quick else START
    block = poll_block(flat, 0, points)
    closure = lambda: criterion(model(inputs), targets)  # noqa: E731
    run = partial(serial_search_from_start, closure, flat, values_of(flat.params), block)
    measure("models", label("start of training", name), "serial loop", run, points)
