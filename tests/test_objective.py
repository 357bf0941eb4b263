"""``psfast.objective``: the choice of a backend, and one search across all of them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import build
from torch import nn

import psfast
from psfast.objectives import BACKENDS
from psfast.objectives.graph import GraphModelObjective

WITHOUT_GPU = [name for name in BACKENDS if name != "graph"]


def transformer(dropout=0.0):
    torch.manual_seed(0)
    model = psfast.DecoderOnlyTransformer(11, 8, 2, 2, 12, max_len=7, dropout=dropout).double()
    inputs = torch.randint(0, 11, (3, 5))
    targets = torch.randint(0, 11, (3, 5))
    return model, psfast.MaskedCrossEntropy(ignore_index=0), inputs, targets


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 2).double(), F.mse_loss, torch.randn(6, 4).double(), torch.zeros(6, 2)


@pytest.mark.parametrize("backend", WITHOUT_GPU)
def test_every_backend_takes_the_same_decisions(backend):
    """200 steps in float64, polls cut short, against the serial backend; bit for bit."""
    runs = []
    for name in ("serial", backend):
        f = psfast.objective(*transformer(), backend=name)
        assert f.backend == name and f.why_not == {}
        optimizer = psfast.PatternSearch(f.params, radius=0.4, seed=2, max_evaluations=300)
        steps = []
        for _ in range(200):
            optimizer.step(f)
            steps.append((optimizer.last_poll.accepted, optimizer.last_poll.evaluations))
        runs.append((steps, f.flat.buffer.clone(), optimizer.radius))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1]) and runs[0][2] == runs[1][2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode_is_refused_and_leaves_no_trace(backend):
    """What is made there could never be changed again."""
    model, criterion, *batch = linear() if backend == "graph" else transformer(dropout=0.1)
    f = (
        GraphModelObjective(model, criterion, *batch, capture=False)
        if backend == "graph"
        else psfast.objective(model, criterion, *batch, backend=backend)
    )
    at = torch.tensor([0, 3]), torch.tensor([0.1, -0.1], dtype=torch.float64)
    before, other = f(), [t[:-1] for t in batch]
    with torch.no_grad():
        f.params[0].normal_()
    values = f.flat.buffer.clone()
    calls = [f, lambda: f.losses(*at), lambda: f.loss_at(*at), lambda: f.accept(*at)]
    calls.append(lambda: f.set_batch(*other))
    if f.descends:
        rest = dict(incumbent=9.0, margin=0.0, most=2, gap=1.0)
        calls.append(lambda: f.descend(*at, **rest))
    for call in calls:
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
            call()
    assert torch.equal(f.flat.buffer, values)
    assert f() != before
    f.losses(*at)
    f.loss_at(*at)
    f.set_batch(*other)
    psfast.PatternSearch(f.params).step(f)


@pytest.mark.parametrize("backend", ["auto", "serial", "batched", "vmap"])
def test_a_module_that_goes_by_two_names_keeps_its_parameters(backend):
    """``functional_call`` takes them away from a layer that a model uses again, or a wrapper."""
    model, criterion, inputs, targets = build("two names")
    before, steps = list(model.parameters()), []
    for name in ("serial", backend):
        f = psfast.objective(copy.deepcopy(model), criterion, inputs, targets, backend=name)
        optimizer = psfast.PatternSearch(f.params, seed=2)
        steps.append([])
        for _ in range(20):
            optimizer.step(f)
            steps[-1].append(optimizer.last_poll.accepted)
    assert steps[0] == steps[1]
    optimizer = psfast.PatternSearch(model.parameters())
    psfast.fit(model, criterion, [(inputs, targets)], optimizer, progress=False)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("decrease", [0.0, 1e-3])
@pytest.mark.parametrize("backend", [*WITHOUT_GPU, "frozen fused"])
def test_many_accepts_in_one_step_are_those_of_many_steps(backend, decrease):
    """To the bit, in float32 too; ends behind an accepted trial point and at a failed poll."""
    runs = []
    for many in (1, 7):
        model, *rest = transformer(dropout=0.1)
        model.float()
        if backend == "frozen fused":
            model.blocks[0].requires_grad_(False)
        f = psfast.objective(model, *rest, backend=backend.removeprefix("frozen "))
        head = [p for p in f.params if p is model.head.weight or p is model.head.bias]
        groups = [
            {"params": [p for p in f.params if all(p is not q for q in head)]},
            {"params": head, "radius": 0.1},
        ]
        optimizer = psfast.PatternSearch(
            groups, radius=0.05, seed=3, max_accepts=many, decrease=decrease
        )
        accepted = []
        while len(accepted) < 140:
            optimizer.step(f)
            assert len(optimizer.last_poll.accepted) <= many
            assert optimizer.last_poll.speculated >= 0
            accepted += optimizer.last_poll.accepted
        state = optimizer.state_dict()["search"]
        assert state.pop("incumbent") == pytest.approx(f().item(), rel=1e-5)
        runs.append((accepted, state))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("backend", ["serial", "batched"])
def test_many_accepts_until_the_radius_has_shrunk(backend):
    runs = []
    for many in (1, 10_000):
        f = psfast.objective(*linear(), backend=backend)
        optimizer = psfast.PatternSearch(
            f.params, radius=0.4, min_radius=0.1, expand=1.5, max_accepts=many, max_evaluations=35
        )
        accepted, steps = [], 0
        while not optimizer.converged:
            optimizer.step(f)
            assert optimizer.last_poll.evaluations <= 35
            accepted, steps = accepted + optimizer.last_poll.accepted, steps + 1
        runs.append((accepted, optimizer.evaluations, f.flat.buffer.clone(), steps))
    assert runs[0][:2] == runs[1][:2] and torch.equal(runs[0][2], runs[1][2])
    assert runs[1][3] < runs[0][3]


@pytest.mark.parametrize("backend", WITHOUT_GPU)
def test_block_sizes_change_no_bit_of_a_loss(backend):
    f = psfast.objective(*transformer(dropout=0.2), backend=backend)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, f.flat.size, (60,), generator=generator)
    delta = 0.3 * torch.randn(60, generator=generator, dtype=torch.float64)
    whole = f.losses(index, delta)
    order = torch.randperm(60, generator=generator)
    assert torch.equal(f.losses(index[order], delta[order]), whole[order])
    for size in (1, 7):
        parts = [f.losses(i, d) for i, d in zip(index.split(size), delta.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), whole), size


@pytest.mark.parametrize("backend", WITHOUT_GPU)
def test_one_point_with_many_changes(backend):
    f = psfast.objective(*transformer(), backend=backend)
    exact = psfast.objective(*transformer(), backend="serial")
    index = torch.randperm(f.flat.size, generator=torch.Generator().manual_seed(3))[:50]
    delta = torch.full((50,), 0.1, dtype=torch.float64)
    before = f().item()
    assert f.loss_at(index, delta).item() == pytest.approx(
        exact.loss_at(index, delta).item(), rel=1e-9
    )
    assert f().item() == before
    f.accept(index, delta)
    exact.accept(index, delta)
    assert f().item() == pytest.approx(exact().item(), rel=1e-9)


@pytest.mark.parametrize("backend", WITHOUT_GPU)
def test_two_objectives_over_one_model_follow_each_other(backend):
    model, criterion, inputs, targets = transformer()
    one = psfast.objective(model, criterion, inputs, targets, backend=backend)
    other = psfast.objective(model, criterion, inputs, targets, backend=backend)
    one.accept(torch.tensor([5]), torch.tensor([0.7], dtype=torch.float64))
    assert other().item() == one().item()
    model.load_state_dict({name: 0.5 * v for name, v in model.state_dict().items()})
    expected = criterion(model(inputs), targets).item()
    for f in (one, other):
        assert f().item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("backend", WITHOUT_GPU)
def test_set_batch_goes_on_with_another_batch(backend):
    model, criterion, inputs, targets = transformer()
    f = psfast.objective(model, criterion, inputs, targets, backend=backend)
    for shape in ((3, 5), (2, 6)):
        inputs, targets = torch.randint(0, 11, shape), torch.randint(1, 11, shape)
        f.set_batch(inputs, targets)
        assert f().item() == pytest.approx(criterion(model(inputs), targets).item(), rel=1e-9)


def test_auto_takes_the_fastest_and_says_why_not_a_faster_one():
    assert psfast.objective(*transformer()).backend == "fused"
    f = psfast.objective(*linear())
    assert f.backend == "batched"
    assert "DecoderOnlyTransformer" in f.why_not["fused"]


class Branching(nn.Module):
    """Cannot be traced: it looks at a value."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        if self.weight.sum().item() > 2:
            return x * self.weight
        return x - self.weight


