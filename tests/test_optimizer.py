"""``PatternSearch``: the serial loop's decisions, and its interface."""

import copy
import io
import math
import operator
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import equal, regression, values
from torch import nn

import psfast
from psfast import PatternSearch, ReferencePatternSearch

FIXED = {
    "reshuffle": False,
    "carry_loss": False,
    "fresh_masks": False,
    "subtract_to_restore": False,
    "perturb_frozen": False,
    "stateless": False,
}


# -- the serial loop's decisions ------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_accepts_exactly_what_the_serial_oracle_accepts(dtype, dropout):
    fast, fast_loss = regression(1, dtype, dropout)
    slow, slow_loss = regression(1, dtype, dropout)
    optimizer = PatternSearch(fast.parameters(), radius=0.5, seed=3)
    oracle = ReferencePatternSearch(slow.parameters(), radius=0.5, seed=3, **FIXED)
    for step in range(1000):
        assert optimizer.step(fast_loss) == oracle.step(slow_loss), step
        assert equal(fast.parameters(), slow.parameters()), step
    assert optimizer.evaluations == oracle.evaluations
    assert optimizer.radius == oracle.radius
    if not dropout:
        assert optimizer.radius < 0.5  # polls failed too on the way


def test_accepts_what_the_oracle_accepts_on_minibatches_of_the_small_model():
    def run(make):
        torch.manual_seed(0)
        model = psfast.DecoderOnlyTransformer(
            vocab_size=11, d_model=8, n_layers=1, n_heads=2, d_ff=16, max_len=8
        ).double()
        optimizer = make(model.parameters())
        generator = torch.Generator().manual_seed(5)
        for _ in range(40):
            x = torch.randint(0, 11, (2, 5), generator=generator)
            y = torch.randint(0, 11, (2, 5), generator=generator)
            optimizer.step(lambda x=x, y=y: psfast.MaskedCrossEntropy()(model(x), y))
        return model

    fast = run(lambda params: PatternSearch(params, radius=0.1, seed=9))
    slow = run(lambda params: ReferencePatternSearch(params, radius=0.1, seed=9, **FIXED))
    assert equal(fast.parameters(), slow.parameters())


@pytest.mark.parametrize("block_size", [1, 7, 64, None])
@pytest.mark.parametrize("bar", [{}, {"decrease": 0.1, "noise": 1e-4}])
def test_the_block_size_never_changes_a_decision(block_size, bar):
    base, base_loss = regression()
    net, loss = regression()
    one = PatternSearch(base.parameters(), radius=0.3, block_size=1, **bar)
    other = PatternSearch(net.parameters(), radius=0.3, block_size=block_size, **bar)
    for _ in range(200):
        one.step(base_loss)
        other.step(loss)
        assert one.last_poll.accepted == other.last_poll.accepted
    assert equal(base.parameters(), net.parameters())


def test_max_evaluations_cuts_a_poll_without_changing_it():
    whole, whole_loss = regression()
    cut, cut_loss = regression()
    one = PatternSearch(whole.parameters(), radius=2.0)
    other = PatternSearch(cut.parameters(), radius=2.0, max_evaluations=5)
    for _ in range(300):
        one.step(whole_loss)
    while other.evaluations < one.evaluations:
        other.step(cut_loss)
        assert other.last_poll.evaluations <= 5
    assert one.radius < 2.0
    assert one.radius == other.radius and equal(whole.parameters(), cut.parameters())


# -- the rest of the interface --------------------------------------------------------------


def test_a_model_in_place_of_its_parameters_is_refused():
    with pytest.raises(TypeError, match=r"params must be a model's parameters\(\), got the model"):
        PatternSearch(nn.Linear(2, 1))


def test_load_state_dict_and_conversion_of_the_model_are_followed():
    net, loss = regression(dtype=torch.float32)
    optimizer = PatternSearch(net.parameters(), radius=0.3)
    optimizer.step(loss)
    net.load_state_dict({name: torch.zeros_like(v) for name, v in net.state_dict().items()})
    before = loss().item()
    optimizer.step(loss)
    assert optimizer.last_poll.loss_before == pytest.approx(before, rel=1e-6)
    net.double()
    x, y = torch.randn(10, 4).double(), torch.randn(10, 2).double()
    previous = math.inf
    for _ in range(20):
        value = optimizer.step(lambda: F.mse_loss(net(x), y)).item()
        assert value <= previous
        previous = value
    assert optimizer.last_poll.loss_after == F.mse_loss(net(x), y).item()


