"""What torch does otherwise on a GPU, as far as a CPU can do the same."""

import pytest
import torch
import torch.nn.functional as F
from models import some_points
from torch import nn

import psfast
from psfast.objectives import surroundings
from psfast.objectives.batched import BatchedObjective
from psfast.objectives.batched.incumbent import _draws_nothing
from psfast.objectives.batched.trace import _FUSED_CELLS, Node, Ref, aten
from psfast.objectives.graph import GraphObjective
from psfast.objectives.serial import SerialModelObjective, SerialObjective


@pytest.mark.parametrize("kind", [SerialObjective, GraphObjective])
def test_autocast_keeps_no_weight_of_before(kind):
    torch.manual_seed(0)
    model, x = nn.Linear(8, 1), torch.randn(4, 8)
    options = {"capture": False} if kind is GraphObjective else {}
    with torch.autocast("cpu", torch.bfloat16):
        objective = kind(
            lambda: model(x).float().square().mean(), list(model.parameters()), **options
        )
        losses = objective.losses(torch.arange(9), torch.ones(9))
        assert torch.is_autocast_cache_enabled()
    assert len(set(losses.tolist())) == 9


@pytest.mark.parametrize("kind", [SerialObjective, GraphObjective])
def test_parameters_that_move_are_refused(kind):
    layer, x = nn.Linear(3, 1), torch.ones(2, 3)

    def closure():
        for p in layer.parameters():  # as flatten_parameters() does where there is cuDNN
            p.data = p.data.clone()
        return layer(x).sum()

    with pytest.raises(ValueError, match=r"moves its parameters .* flatten_parameters\(\)"):
        options = {"capture": False} if kind is GraphObjective else {}
        kind(closure, list(layer.parameters()), **options)()


class NativeDropout(nn.Module):
    """As F.dropout is on a GPU."""

    def forward(self, x):
        return aten.native_dropout(x, 0.3, True)[0] if self.training else x


@pytest.mark.parametrize("training", [True, False])
def test_native_dropout_is_batched(training):
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), NativeDropout(), nn.Tanh(), nn.Linear(8, 7), NativeDropout()
    parts = nn.Sequential(*layers).double().train(training), nn.MSELoss()
    batch = torch.randn(5, 6).double(), torch.randn(5, 7).double()
    batched = BatchedObjective(*parts, *batch, seed=4)
    serial = SerialModelObjective(*parts, *batch, seed=4)
    block = some_points(batched, 30)
    torch.testing.assert_close(batched.losses(*block), serial.losses(*block))
    again = torch.randn(5, 6).double(), torch.randn(5, 7).double()
    for objective in (batched, serial):
        objective.set_batch(*again, seed=9)
    torch.testing.assert_close(batched.losses(*block), serial.losses(*block))


def test_only_dropout_of_attention_is_random():
    flash = aten._scaled_dot_product_flash_attention.default
    efficient = aten._scaled_dot_product_efficient_attention.default
    q, k, v, mask = map(Ref, range(4))
    assert _draws_nothing(Node(4, flash, (q, k, v)))
    assert _draws_nothing(Node(4, flash, (q, k, v, 0.0, True)))
    assert not _draws_nothing(Node(4, flash, (q, k, v, 0.1)))
    assert _draws_nothing(Node(4, efficient, (q, k, v, mask, False)))
    assert _draws_nothing(Node(4, efficient, (q, k, v, mask, False, 0.0, True)))
    assert not _draws_nothing(Node(4, efficient, (q, k, v, None, False, 0.2)))
    assert not _draws_nothing(Node(4, efficient, (q, k, v, None, False), {"dropout_p": 0.2}))
    assert not _draws_nothing(Node(1, aten.native_dropout.default, (q, 0.0, True)))


@pytest.mark.parametrize("bias", [True, False])
def test_fused_cells_are_the_cells(bias):
    torch.manual_seed(0)
    x, h, c = torch.randn(3, 5), torch.randn(3, 4), torch.randn(3, 4)

    def gates(cell):
        biases = (cell.bias_ih, cell.bias_hh) if bias else ()
        return F.linear(x, cell.weight_ih), F.linear(h, cell.weight_hh), biases

    gru, lstm = nn.GRUCell(5, 4, bias=bias), nn.LSTMCell(5, 4, bias=bias)
    own, other, biases = gates(gru)
    found = _FUSED_CELLS[aten._thnn_fused_gru_cell.default](own, other, h, *biases)
    torch.testing.assert_close(found[0], gru(x, h))
    own, other, biases = gates(lstm)
    found = _FUSED_CELLS[aten._thnn_fused_lstm_cell.default](own, other, c, *biases)
    torch.testing.assert_close(found[:2], lstm(x, (h, c)))


def test_rounded_products_are_warned_of_once(recwarn):
    surroundings._say_once.cache_clear()
    try:
        for precision in ("highest", "high", "high"):
            torch.set_float32_matmul_precision(precision)
            with surroundings.full_float32(torch.device("cuda")):
                pass
    finally:
        torch.set_float32_matmul_precision("highest")
    (warning,) = recwarn
    assert "rounds the factors of every product" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize("backend", ["serial", "vmap", "batched"])
def test_a_point_of_another_dtype_is_taken(backend):
    model = nn.Linear(3, 2)
    objective = psfast.objective(
        model, nn.MSELoss(), torch.ones(4, 3), torch.ones(4, 2), backend=backend
    )
    index, delta = torch.tensor([1, 4]), torch.tensor([0.5, -0.25], dtype=torch.float64)
    promised = objective.loss_at(index, delta)
    objective.accept(index, delta)
    torch.testing.assert_close(objective(), promised)