def test_auto_falls_back_to_serial_with_every_reason():
    x = torch.ones(2, 3, dtype=torch.float64)
    f = psfast.objective(Branching(), F.mse_loss, x, 0 * x)
    assert f.backend == "serial" and set(f.why_not) == {"fused", "batched", "vmap", "graph"}
    optimizer = psfast.PatternSearch(f.params, radius=0.25)
    for _ in range(20):
        loss = optimizer.step(f)
    assert loss < 0.2


class Odd(nn.Module):
    """Steps that one backend or another fails on, each in its own way."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.how, self.order = how, torch.tensor([2, 0, 3, 1])
        self.double()

    def forward(self, x):
        h = self.first(x)
        if self.how == "mask":
            h[h < 0] = 0.0
        elif self.how == "sparse":
            h = torch.sparse.mm(torch.eye(len(x), dtype=x.dtype).to_sparse(), h)
        elif self.how == "generator":
            h = h + torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        elif self.how == "gradient":
            x = x.clone().requires_grad_()
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(self.first(x).square().sum(), x)
            h = h + slope
        else:
            h = h[:, self.order]
        return self.second(h)


@pytest.mark.parametrize("how", ["order", "mask", "sparse", "generator", "gradient"])
def test_what_a_backend_fails_on_another_serves(how):
    torch.manual_seed(0)
    arguments = Odd(how), F.mse_loss, *linear()[2:]
    f, brute = psfast.objective(*arguments), psfast.objective(*arguments, backend="serial")
    assert how != "order" or f.backend == "batched"
    index = torch.arange(f.flat.size)
    delta = torch.full((len(index),), 0.1, dtype=torch.float64)
    torch.testing.assert_close(f().double(), brute(), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        f.losses(index, delta).double(), brute.losses(index, delta), rtol=1e-9, atol=0
    )
    for backend, reason in f.why_not.items():
        with pytest.raises(ValueError) as error:
            psfast.objective(*arguments, backend=backend)
        assert str(error.value) == reason


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"backend": "quick"}, ValueError, "backend must be one of 'auto', 'fused'.*'quick'"),
        ({"backend": "fused"}, ValueError, "must be a DecoderOnlyTransformer, got Linear"),
        ({"workspace": 1}, TypeError, "options need an explicit backend"),
        ({"params": []}, ValueError, "at least one"),
        ({"params": "head"}, TypeError, "params must hold torch.nn.Parameters, got str"),
        ({"params": [torch.zeros(3)]}, TypeError, "must hold torch.nn.Parameters, got Tensor"),
        ({"params": [nn.Parameter(torch.zeros(3))]}, ValueError, "the model's own, got 1 others"),
        ({"seed": "a"}, TypeError, "seed must be an integer, got 'a'"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        ({"seed": 2**70}, ValueError, "seed must be one that torch.manual_seed takes"),
        ({"backend": "vmap", "space": 1}, TypeError, "unexpected keyword argument 'space'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        psfast.objective(*linear(), **arguments)


def test_arguments_of_a_wrong_type():
    model, criterion, inputs, targets = linear()
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        psfast.objective(lambda x: x, criterion, inputs, targets)
    with pytest.raises(TypeError, match="criterion must be callable, got str"):
        psfast.objective(model, "mse", inputs, targets)


@pytest.mark.parametrize("backend", WITHOUT_GPU)
@pytest.mark.parametrize(
    "index, delta, error, message",
    [
        ([0], torch.ones(1), TypeError, "index must be a tensor, got list"),
        (torch.tensor([0.5]), torch.ones(1), TypeError, "index must be int64, got torch.float32"),
        (torch.tensor([0]), torch.tensor([1]), TypeError, "delta must be floating-point"),
        (torch.tensor([[0]]), torch.ones(1, 1), ValueError, r"shape \(K,\), got \(1, 1\)"),
        (torch.tensor([0, 1]), torch.ones(1), ValueError, "same length, got 2 and 1"),
        (torch.tensor([10**6]), torch.ones(1), IndexError, "index must lie in"),
        (torch.tensor([-1]), torch.ones(1), IndexError, "index must lie in"),
    ],
)
def test_bad_blocks(backend, index, delta, error, message):
    f = psfast.objective(*transformer(), backend=backend)
    with pytest.raises(error, match=message):
        f.losses(index, delta)


@pytest.mark.parametrize("backend", WITHOUT_GPU)
@pytest.mark.parametrize("indices", [[-1], [10**6], [*range(20), -1], [*range(20), 10**6]])
def test_bad_points(backend, indices):
    f = psfast.objective(*transformer(), backend=backend)
    before = f.flat.buffer.clone(), f()
    index, delta = torch.tensor(indices), torch.ones(len(indices), dtype=torch.float64)
    for call in (f.loss_at, f.accept):
        with pytest.raises(IndexError, match=r"index must lie in \[0, \d+\)"):
            call(index, delta)
    assert torch.equal(f.flat.buffer, before[0]) and torch.equal(f(), before[1])


@pytest.mark.parametrize("backend", WITHOUT_GPU)
def test_an_empty_block(backend):
    f = psfast.objective(*transformer(), backend=backend)
    none = torch.tensor([], dtype=torch.int64)
    assert f.losses(none, none.double()).shape == (0,)


@pytest.mark.parametrize("backend", ["auto", "serial"])
def test_a_batch_that_the_model_refuses_is_refused_at_construction(backend):
    model = psfast.DecoderOnlyTransformer(d_model=8, n_layers=1, n_heads=2, d_ff=8, max_len=4)
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"T <= max_len = 4, got T = 5"):
        psfast.objective(model, psfast.MaskedCrossEntropy(), tokens, tokens, backend=backend)


@pytest.mark.parametrize("backend", WITHOUT_GPU)
def test_what_was_tried_before_leaves_no_bits_behind(backend):
    """So a run that goes on from a checkpoint, with an objective of its own, goes the same way."""
    model, *rest = transformer()
    f = psfast.objective(model, *rest, backend=backend)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, f.flat.size, (24,), generator=generator)
    delta = torch.full((24,), 0.05, dtype=torch.float64)
    for k in range(0, 24, 3):
        f.losses(index[k : k + 3], delta[k : k + 3])
        f.accept(index[k : k + 1], delta[k : k + 1])
        other, *_ = transformer()
        other.load_state_dict(model.state_dict())
        fresh = psfast.objective(other, *rest, backend=backend)
        assert torch.equal(f(), fresh())
        assert torch.equal(f.losses(index, delta), fresh.losses(index, delta))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_objective_is_not_copied(copied):
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match="Objective is neither copied nor pickled"):
        copied(psfast.objective(model, nn.MSELoss(), torch.randn(3, 2), torch.randn(3, 1)))