def test_radius_of_param_groups():
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    optimizer = PatternSearch([{"params": [a], "radius": 0.5}, {"params": [b]}], radius=0.125)
    assert optimizer.radius == 0.5
    for _ in range(5):
        optimizer.step(lambda: -(a.sum() + b.sum()))
    assert ((a % 0.5) == 0).all() and ((b % 0.125) == 0).all()
    assert a.sum() + b.sum() > 0 and 0.125 in b
    optimizer.step(lambda: torch.tensor(1.0))
    assert [group["radius"] for group in optimizer.param_groups] == [0.25, 0.0625]
    optimizer.radius = 1.0
    assert [group["radius"] for group in optimizer.param_groups] == [1.0, 1.0]


def test_expand_after_success_and_converged_below_min_radius():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = PatternSearch([p], radius=1.0, expand=2.0, min_radius=0.3)
    optimizer.step(lambda: (p - 100).square().sum())
    assert optimizer.radius == 2.0
    calls = 0

    def counted():
        nonlocal calls
        calls += 1
        return (p - 100).square().sum()

    for _ in range(100):
        optimizer.step(counted)
    assert optimizer.converged and optimizer.radius < 0.3 and abs(p - 100) < 0.6
    used = calls
    assert optimizer.step(counted) == optimizer.last_poll.loss_after
    assert calls == used and optimizer.last_poll.evaluations == 0
    optimizer.radius = 1.0
    assert not optimizer.converged


def test_best_acceptance_takes_the_steepest_coordinate():
    weights = torch.tensor([1.0, -5.0, 3.0, 0.5])
    p = nn.Parameter(torch.zeros(4))
    optimizer = PatternSearch([p], radius=0.5, acceptance="best")
    optimizer.step(lambda: (weights * p).sum())
    assert optimizer.last_poll.accepted == [(1, 0.5)]
    assert optimizer.last_poll.evaluations == 8


def test_the_report_and_the_returned_loss():
    net, loss = regression()
    optimizer = PatternSearch(net.parameters(), radius=0.2)
    before = loss().item()
    value = optimizer.step(loss)
    report = optimizer.last_poll
    assert value.shape == () and value.dtype == torch.float64
    assert report.loss_before == before and report.loss_after == value.item() == loss().item()
    assert report.radius == 0.2 and not report.failed and report.seconds > 0
    [(index, delta)] = report.accepted
    assert 0 <= index < 44 and abs(delta) == 0.2
    assert report.evaluations == optimizer.evaluations > 0


def test_progress_is_told_inside_a_long_poll():
    import time

    p = nn.Parameter(torch.zeros(40))
    optimizer = PatternSearch([p])
    told = []
    optimizer.progress = lambda tried, total: told.append((tried, total))

    def slow():
        time.sleep(0.008)
        return 1.0

    optimizer.step(slow)
    assert sum(tried > 0 for tried, _ in told) > 1
    assert all(0 <= tried <= 80 and total == 80 for tried, total in told)


def test_a_plain_number_is_a_loss_too():
    p = nn.Parameter(torch.ones(2))
    optimizer = PatternSearch([p], radius=0.5)
    for number in (float, np.float32):
        for _ in range(5):
            loss = optimizer.step(lambda number=number: number(p.abs().sum().item()))
    assert loss == 0.0


def test_a_loss_in_integers_is_reported_as_a_number_like_any_other():
    p = nn.Parameter(torch.ones(2))
    optimizer = PatternSearch([p], radius=1.0, max_accepts=9)
    optimizer.step(lambda: p.abs().sum().long())
    assert optimizer.last_poll.accepted and isinstance(optimizer.last_poll.loss_after, float)


