"""Trial points that a poll begins with, one after another, before blocks of the batched ones."""

import functools
import gc
import weakref

import pytest
import torch
from models import some_points
from torch import nn

import psfast
from psfast import search
from psfast.objectives.batched import BatchedObjective, VmapObjective
from psfast.objectives.batched.opening import Opening
from psfast.objectives.serial import SerialModelObjective

GAP = 8  # trial points


def problem(dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 3))
    return model, nn.MSELoss(), torch.randn(8, 5), torch.randn(8, 3)


def other_rounding(model, criterion, *batch):
    """The serial loop with losses that differ by what no rounding could hide."""
    return SerialModelObjective(model, lambda *args: criterion(*args) + 1e-3, *batch)


def with_other_rounding(kind: type, arguments: tuple):
    f = kind(*arguments)
    assert f.opening.patience == GAP
    f.opening = other_rounding(*arguments)
    f.opening.patience = GAP
    return f


@functools.cache
def one_by_one(kind: type, points: int):
    """The search with one trial point at a time, written out: accepted ones, values, how often
    the serial loop and the other kind decided."""
    arguments = problem()
    serial, other = other_rounding(*arguments), kind(*arguments)
    total, radius = 2 * serial.flat.size, 0.3
    order = position = tried = 0
    gap, last, accepted, decided = 1.0, None, [], {serial: 0, other: 0}
    for _ in range(points):
        f = serial if gap <= GAP and tried < GAP else other
        if f is not last:
            incumbent, last = f().item(), f
        entry = search.poll_order(0, order, position, 1, total)
        index, sign = search.coordinates(entry)
        position, tried = (position + 1) % total, tried + 1
        decided[f] += 1
        if f.losses(index, sign * radius).item() < incumbent:
            accepted.append((index.item(), (sign * radius).float().item()))
            f.accept(index, sign * radius)
            incumbent, gap, tried = f().item(), 0.7 * gap + 0.3 * tried, 0
        elif tried == total:
            order, position, tried, gap, radius = order + 1, 0, 0, float(total), radius / 2
    return accepted, serial.flat.buffer.tolist(), decided


