"""What always holds of ``PatternSearch``, by the numbers of the design's list."""

import copy
import io
import math
import random
import signal
import warnings

import pytest
import torch
from models import equal, regression, values
from torch import nn

import psfast
from psfast import PatternSearch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_1_a_rejected_trial_point_leaves_every_bit(dtype):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(50).to(dtype))
    before = p.detach().clone()
    optimizer = PatternSearch([p], radius=0.1)
    for _ in range(3):
        optimizer.step(lambda: 1.0 + 0.0 * p.sum().float())
        assert optimizer.last_poll.failed
    assert torch.equal(p, before)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_2_an_exception_leaves_the_incumbent_and_is_raised_on(at):
    net, loss = regression()
    before, calls = values(net), 0

    def failing():
        nonlocal calls
        calls += 1
        if calls == at:
            raise ZeroDivisionError("user code")
        return torch.tensor(1.0)

    optimizer = PatternSearch(net.parameters())
    with pytest.raises(ZeroDivisionError, match="user code"):
        optimizer.step(failing)
    assert equal(net.parameters(), before)
    start = loss().item()
    for _ in range(20):
        optimizer.step(loss)
    assert optimizer.last_poll.loss_after == loss().item() < start


@pytest.mark.parametrize("at", [2, 9, 30])
def test_2_an_exception_amid_many_accepts_leaves_the_best_of_them(at):
    net, loss = regression()
    best, calls = (math.inf, None), 0

    def failing():
        nonlocal best, calls
        calls += 1
        if calls == at:
            raise ZeroDivisionError("user code")
        value = loss()
        if value < best[0]:
            best = value.item(), values(net)
        return value

    optimizer = PatternSearch(net.parameters(), max_accepts=1000)
    with pytest.raises(ZeroDivisionError, match="user code"):
        optimizer.step(failing)
    assert equal(net.parameters(), best[1])
    optimizer.step(loss)
    assert optimizer.last_poll.loss_before == best[0] > optimizer.last_poll.loss_after


def test_2_a_keyboard_interrupt_too():
    net, _ = regression()
    before, calls = values(net), 0

    def interrupted():
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return torch.tensor(1.0)

    with pytest.raises(KeyboardInterrupt):
        PatternSearch(net.parameters()).step(interrupted)
    assert equal(net.parameters(), before)


def test_3_nan_and_infinity_never_win():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def loss():  # one direction is better, the others are not even numbers
        if p[1] > 0:
            return 1.0 - p[1]
        return torch.tensor(math.nan if p[0] else math.inf if p.any() else 1.0)

    optimizer = PatternSearch([p], radius=0.25)
    for _ in range(10):
        optimizer.step(loss)
    assert p[0] == p[2] == 0 and p[1] > 1


@pytest.mark.parametrize("acceptance", ["first", "best"])
@pytest.mark.parametrize("search", [None, psfast.SimplexGradient()])
def test_3_minus_infinity_never_wins(acceptance, search):
    p = nn.Parameter(torch.full((3,), 2.0))
    optimizer = PatternSearch([p], radius=1.0, expand=2.0, acceptance=acceptance, search=search)
    for _ in range(60):  # the logarithm of 0 is near, and so is the end of float32
        optimizer.step(lambda: p[0].abs().log() - p[1])
        assert math.isfinite(optimizer.last_poll.loss_after)
    assert p.isfinite().all() and math.isfinite(optimizer.radius)


@pytest.mark.parametrize("backend", ["serial", "batched"])
@pytest.mark.parametrize("block_size", [1, 7, 64, None])
def test_3_infinite_losses_are_decided_the_same_in_every_block(block_size, backend):
    def run(block_size, backend):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double()
        x, y = torch.ones(1, 4).double(), torch.zeros(1, 1).double()
        criterion = lambda out, y: (out.relu() + y).sum().log()  # noqa: E731
        f = psfast.objective(net, criterion, x, y, backend=backend)
        optimizer = PatternSearch(net.parameters(), radius=0.5, block_size=block_size)
        reports = []
        for _ in range(20):
            optimizer.step(f)
            reports.append(optimizer.last_poll.accepted)
        assert math.isfinite(optimizer.last_poll.loss_after)
        return reports, optimizer.evaluations

    assert run(block_size, backend) == run(1, "serial")


def test_3_the_radius_stays_finite():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = PatternSearch([p], radius=1e308, expand=1e308)
    for _ in range(3):
        optimizer.step(lambda: -p.sum())
    assert math.isfinite(optimizer.radius) and p.isfinite().all()