@pytest.mark.parametrize(
    "returned, got",
    [
        (None, "NoneType"),
        (torch.ones(3), r"tensor of shape \(3,\)"),
        ("1", "str"),
        (torch.tensor(1j), "complex"),
        (True, "bool"),
    ],
)
def test_closures_that_return_no_loss(returned, got):
    optimizer = PatternSearch([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=f"scalar loss, got .*{got}"):
        optimizer.step(lambda: returned)


def test_step_needs_a_closure():
    optimizer = PatternSearch([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="closure that returns the loss.*NoneType"):
        optimizer.step(None)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"radius": 0.0}, ValueError, "radius must be > 0.0.*got 0.0"),
        ({"radius": -1.0}, ValueError, "radius must be > 0.0"),
        ({"radius": math.nan}, ValueError, "radius must be .*got nan"),
        ({"radius": math.inf}, ValueError, "radius must be .*finite, got inf"),
        ({"radius": 10**400}, ValueError, "radius must be .*finite, got 1000"),
        ({"acceptance": ["first"]}, ValueError, r"acceptance must be one of .*\['first'\]"),
        ({"radius": "0.1"}, TypeError, "radius must be a number, got '0.1'"),
        ({"shrink": 1.0}, ValueError, "shrink must be .*< 1.0"),
        ({"expand": 0.5}, ValueError, "expand must be >= 1.0"),
        ({"decrease": -1.0}, ValueError, "decrease must be >= 0.0"),
        ({"noise": -1.0}, ValueError, "noise must be >= 0.0"),
        ({"noise": "measure"}, TypeError, "noise must be a number, got 'measure'"),
        ({"min_radius": -1.0}, ValueError, "min_radius must be >= 0.0"),
        ({"max_evaluations": 0}, ValueError, "max_evaluations must be >= 1, got 0"),
        ({"block_size": 1.5}, TypeError, "block_size must be an integer"),
        ({"max_accepts": 0}, ValueError, "max_accepts must be"),
        ({"max_accepts": None}, TypeError, "max_accepts must be an integer"),
        ({"acceptance": "worst"}, ValueError, "acceptance must be one of 'first'.*'worst'"),
        ({"seed": None, "radius": None}, TypeError, "radius must be a number"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        PatternSearch([nn.Parameter(torch.ones(2))], **arguments)


def test_a_bad_radius_of_a_group():
    with pytest.raises(ValueError, match="radius must be > 0.0"):
        PatternSearch([{"params": [nn.Parameter(torch.ones(2))], "radius": -0.1}])


@pytest.mark.parametrize("name", ["radus", "lr"])
def test_an_entry_of_a_group_that_means_nothing(name):
    with pytest.raises(ValueError, match=rf"no entries but .*'radius'\], got \['{name}'\]"):
        PatternSearch([{"params": [nn.Parameter(torch.ones(2))], name: 0.5}])


def test_a_bad_radius_of_a_group_that_is_added_or_changed():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = PatternSearch([p])
    with pytest.raises(ValueError, match="radius must be > 0.0.*got -5"):
        optimizer.add_param_group({"params": [q], "radius": -5})
    assert len(optimizer.param_groups) == 1
    for radius in (-0.5, math.inf, math.nan):
        optimizer.param_groups[0]["radius"] = radius
        with pytest.raises(ValueError, match=f"radius must be .*got {radius}"):
            optimizer.step(lambda: p.sum())
    optimizer.param_groups[0]["radius"] = 0.0  # as a schedule may end
    optimizer.step(lambda: p.sum())
    assert optimizer.converged


def test_a_learning_rate_scheduler_is_told_that_there_is_no_lr():
    p = nn.Parameter(torch.ones(2))
    optimizer = PatternSearch([p])
    for _ in range(2):
        with pytest.raises(KeyError, match="PatternSearch has no 'lr', only a radius"):
            torch.optim.lr_scheduler.StepLR(optimizer, 1)
        optimizer.load_state_dict(optimizer.state_dict())


def test_inference_mode_is_refused_by_name():
    p = nn.Parameter(torch.ones(2))
    optimizer = PatternSearch([p])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\)"):
        optimizer.step(lambda: p.sum())
    optimizer.step(lambda: p.sum())
    p.sum().backward()
    assert p.grad is not None


def test_a_state_is_read_inside_of_inference_mode_too():
    """Where a validation in it writes a checkpoint; also of parameters that went elsewhere."""
    p = nn.Parameter(torch.ones(2))
    optimizer = PatternSearch([p])
    optimizer.step(lambda: p.square().sum())
    p.data = p.detach().clone()
    with torch.inference_mode():
        state = optimizer.state_dict()
        pickle.dumps((p, optimizer))
    assert state["search"] == optimizer.state_dict()["search"]
    loss = optimizer.step(lambda: p.square().sum())
    assert loss == p.square().sum() < 2.0


def test_nothing_to_search():
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        PatternSearch([nn.Parameter(torch.ones(2), requires_grad=False)])


