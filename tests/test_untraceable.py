"""What a trace cannot stand for is refused with the reason, goes through vmap, or is put right."""

import pytest
import torch
from models import build, classes, some_points
from torch import nn

import psfast
from psfast.objectives.batched import BatchedObjective, VmapObjective
from psfast.objectives.serial import SerialModelObjective


class Reads(nn.Module):
    """Control flow, or a number, that depends on a value."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(3, 2), how

    def forward(self, x):
        h = self.linear(x)
        if self.how == "branch":
            return h if h.sum() > 0 else -h
        if self.how == "item":
            return h * h.abs().max().item()
        if self.how == "parameter's item":
            return h * self.linear.weight[0, 0].item()
        if self.how == "numpy":
            return h + torch.from_numpy(h.detach().numpy())
        if self.how == "shape":
            return h[h > 0].sum() + h
        return h * torch.bernoulli(torch.sigmoid(h))  # "draws"


@pytest.mark.parametrize("how", ["branch", "item", "parameter's item", "numpy", "shape", "draws"])
def test_what_depends_on_values_is_refused(how):
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(ValueError):
        BatchedObjective(Reads(how), nn.MSELoss(), x, y)


class ByBatch(nn.Module):
    """Control flow that depends on the batch alone: a trace would hold for one branch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        h = torch.tanh(self.first(x)) if x.sum() > 0 else torch.relu(self.first(x))
        return self.second(self.drop(h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cannot_be_traced_goes_through_vmap(dtype):
    model = ByBatch().to(dtype)
    inputs, targets = torch.randn(4, 5, dtype=dtype), classes(4)
    f = psfast.objective(model, nn.CrossEntropyLoss(), inputs, targets)
    assert f.backend == "vmap"
    assert "cannot be traced" in f.why_not["batched"]
    brute = SerialModelObjective(model, nn.CrossEntropyLoss(), inputs, targets)
    close = {"rtol": 1e-9 if dtype is torch.float64 else 1e-5, "atol": 0}
    for sign in (1, -1):  # both branches
        f.set_batch(sign * inputs, targets)
        brute.set_batch(sign * inputs, targets)
        index, delta = some_points(f, 9)
        together = f.losses(index, delta)
        torch.testing.assert_close(together.double(), brute.losses(index, delta), **close)
        assert torch.equal(f.losses(index, delta * 0), f().expand(len(index)))
        for size in (1, 5):
            blocks = zip(index.split(size), delta.split(size), strict=True)
            assert torch.equal(torch.cat([f.losses(i, d) for i, d in blocks]), together)
        f.accept(index[:1], delta[:1])
        torch.testing.assert_close(f().double(), brute(), **close)


def test_what_neither_trace_nor_vmap_can_do_is_serial():
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    f = psfast.objective(Reads("branch"), nn.MSELoss(), x, y)
    assert f.backend == "serial"
    assert "vmap fails" in f.why_not["vmap"]


@pytest.mark.parametrize("how", ["branch", "parameter's item", "numpy", "shape", "draws"])
def test_what_vmap_would_get_wrong_is_refused(how):
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(ValueError):
        VmapObjective(Reads(how), nn.MSELoss(), x, y)


def test_a_parameter_read_behind_the_modules_back_is_refused():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.alias = [self.linear.weight]

        def forward(self, x):
            return self.linear(x) + x @ self.alias[0].t()

    with pytest.raises(ValueError, match="behind the module.s back"):
        VmapObjective(Hidden(), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 2))


def test_autocast_is_refused():
    arguments = build("mlp", torch.float32)
    f = BatchedObjective(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("batched", "vmap"):
            with pytest.raises(ValueError, match="autocast is on"):
                psfast.objective(*arguments, backend=backend)
        with pytest.raises(ValueError, match="autocast is on"):
            f.losses(*some_points(f, 1))


def test_a_state_of_its_own_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(3, 2), 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x) * self.calls

    with pytest.raises(ValueError, match="differs from one evaluation to the next"):
        BatchedObjective(Counts(), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 2))


