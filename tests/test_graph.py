"""The graph backend's steps, run without a graph: cursor, comparison, keeping and restoring."""

import math

import pytest
import torch
from descents import serial_descent
from torch import nn

import psfast
from psfast.objectives.graph import GraphModelObjective, GraphObjective
from psfast.objectives.serial import SerialModelObjective, SerialObjective


def problem(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2)
    ).to(dtype)
    return model, nn.CrossEntropyLoss(), torch.randn(7, 3, dtype=dtype), torch.randint(2, (7,))


def twins(seed=0):
    """The same problem twice: serial, and the graph's steps."""
    return (
        SerialModelObjective(*problem(seed), seed=5),
        GraphModelObjective(*problem(seed), seed=5, capture=False),
    )


def block(objective, K, seed=1, radius=0.1):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(objective.flat.size, (K,), generator=generator)
    sign = torch.randint(2, (K,), generator=generator) * 2 - 1
    return index, (sign * radius).to(objective.flat.buffer.dtype)


@pytest.mark.parametrize("K", [1, 2, 31, 33, 100])
def test_losses_are_the_serial_ones_and_nothing_changes(K):
    serial, graph = twins()
    index, delta = block(serial, K)
    before = [t.clone() for t in graph.model.state_dict().values()]
    state = torch.get_rng_state()
    assert torch.equal(graph.losses(index, delta), serial.losses(index, delta))
    assert torch.equal(graph(), serial())
    assert torch.equal(torch.get_rng_state(), state)
    for old, new in zip(before, graph.model.state_dict().values(), strict=True):
        assert torch.equal(old, new)


def test_a_block_longer_than_the_device_holds(monkeypatch):
    monkeypatch.setattr("psfast.objectives.graph._CAPACITY", 8)
    serial, graph = twins()
    index, delta = block(serial, 27)
    assert torch.equal(graph.losses(index, delta), serial.losses(index, delta))
    assert len(graph.losses(index[:0], delta[:0])) == 0


