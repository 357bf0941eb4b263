"""Models with operations that are rare: each was once evaluated wrongly, or not at all."""

import functools
import random
import re
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from models import some_points
from torch import nn

import psfast
from psfast.objectives.batched import BatchedObjective, sparse
from psfast.objectives.batched.values import Column
from psfast.objectives.graph import GraphModelObjective
from psfast.objectives.serial import SerialModelObjective

mse = nn.MSELoss()


class Between(nn.Module):
    """Two linear layers, and a function of the hidden values between."""

    def __init__(self, function, width=5, out=3):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(width, 6), nn.Linear(6, out), function

    def forward(self, x):
        return self.last(self.function(torch.tanh(self.first(x))))


class Added(Between):
    def forward(self, x):
        h = torch.tanh(self.first(x))
        return torch.add(self.last(h), h, alpha=2.5)


class Copied(Between):
    def forward(self, x):
        h = self.last(torch.tanh(self.first(x)))
        doubled = torch.empty_like(h).copy_(h)
        doubled.mul_(2)
        return doubled + h.exp()


class GroupedQueries(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (n, 2)).transpose(1, 2)
            for layer, n in ((self.q, 4), (self.k, 2), (self.v, 2))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2)


class PartOfAParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return self.w


def bag():
    return nn.Sequential(nn.EmbeddingBag(7, 4, mode="sum"), nn.Linear(4, 3))


class ReadTwice(nn.Module):
    """A view that is worked on in place by a rule, beside another reader of the same values."""

    def __init__(self):
        super().__init__()
        self.conv, self.last, self.mean = nn.Conv2d(1, 3, 3), nn.Linear(48, 4), nn.Linear(3, 4)
        with torch.no_grad():
            self.conv.bias += 8  # so that relu changes nothing where it is checked

    def forward(self, x):
        h = self.conv(x)
        return self.last(h.flatten(1).relu()) + self.mean(h.mean((2, 3)))


def every_other(h):
    h = h.clone()
    h[..., ::2] *= 3
    return h


