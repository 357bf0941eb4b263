"""The next block under way while one is decided, for objectives that do not wait for a device."""

import math

import pytest
import torch
from models import equal
from torch import nn

import psfast
from psfast.objectives.base import Objective
from psfast.search import PollState, block_size


class Late(Objective):
    """Another objective's losses, as if a device were at work on them; notes the blocks."""

    backend = "late"
    overhead = 4.0

    def __init__(self, inner: Objective, is_asynchronous: bool):
        super().__init__(inner.params)
        self.inner, self.is_asynchronous = inner, is_asynchronous
        self.loss_at, self.accept = inner.loss_at, inner.accept
        self.given: list[int] = []

    def __call__(self):
        return self.inner()

    def losses(self, index, delta, *, stop_below=None):
        self.given.append(len(index))
        return self.inner.losses(index, delta)


def problem(is_asynchronous: bool) -> Late:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    objective = psfast.objective(model, nn.MSELoss(), x, y, backend="batched")
    return Late(objective, is_asynchronous)


def where_nothing_improves(objective, **options):
    """An optimizer that has seen that nothing is low enough, and so looks ahead."""
    optimizer = psfast.PatternSearch(objective.params, decrease=1e9, **options)
    optimizer.step(objective)
    assert optimizer.last_poll.failed
    objective.given.clear()
    return optimizer


@pytest.mark.parametrize("block", [None, 1, 5])
@pytest.mark.parametrize("accepts", [1, 4])
def test_no_decision_changes(block, accepts):
    runs = []
    for is_asynchronous in (False, True):
        objective = problem(is_asynchronous)
        optimizer = psfast.PatternSearch(
            objective.params, radius=1.0, block_size=block, max_accepts=accepts
        )
        accepted, speculated, failed = [], 0, 0
        for _ in range(400):
            optimizer.step(objective)
            accepted += optimizer.last_poll.accepted
            speculated += optimizer.last_poll.speculated
            failed += optimizer.last_poll.failed
        assert failed > 2  # both kinds of polls were there
        if block == 1:
            assert (speculated > 0) == is_asynchronous
        state = optimizer.state_dict()["search"]
        assert sum(objective.given) == state["evaluations"] + speculated
        runs.append((accepted, state, [p.tolist() for p in objective.params]))
    assert runs[0] == runs[1]


def test_the_next_block_is_begun_before_this_one_is_decided(monkeypatch):
    objective = problem(True)
    optimizer = where_nothing_improves(objective, block_size=10)
    under_way, decide = [], optimizer._decide

    def noted(*arguments):
        under_way.append(len(objective.given))
        return decide(*arguments)

    monkeypatch.setattr(optimizer, "_decide", noted)
    optimizer.step(objective)
    total = 2 * objective.flat.size  # 132
    assert under_way == [*range(2, 15), 14]  # nothing comes behind the last one
    assert sum(objective.given) == total and optimizer.last_poll.speculated == 0


def test_what_stops_early_without_an_improvement_takes_nothing_from_the_poll(monkeypatch):
    """At minus infinity, say, which lies below the bar and never wins."""
    objective = problem(True)
    optimizer = where_nothing_improves(objective, block_size=8)
    losses, seen = objective.losses, []

    def stops(index, delta, *, stop_below=None):
        found = losses(index, delta)
        lowest = (index == 17).nonzero().flatten().tolist()
        end = lowest[0] + 1 if lowest else len(index)
        seen.extend(zip(index[:end].tolist(), delta[:end].tolist(), strict=True))
        return found.masked_fill(index == 17, -math.inf)[:end]

    monkeypatch.setattr(objective, "losses", stops)
    optimizer.step(objective)
    assert optimizer.last_poll.failed and len(set(seen)) == 2 * objective.flat.size


def test_nothing_is_begun_beyond_max_evaluations():
    objective = problem(True)
    optimizer = where_nothing_improves(objective, block_size=10, max_evaluations=132)
    optimizer.max_evaluations = 25
    optimizer.step(objective)
    assert objective.given == [10, 10, 5]
    optimizer.step(objective)
    assert optimizer.last_poll.evaluations == 25 and optimizer.last_poll.speculated == 0


def test_where_much_improves_nothing_is_begun_ahead():
    objective = problem(True)
    optimizer = psfast.PatternSearch(objective.params, radius=0.01, block_size=1, max_accepts=20)
    optimizer.step(objective)
    assert len(optimizer.last_poll.accepted) == 20 and optimizer.last_poll.speculated == 0


def test_an_error_ahead_loses_nothing(monkeypatch):
    objective, untouched = problem(True), problem(True)
    optimizer = where_nothing_improves(objective, block_size=10)
    other = where_nothing_improves(untouched, block_size=10)
    losses = objective.losses

    def fails(index, delta, **options):
        if len(objective.given) == 3:
            raise RuntimeError("the device is out of memory")
        return losses(index, delta, **options)

    monkeypatch.setattr(objective, "losses", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(objective)
    assert equal(objective.params, untouched.params)
    monkeypatch.undo()
    optimizer.step(objective)  # to the end of the poll
    other.step(untouched)
    assert optimizer.last_poll.failed and optimizer.evaluations == other.evaluations
    assert equal(objective.params, untouched.params)


def test_blocks_ahead_hide_what_they_cost():
    """Small ones do, so that little is lost with an improvement; they grow where that is rare."""
    assert block_size(PollState(mean_gap=3000.0), overhead=1000.0, ahead=True) == 1500
    assert block_size(PollState(mean_gap=3000.0), overhead=1.0, at_once=64, ahead=True) == 64
    assert block_size(PollState(mean_gap=2e6), overhead=1000.0, ahead=True) == 10_000
    state = PollState(mean_gap=10.0, tried=2_000_000)
    assert block_size(state, overhead=1000.0, ahead=True) == 10_000
