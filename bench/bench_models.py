"""``batched`` on models that have no kernel of their own: a complete poll beside the serial loop.

Each case checks its losses against the float64 serial ones before it is timed.
"""

from functools import partial

import pytest
import torch
from harness import ForcedOutcomes, agreement, poll_block, run_points, serial_loop
from torch import nn

import psfast
from psfast.flat import FlatParameters

TOLERANCE = 2e-5
POINTS = {"serial loop": 400, "batched": 65_536}


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


def points_of(backend, request):
    return 64 if request.config.getoption("benchmark_disable") else POINTS[backend]


@pytest.mark.parametrize("name", CASES)
def test_batched(measure, request, name):
    objective = psfast.objective(*build(name), backend="batched")
    exact = psfast.objective(*build(name, torch.float64), backend="serial")
    error = agreement(objective, exact)
    assert error < TOLERANCE, f"batched is off by {error}: no timing of wrong losses"
    outcomes = ForcedOutcomes(objective, 0.0)
    points = points_of("batched", request)
    optimizer = psfast.PatternSearch(objective.params, radius=1e-3)
    case = f"complete poll: {name}, B = {CASES[name][1]}, cpu"
    run = partial(run_points, optimizer, outcomes, points)
    measure("models", case, "batched", run, points)


@pytest.mark.parametrize("name", CASES)
def test_serial_loop(measure, request, name):
    model, criterion, inputs, targets = build(name)
    flat = FlatParameters(list(model.parameters()))
    points = points_of("serial loop", request)
    block = poll_block(flat, 0, points, radius=1e-3)
    run = partial(serial_loop, lambda: criterion(model(inputs), targets), flat, *block)
    case = f"complete poll: {name}, B = {CASES[name][1]}, cpu"
    measure("models", case, "serial loop", run, points)