@pytest.mark.parametrize("kind", [BatchedObjective, VmapObjective])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_accepts": 100},
        {"max_accepts": 3, "block_size": 3},
        {"max_accepts": 100, "max_evaluations": 1},
        {"max_accepts": 100, "max_evaluations": GAP},
        {"max_evaluations": 5, "block_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("resumed", [False, True])
def test_the_same_trial_points_open_whatever_the_steps_are(kind, options, resumed):
    points = 3000 if kind is BatchedObjective else 1000
    expected, values, decided = one_by_one(kind, points)
    assert min(decided.values()) > points / 10
    arguments = problem()
    f, accepted, resume_at = with_other_rounding(kind, arguments), [], 0 if resumed else points
    optimizer = psfast.PatternSearch(f.params, radius=0.3, **options)
    most = optimizer.max_evaluations or points
    while optimizer.evaluations < points:
        optimizer.max_evaluations = min(most, points - optimizer.evaluations)
        if optimizer.evaluations >= resume_at:
            resume_at += 97
            saved = optimizer.state_dict()
            f = with_other_rounding(kind, arguments)
            optimizer = psfast.PatternSearch(f.params, **options)  # the state has the radius
            optimizer.max_evaluations = min(most, points - saved["search"]["evaluations"])
            optimizer.load_state_dict(saved)
        optimizer.step(f)
        accepted += optimizer.last_poll.accepted
    assert [i for i, _ in accepted] == [i for i, _ in expected]
    assert [d for _, d in accepted] == pytest.approx([d for _, d in expected])
    assert f.flat.buffer.tolist() == values


def test_nothing_is_stacked_while_much_improves(monkeypatch):
    f = BatchedObjective(*problem())
    monkeypatch.setattr(f, "losses", None)
    optimizer = psfast.PatternSearch(f.params, radius=1e-3, max_accepts=20)
    before = f().item()
    loss = optimizer.step(f)
    assert len(optimizer.last_poll.accepted) == 20 and optimizer.last_poll.speculated == 0
    assert loss.dtype == f().dtype and loss.item() == pytest.approx(f().item()) and loss < before


def test_a_batch_that_only_opens_polls_is_not_taken_up_by_blocks(monkeypatch):
    model, criterion, x, y = problem()
    f = BatchedObjective(model, criterion, x, y)
    optimizer = psfast.PatternSearch(f.params, radius=1e-3, max_accepts=3)
    with monkeypatch.context() as context:
        context.setattr(f, "_refresh", None)
        f.set_batch(x + 1.0, y)
        optimizer.step(f)
        assert len(optimizer.last_poll.accepted) == 3
    assert f().item() == pytest.approx(SerialModelObjective(model, criterion, x + 1.0, y)().item())


@pytest.mark.parametrize(
    "options", [{"acceptance": "best"}, {"search": psfast.SimplexGradient()}], ids=str
)
def test_what_needs_whole_blocks_gets_them(options, monkeypatch):
    f = BatchedObjective(*problem())
    monkeypatch.setattr(f.opening, "losses", None)
    monkeypatch.setattr(f.opening, "descend", None)
    psfast.PatternSearch(f.params, radius=1e-3, **options).step(f)


@pytest.mark.parametrize("kind", [BatchedObjective, VmapObjective])
def test_it_has_the_batch_and_the_mask(kind):
    model, criterion, x, y = problem(dropout=0.5)
    f = kind(model, criterion, x, y, seed=3)
    block = some_points(f, 20)

    def same():
        torch.testing.assert_close(f.opening().item(), f().item(), rtol=1e-5, atol=0.0)
        losses = f.opening.losses(*block).to(f().dtype)
        torch.testing.assert_close(losses, f.losses(*block), rtol=1e-5, atol=0.0)
        return f.opening().item()

    seen = [same()]
    f.set_batch(x, y, seed=4)
    seen.append(same())
    f.set_batch(x + 1.0, y)
    seen.append(same())
    f.set_batch(x[:4], y[:4])
    seen.append(same())
    with pytest.raises((ValueError, RuntimeError), match="shapes cannot be multiplied"):
        f.set_batch(x[:, :2], y)
    assert f().item() == pytest.approx(seen[-1]) and same() == seen[-1]
    x[0] += 1.0
    seen.append(same())
    model.eval()
    seen.append(same())
    model.double()
    f.set_batch(x.double(), y.double())
    seen.append(same())
    assert f.opening().dtype == f().dtype == torch.float64
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("kind", [BatchedObjective, VmapObjective])
@pytest.mark.parametrize("seed", range(3))
def test_what_it_knows_of_the_incumbent_is_never_old(kind, seed):
    torch.manual_seed(seed)
    inner = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    model = nn.Sequential(inner, nn.Dropout(0.5)).double()
    x, y = torch.randn(8, 5).double(), torch.randn(8, 4).double()
    f = kind(model, nn.MSELoss(), x, y)

    def descend():
        index, delta = some_points(f, 6)
        known = f.opening().item()
        f.opening.descend(index, 0.1 * delta, incumbent=known, margin=0.0, most=2, gap=2.0)

    def step_of_two():
        block = [part[:2] for part in some_points(f, 1)]
        f.opening.losses(*block, stop_below=f.opening().item())
        f.opening.accept(block[0][:1], block[1][:1])

    def set_batch():
        f.set_batch(torch.randn_like(x), y, seed=int(torch.randint(9, ())))

    @torch.no_grad()
    def write(tensor):
        tensor.add_(0.1)

    block = [part[:2] for part in some_points(f, 1)]

    actions = [
        *(descend, step_of_two, set_batch, f, lambda: f.opening()),
        lambda: f.opening.losses(*block),
        lambda: f.opening.accept(*(part[1:] for part in block)),
        lambda: f.opening.accept(*block),
        lambda: f.losses(*some_points(f, 3)),
        lambda: f.opening.losses(*some_points(f, 2)),
        lambda: f.accept(*(part[:1] for part in some_points(f, 1))),
        lambda: write(inner[0].bias),
        lambda: write(f.inputs),
        lambda: model.train(not model.training),
    ]
    for first, second in torch.randint(len(actions), (100, 2)).tolist():
        actions[first]()
        actions[second]()
        brute = SerialModelObjective(model, nn.MSELoss(), f.inputs, y, seed=f.seed)
        assert f.opening().item() == brute().item()
        assert f().item() == pytest.approx(brute().item())


def test_the_loss_of_an_accepted_trial_point_is_the_incumbents_if_it_was_found_there():
    model, criterion, x, y = problem()
    f = BatchedObjective(model, criterion, x, y).opening
    brute = SerialModelObjective(model, criterion, x, y)
    index, delta = (part[:3] for part in some_points(f, 1))
    for other_incumbent in (False, True):
        f()
        losses = f.losses(index, delta)
        if other_incumbent:
            brute.accept(torch.tensor([7]), torch.tensor([0.5]))
            f()
        f.accept(index[2:], delta[2:])
        assert f().item() == brute().item()
        assert (f().item() == losses[2].item()) != other_incumbent


def test_another_batch_in_place_begins_a_new_poll():
    model, criterion, x, y = problem()
    f = BatchedObjective(model, criterion, x, y)
    optimizer = psfast.PatternSearch(f.params, decrease=1e9, max_evaluations=3)
    optimizer.step(f)
    y.neg_()
    optimizer.step(f)
    assert optimizer.state_dict()["search"]["tried"] == 3


@pytest.mark.parametrize("at", [2, 3, 4, 7, 8, 9, 11, 30])
def test_an_error_in_the_model_loses_nothing(at):
    class Fails(nn.Module):
        calls = None

        def forward(self, x):
            if self.calls is not None:
                self.calls += 1
                if self.calls == at:
                    raise OSError("gone")
            return x

    model, criterion, x, y = problem()
    fails = Fails()
    f = BatchedObjective(nn.Sequential(model, fails), criterion, x, y)
    optimizer = psfast.PatternSearch(f.params, max_accepts=100)
    fails.calls = 0
    with pytest.raises(OSError, match="gone"):
        while True:
            optimizer.step(f)
    again = BatchedObjective(*problem())
    other = psfast.PatternSearch(again.params, max_accepts=100)
    while other.evaluations < optimizer.evaluations:
        other.max_evaluations = optimizer.evaluations - other.evaluations
        other.step(again)
    assert f.flat.buffer.tolist() == again.flat.buffer.tolist()
    assert optimizer.state_dict()["search"]["tried"] == other.state_dict()["search"]["tried"]


def test_autocast_is_refused_as_by_the_blocks():
    f = BatchedObjective(*problem())
    optimizer = psfast.PatternSearch(f.params)
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast is on"):
        optimizer.step(f)


def with_buffers():
    return nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))