def test_stops_in_the_round_of_the_first_improvement(monkeypatch):
    monkeypatch.setattr("psfast.objectives.graph._ROUND", 4)
    serial, graph = twins()
    index, delta = block(serial, 40)
    losses = serial.losses(index, delta)
    bar = losses[6].item() + 1e-9
    first = int((losses < bar).nonzero()[0])
    found = graph.losses(index, delta, stop_below=bar)
    assert len(found) == (first // 4 + 1) * 4
    assert torch.equal(found, losses[: len(found)])


@pytest.mark.parametrize("margin, most", [(0.0, 99), (1e-3, 99), (0.0, 4)])
def test_descend_is_the_serial_loop(margin, most):
    serial, graph = twins()
    index, delta = block(serial, 60)
    losses, places, incumbents = serial_descent(serial, index, delta, margin, most)
    assert incumbents == [losses[place] for place in places]
    found = graph.descend(index, delta, incumbent=graph().item(), margin=margin, most=most, gap=1.0)
    assert len(places) > 3
    assert found.places == places and found.losses.tolist() == losses
    assert found.incumbents == incumbents
    assert len(losses) <= found.evaluated <= 60
    assert torch.equal(graph.flat.buffer, serial.flat.buffer)
    assert graph().item() == incumbents[-1]


def test_a_descent_takes_what_the_device_holds(monkeypatch):
    monkeypatch.setattr("psfast.objectives.graph._CAPACITY", 8)
    _, graph = twins()
    found = graph.descend(*block(graph, 20), incumbent=graph().item(), margin=0.0, most=99, gap=1.0)
    assert len(found.losses) == 8


def test_what_is_not_finite_is_never_kept():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    graph = GraphObjective(lambda: (weight - 1).log().sum(), [weight], capture=False)
    index, delta = torch.tensor([0, 1, 0]), torch.tensor([-0.5, -0.5, 1.0])
    assert graph().item() == -math.inf
    found = graph.descend(index, delta, incumbent=math.inf, margin=0.0, most=9, gap=1.0)
    assert math.isnan(found.losses[0]) and found.losses[1] == -math.inf
    assert found.places == [2] and weight.tolist() == [2.0, 2.0]


def failing_beyond_2():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def closure():
        if weight[1] > 2:
            raise ArithmeticError("no")
        return weight.square().sum()

    return weight, closure


def test_an_exception_in_a_descent_keeps_what_was_accepted():
    weight, closure = failing_beyond_2()
    graph = GraphObjective(closure, [weight], capture=False)
    other = SerialObjective(closure, [weight])
    index, delta = torch.tensor([0, 1]), torch.tensor([-0.5, 0.5])
    with pytest.raises(ArithmeticError):
        graph.descend(index, delta, incumbent=5.0, margin=0.0, most=9, gap=1.0)
    assert weight.tolist() == [0.5, 2.0]
    assert other.flat.changed()


def test_an_exception_leaves_the_incumbent():
    weight, closure = failing_beyond_2()
    graph = GraphObjective(closure, [weight], capture=False)
    with pytest.raises(ArithmeticError):
        graph.losses(torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
    assert weight.tolist() == [1.0, 2.0]


def test_a_batch_that_changes_in_place_is_followed_everywhere():
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randn(8, 3)
    graph = GraphModelObjective(net, nn.MSELoss(), x, y, capture=False)
    x.add_(1.0)
    at = torch.tensor([0]), torch.tensor([0.1])
    promised = graph.loss_at(*at)
    assert promised == psfast.objective(net, nn.MSELoss(), x, y, backend="serial").loss_at(*at)
    assert promised == graph.losses(*at)


def test_goes_on_with_another_batch_and_follows_the_parameters():
    serial, graph = twins()
    for shape in (7, 9):
        inputs = torch.randn(shape, 3, dtype=torch.float64)
        targets = torch.randint(2, (shape,))
        for objective in (serial, graph):
            objective.set_batch(inputs, targets, seed=8)
        assert torch.equal(graph(), serial())
    with torch.no_grad():
        for objective in (serial, graph):
            objective.params[0].mul_(2)
            objective.params[1].data = objective.params[1].data.clone() + 1
    assert torch.equal(graph(), serial())
    index, delta = block(serial, 5)
    assert torch.equal(graph.losses(index, delta), serial.losses(index, delta))


@pytest.mark.parametrize("method", ["losses", "loss_at", "descend"])
def test_what_others_write_to_buffers_stays(method):
    options = {"incumbent": 9.0, "margin": 0.0, "most": 9, "gap": 1.0}
    options = options if method == "descend" else {}
    for objective in twins():
        at = block(objective, 3)
        getattr(objective, method)(*at, **options)
        mean = objective.model[1].running_mean
        mean.copy_(torch.arange(5.0))  # batch_norm itself leaves no trace in a version counter
        getattr(objective, method)(*at, **options)
        assert mean.tolist() == [0, 1, 2, 3, 4]


def test_autocast_captures_again(monkeypatch):
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randn(8, 3)
    graph = GraphModelObjective(net, nn.MSELoss(), x, y, capture=False)
    captures, prepare = [], graph._prepare
    monkeypatch.setattr(graph, "_prepare", lambda: captures.append(prepare()))
    outside = graph()
    with torch.autocast("cpu", torch.bfloat16):
        assert graph() == graph() != outside
        assert len(captures) == 1
    assert graph() == outside and len(captures) == 2


class Interrupts(torch.Tensor):
    """Whoever copies it is interrupted."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            raise KeyboardInterrupt
        return super().__torch_function__(function, types, args, kwargs or {})


def test_an_interrupt_amid_a_batch_leaves_the_one_before():
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randn(8, 3)
    graph = GraphModelObjective(net, nn.MSELoss(), x, y, capture=False)
    before = graph()
    with pytest.raises(KeyboardInterrupt):
        graph.set_batch(x + 1.0, y.clone().as_subclass(Interrupts))
    assert torch.equal(graph(), before)


@pytest.mark.parametrize("many", [1, 6])
def test_the_optimizer_takes_the_serial_steps(many):
    serial, graph = twins(seed=3)
    searches = [
        psfast.PatternSearch(o.params, radius=0.2, seed=4, max_accepts=many)
        for o in (serial, graph)
    ]
    for _ in range(5):
        values = [
            search.step(o).item() for search, o in zip(searches, (serial, graph), strict=True)
        ]
        assert values[0] == values[1]
        assert searches[0].last_poll.accepted == searches[1].last_poll.accepted


def test_says_why_it_cannot_serve():
    weight = nn.Parameter(torch.ones(2))
    cases = {
        "CUDA device": dict(closure=lambda: weight.sum()),
        "backward": dict(closure=lambda: weight.sum().backward(), capture=False),
        "scalar tensor, got float": dict(closure=lambda: 1.0, capture=False),
        "scalar tensor": dict(closure=lambda: weight * 2, capture=False),
    }
    for reason, arguments in cases.items():
        with pytest.raises(ValueError, match=reason):
            GraphObjective(params=[weight], **arguments)
    with pytest.raises(ValueError, match="inputs must be a tensor, got list"):
        GraphModelObjective(nn.Linear(2, 1), nn.MSELoss(), [1.0], torch.ones(1), capture=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_on_a_gpu():
    model, criterion, inputs, targets = problem(dtype=torch.float32)
    model, inputs, targets = model.cuda(), inputs.cuda(), targets.cuda()
    graph = GraphModelObjective(model, criterion, inputs, targets, seed=5)
    serial = SerialObjective(lambda: criterion(model(inputs), targets), graph.params, seed=5)
    index, delta = block(graph, 50)
    index, delta = index.cuda(), delta.cuda()
    expected = serial.losses(index, delta)
    torch.testing.assert_close(graph.losses(index, delta).cpu(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="cannot be captured"):
        weight = graph.params[0]
        GraphObjective(lambda: weight.sum() * weight.sum().item(), [weight])
