"""One buffer, parameters as views of it, and every change by others noticed."""

import copy

import pytest
import torch
from torch import nn

from psfast.flat import FlatParameters, trainable


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))


def test_parameters_keep_their_values_and_become_views():
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    flat = FlatParameters(net.parameters())
    assert flat.size == 26
    for p, value, start in zip(flat.params, before, flat.offsets, strict=False):
        assert torch.equal(p, value)
        assert p.data_ptr() == flat.buffer[start:].data_ptr()
    flat.buffer.zero_()
    assert all((p == 0).all() for p in net.parameters())


def test_a_second_one_adopts_the_buffer():
    net = model()
    first, second = FlatParameters(net.parameters()), FlatParameters(net.parameters())
    assert first.buffer.data_ptr() == second.buffer.data_ptr()


def test_a_subset_is_flattened_on_its_own():
    net = model()
    FlatParameters(net.parameters())
    tail = FlatParameters(net[2].parameters())
    assert torch.equal(tail.buffer[:5], net[2].weight.detach()[0])


def test_non_contiguous_parameters_are_flattened_row_by_row():
    p = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    flat = FlatParameters([p])
    assert flat.buffer.tolist() == [0, 3, 1, 4, 2, 5]
    assert p.shape == (3, 2)


def test_tied_and_frozen_parameters():
    net = model()
    net[0].bias.requires_grad_(False)
    tied = [net[0].weight, *net.parameters()]
    assert trainable(tied) == [net[0].weight, net[2].weight, net[2].bias]


def test_changes_by_others_are_noticed_once():
    net = model()
    flat = FlatParameters(net.parameters())
    assert not flat.changed()
    net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})
    assert flat.changed() and not flat.changed()
    net.double()
    assert flat.changed() and flat.buffer.dtype == torch.float64
    net[0].weight.data = torch.zeros(5, 3, dtype=torch.float64)
    assert flat.changed() and (flat.buffer[:15] == 0).all()
    assert net[0].weight.data_ptr() == flat.buffer.data_ptr()


def test_own_additions_are_changes_to_the_others_only():
    net = model()
    first, second = FlatParameters(net.parameters()), FlatParameters(net.parameters())
    first.add(torch.tensor([0, 25]), torch.tensor([1.0, 2.0]))
    assert second.changed() and not first.changed()
    second.mark_changed()
    assert first.changed()
    second.add(torch.tensor([0]), torch.tensor([1.0]))
    assert second.changed() and first.changed()


def test_trial_writes_are_no_changes():
    flat = FlatParameters(model().parameters())
    flat.buffer[3] += 1.0
    assert not flat.changed()


def test_locate():
    flat = FlatParameters(model().parameters())
    assert flat.locate(0) == (0, 0)
    assert flat.locate(15) == (1, 0)
    assert flat.locate(25) == (3, 0)
    with pytest.raises(IndexError, match=r"\[0, 26\), got 26"):
        flat.locate(26)


def test_empty_parameters_take_no_coordinate():
    flat = FlatParameters([nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(2))])
    assert flat.size == 2 and flat.locate(0) == (1, 0)
    FlatParameters(flat.params)
    assert not flat.changed()


def test_fingerprint_sees_a_changed_bit_and_an_exchange():
    flat = FlatParameters([nn.Parameter(torch.tensor([1.0, 2.0]))])
    before = flat.fingerprint()
    flat.buffer.copy_(torch.tensor([2.0, 1.0]))
    assert flat.fingerprint() != before
    flat.buffer.copy_(torch.tensor([1.0, 2.0]))
    assert flat.fingerprint() == before


@pytest.mark.parametrize(
    "params, message",
    [
        ([], "at least one trainable parameter"),
        ([nn.Parameter(torch.empty(0))], "at least one element"),
        ([nn.Parameter(torch.ones(2, dtype=torch.cfloat))], "floating-point"),
        (
            [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).double())],
            "one dtype and one device.*float32.*float64",
        ),
    ],
)
def test_what_cannot_be_flattened(params, message):
    with pytest.raises(ValueError, match=message):
        FlatParameters(params)


def test_the_same_parameter_twice():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="distinct"):
        FlatParameters([p, p])


def test_parameters_that_share_memory_are_refused():
    a, b = nn.Linear(3, 5), nn.Linear(3, 5)
    b.weight.data = a.weight.data
    message = r"must not share memory, got numbers \[0, 2\] of shapes \[\(5, 3\), \(5, 3\)\]"
    with pytest.raises(ValueError, match=message):
        FlatParameters([*a.parameters(), *b.parameters()])
    assert a.weight.data_ptr() == b.weight.data_ptr()


def test_parameters_that_share_a_storage_but_no_element_are_fine():
    storage = torch.arange(12.0).view(4, 3)
    params = [nn.Parameter(storage[:, :1]), nn.Parameter(storage[:, 1:])]
    assert FlatParameters(params).buffer.tolist() == [0, 3, 6, 9, 1, 2, 4, 5, 7, 8, 10, 11]
    with pytest.raises(ValueError, match="share memory"):
        FlatParameters([nn.Parameter(storage[:, :2]), nn.Parameter(storage[:, 1:])])


def test_inference_mode_is_refused_by_name():
    net = model()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\)"):
        FlatParameters(net.parameters())
    with torch.inference_mode():
        made_inside = model()
    with pytest.raises(ValueError, match="make the model outside"):
        FlatParameters(made_inside.parameters())


def test_a_copied_model_is_on_its_own():
    net = model()
    flat = FlatParameters(net.parameters())
    other = copy.deepcopy(net)
    flat.buffer.zero_()
    assert any((p != 0).any() for p in other.parameters())