def with_frozen_layers():
    frozen = (nn.Sequential(nn.Linear(5, 5), nn.Tanh()).requires_grad_(False) for _ in range(4))
    return nn.Sequential(*frozen, nn.Linear(5, 3))


@pytest.mark.parametrize("make", [with_buffers, with_frozen_layers])
def test_where_it_could_do_harm_there_is_none(make):
    _, criterion, x, y = problem()
    assert BatchedObjective(make(), criterion, x, y).opening is None


@pytest.mark.parametrize("kind", [BatchedObjective, VmapObjective])
def test_it_goes_with_its_objective(kind):
    kind(*problem())  # what torch makes at the first use may outlive it
    gc.collect()
    gc.disable()
    try:
        f = kind(*problem())
        psfast.PatternSearch(f.params, max_accepts=5).step(f)
        opening = weakref.ref(f.opening)
        del f
        assert opening() is None
    finally:
        gc.enable()


def test_a_model_of_large_products_has_none():
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
    arguments = model, nn.CrossEntropyLoss(), torch.randn(64, 256), torch.randint(0, 10, (64,))
    f = BatchedObjective(*arguments)
    assert f.opening is None
    few = [t[:2] for t in arguments[2:]]
    f.set_batch(*few)
    assert f.opening is not None
    optimizer = psfast.PatternSearch(f.params, max_accepts=5)
    optimizer.step(f)
    assert len(optimizer.last_poll.accepted) == 5


def decided(optimizer) -> dict:
    state = optimizer.state_dict()["search"]
    return {name: state[name] for name in ("evaluations", "tried", "polls", "incumbent")}


@pytest.mark.parametrize("kind", [BatchedObjective, VmapObjective])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("method", ["__call__", "losses"])
def test_an_error_behind_the_switch_to_blocks_begins_no_poll_anew(kind, resumed, method):
    arguments, fails = problem(), []

    class Fails(kind):
        def __call__(self):
            if fails and method == "__call__":
                raise OSError(fails.pop())
            return super().__call__()

        def losses(self, *args, **kwargs):
            if fails and method == "losses":
                raise OSError(fails.pop())
            return super().losses(*args, **kwargs)

    f = with_other_rounding(Fails, arguments)
    optimizer = psfast.PatternSearch(f.params, decrease=1e9, max_evaluations=GAP + 2)
    fails.append("gone")
    with pytest.raises(OSError, match="gone"):
        optimizer.step(f)
    assert decided(optimizer)["tried"] == GAP
    if resumed:
        saved = optimizer.state_dict()
        f = with_other_rounding(kind, arguments)
        optimizer = psfast.PatternSearch(f.params, decrease=1e9, max_evaluations=GAP + 2)
        optimizer.load_state_dict(saved)
    optimizer.step(f)
    assert decided(optimizer) == {
        **{"evaluations": 2 * GAP + 2, "tried": 2 * GAP + 2, "polls": 0},
        "incumbent": f().item(),
    }