class OneBias(nn.Module):
    """A bias of one number for all outputs."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(1))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def spectral(width):
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(width, 2))
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), layer).eval()


MODELS = {
    "spectral norm": (lambda: spectral(33), (2, 33), (2, 2)),
    "spectral norm of few": (lambda: spectral(3), (17, 3), (17, 2)),
    "one output": (lambda: Between(torch.relu, width=9, out=1), (3, 9), (3, 1)),
    "PReLU": (lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.PReLU(6)), (3, 5), (3, 6)),
    "read twice": (ReadTwice, (2, 1, 6, 6), (2, 4)),
    "view_copy": (
        lambda: Between(lambda h: torch.view_copy(h.sin(), [24]).relu().view(4, 6) + h),
        (4, 5),
        (4, 3),
    ),
    "every other": (lambda: Between(every_other), (4, 5), (4, 3)),
    "a bias for all": (OneBias, (4, 5), (4, 6)),
    "alpha": (lambda: Added(None, out=6), (4, 5), (4, 6)),
    "copy_": (lambda: Copied(None, out=6), (4, 5), (4, 6)),
    "squeeze of many": (lambda: Between(lambda h: h.squeeze(0)), (8, 5), (8, 3)),
    "squeeze of four": (lambda: Between(lambda h: h.squeeze(0)), (4, 5), (4, 3)),
    "squeeze of one": (lambda: Between(lambda h: h.squeeze(0)), (1, 5), (3,)),
    "grouped queries": (GroupedQueries, (3, 4, 8), (3, 4, 8)),
    "powers": (lambda: Between(lambda h: h.abs() ** 1.7), (3, 5), (3, 3)),
    "powers of each": (lambda: Between(lambda h: h.abs() ** h.flip(-1)), (3, 5), (3, 3)),
    "powers of a number": (lambda: Between(lambda h: 1.3**h), (3, 5), (3, 3)),
    "exp2": (lambda: Between(torch.exp2), (3, 5), (3, 3)),
    "sinh": (lambda: Between(torch.sinh), (3, 5), (3, 3)),
    "cosh": (lambda: Between(torch.cosh), (3, 5), (3, 3)),
    "atanh": (lambda: Between(lambda h: torch.atanh(h / 2)), (3, 5), (3, 3)),
    "atan2": (lambda: Between(lambda h: torch.atan2(h, h.flip(-1))), (3, 5), (3, 3)),
    "celu": (lambda: Between(F.celu), (3, 5), (3, 3)),
    "logit": (lambda: Between(lambda h: torch.logit(h.t().sigmoid()).t()), (3, 5), (3, 3)),
    "ldexp": (lambda: Between(lambda h: torch.ldexp(h, 3 * h)), (3, 5), (3, 3)),
    "gammainc": (
        lambda: Between(lambda h: torch.special.gammainc(h.abs(), h.flip(-1).abs())),
        (3, 5),
        (3, 3),
    ),
    "hypot": (lambda: Between(lambda h: torch.hypot(h, h[:, :1])), (3, 5), (3, 3)),
    "logaddexp": (lambda: Between(lambda h: torch.logaddexp(h, h.flip(-1))), (3, 5), (3, 3)),
    "logaddexp2": (lambda: Between(lambda h: torch.logaddexp2(h, h.flip(-1))), (3, 5), (3, 3)),
}


def built(name, dtype):
    make, x, y = MODELS[name]
    torch.manual_seed(0)
    return make().to(dtype), mse, torch.randn(x, dtype=dtype), torch.randn(y, dtype=dtype)


def check(f, brute):
    index, delta = some_points(f, 5)
    index, delta = index.repeat(2), torch.cat([delta, 30 * delta])
    torch.testing.assert_close(f().double(), brute().double(), rtol=1e-9, atol=0)
    for size in (1, 5, len(index)):
        parts = zip(index.split(size), delta.split(size), strict=True)
        losses = torch.cat([f.losses(i, d) for i, d in parts])
        torch.testing.assert_close(losses, brute.losses(index, delta), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_brute_force(name):
    arguments = built(name, torch.float64)
    check(BatchedObjective(*arguments), SerialModelObjective(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_a_loss_does_not_depend_on_its_block(name, dtype):
    f = BatchedObjective(*built(name, dtype))
    index, delta = some_points(f, 20)
    together = f.losses(index, delta)
    for size in (1, 5, 7, 9, 11, 40):
        parts = zip(index.split(size), delta.split(size), strict=True)
        assert torch.equal(torch.cat([f.losses(i, d) for i, d in parts]), together)


def test_a_last_parameter_without_elements():
    model = nn.Linear(5, 3, dtype=torch.float64)
    model.register_parameter("unused", nn.Parameter(torch.empty(0, dtype=torch.float64)))
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    index, delta = torch.arange(18), torch.ones(18)
    expected = SerialModelObjective(model, mse, x, y).losses(index, delta)
    torch.testing.assert_close(BatchedObjective(model, mse, x, y).losses(index, delta), expected)


def test_sums_of_bags():
    torch.manual_seed(0)
    arguments = bag().double(), mse, torch.randint(0, 7, (4, 3)), torch.randn(4, 3).double()
    check(BatchedObjective(*arguments), SerialModelObjective(*arguments))


def test_a_loss_that_is_an_element_of_a_parameter():
    arguments = PartOfAParameter(), lambda outputs, targets: outputs[2], None, None
    f, index = BatchedObjective(*arguments), torch.arange(5)
    delta = torch.ones(5)
    expected = SerialModelObjective(*arguments).losses(index, delta)
    torch.testing.assert_close(f.losses(index, delta).double(), expected)


class UnreadDraws(nn.Module):
    """Masks that nobody reads still decide what the later ones are."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(5, 6), nn.Linear(6, 3), nn.Dropout(0.4)

    def forward(self, x):
        self.drop(x)
        h = self.drop(torch.tanh(self.first(x)))
        self.drop(h)
        return self.drop(self.last(h))


def test_dropout_that_nobody_reads():
    torch.manual_seed(0)
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    arguments = UnreadDraws().double(), mse, x, y
    f, brute = (kind(*arguments, seed=3) for kind in (BatchedObjective, SerialModelObjective))
    check(f, brute)
    for objective in (f, brute):
        objective.set_batch(x, y, seed=5)
    check(f, brute)


class Unpooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 2, padding=1)

    def forward(self, x):
        pooled, places = F.max_pool2d(self.conv(x), 2, return_indices=True)
        return F.max_unpool2d(pooled, places, 2)


class Statistics(nn.Module):
    """Its loss has a share in the running statistics that it updates."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.linear(x)) + 1e-4 * self.norm.running_var.sum()


class Padded(nn.Module):
    """torch's fused encoder layers, which only evaluation has, write zeros where this masks."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 10, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.eval()

    def forward(self, x):
        mask = torch.arange(4) >= torch.tensor([[3], [2], [4]])
        return self.encoder(x, src_key_padding_mask=mask)


class Itself(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.w


@pytest.mark.parametrize(
    ("make", "shape", "why_not"),
    [
        (Unpooled, (1, 1, 3, 3), "another result of aten.max_pool2d_with_indices"),
        (Statistics, (4, 3), "running statistics of a batch norm that trains"),
        (Padded, (3, 4, 8), "depends on which kernels torch takes"),
        (Itself, (), "the loss is a parameter itself"),
    ],
)
def test_what_batched_cannot_tell_it_leaves_to_others(make, shape, why_not):
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    model(x)  # nn.TransformerEncoder warns of its fused layers once
    criterion = (lambda o, y: o) if make is Itself else (lambda o, y: o.square().mean())
    f = psfast.objective(model, criterion, x, x)
    assert why_not in f.why_not["batched"]
    brute = SerialModelObjective(model, criterion, x, x)
    index, delta = some_points(f, 3)
    torch.testing.assert_close(
        f.losses(index, 10 * delta).double(), brute.losses(index, 10 * delta)
    )


def test_a_rule_that_goes_wrong_at_trial_points_alone_is_found(monkeypatch):
    right = sparse._pointwise

    def wrong(node, *args, **kwargs):
        out = right(node, *args, **kwargs)
        return Column(out.base, out.dim, out.at, out.new + 0.1) if type(out) is Column else out

    arguments = Between(lambda h: h), mse, torch.randn(3, 5), torch.randn(3, 3)
    assert psfast.objective(*arguments).backend == "batched"
    monkeypatch.setattr(sparse, "_pointwise", wrong)
    reason = r"a trial point of model.first.weight would have the loss [0-9.]+, the model's is"
    assert re.match(reason, psfast.objective(*arguments).why_not["batched"])


# -- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored_first", [0, 1])
def test_batches_with_other_numbers_of_ignored_targets(smoothing, ignored_first):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def batch(ignored):
        targets = torch.tensor([0, 1, 2, 1, 0, 2])
        targets[:ignored] = -100
        return torch.randn(6, 5, dtype=torch.float64), targets

    inputs, targets = batch(ignored_first)
    f = BatchedObjective(model, criterion, inputs, targets)
    brute = SerialModelObjective(model, criterion, inputs, targets)
    for step in range(16):
        new = batch((ignored_first + step // 2) % 7)
        f.set_batch(*new)
        brute.set_batch(*new)
        index, delta = some_points(f, 4, seed=step)
        for size in (1, len(index)):
            parts = zip(index.split(size), delta.split(size), strict=True)
            losses = torch.cat([f.losses(i, d) for i, d in parts])
            torch.testing.assert_close(
                losses, brute.losses(index, delta), rtol=1e-9, atol=1e-12, equal_nan=True
            )
            assert all(f.losses(i, 0 * i.double()).isclose(f(), 0, 0, True) for i in index.split(1))
        f.accept(index[:1], delta[:1])


@pytest.mark.parametrize("ignored", [0, 2])
def test_weights_of_classes_beside_ignored_targets(ignored):
    torch.manual_seed(0)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    targets = torch.tensor([0, 1, 2, 1])
    targets[:ignored] = -100

    def criterion(outputs, targets):
        return F.cross_entropy(outputs, targets, weight=weights)

    arguments = model, criterion, torch.randn(4, 5, dtype=torch.float64), targets
    check(BatchedObjective(*arguments), SerialModelObjective(*arguments))


def per_kept_target(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="sum") / targets[targets != -100].numel()


def per_place(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="sum") / len((targets >= 0).nonzero())


def of_parts(outputs, targets):
    first, second = torch.tensor_split(outputs, targets[:1].clamp(min=0) + 1)
    return first.sum() + second.square().sum()


@pytest.mark.parametrize("criterion", [per_kept_target, per_place, of_parts])
def test_lengths_that_the_batch_decides(criterion):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    targets = torch.tensor([[0, 1, 2, -100], [2, 1, -100, -100], [1, 0, 1, 2]])
    inputs = torch.randn(3, 4, 5, dtype=torch.float64)
    f = psfast.objective(model, criterion, inputs[0], targets[0])
    brute = SerialModelObjective(model, criterion, inputs[0], targets[0])
    for k in (1, 2, 0, 1):
        for objective in (f, brute):
            objective.set_batch(inputs[k], targets[k])
        check(f, brute)


def test_a_count_of_parameters_is_refused():
    class Counts(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.1 * len(self.weight[self.weight.abs() > 0.2])

    f = psfast.objective(Counts(5, 3), mse, torch.randn(4, 5), torch.randn(4, 3))
    assert "result depends on the parameters" in f.why_not["batched"]


@pytest.mark.parametrize("shape", [(4, 3), (1, 4, 3)])
def test_a_weight_of_the_logits_shape_beside_ignored_targets(shape):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.shift = nn.Linear(5, 3), nn.Parameter(torch.randn(shape))

        def forward(self, x):
            return (self.linear(x) + self.shift).view(-1, 3)

    torch.manual_seed(0)
    targets = torch.tensor([0, -100, 2, 1])
    arguments = Shifted().double(), nn.CrossEntropyLoss(), torch.randn(4, 5).double(), targets
    check(BatchedObjective(*arguments), SerialModelObjective(*arguments))


def move_by_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(1.1 * vector, model.parameters())


@pytest.mark.parametrize("move", [move_by_vector, nn.Module.double])
@torch.no_grad()
def test_parameters_that_have_moved_before_another_batch(move):
    torch.manual_seed(0)
    model = Between(torch.tanh)
    f = BatchedObjective(model, mse, torch.randn(4, 5), torch.randn(4, 3))
    f.losses(*some_points(f, 2))
    move(model)
    dtype = model.first.weight.dtype
    batch = torch.randn(7, 5, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    f.set_batch(*batch)
    brute = SerialModelObjective(model, mse, *batch)
    index, delta = some_points(f, 4)
    torch.testing.assert_close(
        f.losses(index, delta).double(), brute.losses(index, delta), rtol=1e-5, atol=1e-6
    )


def test_inputs_that_are_the_targets_and_then_are_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    f, brute = (kind(model, mse, x, x) for kind in (BatchedObjective, SerialModelObjective))
    index, delta = some_points(f, 4)
    for _ in range(3):  # until it is recorded
        f.losses(index, delta)
        f.accept(index[:1], delta[:1])
        f()
    noisy = x + torch.randn_like(x)
    for objective in (f, brute):
        objective.set_batch(noisy, x)
    check(f, brute)


class Encoding(UserDict):
    """As tokenizers give it: no dict for torch's pytree."""

    def to(self, device):
        return Encoding({name: value.to(device) for name, value in self.items()})


class Holder:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize(
    ("hold", "read"),
    [
        (lambda x: Encoding(x=x), lambda batch: batch["x"]),
        (lambda x: x.numpy(), torch.from_numpy),
        (Holder, lambda batch: batch.x),
    ],
)
def test_batches_that_torch_does_not_see_into(hold, read):
    torch.manual_seed(0)
    model = Between(torch.tanh).double()
    model.register_forward_pre_hook(lambda module, inputs: (read(inputs[0]),))
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    batch = hold(x)
    f, brute = (kind(model, mse, batch, y) for kind in (BatchedObjective, SerialModelObjective))
    for _ in range(3):
        batch = hold(torch.randn_like(x))
        f.set_batch(batch, y)
        brute.set_batch(batch, y)
        check(f, brute)
    if isinstance(batch, Holder):  # the same object, with another tensor in it
        batch.x = x
        f.set_batch(batch, y)
        check(f, brute)


def test_fit_takes_batches_that_torch_does_not_see_into():
    model = Between(torch.tanh)
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0]["x"],))
    loader = [(Encoding(x=torch.randn(4, 5)), torch.randn(4, 3)) for _ in range(2)]
    optimizer = psfast.PatternSearch(model.parameters(), max_evaluations=20)
    history = psfast.fit(model, mse, loader, optimizer, max_steps=4, progress=False)
    assert len(history.polls) == 4


# -- serial -----------------------------------------------------------------------------------


class Counted(nn.Module):
    """Writes to a buffer of a module that it does not call."""

    def __init__(self):
        super().__init__()
        self.linear, self.store = nn.Linear(5, 3), nn.Module()
        self.store.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.store.calls += 1
        return self.linear(x)


def normed():
    return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    "kind", [SerialModelObjective, functools.partial(GraphModelObjective, capture=False)]
)
@pytest.mark.parametrize(
    "make", [Counted, lambda: torch.jit.script(normed()), lambda: normed().eval()]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_the_serial_loop_leaves_buffers_that_modules_write_unseen(make, kind):
    model = make()
    f = kind(model, mse, torch.randn(4, 5), torch.randn(4, 3))
    model.train()
    before = [buffer.clone() for buffer in model.buffers()]
    f.losses(torch.arange(5), torch.ones(5))
    f.loss_at(torch.arange(5), torch.ones(5))
    f()
    assert all(map(torch.equal, model.buffers(), before))


@pytest.mark.filterwarnings("ignore:.*torch.compile.*global hooks.*")
def test_a_closure_of_a_compiled_model():
    torch.manual_seed(0)
    model, x, y = normed(), torch.randn(4, 5), torch.randn(4, 3)
    compiled = torch.compile(model, backend="eager")
    optimizer = psfast.PatternSearch(model.parameters(), max_evaluations=20)
    before = [buffer.clone() for buffer in model.buffers()]
    loss = optimizer.step(lambda: mse(compiled(x), y))
    assert loss < optimizer.last_poll.loss_before
    assert all(map(torch.equal, model.buffers(), before))


@pytest.mark.parametrize("part", ["model", "module", "criterion"])
def test_compiled_parts_are_traced_as_they_were_written(part):
    torch.manual_seed(0)
    model, criterion = normed().double(), mse
    arguments = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    brute = SerialModelObjective(model, criterion, *arguments)
    if part == "model":
        model = torch.compile(model, backend="eager")
    elif part == "module":
        model[0].compile(backend="eager")
    else:
        criterion = torch.compile(criterion, backend="eager")
    check(BatchedObjective(model, criterion, *arguments), brute)


class Draws(nn.Linear):
    def forward(self, x):
        return super().forward(x) * random.random()


def test_the_serial_loop_warns_of_a_loss_that_differs():
    arguments = torch.randn(4, 5), torch.randn(4, 3)
    with pytest.warns(UserWarning, match="differs from one evaluation to the next") as warned:
        assert psfast.objective(Draws(5, 3), mse, *arguments).backend == "serial"
    assert warned[0].filename == __file__


def test_an_accept_after_the_parameters_have_moved():
    model = nn.Linear(5, 3)
    f = SerialModelObjective(model, mse, torch.randn(4, 5), torch.randn(4, 3))
    model.weight.data = model.weight.detach().clone()
    before = model.weight.detach().clone()
    f.accept(torch.tensor([0]), torch.tensor([1.0]))
    assert model.weight[0, 0] == before[0, 0] + 1
    assert f().item() == pytest.approx(mse(model(f.inputs), f.targets).item())


def test_fused_follows_a_conversion_of_the_model():
    model = psfast.DecoderOnlyTransformer(11, 8, 1, 2, 16, max_len=6, dropout=0.0)
    tokens = torch.randint(0, 11, (2, 6))
    criterion = psfast.MaskedCrossEntropy()
    f = psfast.objective(model, criterion, tokens, tokens, backend="fused")
    for convert in (model.double, model.float):
        convert()
        assert f().item() == pytest.approx(criterion(model(tokens), tokens).item(), rel=1e-6)
