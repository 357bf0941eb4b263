"""The rules that train: the simplex-gradient step, working sets."""

import copy
import math

import pytest
import torch
from torch import nn

import psfast
from psfast import PatternSearch
from psfast.search import Decision, PollState, with_points
from psfast.search_simplex import (
    SimplexGradient,
    advance_window,
    begin_lap,
    direction,
    follow,
    live_total,
    measure,
    new_window,
    window_count,
    window_entries,
)

RULES = {
    "first": {},
    "best": {"acceptance": "best"},
    "simplex": {"search": SimplexGradient()},
    "simplex, fading": {"search": SimplexGradient(fade=0.5)},
    "simplex in parts": {"search": SimplexGradient(working_set=7), "acceptance": "best"},
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def quadratic(n, condition=10.0, dtype=torch.float64):
    """A rotated quadratic with its minimum 0 at 0."""
    torch.manual_seed(n)
    rotation, _ = torch.linalg.qr(torch.randn(n, n, dtype=dtype))
    hessian = rotation @ torch.diag(torch.logspace(0, math.log10(condition), n, dtype=dtype))
    hessian = hessian @ rotation.T
    return lambda x: 0.5 * x @ hessian @ x


def minimise(function, x, rule, most=20_000, **options):
    """Run to convergence; checks that no step makes the fixed objective worse."""
    x = nn.Parameter(x)
    optimizer = PatternSearch([x], **{"radius": 0.5, "min_radius": 1e-2, **rule, **options})
    last = math.inf
    while not optimizer.converged and optimizer.evaluations < most:
        before = x.detach().clone()
        loss = optimizer.step(lambda: function(x)).item()
        assert not loss > last  # NaN before and after is no worse
        if not optimizer.last_poll.accepted:
            assert torch.equal(x, before)
        last = loss
    return optimizer, x.detach(), last


# -- the pure functions ---------------------------------------------------------------------


def test_a_point_wins_only_on_its_own_decrease():
    failed = Decision(None, math.nan, 4, 0)
    single = Decision(2, 0.8, 4, 0)
    assert with_points(failed, [1.1, 0.9], 1.0).point == 1
    assert with_points(failed, [math.nan, math.inf, -math.inf], 1.0) == failed
    assert with_points(failed, [-math.inf, 0.9], 1.0).point == 1
    assert with_points(failed, [0.95], 0.9) == failed
    assert with_points(single, [0.7], 0.6) == single
    assert with_points(single, [0.9], 1.0) == single
    won = with_points(single, [0.9, 0.7], 1.0)
    assert (won.chosen, won.point, won.loss, won.success) == (None, 1, 0.7, True)


@pytest.mark.parametrize("size, working_set", [(1, 5), (17, 17), (129, 16), (151, 150)])
def test_working_sets_part_all_coordinates(size, working_set):
    settings = SimplexGradient(working_set)
    windows = [
        new_window(3, 0, number, size, settings, torch.float32)
        for number in range(window_count(size, working_set))
    ]
    assert max(len(w.index) for w in windows) <= working_set
    assert torch.cat([w.index for w in windows]).sort().values.equal(torch.arange(size))


@pytest.mark.parametrize("W, most", [(1, 1), (17, 5), (129, 128), (40, 512)])
def test_a_lap_holds_both_signs_of_every_coordinate_once(W, most):
    window = new_window(0, 0, 0, W, SimplexGradient(), torch.float32)
    state, seen = PollState(incumbent=1.0), []
    while state.lap == 0:
        place, sign = window_entries(0, window, state, most)
        assert 1 <= len(place) <= most and len(place.unique()) == len(place)
        seen += zip(place.tolist(), sign.tolist(), strict=True)
        failed = Decision(None, math.nan, len(place), 0)
        state, poll_failed = advance_window(state, failed, window, 2 * W)
    assert poll_failed
    assert sorted(seen) == [(place, sign) for place in range(W) for sign in (-1, 1)]


def test_the_poll_fails_only_when_every_working_set_has_failed_at_one_incumbent():
    size, W, K = 12, 4, 3
    window = new_window(0, 0, 0, size, SimplexGradient(W), torch.float32)
    fail, win = Decision(None, math.nan, K, 0), Decision(0, 0.5, K, 0)
    state = PollState(incumbent=1.0)
    # A success in mid-lap, in the second working set: only whole laps after it count.
    decisions = [fail] * 4 + [win] + [fail] * 20
    failed_after, evaluated = None, 0
    for decision in decisions:
        count = min(K, 2 * W - state.position)
        evaluated += count
        decision = decision._replace(decided=count)
        state, failed = advance_window(state, decision, window, 2 * size)
        if failed:
            failed_after = evaluated
            break
    # 8 in the first set, 3 up to the success, the rest of that lap, then three whole laps.
    assert failed_after == 8 + 8 + 3 * 8
    assert state.tried == state.position == 0 and state.order == 0


def rested(lap=1):
    """A working set of 10 of which places 2, 5 and 6 have shown exact zeros, in ``lap``."""
    window = new_window(0, 0, 0, 10, SimplexGradient(), torch.float32)
    slope = torch.ones(9)  # place 9 was never visited
    slope[[2, 5, 6]] = 0.0
    return begin_lap(measure(window, torch.arange(9), slope, SimplexGradient()), lap)


def test_coordinates_that_never_changed_the_loss_rest():
    window = rested()
    assert window.resting.nonzero().squeeze(1).tolist() == [2, 5, 6]
    assert live_total(window) == 14
    again = measure(window, torch.tensor([5]), torch.tensor([1e-9]), SimplexGradient())
    assert begin_lap(again, 2).resting.nonzero().squeeze(1).tolist() == [2, 6]
    assert not rested(lap=8).resting.any()  # another batch may read them
    nothing = measure(window, torch.arange(10), torch.zeros(10), SimplexGradient())
    nothing = nothing._replace(square=torch.zeros(10))
    assert not begin_lap(nothing, 1).resting.any()


@pytest.mark.parametrize("success_at, entries", [(None, 20), (0, 14), (5, 14), (6, 17)])
def test_a_lap_visits_those_at_rest_only_while_all_its_trial_points_fail(success_at, entries):
    window, state, seen = rested(), PollState(incumbent=1.0, lap=1), []
    for number in range(20):
        place, sign = window_entries(0, window, state, 3)
        seen += zip(place.tolist(), sign.tolist(), strict=True)
        decision = Decision(None, math.nan, len(place), 0)
        if number == success_at:
            decision = decision._replace(chosen=0, loss=0.5)
        state, failed = advance_window(state, decision, window, 20)
        if state.lap == 2:
            break
    assert failed == (success_at is None)
    # Blocks 0 to 5 are the 14 live entries (3, 2 and 2 a round), 6 and 7 those at rest.
    assert len(seen) == len(set(seen)) == entries
    assert {place for place, _ in seen[:14]} == {0, 1, 3, 4, 7, 8, 9}


def test_the_direction_is_downhill_scaled_and_zero_where_nothing_is_known():
    settings = SimplexGradient(momentum=0.5, square_momentum=0.5)
    window = new_window(0, 0, 0, 4, settings, torch.float64)
    place = torch.tensor([0, 1, 2])
    window = measure(window, place, torch.tensor([2.0, -300.0, math.nan]).double(), settings)
    u = direction(window, torch.arange(4), torch.zeros(4).double() + 1e-9, settings)
    torch.testing.assert_close(u, torch.tensor([-1.0, 1.0, 0.0, 0.0]).double())
    window = measure(window, place[:1], torch.tensor([-2.0]).double(), settings)
    # mean 0.5 * 1 - 0.5 * 2 over 1 - 0.5^2; mean square 4
    u = direction(window, place[:1], torch.zeros(1).double(), settings)
    torch.testing.assert_close(u, torch.tensor([(0.5 / 0.75) / 2.0]).double())


def test_slopes_below_the_rounding_of_the_loss_are_not_amplified():
    settings = SimplexGradient()
    window = new_window(0, 0, 0, 2, settings, torch.float32)
    window = measure(window, torch.arange(2), torch.tensor([1e-9, 1.0]), settings)
    u = direction(window, torch.arange(2), torch.full((2,), 1e-6), settings)
    assert abs(u[0]) < 1e-2 and u[1] < -0.99


def test_the_trail_fades_is_overwritten_and_ends():
    settings = SimplexGradient(fade=0.5)
    window = new_window(0, 0, 0, 6, settings, torch.float64)
    window = follow(window, torch.tensor([0, 1]), torch.tensor([1.0, -4.0]).double(), settings)
    window = follow(window, torch.tensor([1, 2]), torch.tensor([3.0, 2.0]).double(), settings)
    torch.testing.assert_close(window.trail, torch.tensor([0.5, 3, 2, 0, 0, 0]).double())
    for _ in range(10):
        window = follow(window, torch.tensor([5]), torch.tensor([1.0]).double(), settings)
    assert window.trail.nonzero().squeeze(1).tolist() == [5]


def test_a_point_with_the_trail_moves_the_earlier_block_too():
    x = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    search = SimplexGradient(lengths=(1.0,), fade=0.5)
    optimizer = PatternSearch([x], radius=0.1, search=search, block_size=4)
    slopes = torch.arange(1.0, 9.0).double()
    optimizer.step(lambda: x @ slopes)
    first = x.detach().clone()
    assert ((first + 0.1).abs() < 1e-12).sum() == 4 and (first == 0).sum() == 4
    optimizer.step(lambda: x @ slopes)
    moved = (x.detach() - first).abs()
    torch.testing.assert_close(moved, torch.where(first == 0, 0.1, 0.05).double())
    assert optimizer.last_poll.evaluations == 4 + 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"working_set": 0}, "working_set"),
        ({"lengths": ()}, "lengths"),
        ({"lengths": (1.0, -1.0)}, "lengths"),
        ({"fade": 1.0}, "fade"),
        ({"fade": -0.1}, "fade"),
        ({"momentum": 1.0}, "momentum"),
        ({"square_momentum": -0.1}, "square_momentum"),
        ({"decay": -1.0}, "decay"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SimplexGradient(**settings)


def test_a_search_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="SimplexGradient"):
        PatternSearch([nn.Parameter(torch.zeros(2))], search="simplex")