@pytest.mark.parametrize("kind", [BatchedObjective, VmapObjective])
def test_a_batch_that_is_refused_begins_no_poll_anew(kind, monkeypatch):
    model, criterion, x, y = problem()
    evaluate = Opening._evaluate
    monkeypatch.setattr(Opening, "_evaluate", lambda opening: evaluate(opening) + 1e-3)
    f = kind(model, criterion, x, y)
    optimizer = psfast.PatternSearch(f.params, decrease=1e9, max_evaluations=3)
    optimizer.step(f)
    for refused in (x[:, :2], x.double()):
        with pytest.raises((ValueError, RuntimeError)):
            f.set_batch(refused, y)
    optimizer.step(f)
    assert decided(optimizer)["tried"] == 6


@pytest.mark.parametrize("kind", [BatchedObjective, VmapObjective])
def test_it_is_on_the_batch_before_when_set_batch_is_interrupted_at_its_end(kind, monkeypatch):
    model, criterion, x, y = problem(dropout=0.5)
    f = kind(model, criterion, x, y)
    before, evaluate = f.opening().item(), Opening.__call__

    def interrupted(opening):
        evaluate(opening)
        raise KeyboardInterrupt

    for batch, seed in (((x + 1.0, y), 0), ((x, y + 1.0), 0), ((x, y), 1)):
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            context.setattr(Opening, "__call__", interrupted)
            f.set_batch(*batch, seed=seed)
        index, delta = (part[:2] for part in some_points(f, 1))
        assert f.opening.loss_at(index, 0 * delta).item() == pytest.approx(before)
        assert f.opening().item() == before


@pytest.mark.parametrize("kind", [BatchedObjective, VmapObjective])
def test_an_objective_built_amid_a_poll_does_not_begin_it_anew(kind):
    arguments = problem()
    f = kind(*arguments)
    optimizer = psfast.PatternSearch(f.params, decrease=1e9, max_evaluations=20)
    optimizer.step(f)
    optimizer.step(kind(*arguments))
    assert decided(optimizer)["tried"] == 40


@pytest.mark.parametrize("opens, seeds", [(True, (17, 21, 38)), (False, (9, 22, 31, 35))])
def test_rounding_alone_improves_nothing_for_ever(opens, seeds):
    """Near the optimum of a tiny model, where points were lower than one another in a ring."""
    for seed in seeds:
        torch.manual_seed(seed)
        model = nn.Linear(4 + seed % 4, 1)
        x, y = torch.randn(16, model.in_features), torch.randn(16, 1)
        f = BatchedObjective(model, nn.MSELoss(reduction="sum" if seed % 2 else "mean"), x, y)
        f.opening = f.opening if opens else None
        with_ones = torch.cat([x, torch.ones(16, 1)], 1).double()
        best = torch.linalg.lstsq(with_ones, y.double()).solution
        with torch.no_grad():
            model.weight.copy_(best[:-1].T)
            model.bias.copy_(best[-1])
        optimizer = psfast.PatternSearch(f.params, radius=1e-4, min_radius=1e-8)
        for _ in range(2000):
            optimizer.step(f)
        assert optimizer.converged, seed


def test_losses_that_are_whole_numbers_need_no_confirmation():
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(40, 5), torch.randint(0, 3, (40,))

    def wrong(outputs, targets):
        return (outputs.argmax(1) != targets).sum()

    f = BatchedObjective(model, wrong, x, y)
    optimizer = psfast.PatternSearch(f.params, radius=0.5, max_accepts=3, acceptance="best")
    before = f().item()
    assert optimizer.step(f).item() < before


def test_a_model_that_moves_its_parameters_has_none():
    class Moves(nn.Sequential):
        def forward(self, x):
            self[0].weight.data = self[0].weight.data.clone()
            return super().forward(x)

    model, criterion, x, y = problem()
    assert BatchedObjective(Moves(*model), criterion, x, y).opening is None


def test_it_sees_what_the_criterion_reads_change():
    model, _, x, y = problem()
    weight = torch.ones(3)
    f = BatchedObjective(model, lambda a, b: ((a - b) ** 2 * weight).mean(), x, y)
    before = f.opening().item()
    weight.mul_(2.0)
    assert f.opening().item() == pytest.approx(2 * before) == f().item()


@pytest.mark.parametrize("kind", [BatchedObjective, VmapObjective])
def test_buffers_that_came_in_stay_after_an_interrupt(kind):
    model, criterion, x, y = problem()
    f = kind(model, criterion, x, y)
    optimizer = psfast.PatternSearch(f.params)
    optimizer.step(f)
    norm = model[2] = nn.BatchNorm1d(9, affine=False)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(f)
    handle.remove()
    for _ in range(3):
        optimizer.step(f)
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()
