"""Recorded programs: the function's bits, on other inputs and after other nodes' values."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from psfast.objectives.batched.modes import run_under
from psfast.objectives.batched.program import Unrecordable, kept, record
from psfast.objectives.batched.trace import Node


def node_with(value):
    node = Node(0, None)
    node.value = value
    return node


def function_of(node):
    def function(x, at):
        slope = kept(node.memo, "slope", lambda: torch.layer_norm(node.value, [4]))
        y = x.reshape(6, 4) @ node.value.t()
        y = y.view(2, 3, 4).view(6, 4).view(2, 12)
        a, b = y.split(6, 1)
        z = a.clone().relu_().mul_(b).add_(slope.sum())
        unused = z.exp()
        assert unused.shape == z.shape
        return [z.index_select(0, at), (b.neg(), None)]

    return function


def inputs(seed):
    torch.manual_seed(seed)
    return torch.randn(2, 3, 4), torch.tensor([1, 0])


def test_a_program_is_its_function():
    node = node_with(torch.randn(4, 4))
    function = function_of(node)
    program = record(function, list(inputs(0)), [node])
    assert program.reads == {0}
    for seed in (0, 1):
        node.value = torch.randn(4, 4)
        node.memo.clear()
        got, (negative, nothing) = program.run(*inputs(seed))
        node.memo.clear()
        expected, (its_negative, _) = function(*inputs(seed))
        assert torch.equal(got, expected) and torch.equal(negative, its_negative)
        assert nothing is None


def test_results_can_go_to_nodes():
    node, doubled = node_with(torch.randn(3)), Node(1, None)
    program = record(lambda: [node.value * 2], [], [node, doubled], store=[doubled])
    node.value = torch.ones(3)
    assert program.run() is None
    assert torch.equal(doubled.value, torch.full((3,), 2.0))


def test_lists_of_other_kinds_are_called_otherwise():
    """torch.index_put takes no None for a whole dimension; the operation does."""
    put, place = torch.ops.aten.index_put.default, torch.tensor([2, 0])

    def function(x, place):
        return put(put(x, [place], x[:2]), [None, place], x[:, :2])

    program = record(function, [torch.randn(3, 3), place], [])
    x = torch.randn(3, 3)
    assert torch.equal(program.run(x, place), function(x, place))


@pytest.mark.parametrize("how", ["a value on the host", "a tensor from elsewhere"])
def test_what_cannot_be_repeated_is_not_recorded(how):
    elsewhere = torch.randn(3)

    def function(x):
        return x * x.sum().item() if how == "a value on the host" else x + elsewhere

    with pytest.raises(Unrecordable):
        record(function, [torch.randn(3)], [])


class Interrupted(TorchDispatchMode):
    """Ctrl-C in its enter or exit, where ``with`` alone would leave it on torch's stack."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def __enter__(self):
        super().__enter__()
        if self.where == "enter":
            raise KeyboardInterrupt
        return self

    def __exit__(self, *error):
        if self.where == "exit":
            raise KeyboardInterrupt
        super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {})) - 1


@pytest.mark.parametrize("where", ["enter", "exit"])
def test_an_interrupted_mode_is_left(where):
    with pytest.raises(KeyboardInterrupt):
        run_under(Interrupted(where), lambda: torch.ones(2))
    assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))
    assert run_under(Interrupted("never"), lambda: torch.ones(2)).tolist() == [0, 0]