# -- stress: every rule, on objectives that are hard -------------------------------------------


@every_rule
@pytest.mark.parametrize("n", [1, 2, 17])
def test_a_rotated_quadratic_is_solved(rule, n):
    optimizer, _, loss = minimise(quadratic(n), torch.ones(n, dtype=torch.float64), rule)
    assert optimizer.converged
    assert loss < 0.05


@every_rule
def test_a_plateau_ends_the_search_by_itself(rule):
    optimizer, x, loss = minimise(lambda x: 0.0 * x.sum() + 3.0, torch.ones(9), rule)
    assert optimizer.converged and loss == 3.0
    assert torch.equal(x, torch.ones(9))
    # Six halvings from 0.5 below 0.01, each after a complete poll of 18 trial points.
    assert optimizer.evaluations >= 6 * 18


@every_rule
def test_steps_and_corners_are_no_trap_of_the_rules(rule):
    optimizer, _, loss = minimise(
        lambda x: x.abs().max() + (2 * x).round().abs().sum(), torch.full((5,), 2.3), rule
    )
    assert optimizer.converged
    assert loss < 10.0


@every_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_regions_without_a_loss_are_never_entered(rule, bad):
    def function(x):
        loss = (x - 1.0).square().sum()
        return torch.where(x.sum() > 4.0, torch.tensor(bad, dtype=loss.dtype), loss)

    optimizer, x, loss = minimise(function, torch.zeros(6, dtype=torch.float64), rule)
    assert optimizer.converged
    assert x.sum() <= 4.0 and loss <= 1.5  # from 6