def test_a_state_of_another_optimizer():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(KeyError, match="psfast.PatternSearch"):
        PatternSearch([p]).load_state_dict(torch.optim.SGD([p], lr=0.1).state_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"position": 10**6}, r"position must be < 4, got 1000000"),
        ({"position": -1}, "position must be >= 0"),
        ({"tried": 4}, "tried must be < 4, got 4"),
        ({"evaluations": 1.5}, "evaluations must be an integer, got 1.5"),
        ({"incumbent": "low"}, "incumbent must be a number or None, got 'low'"),
        ({"mean_gap": math.nan}, "mean_gap must be"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"extra": 1}, r"must have the entries \["),
        ({"size": 3}, "one over 3 coordinates for 2"),
    ],
)
def test_a_state_that_no_search_can_be_in_is_refused_and_changes_nothing(change, message):
    p = nn.Parameter(torch.ones(2))
    optimizer = PatternSearch([p], radius=0.25)
    optimizer.step(lambda: p.square().sum())
    before = optimizer.state_dict()
    wrong = copy.deepcopy(before)
    wrong["search"].update(change)
    wrong["param_groups"][0]["radius"] = 7.0
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(wrong)
    assert optimizer.state_dict() == before


def test_a_state_of_another_model_or_radius_is_refused():
    def stepped(size):
        p = nn.Parameter(torch.ones(size))
        optimizer = PatternSearch([p], max_evaluations=3)
        optimizer.step(lambda: 0.0 * p.sum())
        return optimizer

    with pytest.raises(ValueError, match="the same parameters, got one over 9 coordinates for 5"):
        stepped(5).load_state_dict(stepped(9).state_dict())
    state = stepped(5).state_dict()
    state["param_groups"][0]["radius"] = math.inf
    with pytest.raises(ValueError, match="radius must be .*finite, got inf"):
        stepped(5).load_state_dict(state)


def test_a_state_is_taken_up_after_freezing_as_it_was_saved():
    net, loss = regression()
    net[0].requires_grad_(False)
    optimizer = PatternSearch(net.parameters(), max_evaluations=3)
    optimizer.step(loss)
    other, other_loss = regression()
    resumed = PatternSearch(other.parameters(), max_evaluations=3)
    other[0].requires_grad_(False)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(net.state_dict())
    for _ in range(20):
        assert resumed.step(other_loss) == optimizer.step(loss)
    assert resumed.state_dict() == optimizer.state_dict()


def freeze(net, optimizer):
    net[0].requires_grad_(False)


def add_a_group(net, optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})


def halve_the_radius(net, optimizer):
    optimizer.radius /= 2


@pytest.mark.parametrize("change", [freeze, add_a_group, halve_the_radius])
def test_a_state_saved_before_the_step_that_sees_a_change_has_it(change):
    net, loss = regression()
    optimizer = PatternSearch(net.parameters(), radius=2.0, max_evaluations=3)
    for _ in range(3):
        optimizer.step(loss)
    change(net, optimizer)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())

    other, other_loss = regression()
    resumed = PatternSearch(other.parameters(), max_evaluations=3)
    change(other, resumed)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # though its parameters are still others
    other.load_state_dict(weights)
    for _ in range(20):
        assert resumed.step(other_loss) == optimizer.step(loss)
    assert resumed.state_dict() == optimizer.state_dict()