def test_3_any_number_beats_an_infinite_incumbent():
    p = nn.Parameter(torch.zeros(2))
    optimizer = PatternSearch([p], radius=0.5)
    for sign in (1.0, -1.0):
        with torch.no_grad():
            p.zero_()
        optimizer.step(lambda sign=sign: p.sum() if p.any() else torch.tensor(sign * math.inf))
        assert len(optimizer.last_poll.accepted) == 1


def test_3_an_all_nan_poll_fails_with_a_warning_and_any_number_beats_nan():
    p = nn.Parameter(torch.zeros(2))
    optimizer = PatternSearch([p], radius=0.5)
    with pytest.warns(RuntimeWarning, match="NaN at all 4 trial points") as warned:
        loss = optimizer.step(lambda: p.sum() * math.nan)
    assert warned[0].filename == __file__
    assert loss.isnan() and optimizer.last_poll.failed and optimizer.radius == 0.25
    optimizer.step(lambda: p.sum() if p.any() else p.sum() * math.nan)
    assert len(optimizer.last_poll.accepted) == 1


def test_5_no_backward_no_grad_and_requires_grad_as_it_was():
    net, loss = regression()
    net[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        return loss()

    PatternSearch(net.parameters()).step(closure)
    assert not any(seen)
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())


def test_5_a_closure_that_runs_backward_works_and_is_told_once():
    net, loss = regression()

    def closure():
        value = loss()
        value.backward()
        return value

    optimizer = PatternSearch(net.parameters())
    with pytest.warns(UserWarning, match="runs backward") as warned:
        first = optimizer.step(closure)
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.step(closure) <= first
    assert all(p.grad is None for p in net.parameters())


def test_6_one_dropout_mask_a_poll_and_the_random_state_untouched():
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5))
    x, masks = torch.ones(3, 4), []

    def closure():
        out = net(x)
        masks.append(out == 0)
        random.random()
        return torch.tensor(1.0)

    torch.manual_seed(11)
    state = torch.get_rng_state()
    optimizer = PatternSearch(net.parameters())
    optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), state)
    first = masks[0]
    assert first.any() and all(torch.equal(mask, first) for mask in masks)
    masks.clear()
    optimizer.step(closure)
    assert not torch.equal(masks[0], first)  # a new poll, a new mask


def test_6_buffers_are_untouched():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    x = torch.randn(8, 4)
    before = copy.deepcopy(dict(net.named_buffers()))
    optimizer = PatternSearch(net.parameters(), max_evaluations=20)
    for _ in range(3):
        optimizer.step(lambda: net(x).square().mean())
    for name, value in net.named_buffers():
        assert torch.equal(value, before[name]), name


def test_7_only_a_whole_failed_poll_shrinks():
    p = nn.Parameter(torch.zeros(5))
    optimizer = PatternSearch([p], radius=1.0, max_evaluations=3)
    radii = []
    for _ in range(8):
        optimizer.step(lambda: 1.0 + p.square().sum())
        radii.append(optimizer.radius)
    assert radii == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.25]  # 10 points: 3 + 3 + 3 + 1


def test_7_another_objective_starts_the_count_anew():
    p = nn.Parameter(torch.zeros(5))
    optimizer = PatternSearch([p], radius=1.0, max_evaluations=9)
    for batch in range(6):
        optimizer.step(lambda batch=batch: batch + p.square().sum())
        assert optimizer.radius == 1.0
    optimizer.step(lambda: 5 + p.square().sum())
    assert optimizer.last_poll.failed and optimizer.radius == 0.5


def test_7_changed_parameters_start_the_count_anew():
    p = nn.Parameter(torch.zeros(5))
    optimizer = PatternSearch([p], radius=1.0, max_evaluations=9)

    def flat():
        return torch.tensor(1.0)

    optimizer.step(flat)
    with torch.no_grad():
        p.add_(1.0)
    optimizer.step(flat)
    assert optimizer.radius == 1.0 and optimizer.last_poll.evaluations == 9