@every_rule
def test_a_start_without_a_loss_is_left(rule):
    def function(x):
        return torch.where(x[0] < 0.2, torch.tensor(math.nan), (x - 1.0).square().sum())

    _, _, loss = minimise(function, torch.zeros(3), rule)
    assert loss < 0.1


@every_rule
@pytest.mark.filterwarnings("ignore:the loss was NaN")
def test_nothing_but_nan_ends_too(rule):
    optimizer, x, _ = minimise(lambda x: x.sum() * math.nan, torch.ones(4), rule)
    assert optimizer.converged and torch.equal(x, torch.ones(4))


@every_rule
def test_a_noisy_loss_neither_raises_nor_hangs(rule):
    generator = torch.Generator().manual_seed(0)

    def function():
        noise = torch.randn((), generator=generator, dtype=torch.float64)
        return x.square().sum() + 0.1 * noise

    x = nn.Parameter(torch.full((20,), 2.0, dtype=torch.float64))
    optimizer = PatternSearch([x], radius=0.5, max_evaluations=200, block_size=40, **rule)
    for _ in range(40):
        assert math.isfinite(optimizer.step(function))
    assert x.square().sum() < 40.0  # from 80


@every_rule
def test_a_measured_noise_lets_the_radius_shrink_where_the_loss_is_noise(rule):
    def run(noise):
        generator = torch.Generator().manual_seed(0)

        def function():
            error = torch.randn((), generator=generator, dtype=torch.float64)
            return x.square().sum() + 0.01 * error

        x = nn.Parameter(torch.full((10,), 2.0, dtype=torch.float64))
        options = {"radius": 0.5, "min_radius": 1e-3, "noise": noise, "seed": 3, **rule}
        optimizer = PatternSearch([x], **options)
        while not optimizer.converged and optimizer.evaluations < 3_000:
            optimizer.step(function)
        return optimizer, x.square().sum().item()

    optimizer, loss = run(None)
    assert optimizer.converged and loss < 0.5  # from 40
    assert run(0.01)[0].converged
    assert optimizer.evaluations < run(0.0)[0].evaluations


