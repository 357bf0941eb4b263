"""The batched objective against brute force, and what every objective promises."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import is_tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import psfast
from psfast.models import DecoderOnlyTransformer, MaskedCrossEntropy
from psfast.objectives.batched import BatchedObjective, VmapObjective
from psfast.objectives.serial import SerialModelObjective


class First(nn.Module):
    """The output sequence of a recurrent layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Tied(nn.Module):
    """The token embedding is the head's weight too."""

    def __init__(self):
        super().__init__()
        self.body = DecoderOnlyTransformer(11, 8, 1, 2, 16, max_len=6, dropout=0.1)
        self.body.head.weight = self.body.token_embedding.weight

    def forward(self, tokens):
        return self.body(tokens)


class UsedTwice(nn.Module):
    """One matrix as weight, as its own transpose, and by itself; in-place ops on views."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.scale = nn.Parameter(torch.randn(()))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(x @ self.weight)
        h = h @ self.weight.t() + self.weight.mean(0)
        h[:, 1:3] += 0.5
        h[:, 0].mul_(self.scale)
        return self.out(torch.relu_(h))


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 1, 0, 1]))
        self.frozen = nn.Linear(6, 3).requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return self.frozen(self.norm(nn.functional.gelu(self.linear(x))) * self.mask)


def images():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2, stride=2, groups=1),
        nn.Conv2d(3, 6, 1, groups=3, bias=False),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(6, 3),
    )


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 1)


def tokens(B, T, V):
    return torch.randint(0, V, (B, T))


def some_ignored(B, T, V):
    targets = tokens(B, T, V)
    targets[:, : T // 2] = 100
    return targets


def classes(B=3, C=3):
    return torch.randint(0, C, (B,))


CASES = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.SiLU(), nn.Linear(6, 3)),
        nn.CrossEntropyLoss(),
        torch.randn(4, 5),
        classes(4),
    ),
    "one row": lambda: (
        nn.Sequential(nn.Linear(5, 7), nn.Softplus(), nn.Linear(7, 3)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        torch.randn(1, 5),
        classes(1),
    ),
    "cnn": lambda: (images(), nn.CrossEntropyLoss(), torch.randn(3, 2, 8, 8), classes()),
    "conv1d": lambda: (
        nn.Sequential(nn.Conv1d(2, 3, 3), nn.ELU(), nn.Conv1d(3, 2, 2, dilation=2), nn.Flatten()),
        nn.MSELoss(),
        torch.randn(2, 2, 9),
        torch.randn(2, 10),
    ),
    "gru": lambda: (
        First(nn.GRU(3, 5, num_layers=2, dropout=0.3, batch_first=True)),
        nn.MSELoss(),
        torch.randn(2, 4, 3),
        torch.randn(2, 4, 5),
    ),
    "lstm": lambda: (
        First(nn.LSTM(3, 4, bidirectional=True)),
        nn.SmoothL1Loss(),
        torch.randn(3, 2, 3),
        torch.randn(3, 2, 8),
    ),
    "encoder": lambda: (encoder(), nn.MSELoss(), torch.randn(2, 3, 8), torch.randn(2, 3, 8)),
    "decoder": lambda: (
        DecoderOnlyTransformer(11, 8, 2, 2, 16, max_len=7, dropout=0.2),
        MaskedCrossEntropy(),
        tokens(2, 6, 11),
        some_ignored(2, 6, 11),
    ),
    "tied": lambda: (Tied(), MaskedCrossEntropy(), tokens(2, 5, 11), some_ignored(2, 5, 11)),
    "bag": lambda: (
        nn.Sequential(nn.EmbeddingBag(10, 4, mode="mean"), nn.Linear(4, 3)),
        nn.CrossEntropyLoss(),
        tokens(3, 5, 10),
        classes(),
    ),
    "used twice": lambda: (UsedTwice(), nn.L1Loss(), torch.randn(3, 5), torch.randn(3, 3)),
    "buffers": lambda: (Buffers(), nn.CrossEntropyLoss(), torch.randn(4, 4), classes(4)),
}


def build(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model, criterion, inputs, targets = CASES[name]()
    inputs, targets = (x.to(dtype) if x.is_floating_point() else x for x in (inputs, targets))
    model = model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # no zeros and ones
    return model, criterion, inputs, targets


def some_points(f, per_tensor, seed=0):
    """A few coordinates of every tensor, each with its step."""
    generator = torch.Generator().manual_seed(seed)
    index = [
        torch.randint(start, stop, (per_tensor,), generator=generator)
        for start, stop in zip(f.flat.offsets, f.flat.offsets[1:], strict=False)
    ]
    index = torch.cat(index)
    index = index[torch.randperm(len(index), generator=generator)]
    delta = 0.3 * torch.randn(len(index), generator=generator, dtype=torch.float64)
    return index, delta.to(f.flat.buffer.dtype)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_brute_force(name):
    arguments = build(name)
    f, brute = BatchedObjective(*arguments), SerialModelObjective(*arguments)
    index, delta = some_points(f, 5)
    torch.testing.assert_close(f(), brute(), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        f.losses(index, delta), brute.losses(index, delta), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_written(name):
    arguments = build(name)
    model = arguments[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    f = BatchedObjective(*arguments)
    index, delta = some_points(f, 2)
    f(), f.losses(index, delta), f.loss_at(index[:1], delta[:1])
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_a_loss_does_not_depend_on_its_block(name, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of bits that depend on the block, too
        f = BatchedObjective(*build(name, dtype))
        index, delta = some_points(f, 7)
        together = f.losses(index, delta)
        for size in (1, 7, 40):
            blocks = zip(index.split(size), delta.split(size), strict=True)
            parts = [f.losses(i, d) for i, d in blocks]
            assert torch.equal(torch.cat(parts), together)
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(1))
        assert torch.equal(f.losses(index[order], delta[order]), together[order])
        repeated = index.repeat(30), delta.repeat(30)
        assert torch.equal(f.losses(*repeated), together.repeat(30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_a_trial_point_that_changes_nothing_has_the_incumbents_loss(name, dtype):
    f = BatchedObjective(*build(name, dtype))
    index, delta = some_points(f, 3)
    assert torch.equal(f.losses(index, delta * 0), f().expand(len(index)))


def test_what_the_batch_never_reads_is_an_exact_no_op():
    model, criterion, inputs, targets = build("decoder", torch.float32)
    inputs.clamp_(max=5)
    f = BatchedObjective(model, criterion, inputs, targets)
    names = [name for name, _ in model.named_parameters()]
    embedding = f.flat.offsets[names.index("token_embedding.weight")]
    position = f.flat.offsets[names.index("position_embedding")]
    index = torch.tensor([embedding + 6 * 8 + 1, position + 6 * 8, embedding + inputs[0, 0] * 8])
    losses = f.losses(index, torch.ones(3))
    assert torch.equal(losses[:2], f().expand(2))
    assert losses[2] != f()


def test_dead_units_are_exact_no_ops():
    model, criterion, inputs, targets = build("mlp", torch.float32)
    with torch.no_grad():
        model[0].bias[2] = -100.0
    f = BatchedObjective(model, criterion, inputs, targets)
    index = torch.arange(2 * 5, 3 * 5)
    assert torch.equal(f.losses(index, torch.full((5,), 0.1)), f().expand(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "decoder", "gru"])
def test_a_loss_does_not_depend_on_how_often_its_tensor_was_polled(name, dtype):
    """At first every few trial points are looked at, whether they change anything."""
    f = BatchedObjective(*build(name, dtype))
    index, delta = some_points(f, 3)
    expected = f.losses(index, delta)
    plans = f._evaluator.plans
    for _ in range(40):
        alone = torch.cat([f.losses(index[k : k + 1], delta[k : k + 1]) for k in range(len(index))])
        assert torch.equal(alone, expected)
        none = f.losses(index[:1], torch.zeros(1, dtype=dtype))  # also where nobody looks
        assert torch.equal(none[0], f())
    assert any("few" in key and False in key for plan in plans for key in plan.programs)


def test_trial_points_of_rows_that_are_seldom_read_are_looked_at():
    model, criterion, inputs, targets = build("decoder")
    inputs.clamp_(max=5)
    f = BatchedObjective(model, criterion, inputs, targets)
    number = [name for name, _ in model.named_parameters()].index("token_embedding.weight")
    unread = f.flat.offsets[number] + 6 * 8
    for i in range(unread, unread + 30):
        point = torch.tensor([i]), torch.tensor([0.1], dtype=torch.float64)
        assert torch.equal(f.losses(*point)[0], f())
    assert f._evaluator.plans[number].idle > 0.5


@pytest.mark.parametrize("name", ["decoder", "gru", "cnn", "used twice", "tied"])
def test_accept_refreshes_the_incumbent(name):
    arguments = build(name)
    f, brute = BatchedObjective(*arguments), SerialModelObjective(*arguments)
    index, delta = some_points(f, 3)
    for start in (0, 5, 11):
        which = torch.unique(index[start : start + 3])
        steps = delta[: len(which)]
        at = f.loss_at(which, steps)
        torch.testing.assert_close(at, brute.loss_at(which, steps), rtol=1e-9, atol=1e-12)
        f.accept(which, steps)
        assert torch.equal(f(), at)
        assert torch.equal(f(), BatchedObjective(*arguments)())
        torch.testing.assert_close(
            f.losses(index, delta), brute.losses(index, delta), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("name", CASES)
def test_what_is_brought_up_to_date_has_the_bits_of_what_is_new(name):
    """Also where it runs as programs, after some uses: a resumed run goes on bit for bit."""
    arguments = build(name, torch.float32)
    f = BatchedObjective(*arguments)
    index, delta = some_points(f, 4)
    for k in range(len(index)):
        f.losses(index[k : k + 1], delta[k : k + 1])  # brings up to date only what it reads
        f.accept(index[k : k + 1], 0.1 * delta[k : k + 1])
        if k % 8 == 7:
            fresh = BatchedObjective(*arguments)
            assert torch.equal(f.losses(index[:3], delta[:3]), fresh.losses(index[:3], delta[:3]))
            assert torch.equal(f.losses(index, delta), fresh.losses(index, delta))
            assert torch.equal(f(), fresh())


def test_a_block_of_a_few_may_stop_at_an_improvement():
    f = BatchedObjective(*build("mlp"))
    index, delta = some_points(f, 2)
    losses = f.losses(index, delta)
    bound = losses[3].item() + 1e-9
    first = (losses < bound).nonzero()[0].item()
    assert torch.equal(f.losses(index, delta, stop_below=bound), losses[: first + 1])
    assert torch.equal(f.losses(index, delta, stop_below=losses.min().item()), losses)


def test_changes_by_others_are_seen():
    arguments = build("cnn")
    f, brute = BatchedObjective(*arguments), SerialModelObjective(*arguments)
    f()
    model = arguments[0]
    state = {key: value * 1.1 for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    torch.testing.assert_close(f(), brute(), rtol=1e-9, atol=0)
    model.float()
    f.inputs, brute.inputs = f.inputs.float(), brute.inputs.float()
    torch.testing.assert_close(f().double(), brute().double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["decoder", "cnn", "gru"])
def test_another_batch(name):
    model, criterion, inputs, targets = build(name)
    f = BatchedObjective(model, criterion, inputs, targets)
    graph = f._evaluator.graph
    _, _, inputs, targets = build(name, seed=1)
    if name == "decoder":
        targets[0, -1] = 100  # fewer supervised positions than the traced batch has
    for seed in (None, 5):
        f.set_batch(inputs, targets, seed=seed)
        brute = SerialModelObjective(model, criterion, inputs, targets, seed=seed or 0)
        index, delta = some_points(f, 3)
        torch.testing.assert_close(f(), brute(), rtol=1e-9, atol=0)
        torch.testing.assert_close(
            f.losses(index, delta), brute.losses(index, delta), rtol=1e-9, atol=1e-12
        )
    assert f._evaluator.graph is graph
    half = slice(0, len(inputs) - 1)
    f.set_batch(inputs[half], targets[half])
    brute = SerialModelObjective(model, criterion, inputs[half], targets[half], seed=5)
    torch.testing.assert_close(f(), brute(), rtol=1e-9, atol=0)
    model.eval()
    f.set_batch(inputs[half], targets[half])
    torch.testing.assert_close(f(), brute(), rtol=1e-9, atol=0)


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


@pytest.mark.parametrize("name", ["mlp", "decoder", "gru", "cnn"])
def test_bits_hold_for_another_number_of_threads(name):
    f = BatchedObjective(*build(name, torch.float32))
    index, delta = some_points(f, 7)
    f.losses(index, delta)
    threads = torch.get_num_threads()
    try:
        for count in (3, 2):
            torch.set_num_threads(count)
            together = f.losses(index, delta)
            parts = [f.losses(i, d) for i, d in zip(index.split(3), delta.split(3), strict=True)]
            assert torch.equal(torch.cat(parts), together)
            assert torch.equal(f.losses(index, delta * 0), f().expand(len(index)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Tanh])
def test_changed_columns_have_the_bits_of_whole_values(activation):
    """On CPU these ops compute the last few elements by other code than the rest."""
    model = nn.Sequential(nn.Linear(8, 64), activation(), nn.Linear(64, 64), nn.Linear(64, 3))
    f = BatchedObjective(model, nn.CrossEntropyLoss(), torch.randn(3, 8), torch.tensor([0, 1, 2]))
    index, delta = torch.randint(576, (601,)), torch.randn(601)
    together = f.losses(index, delta)
    for size in (33, 97):
        parts = [f.losses(i, d) for i, d in zip(index.split(size), delta.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), together)


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


def test_out_of_memory_halves_the_chunk_and_says_so_once(monkeypatch):
    f = BatchedObjective(*build("mlp"))
    index, delta = some_points(f, 64)
    expected = f.losses(index, delta)
    compute = f._evaluator.losses

    def limited(plan, env, K, check=False):
        if K > 16:
            raise torch.OutOfMemoryError("not that many")
        return compute(plan, env, K, check)

    monkeypatch.setattr(f._evaluator, "losses", limited)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        losses = f.losses(index, delta)
    assert len(caught) == 1
    assert torch.equal(losses, expected)


def test_the_workspace_bounds_the_chunk():
    arguments = build("decoder")
    f = BatchedObjective(*arguments)
    index, delta = some_points(f, 20)
    expected = f.losses(index, delta)
    small = BatchedObjective(*arguments, workspace=100_000)
    assert torch.equal(small.losses(index, delta), expected)
    for plan in small._evaluator.plans:
        alive, _ = plan.footprint(small._evaluator.graph.nodes)
        assert small._most(plan) * alive <= 100_000 or small._most(plan) == 2


class LiveBytes(TorchDispatchMode):
    """peak: the most bytes that results of operations within were alive at once."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[int, int]] = {}  # address -> (views, bytes)
        self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        known = {
            a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if is_tensor(a)
        }
        for tensor in filter(is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address in known and address not in self.live:
                continue  # a view of what was there before
            views, _ = self.live.get(address, (0, 0))
            self.live[address] = views + 1, storage.nbytes()
            weakref.finalize(tensor, self.end, address)
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out

    def end(self, address):
        views, size = self.live.pop(address, (0, 0))
        if views > 1:
            self.live[address] = views - 1, size


@pytest.mark.parametrize("name", ["mlp", "decoder", "gru", "cnn"])
def test_memory_stays_within_the_workspace(name):
    f = BatchedObjective(*build(name), workspace=200_000)
    index, delta = some_points(f, 1000)
    expected = f.losses(index, delta)
    gc.collect()
    gc.disable()  # memory must not wait for the collector
    try:
        with LiveBytes() as memory:
            assert torch.equal(f.losses(index, delta), expected)
    finally:
        gc.enable()
    assert sum(size for _, size in memory.live.values()) < 1000
    own = 8 * (8 * len(index) + 2 * f.flat.size)  # the block's own index, order, steps, losses
    assert 0 < memory.peak <= 200_000 + own


def test_bad_arguments():
    arguments = build("mlp")
    with pytest.raises(ValueError, match="workspace must be"):
        BatchedObjective(*arguments, workspace=0)
    f = BatchedObjective(*arguments)
    for index in (f.flat.size, -1):
        for K in (1, 100):
            with pytest.raises(IndexError, match="index must lie in"):
                f.losses(torch.tensor([index] * K), torch.ones(K))
    with pytest.raises(ValueError, match="must be a scalar"):
        BatchedObjective(arguments[0], lambda out, y: out, *arguments[2:])


@pytest.mark.parametrize("acceptance", ["first", "best"])
@pytest.mark.parametrize("name", ["mlp", "decoder", "gru"])
def test_the_search_takes_the_serial_steps(name, acceptance):
    taken = []
    for backend, block_size in (("serial", 8), ("batched", 8), ("batched", None)):
        if block_size is None and acceptance == "best":
            continue  # the best of another block is another step
        arguments = build(name)
        f = psfast.objective(*arguments, backend=backend, seed=2)
        optimizer = psfast.PatternSearch(
            f.params, radius=0.2, acceptance=acceptance, block_size=block_size, seed=1
        )
        taken.append([])
        for _ in range(6):
            optimizer.step(f)
            taken[-1] += optimizer.last_poll.accepted
    assert taken[0]
    assert all(steps == taken[0] for steps in taken)


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


def test_a_batch_without_supervision_has_no_loss():
    model, criterion, inputs, targets = build("tied")
    none = torch.full_like(targets, 100)
    index, delta = torch.tensor([0, 5]), torch.ones(2)
    assert BatchedObjective(model, criterion, inputs, none)().isnan()
    f = BatchedObjective(model, criterion, inputs, targets)
    before = f()
    f.set_batch(inputs, none)
    assert f().isnan() and f.losses(index, delta).isnan().all()
    f.set_batch(inputs, targets)
    assert f() == before


@pytest.mark.parametrize("backend", ["batched", "vmap"])
def test_an_incumbent_without_a_loss_is_served(backend):
    model, criterion, inputs, targets = build("mlp")
    with torch.no_grad():
        model[4].bias[1] = torch.nan
    f = psfast.objective(model, criterion, inputs, targets, backend=backend)
    index = torch.arange(f.flat.size)
    assert f().isnan() and f.losses(index, torch.ones(len(index))).isnan().all()
    with torch.no_grad():
        model[4].bias[1] = 0.0
    brute = SerialModelObjective(model, criterion, inputs, targets)
    torch.testing.assert_close(f(), brute(), rtol=1e-9, atol=0)


def test_no_notes_of_torch_are_printed(capfd):
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3))
    f = BatchedObjective(model, nn.CrossEntropyLoss(), torch.randint(0, 10, (5, 2)), classes(5))
    f.losses(*some_points(f, 9))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "decoder", "gru"])
def test_the_loss_after_an_accept_depends_on_the_parameters_alone(name, dtype):
    """Not on what was tried before: a run that goes on from a checkpoint knows nothing of that."""
    f, fresh = (BatchedObjective(*build(name, dtype)) for _ in range(2))
    index, delta = some_points(f, 6)
    for k in range(40):
        place = slice(k % len(index), k % len(index) + 1)
        f.losses(index[place], delta[place])
        f.accept(index[place], delta[place])
        fresh.accept(index[place], delta[place])
        assert torch.equal(f(), fresh())
        assert torch.equal(f.losses(index, delta), fresh.losses(index, delta))
