"""What a model keeps beside its parameters: buffers, and memory that goes by several names."""

import re
import threading

import pytest
import torch
from models import some_points
from torch import nn
from torch.func import functional_call

import psfast
from psfast.objectives.graph import GraphModelObjective
from psfast.objectives.serial import SerialModelObjective, SerialObjective

mse = nn.MSELoss()


def batch(*shape, out=3):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64), torch.randn(shape[0], out, dtype=torch.float64)


def of_closure(model, criterion, inputs, targets):
    params = [p for p in model.parameters() if p.requires_grad]
    return SerialObjective(lambda: criterion(model(inputs), targets), params)


def graph_steps(*arguments, **options):
    return GraphModelObjective(*arguments, capture=False, **options)


def by_copies(arguments, index, delta):
    """Each trial point's loss, by a model whose every tensor is a copy."""
    model, criterion, inputs, targets = arguments
    names, losses = [name for name, _ in model.named_parameters()], []
    for i, d in zip(index.tolist(), delta.tolist(), strict=True):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for name in names:
            if 0 <= i < state[name].numel():
                state[name].view(-1)[i] += d
            i -= state[name].numel()
        with torch.no_grad():
            losses.append(criterion(functional_call(model, state, inputs), targets))
    return torch.stack(losses)


def expect_untouched(f, model, arguments):
    """Losses as by copies, in blocks and before the incumbent's, and no trace of them."""
    index, delta = some_points(f, 4)
    expected = by_copies(arguments, index, delta)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        losses = f.losses(index, delta).double()
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
        f.loss_at(index[:1], delta[:1])
        for name, value in model.state_dict().items():
            assert torch.equal(value.to_dense(), before[name].to_dense()), name
        f()


# -- buffers ------------------------------------------------------------------------------------


class Maximum(nn.Module):
    """Divides by the largest value so far, as observers of quantization do."""

    def __init__(self, how):
        super().__init__()
        self.first, self.last, self.how = nn.Linear(4, 4), nn.Linear(4, 3), how
        self.register_buffer("largest", torch.tensor(0.0))

    def forward(self, x):
        h = self.first(x)
        largest = torch.maximum(self.largest, h.detach().abs().max())
        if self.how == "in place":
            self.largest.copy_(largest)
        elif self.how == "replaced":
            self.largest = largest
        elif largest > self.largest:  # "branch"
            self.largest.fill_(largest)
        return self.last(h / self.largest)


def cumulative():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None), nn.Tanh())


KEEPING = {
    "in place": lambda: Maximum("in place"),
    "replaced": lambda: Maximum("replaced"),
    "branch": lambda: Maximum("branch"),
    "cumulative": cumulative,
}


@pytest.mark.parametrize("make", [SerialModelObjective, graph_steps, of_closure])
@pytest.mark.parametrize("name", KEEPING)
def test_what_only_trial_points_write_to_a_buffer_is_taken_back(name, make):
    torch.manual_seed(0)
    model = KEEPING[name]().double()
    arguments = model, mse, *batch(5, 4)
    with torch.no_grad():
        model(arguments[2])  # what the incumbent would write is there
    f = make(*arguments)
    f()
    expect_untouched(f, model, arguments)


@pytest.mark.parametrize("make", [SerialModelObjective, graph_steps])
@pytest.mark.parametrize("name", KEEPING)
def test_a_buffer_that_others_write_is_followed_by_every_call(name, make):
    torch.manual_seed(0)
    model = KEEPING[name]().double()
    arguments = model, mse, *batch(5, 4)
    f = make(*arguments)
    for write in (lambda: model(3 * arguments[2]), lambda: next(model.buffers()).add_(1)):
        f.loss_at(*some_points(f, 1))
        with torch.no_grad():
            write()
        expect_untouched(f, model, arguments)


class Convolution(nn.Module):
    """Of a graph, whose adjacency is a sparse buffer."""

    def __init__(self, layout):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer(
            "adjacency", torch.eye(5, dtype=torch.float64).to_sparse(layout=layout)
        )

    def forward(self, x):
        return self.adjacency @ self.linear(x)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("make", [psfast.objective, of_closure])
@pytest.mark.filterwarnings("ignore:.*Sparse CSR tensor support is in beta.*")
def test_sparse_buffers(make, layout):
    torch.manual_seed(0)
    model = Convolution(layout).double()
    arguments = model, mse, *batch(5, 4)
    f = make(*arguments)
    f()
    expect_untouched(f, model, arguments)