@every_rule
def test_a_measured_noise_changes_nothing_where_there_is_none(rule):
    starts = [torch.ones(7, dtype=torch.float64) for _ in range(2)]
    plain = minimise(quadratic(7), starts[0], rule)
    measured = minimise(quadratic(7), starts[1], rule, noise=None)
    assert torch.equal(plain[1], measured[1])
    assert plain[0].evaluations == measured[0].evaluations


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_noise_is_measured_at_a_radius_beyond_the_dtype(dtype):
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = psfast.PatternSearch([p], radius=1e300, noise=None)
    optimizer.step(lambda: p.square().sum())
    assert optimizer.last_poll.failed and optimizer.radius == 5e299


def test_accepts_below_the_rounding_of_a_float32_loss_end():
    def accepts(noise):
        torch.manual_seed(0)
        x = nn.Parameter(torch.randn(400))
        weights = torch.randn(400, 400)

        def loss():  # 5, and what the order of a sum makes of its rounding
            return 5.0 + (weights @ x).sum() - x @ weights.sum(0)

        optimizer = PatternSearch([x], radius=1e-3, noise=noise, max_evaluations=800)
        return sum(len(optimizer.step(loss) and optimizer.last_poll.accepted) for _ in range(20))

    assert accepts(None) < accepts(0.0)


@every_rule
def test_sufficient_decrease_holds_for_every_accept(rule):
    function = quadratic(6)
    x = nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = PatternSearch([x], radius=0.5, min_radius=1e-3, decrease=0.3, **rule)
    accepted = 0
    while not optimizer.converged:
        optimizer.step(lambda: function(x))
        report = optimizer.last_poll
        if report.accepted:
            accepted += 1
            assert report.loss_after < report.loss_before - 0.3 * report.radius**2
    assert accepted


def test_a_hundred_thousand_coordinates():
    n = 100_000
    x = nn.Parameter(torch.ones(n))
    optimizer = PatternSearch(
        [x], radius=0.5, block_size=128, max_evaluations=128, **RULES["simplex"]
    )
    first = last = optimizer.step(lambda: x.square().mean()).item()
    for _ in range(5):
        loss = optimizer.step(lambda: x.square().mean()).item()
        assert loss <= last
        last = loss
    assert last < first
    assert len(optimizer.last_poll.accepted) > 1  # many at once