def test_custom_autograd_functions_run_forward():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return Double.apply(self.linear(x))

    arguments = Uses().double(), nn.MSELoss(), *torch.randn(2, 4, 3).double().unbind()
    arguments = *arguments[:3], arguments[3][:, :2]
    f, brute = BatchedObjective(*arguments), SerialModelObjective(*arguments)
    index, delta = some_points(f, 4)
    torch.testing.assert_close(f.losses(index, delta), brute.losses(index, delta))


class Penalised(nn.Module):
    """A criterion that reads parameters which it captured, by a way of its own."""

    def __init__(self, params, read):
        super().__init__()
        self.params, self.read = [list(params)], read

    def forward(self, out, y):
        return nn.functional.mse_loss(out, y) + 1e-6 * self.read(self.params[0])


READS = {
    "squares": lambda params: sum(p.square().sum() for p in params),
    "data": lambda params: params[0].data.sum(),
    "item": lambda params: params[-1].item(),
    "float": lambda params: float(params[-1]),
    "tolist": lambda params: sum(params[1].tolist()),
    "numpy": lambda params: float(params[1].detach().numpy().sum()),
}


@pytest.mark.parametrize("read", READS)
def test_captured_parameters_are_refused_however_little_they_weigh(read):
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    criterion = Penalised(model.parameters(), READS[read])
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    f = psfast.objective(model, criterion, x, y)
    assert f.backend == "serial"
    assert "cannot be traced" in f.why_not["batched"] and "vmap fails" in f.why_not["vmap"]


class Branches(nn.Module):
    """Branches on what it reads where torch does not see it; not on this batch."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(3, 2), how

    def forward(self, x):
        h = self.linear(x)
        if self.how == "numpy":
            high = float(h.detach().numpy().max())
        else:
            high = max(self.linear.weight.abs().reshape(-1).tolist())
        return h if high < 50 else -h


@pytest.mark.parametrize("how", ["numpy", "tolist"])
def test_branches_on_values_that_leave_torch_are_refused(how):
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    f = psfast.objective(Branches(how), nn.MSELoss(), x, y)
    assert f.backend == "serial"
    assert f"{how}()" in f.why_not["batched"]


@pytest.mark.parametrize("backend", ["serial", "batched"])
def test_what_the_forward_pass_writes_to_parameters_is_taken_back(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3)).double()
    arguments = model, nn.CrossEntropyLoss(), torch.randint(0, 10, (5, 2)), classes(5)
    f = psfast.objective(*arguments, backend=backend)
    before = f.flat.buffer.clone()
    index, delta = some_points(f, 9)
    losses = f.losses(index, delta)  # before the incumbent's
    loss = f()
    assert torch.equal(f.losses(index, delta), losses) and torch.equal(f(), loss)
    at = f.loss_at(index[:2], delta[:2])
    assert torch.equal(f.flat.buffer, before)
    f.accept(index[:2], delta[:2])
    assert torch.equal(f(), at)
    expected = before.index_add(0, index[:2], delta[:2])
    assert torch.equal(f.flat.buffer, expected)
    assert f().item() == pytest.approx(arguments[1](model(arguments[2]), arguments[3]).item())
    with pytest.raises(ValueError, match=r"writes to the parameter 'model\.0\.weight'"):
        psfast.objective(*arguments, backend="vmap")
    start, runs = f.flat.buffer.clone(), []
    for many in (1, 30):
        f.flat.buffer.copy_(start)
        f.flat.mark_changed()
        optimizer = psfast.PatternSearch(f.params, max_accepts=many)
        accepted = []
        while len(accepted) < 30:
            optimizer.step(f)
            accepted += optimizer.last_poll.accepted
        runs.append((accepted, f.flat.buffer.tolist()))
    assert runs[0] == runs[1]