class Resized(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("work", torch.zeros(2, 3))

    def forward(self, x):
        self.work.resize_(len(x), 3).copy_(self.linear(x))
        return self.work * 2


def test_buffers_that_a_forward_pass_resizes():
    model = Resized().double()
    f = SerialModelObjective(model, mse, *batch(5, 4))
    expect_untouched(f, model, (model, mse, f.inputs, f.targets))
    assert model.work.shape == (2, 3)


class Table(nn.Module):
    """A buffer that is made for the first batch, and again for one of another length."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("table", None)

    def forward(self, x):
        if self.table is None or len(self.table) != len(x):
            self.table = torch.arange(3 * len(x)).view(-1, 3) / 10
        return self.linear(x) * self.table


def test_a_buffer_that_the_first_forward_pass_makes():
    torch.manual_seed(0)
    model = Table().double()
    f = psfast.objective(model, mse, *batch(5, 4))
    assert f.backend == "batched"
    for B in (5, 7, 5):
        f.set_batch(*batch(B, 4))
        expect_untouched(f, model, (model, mse, f.inputs, f.targets))


def test_buffers_of_a_model_in_another_thread_are_left_alone():
    model, other, x = nn.Linear(4, 3).double(), nn.BatchNorm1d(4).double(), batch(5, 4)[0]

    def closure():
        thread = threading.Thread(target=other, args=(x,))
        thread.start()
        thread.join()
        return model(x).sum()

    f = SerialObjective(closure, list(model.parameters()))
    f()
    f.losses(torch.arange(2), torch.ones(2))
    assert other.num_batches_tracked == 3


class Momentum(nn.Module):
    """A teacher that follows in the forward pass, as MoCo's key encoder does."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)

    @torch.no_grad()
    def follow(self):
        for p, q in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            p.lerp_(q, 0.1)

    def forward(self, x):
        self.follow()
        return self.student(x) - 0.5 * self.teacher(x)


@pytest.mark.parametrize("backend", ["serial", "closure", "graph", "batched"])
def test_what_the_forward_pass_writes_to_frozen_parameters_is_taken_back(backend):
    torch.manual_seed(0)
    model = Momentum().double()
    arguments = model, mse, *batch(5, 4)
    make = {"closure": of_closure, "graph": graph_steps}.get(backend)
    f = make(*arguments) if make else psfast.objective(*arguments, backend=backend)
    if backend != "batched":
        f()  # the first evaluation finds them
    before = [p.clone() for p in model.teacher.parameters()]
    optimizer = psfast.PatternSearch(f.params)
    for _ in range(5):
        expect_untouched(f, model, arguments)
        optimizer.step(f)
    assert all(map(torch.equal, before, model.teacher.parameters()))


# -- memory that goes by several names ------------------------------------------------------------


class Overlapping(nn.Module):
    """What it writes to one buffer is read from another."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))
        self.register_buffer("part", self.mean[1:3])

    def forward(self, x):
        self.mean[:4].add_(x.mean(0))
        return self.last(torch.tanh(self.first(x)) + self.part.sum())


class OwnBatch(nn.Module):
    """Works on the batch in place, where it is the model's own buffer, too."""

    def __init__(self, x):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("x", x)

    def forward(self, x):
        self.x.mul_(1.5)
        return self.linear(x)


def overlapping():
    return Overlapping().double(), mse, *batch(5, 4)


def own_parameter():
    model = nn.Linear(4, 4).double()
    return model, mse, model.weight, batch(4, 4, out=4)[1]


def own_batch():
    inputs, targets = batch(5, 4)
    return OwnBatch(inputs).double(), mse, inputs, targets


@pytest.mark.parametrize("backend", ["auto", "batched", "vmap", "graph"])
@pytest.mark.parametrize("make", [overlapping, own_batch, own_parameter])
def test_buffers_that_share_memory(make, backend):
    """Such a model is served as it is, or not at all."""
    torch.manual_seed(0)
    arguments = make()
    exact = SerialModelObjective(*arguments)
    index, delta = some_points(exact, 4)
    try:
        if backend == "graph":
            f = graph_steps(*arguments)
        else:
            f = psfast.objective(*arguments, backend=backend)
    except ValueError as error:
        why = {
            "batched": "the model's? ",
            "vmap": "behind the module's back",
            "graph": "shares memory",
        }
        assert re.search(why[backend], str(error))
        return
    torch.testing.assert_close(f().double(), exact(), rtol=1e-9, atol=0)
    losses = f.losses(index, delta).double()
    torch.testing.assert_close(losses, exact.losses(index, delta), rtol=1e-9, atol=0)