def test_the_simplex_gradient_leaves_the_plain_poll_behind():
    function = quadratic(60, condition=100.0)
    start = torch.ones(60, dtype=torch.float64)
    options = {"most": 4_000, "radius": 0.1, "min_radius": 0.0, "block_size": 30}
    losses = {name: minimise(function, start, RULES[name], **options)[2] for name in RULES}
    assert losses["simplex"] < 0.2 * losses["first"]
    assert losses["simplex"] < 0.2 * losses["best"]


# -- what always holds, with a search ---------------------------------------------------------


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(40, 6, dtype=torch.float64)
    x[:, 5] = 0.0  # no slope along the eight weights that read it
    y = (x[:, :1] * x[:, 1:2]).sign()
    return net, lambda: (net(x) - y).square().mean()


@every_rule
def test_a_run_that_is_saved_and_resumed_continues_bit_for_bit(rule):
    options = {"radius": 0.1, "block_size": 10, "max_evaluations": 10, "seed": 5, **rule}
    net, loss = network()
    optimizer = PatternSearch(net.parameters(), **options)
    for _ in range(17):  # into the second lap
        optimizer.step(loss)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = [optimizer.step(loss).item() for _ in range(25)]

    other, other_loss = network()
    resumed = PatternSearch(other.parameters(), **options)
    resumed.step(other_loss)
    resumed.load_state_dict(state)
    other.load_state_dict(weights)
    assert [resumed.step(other_loss).item() for _ in range(25)] == expected
    assert resumed.evaluations == optimizer.evaluations
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("n", [10, 12])  # working sets of the same size, and not
def test_a_state_between_two_working_sets_resumes_too(n):
    def started():
        x = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        slope = torch.linspace(1.0, 2.0, n, dtype=torch.float64)
        search = SimplexGradient(working_set=4)
        optimizer = PatternSearch([x], radius=1.0, search=search, block_size=3, max_evaluations=3)
        return x, optimizer, lambda: (slope * (x - 0.03).abs()).sum()  # most laps fail

    between = 0
    for cut in range(1, 40):
        x, optimizer, loss = started()
        for _ in range(cut):
            optimizer.step(loss)
        state = copy.deepcopy(optimizer.state_dict())
        between += state["search"]["window"] > 0 and "slopes" not in state
        other, resumed, other_loss = started()
        with torch.no_grad():
            other.copy_(x)
        resumed.load_state_dict(state)
        for _ in range(20):
            assert resumed.step(other_loss) == optimizer.step(loss)
            assert resumed.last_poll.accepted == optimizer.last_poll.accepted
    assert between


def test_lengths_must_be_several():
    with pytest.raises(TypeError, match="lengths must be a sequence of numbers, got 1.0"):
        SimplexGradient(lengths=1.0)


def test_a_state_of_another_working_set_is_refused():
    net, loss = network()
    optimizer = PatternSearch(net.parameters(), search=SimplexGradient(working_set=30))
    optimizer.step(loss)
    other = PatternSearch(net.parameters(), search=SimplexGradient(working_set=20))
    with pytest.raises(ValueError, match="working_set"):
        other.load_state_dict(optimizer.state_dict())


def test_param_groups_scale_the_points_along_the_direction():
    a, b = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    groups = [{"params": [a, frozen], "radius": 0.1}, {"params": [b], "radius": 0.001}]
    optimizer = PatternSearch(groups, search=SimplexGradient(lengths=(1.0,)))
    optimizer.step(lambda: a.sum() + b.sum() + frozen.sum())
    torch.testing.assert_close(a.detach(), torch.full((5,), 0.9))
    torch.testing.assert_close(b.detach(), torch.full((5,), 0.999))
    assert torch.equal(frozen, torch.ones(3))