@pytest.mark.parametrize("parameters_first", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_9_a_killed_run_resumes_bit_for_bit_in_the_middle_of_a_poll(parameters_first, dropout):
    def run(steps, saved=None):
        net, loss = regression(dropout=dropout)
        options = {"radius": 2.0, "seed": 5, "max_evaluations": 7, "noise": None}
        optimizer = PatternSearch(net.parameters(), **options)
        if saved is not None:
            saved.seek(0)
            state = torch.load(saved, weights_only=True)
            parts = [(net, state["net"]), (optimizer, state["optimizer"])]
            for part, value in parts if parameters_first else reversed(parts):
                part.load_state_dict(value)
        reports = []
        for _ in range(steps):
            optimizer.step(loss)
            reports.append(optimizer.last_poll._replace(seconds=0.0))
        saved = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        return values(net), optimizer, reports, saved

    whole, control, all_reports, _ = run(260)
    _, _, first_reports, saved = run(133)
    resumed, optimizer, last_reports, _ = run(127, saved)
    assert equal(whole, resumed)
    assert all_reports == first_reports + last_reports
    assert optimizer.state_dict() == control.state_dict()
    if not dropout:
        assert optimizer.radius < 2.0


def test_9_the_state_is_plain_numbers():
    net, loss = regression()
    optimizer = PatternSearch(net.parameters())
    optimizer.step(loss)
    state = optimizer.state_dict()
    assert state["search"].pop("noise") is None
    assert all(isinstance(value, (int, float)) for value in state["search"].values())
    assert state["param_groups"][0]["radius"] == 0.1


def test_10_frozen_parameters_stay_and_tied_ones_count_once():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    x = torch.randn(5, 3)
    optimizer = PatternSearch([*net.parameters(), frozen])
    optimizer.step(lambda: 1.0 + 0.0 * (net(x) * frozen.sum()).square().mean())
    assert optimizer.last_poll.evaluations == 2 * 9
    for _ in range(30):
        optimizer.step(lambda: (net(x) * frozen.sum()).square().mean())
    assert torch.equal(frozen, torch.ones(2)) and net[1].weight is net[0].weight


def test_10_freezing_later_is_respected():
    net, loss = regression()
    optimizer = PatternSearch(net.parameters(), radius=0.3)
    optimizer.step(loss)
    net[0].weight.requires_grad_(False)
    before, start = net[0].weight.detach().clone(), loss().item()
    for _ in range(50):
        optimizer.step(loss)
    assert torch.equal(net[0].weight, before)
    assert loss() < start


@pytest.mark.parametrize("backend", ["vmap", "batched"])
@pytest.mark.parametrize("times", [1, 2])
def test_2_ctrl_c_inside_of_torchs_transforms_leaves_the_model_whole(backend, times):
    net, _ = regression()
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    pressing = []

    def press(module, inputs):
        for _ in range(len(pressing) and times):
            pressing.clear()
            signal.raise_signal(signal.SIGINT)

    net.register_forward_pre_hook(press)
    f = psfast.objective(net, nn.MSELoss(), x, y, backend=backend)
    parameters, before, handler = (
        list(net.parameters()),
        values(net),
        signal.getsignal(signal.SIGINT),
    )
    pressing.append(True)
    with pytest.raises(KeyboardInterrupt):
        if backend == "vmap":
            f.losses(torch.arange(4), torch.ones(4))
        else:
            psfast.objective(net, nn.MSELoss(), x, y, backend=backend)
    assert signal.getsignal(signal.SIGINT) is handler
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    assert equal(values(net), before) and torch.is_grad_enabled()
    brute = psfast.objective(net, nn.MSELoss(), x, y, backend="serial")
    index, delta = torch.arange(4), torch.ones(4)
    torch.testing.assert_close(f.losses(index, delta), brute.losses(index, delta))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", ["serial", "batched"])
def test_7_batches_of_one_loss_are_not_one_objective(backend, in_place):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)

    def wrong(outputs, targets):  # 0 or 1 each: many batches have the same loss
        return (outputs.argmax(1) != targets).double().mean()

    batches = [torch.randn(4, 3) for _ in range(4)]
    targets = [1 - net(x).argmax(1) for x in batches]  # all wrong
    f = psfast.objective(net, wrong, batches[0].clone(), targets[0].clone(), backend=backend)
    optimizer = PatternSearch(net.parameters(), radius=1e-9, max_evaluations=5)
    for x, y in zip(batches * 2, targets * 2, strict=True):
        if in_place:
            f.inputs.copy_(x)
            f.targets.copy_(y)
        else:
            f.set_batch(x, y)
        optimizer.step(f)
        assert optimizer.last_poll.loss_before == 1.0
    assert optimizer.radius == 1e-9
    for _ in range(3):  # 5 of its 16 trial points were tried already
        f.set_batch(x.clone(), y.clone())
        optimizer.step(f)
    assert optimizer.radius == 5e-10


def freeze_all(net, optimizer):
    net.requires_grad_(False)


def add_another_dtype(net, optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float32))]})


@pytest.mark.parametrize("change", [freeze_all, add_another_dtype])
def test_10_what_cannot_be_searched_is_refused_every_time(change):
    net, loss = regression()
    optimizer = PatternSearch(net.parameters(), radius=0.3)
    optimizer.step(loss)
    change(net, optimizer)
    before = values(net)
    for _ in range(3):
        with pytest.raises(ValueError, match="params must"):
            optimizer.step(loss)
    assert equal(values(net), before)
