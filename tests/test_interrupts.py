"""What an error or Ctrl-C amid a step leaves: the run goes on as if nothing had happened."""

import math

import pytest
import torch
from models import equal, regression
from torch import nn

import psfast
from psfast.objectives import fused as fused_module


def transformer(frozen: bool):
    torch.manual_seed(0)
    model = psfast.DecoderOnlyTransformer(11, 8, 1, 2, 16, max_len=6, dropout=0.0)
    model.head.bias.requires_grad_(not frozen)
    x, y = torch.randint(11, (3, 5)), torch.randint(11, (3, 5))
    return psfast.objective(model, psfast.MaskedCrossEntropy(), x, y, backend="fused")


def run(objective, steps: int, **options):
    optimizer = psfast.PatternSearch(objective.params, radius=0.1, **options)
    for _ in range(steps):
        optimizer.step(objective)
    return optimizer


@pytest.mark.parametrize("backend", ["vmap", "batched", "opening", "fused"])
def test_an_interrupt_behind_the_look_does_not_hide_what_others_changed(monkeypatch, backend):
    def of_this_model():
        of = "batched" if backend == "opening" else backend
        f = psfast.objective(*arguments, backend=of)
        return f.opening if backend == "opening" else f

    f = transformer(False)
    arguments = f.model, f.criterion, f.inputs, f.targets
    f = of_this_model()
    before = f().item()
    with torch.no_grad():
        f.params[-1].add_(torch.arange(11.0))
    look = f.flat.changed

    def interrupted():
        look()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f.flat, "changed", interrupted)
        f()
    assert f().item() == of_this_model()().item() != before


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("op", "accepts"), [("fused_losses", 1), ("fused_refresh", 1), ("fused_descend", 20)]
)
def test_ctrl_c_at_the_end_of_a_call_of_the_extension(monkeypatch, op, accepts, frozen):
    """Where it arrives if it comes inside: the work is done, and what it returns is lost."""
    objective, untouched = transformer(frozen), transformer(frozen)
    optimizer = run(objective, 2, max_accepts=accepts)
    other = run(untouched, 2, max_accepts=accepts)
    real = getattr(fused_module.ops, op)

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fused_module.ops, op, interrupted)
        optimizer.step(objective)
    assert equal(objective.params, untouched.params)
    for _ in range(4):
        optimizer.step(objective)
        other.step(untouched)
        assert optimizer.last_poll.accepted == other.last_poll.accepted
    assert optimizer.state_dict()["search"] == other.state_dict()["search"]
    torch.testing.assert_close(objective(), transformer_loss(objective), rtol=0, atol=1e-6)


def transformer_loss(objective):
    parts = objective.model, objective.criterion, objective.inputs, objective.targets
    return psfast.objective(*parts, backend="fused", params=objective.params)()


@pytest.mark.parametrize("at", range(2, 60, 3))
def test_an_error_amid_many_accepts_of_a_closure(at):
    """What was decided before it counts, so that only the failed evaluation comes again."""
    net, loss = regression()
    twin, twin_loss = regression()
    calls = 0

    def failing():
        nonlocal calls
        calls += 1
        if calls == at:
            raise ZeroDivisionError("user code")
        return loss()

    optimizer = psfast.PatternSearch(net.parameters(), radius=0.3, max_accepts=30)
    with pytest.raises(ZeroDivisionError, match="user code"):
        for _ in range(60):
            optimizer.step(failing)
    other = psfast.PatternSearch(twin.parameters(), radius=0.3)
    while other.evaluations < optimizer.evaluations:
        other.max_evaluations = optimizer.evaluations - other.evaluations
        other.step(twin_loss)
    assert other.evaluations == optimizer.evaluations and equal(net.parameters(), twin.parameters())
    state, expected = optimizer.state_dict()["search"], other.state_dict()["search"]
    assert {k: state[k] for k in ("position", "tried", "order", "polls", "mean_gap")} == {
        k: expected[k] for k in ("position", "tried", "order", "polls", "mean_gap")
    }


def test_ctrl_c_behind_an_accept_restarts_no_poll():
    """What the step itself has written is nobody else's change."""

    def evaluations(interrupts: bool) -> int:
        torch.manual_seed(0)
        model = nn.Linear(9, 5).double()
        x, y = torch.randn(8, 9).double(), torch.randn(8, 5).double()
        left = 130 if interrupts else math.inf

        def loss():
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return nn.functional.mse_loss(model(x), y)

        optimizer = psfast.PatternSearch(model.parameters(), radius=2.0, max_accepts=100_000)
        if interrupts:
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(loss)
            assert optimizer.state_dict()["search"]["tried"] > 20
        optimizer.step(loss)
        assert optimizer.last_poll.failed
        return optimizer.evaluations

    assert evaluations(True) == evaluations(False)


def test_asking_for_the_state_inside_a_step_changes_nothing(monkeypatch):
    monkeypatch.setattr("psfast.optimizer._PROGRESS_SECONDS", 0.0)
    runs = []
    for asks in (False, True):
        net, loss = regression()
        optimizer = psfast.PatternSearch(net.parameters(), radius=0.5, max_accepts=4)
        if asks:
            optimizer.progress = lambda tried, total, o=optimizer: o.state_dict()
        runs.append([])
        for _ in range(60):
            optimizer.step(loss)
            runs[-1].append((optimizer.evaluations, optimizer.radius))
    assert runs[0] == runs[1] and runs[0][-1][1] < 0.5


def test_a_warning_as_an_error_comes_after_the_radius_has_shrunk():
    p = nn.Parameter(torch.zeros(3))
    optimizer = psfast.PatternSearch([p], radius=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", _raise)
        with pytest.raises(RuntimeWarning, match="NaN at all 6"):
            optimizer.step(lambda: math.nan)
    assert optimizer.radius == 0.25 and optimizer.state_dict()["search"]["order"] == 1


def _raise(message, category, **_):
    raise category(message)


class InterruptedCells:
    """The parameters' numbers; Ctrl-C comes in place of one write."""

    def __init__(self, cells, write: int):
        self.cells, self.left = cells, write

    def __getitem__(self, index):
        return self.cells[index]

    def __setitem__(self, index, value):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        self.cells[index] = value


@pytest.mark.parametrize("accepts", [1, 100])
@pytest.mark.parametrize("write", range(1, 9))
def test_ctrl_c_where_a_value_is_put_back_leaves_the_incumbent(accepts, write):
    model, _ = regression()
    x, y = torch.randn(10, 4).double(), torch.randn(10, 2).double()
    f = psfast.objective(model, nn.MSELoss(), x, y, backend="serial")
    optimizer = psfast.PatternSearch(f.params, max_accepts=accepts)
    optimizer.max_evaluations = 1
    optimizer.step(f)
    optimizer.max_evaluations = None
    f._cells.array = InterruptedCells(f._cells.array, write)
    with pytest.raises(KeyboardInterrupt):
        while True:
            optimizer.step(f)
    decided = optimizer.state_dict()["search"]
    f._cells.array = f._cells.array.cells
    assert f().item() == decided["incumbent"]
    optimizer.max_evaluations = 1
    optimizer.step(f)
    assert optimizer.state_dict()["search"]["evaluations"] == decided["evaluations"] + 1