def test_decay_pulls_towards_zero_and_only_on_an_evaluated_decrease():
    def after_a_step(decay, first=4.0):
        x = nn.Parameter(torch.tensor([first, -2.0]))
        search = SimplexGradient(lengths=(1.0,), decay=decay)
        optimizer = PatternSearch([x], radius=0.1, search=search)
        optimizer.step(lambda: x.sum())
        return x.detach()

    torch.testing.assert_close(after_a_step(0.0), torch.tensor([3.9, -2.1]))
    torch.testing.assert_close(after_a_step(0.5), torch.tensor([3.7, -2.0]))
    # The point (-0.1, -0.1) is higher than -1: one trial point of the block is taken instead.
    assert after_a_step(10.0, first=1.0).sum().item() == pytest.approx(-1.1)


def test_an_exception_in_the_loss_of_a_point_leaves_the_incumbent():
    x = nn.Parameter(torch.ones(4))
    optimizer = PatternSearch([x], search=SimplexGradient(), radius=0.1)
    calls = 0

    def loss():
        nonlocal calls
        calls += 1
        if calls == 6:  # the incumbent, four trial points, then the first point
            raise KeyError("mine")
        return x.square().sum()

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(loss)
    assert torch.equal(x, torch.ones(4))
    assert optimizer.step(loss) < 4.0


@pytest.mark.parametrize("at", range(1, 18))
def test_a_step_that_was_interrupted_is_repeated_as_if_nothing_had_been(at):
    def run(at=None):
        x = nn.Parameter(torch.arange(1.0, 7.0, dtype=torch.float64))
        optimizer = PatternSearch([x], search=SimplexGradient(), radius=0.1, max_evaluations=6)
        calls = 0

        def loss():
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return x.square().sum()

        while True:
            try:
                optimizer.step(loss)
                break
            except KeyboardInterrupt:
                continue
        for _ in range(5):
            optimizer.step(lambda: x.square().sum())
        return x.tolist(), optimizer.state_dict()["search"], optimizer.state_dict()["slopes"]

    (values, search, slopes), (expected, expected_search, expected_slopes) = run(at), run()
    assert values == expected and search == expected_search
    assert all(torch.equal(slopes[name], expected_slopes[name]) for name in slopes)


def test_minibatches_and_dropout_do_not_shrink_the_radius():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = PatternSearch(
        net.parameters(), radius=0.05, search=SimplexGradient(), max_evaluations=40
    )
    for _ in range(30):
        x = torch.randn(16, 6)
        f = psfast.objective(net, nn.MSELoss(), x, x[:, :1], backend="serial")
        optimizer.step(f)
    assert optimizer.radius == 0.05


def test_it_learns_parity():
    """Three bits, the smallest transformer: from chance to every state right."""
    torch.manual_seed(0)
    data = psfast.StateTrackingDataset(32, 3, sep_token=2, pad_token=3, seed=0)
    net = psfast.DecoderOnlyTransformer(3, 8, 1, 2, 16, max_len=6, dropout=0.0)
    objective = psfast.objective(net, psfast.MaskedCrossEntropy(3), data.x, data.y)
    optimizer = PatternSearch(
        net.parameters(), radius=0.05, search=SimplexGradient(), block_size=128
    )
    supervised = data.y != 3
    for _ in range(400):
        optimizer.step(objective)
        if optimizer.last_poll.loss_after < 0.02:
            break
    right = net(data.x).argmax(-1)[supervised] == data.y[supervised]
    assert right.all()


def test_a_state_of_another_kind_of_search_is_refused():
    net, loss = network()
    plain = PatternSearch(net.parameters(), max_evaluations=9)
    simplex = PatternSearch(net.parameters(), search=SimplexGradient(working_set=3))
    for optimizer in (plain, simplex):
        optimizer.step(lambda: 0.0 * loss())
    with pytest.raises(ValueError, match="a search without search=SimplexGradient"):
        simplex.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="a search with search=SimplexGradient"):
        plain.load_state_dict(simplex.state_dict())


def test_a_point_of_the_search_is_one_accept():
    accepted = []
    for max_accepts in (1, 3):
        net, loss = network()
        search = SimplexGradient(working_set=30)
        optimizer = PatternSearch(
            net.parameters(), radius=0.1, search=search, acceptance="best", max_accepts=max_accepts
        )
        optimizer.step(loss)
        accepted.append(len(optimizer.last_poll.accepted))
    assert accepted[0] > 3 and accepted[1] > accepted[0]
