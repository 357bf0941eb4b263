"""What others do to the model and the batch of an objective: followed, or an error."""

import pytest
import torch
from torch import nn

import psfast
from psfast.objectives import BACKENDS
from psfast.objectives.graph import GraphModelObjective

WITHOUT_GPU = [name for name in BACKENDS if name != "graph"]


def transformer():
    torch.manual_seed(0)
    model = psfast.DecoderOnlyTransformer(11, 8, 2, 2, 12, max_len=7, dropout=0.3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    inputs, targets = torch.randint(0, 11, (3, 5)), torch.randint(0, 11, (3, 5))
    return model, psfast.MaskedCrossEntropy(ignore_index=0), inputs, targets


def build(backend, *arguments, **options):
    if backend == "graph":
        return GraphModelObjective(*arguments, capture=False, **options)
    return psfast.objective(*arguments, backend=backend, **options)


def searched(model):
    """All but the parameters of one norm and one linear layer."""
    frozen = {*model.final_norm.parameters(), *model.blocks[0].attention.parameters()}
    return [p for p in model.parameters() if p not in frozen]


def expect_agreement(f, arguments, params):
    """With the serial objective, built now, of everything that ``f`` offers."""
    exact = psfast.objective(*arguments, params=params, backend="serial")
    index = torch.arange(0, f.flat.size, 7)
    delta = torch.full((len(index),), 0.1, dtype=torch.float64)
    close = {"rtol": 1e-9, "atol": 1e-13}
    torch.testing.assert_close(f().double(), exact(), **close)
    torch.testing.assert_close(f.losses(index, delta).double(), exact.losses(index, delta), **close)
    torch.testing.assert_close(
        f.losses(index[:3], delta[:3]).double(), exact.losses(index[:3], delta[:3]), **close
    )
    torch.testing.assert_close(
        f.loss_at(index, delta).double(), exact.loss_at(index, delta), **close
    )


@torch.no_grad()
def write_frozen(model, inputs, targets):
    model.final_norm.weight.mul_(1.5)


def replace_frozen(model, inputs, targets):
    bias = model.blocks[0].attention.out.bias
    model.blocks[0].attention.out.bias = nn.Parameter(torch.randn_like(bias))


def replace_module(model, inputs, targets):
    model.final_norm = nn.LayerNorm(8).double()


def stop_training(model, inputs, targets):
    model.eval()


def write_inputs(model, inputs, targets):
    inputs.copy_(inputs.flip(0))


def write_targets(model, inputs, targets):
    targets.copy_(targets.flip(1))


CHANGES = [
    write_frozen, replace_frozen, replace_module, stop_training, write_inputs, write_targets,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_is_followed(backend, change):
    arguments = transformer()
    params = searched(arguments[0])
    f = build(backend, *arguments, params=params)
    index = torch.tensor([3])
    f(), f.losses(index, torch.ones(1))
    before = f()
    change(arguments[0], *arguments[2:])
    expect_agreement(f, arguments, params)
    assert f() != before
    f.accept(index, torch.tensor([0.2]))
    expect_agreement(f, arguments, params)


@pytest.mark.parametrize("backend", WITHOUT_GPU)
def test_two_optimizers_in_turn_see_each_other(backend):
    arguments = transformer()
    model = arguments[0]
    halves = [list(model.blocks.parameters()), list(model.head.parameters())]
    turns = [
        (psfast.PatternSearch(p, radius=0.3), build(backend, *arguments, params=p)) for p in halves
    ]
    for _ in range(4):
        for optimizer, f in turns:
            loss = optimizer.step(f)
    expect_agreement(turns[0][1], arguments, halves[0])
    assert loss.item() == pytest.approx(turns[0][1]().item(), rel=1e-12)


def assign_state(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace_parameter(model):
    model.head.bias = nn.Parameter(model.head.bias.detach() + 1)


@pytest.mark.parametrize("replace", [assign_state, replace_parameter])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_searched_parameter_that_was_replaced_is_an_error(backend, replace):
    arguments = transformer()
    f = build(backend, *arguments)
    f()
    replace(arguments[0])
    for call in (f, lambda: f.losses(torch.tensor([0]), torch.ones(1)), f):
        with pytest.raises(ValueError, match="not the model's any more.*build another objective"):
            call()


class Remembers(nn.Module):
    """A buffer that its forward pass replaces, as an average does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x):
        h = self.linear(x)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        return h - self.average


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("backend", ["batched", "vmap", "graph", "serial"])
def test_buffers_are_followed(backend, in_place):
    torch.manual_seed(0)
    model, criterion = Remembers().double(), nn.MSELoss()
    inputs, targets = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    f = build(backend, model, criterion, inputs, targets)
    f()
    for _ in range(2):
        if in_place:
            model.average.add_(1)
        else:
            with torch.no_grad():
                model(inputs)
        expect_agreement(f, (model, criterion, inputs, targets), None)


class Captures(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.scale = [scale]

    def forward(self, x):
        return self.linear(x) * self.scale[0]


def test_a_tensor_from_elsewhere_is_read_as_it_is():
    torch.manual_seed(0)
    scale = torch.ones(3).double()
    arguments = Captures(scale).double(), nn.MSELoss(), *torch.randn(2, 5, 4).double().unbind()
    arguments = *arguments[:3], arguments[3][:, :3]
    f = build("batched", *arguments)
    f()
    scale.mul_(2)
    expect_agreement(f, arguments, None)


@pytest.mark.parametrize("backend", WITHOUT_GPU)
def test_a_batch_that_is_refused_leaves_the_one_before(backend):
    arguments = transformer()
    inputs, targets = arguments[2:]
    f = build(backend, *arguments, seed=3)
    before = f()
    for bad in (inputs + 11, torch.zeros(3, 8, dtype=torch.int64)):  # tokens, length
        try:
            f.set_batch(bad, targets, seed=4)
        except Exception as error:
            assert backend != "serial", error
            assert f() == before
            assert f.losses(torch.tensor([0]), torch.zeros(1))[0] == before
        else:
            assert backend == "serial"
            with pytest.raises(Exception, match="tokens"):
                f()
    f.set_batch(inputs, targets, seed=3)
    assert f() == before