@pytest.mark.parametrize("change", [freeze, add_a_group, halve_the_radius])
def test_a_change_behind_a_load_is_in_the_next_state(change):
    net, _ = regression()
    optimizer = PatternSearch(net.parameters(), max_evaluations=3)
    optimizer.step(lambda: 1.0)
    assert optimizer.state_dict()["search"]["tried"] == 3
    resumed = PatternSearch(net.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    states = []
    for changed in (optimizer, resumed):
        change(net, changed)
        states.append(changed.state_dict()["search"])
        del states[-1]["fingerprint"]
    assert states[0] == states[1] and states[0]["tried"] == 0


def test_a_state_that_is_refused_hides_no_freezing():
    net, _ = regression()
    optimizer = PatternSearch(net.parameters(), max_evaluations=30)
    optimizer.step(lambda: 1.0)
    assert optimizer.state_dict()["search"]["position"] == 30
    net[0].requires_grad_(False)
    with pytest.raises(ValueError, match="over 44 coordinates for 14"):
        optimizer.load_state_dict(PatternSearch(regression()[0].parameters()).state_dict())
    optimizer.step(lambda: 1.0)
    assert optimizer.last_poll.evaluations == 28 and optimizer.last_poll.failed


@pytest.mark.parametrize("old", [None, psfast.SimplexGradient()])
@pytest.mark.parametrize("name", ["seed", "search"])
def test_a_seed_or_search_set_by_hand_counts_from_then_on(name, old):
    net, loss = regression()
    optimizer = PatternSearch(net.parameters(), search=old, max_evaluations=5)
    for _ in range(7):
        optimizer.step(loss)
    new = {"seed": 9, "search": psfast.SimplexGradient(working_set=20) if old is None else None}
    setattr(optimizer, name, new[name])
    other, other_loss = regression()
    other.load_state_dict(net.state_dict())
    resumed = PatternSearch(other.parameters(), search=optimizer.search, max_evaluations=5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(20):
        optimizer.step(loss)
        resumed.step(other_loss)
        assert resumed.last_poll.accepted == optimizer.last_poll.accepted
    assert bool(optimizer.state_dict().get("slopes")) == (optimizer.search is not None)


def pickled(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize(
    "make",
    [
        lambda params: PatternSearch(params, radius=0.5, max_evaluations=7),
        lambda params: PatternSearch(params, search=psfast.SimplexGradient(), max_evaluations=7),
        lambda params: ReferencePatternSearch(params, radius=0.5),
    ],
)
def test_a_copy_with_its_model_goes_on_as_the_original(make, copied):
    net, _ = regression()
    x, y = torch.randn(10, 4).double(), torch.randn(10, 2).double()
    optimizer = make(net.parameters())
    for _ in range(5):
        optimizer.step(lambda: F.mse_loss(net(x), y))
    if hasattr(optimizer, "progress"):
        optimizer.progress = lambda tried, total: None  # which pickle cannot take
    other, twin = copied((net, optimizer))
    assert all(map(operator.is_, other.parameters(), twin.param_groups[0]["params"]))
    before = values(net)
    ends = [twin.step(lambda: F.mse_loss(other(x), y)).item() for _ in range(20)]
    assert equal(net.parameters(), before) and not equal(other.parameters(), before)
    assert ends == [optimizer.step(lambda: F.mse_loss(net(x), y)).item() for _ in range(20)]
    assert equal(net.parameters(), other.parameters())
    assert twin.evaluations == optimizer.evaluations


def test_a_copy_of_an_optimizer_with_a_changed_model_starts_its_poll_anew():
    p = nn.Parameter(torch.zeros(5))
    optimizer = PatternSearch([p], radius=1.0, max_evaluations=9)
    optimizer.step(lambda: torch.tensor(1.0))
    with torch.no_grad():
        p.add_(1.0)
    twin = copy.deepcopy(optimizer)
    twin.step(lambda: torch.tensor(1.0))
    assert twin.radius == 1.0 and twin.last_poll.evaluations == 9


def test_an_objective_over_other_parameters_is_refused():
    net, _ = regression()
    optimizer = PatternSearch(net.parameters())
    x, y = torch.ones(1, 4).double(), torch.ones(1, 2).double()
    f = psfast.objective(net, F.mse_loss, x, y, params=list(net[0].parameters()))
    with pytest.raises(ValueError, match="objective's params must be the optimizer's"):
        optimizer.step(f)


def test_a_poll_goes_on_in_another_dtype_as_from_a_checkpoint():
    runs = []
    for resumed in (False, True):
        torch.manual_seed(0)
        net, x, y = nn.Linear(3, 2), torch.randn(5, 3).double(), torch.randn(5, 2).double()
        loss = lambda n=net, x=x, y=y: F.mse_loss(n(x.to(n.weight.dtype)), y)  # noqa: E731
        optimizer = PatternSearch(net.parameters(), max_evaluations=2)
        optimizer.step(loss)
        net.double()
        if resumed:
            state = optimizer.state_dict()
            optimizer = PatternSearch(net.parameters(), max_evaluations=2)
            optimizer.load_state_dict(state)
        accepted = []
        for _ in range(6):
            optimizer.step(loss)
            accepted += optimizer.last_poll.accepted
        runs.append(accepted)
    assert runs[0] == runs[1] and runs[0]
