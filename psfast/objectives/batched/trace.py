"""The composite loss ``criterion(model(inputs), targets)`` as a functional graph of aten ops.

The graph is what the model did once, on one batch: a list of ``Node`` in the order they ran,
each naming the nodes it reads. In-place operations are gone, random draws are nodes of their
own (so a mask is drawn once and then held), and control flow that reads a value is refused.
"""

import operator
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from psfast.objectives.base import CompositeLoss, call_with, named_state, tensors_of
from psfast.objectives.batched.interrupts import Uninterrupted
from psfast.objectives.batched.modes import NoReadValues, run_under, shares_memory, spans
from psfast.objectives.watch import Watch
from psfast.random_state import seeded

aten = torch.ops.aten

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # what rounding may do to a loss

# Of their first argument these read the shape and the dtype, never the values.
SHAPE_ONLY = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.bernoulli.p,
}


class Ref(int):
    """A place in ``node.args`` that holds the value of the node of this number."""


class Node:
    """One op of the graph.

    args, kwargs: as the op takes them, a ``Ref`` in the place of another node's value
    inputs: the numbers of the nodes it reads
    places: which args are a ``Ref``; None if one lies deeper
    shape: of the value where it is one tensor that the trace has seen
    dynamic: the numbers of the nodes whose values decide the shape of its value
    is_view: whether the value may share memory with the first input's
    depends: the numbers (in ``Graph.params``) of the trained tensors its value depends on
    weight: made of parameters and buffers alone, so it has no batch dimension
    value: the incumbent's value, a tensor or a tuple of them; None until it is computed
    memo: what rules keep about the incumbent; emptied when ``value`` changes
    batch_memo: what rules keep about values that no parameter changes; emptied by another batch
    shapes: what rules keep about the shapes; never emptied
    """

    __slots__ = (
        "args", "batch_memo", "depends", "dynamic", "inputs", "is_view", "kwargs", "memo",
        "number", "op", "places", "shape", "shapes", "value", "weight",
    )  # fmt: skip

    def __init__(self, number: int, op, args: tuple = (), kwargs: dict | None = None):
        self.number = number
        self.op = op
        self.args = args
        self.kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, self.kwargs))
        self.inputs = list(dict.fromkeys(int(a) for a in leaves if isinstance(a, Ref)))
        nested = any(isinstance(a, (list, tuple)) and _holds_ref(a) for a in args)
        simple = not nested and not _holds_ref(tuple(self.kwargs.values()))
        refs = [place for place, a in enumerate(args) if isinstance(a, Ref)]
        self.places: list[int] | None = refs if simple else None
        self.is_view = _is_view(op)
        self.dynamic: list[int] = []
        self.shape: tuple[int, ...] | None = None
        self.depends: frozenset[int] = frozenset()
        self.weight = False
        self.value = None
        self.memo: dict = {}
        self.batch_memo: dict = {}
        self.shapes: dict = {}

    def __repr__(self) -> str:
        return f"Node({self.number}, {self.op}, {self.args}, {self.kwargs})"


def _holds_ref(value) -> bool:
    return any(isinstance(leaf, Ref) for leaf in pytree.tree_leaves(value))


# The result may share memory with the first argument, though the schema does not say so.
_MAYBE_VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.clone.default,
    aten.contiguous.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default,
    aten.view_copy.default, aten._reshape_copy.default,
}  # fmt: skip


def _is_view(op) -> bool:
    if op is None or op is operator.getitem or op in _MAYBE_VIEWS:
        return op is not None
    return any(r.alias_info is not None for r in op._schema.returns)


class Graph:
    """nodes: in running order; ``loss`` is the number of the last one.

    state: number of a node -> the parameter or buffer that it stands for
    data: the numbers of the nodes of the tensors among inputs and targets, in tree order
    rows: the number of the node of the rows that the loss counts, if only those are computed
    masked: (number of the node of the targets, the ignored one) of a cross-entropy on all rows
    constants: the tensors from outside of module and batch that the loss reads
    fixed_batch: the graph holds for this one batch only (an output's shape depends on values)
    """

    def __init__(
        self,
        nodes,
        loss: int,
        state: dict[int, Tensor],
        data: list[int],
        constants: Sequence[Tensor] = (),
    ):
        self.nodes: list[Node] = nodes
        self.loss = loss
        self.state = state
        self.data = data
        self.constants = constants
        self.rows: int | None = None
        self.masked: tuple[int, int] | None = None
        self.fixed_batch = any(n.dynamic for n in nodes)

    def mark(self, params: list[nn.Parameter]) -> None:
        """Fill in ``depends`` and ``weight`` of every node, for these trained tensors."""
        order = {p: number for number, p in enumerate(params)}
        data = set(self.data)
        for node in self.nodes:
            if node.number in self.state:
                tensor = self.state[node.number]
                node.depends = frozenset([order[tensor]] if tensor in order else ())
                node.weight = True
            elif node.number not in data and node.op is not None:
                read = [self.nodes[i] for i in node.inputs]
                if node.op not in SHAPE_ONLY:
                    node.depends = frozenset().union(*(n.depends for n in read))
                node.weight = bool(read) and all(n.weight or not n.inputs for n in read)
                node.weight &= not any(n.number in data for n in read)
                node.weight &= any(n.weight for n in read)


def plain_loss(loss: CompositeLoss, inputs, targets, seed: int) -> Tensor:
    """The loss as the model computes it by plain kernels, with the dropout masks of ``seed``.

    What the forward pass writes to parameters and buffers is lost: it is given copies.
    """
    with plain_kernels():
        return _loss(loss, inputs, targets, seed)


def _loss(loss: CompositeLoss, inputs, targets, seed: int) -> Tensor:
    device = next((p.device for p in loss.parameters()), torch.device("cpu"))
    with Uninterrupted(), seeded(seed, device):
        return loss.on_copies(inputs, targets)


def check_kernels(loss: CompositeLoss, inputs, targets, seed: int) -> None:
    """Raise ValueError if the model has another loss by plain kernels than by its usual ones.

    torch's fused encoder layers do: they write zeros to padded positions.
    """
    with torch.no_grad():
        usual, plain = (f(loss, inputs, targets, seed) for f in (_loss, plain_loss))
    if usual.shape == plain.shape and not reproduces(plain, usual):
        raise ValueError(
            f"the model's loss depends on which kernels torch takes: {usual.item():.9g} by its "
            f"fused ones, {plain.item():.9g} without"
        )


def reproduces(losses: Tensor, expected: Tensor) -> bool:
    """Whether these losses, of other code, are the model's own but for rounding."""
    bound = _TOLERANCE.get(expected.dtype, 0.05)
    return torch.allclose(losses, expected, rtol=bound, atol=bound * 1e-3, equal_nan=True)


def signature(watch: Watch, inputs, targets) -> tuple:
    """What is found out holds for: the batch's structure, the modules, and which of them train."""
    leaves, spec = pytree.tree_flatten((inputs, targets))
    modules, state = watch.parts()
    state = [(name, *_kind(t)) for name, t in state.items()]
    return spec, list(map(_kind, leaves)), state, modules, [m.training for m in modules]


def _kind(x) -> tuple:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    if x is None or isinstance(x, (bool, int, float, complex, str, bytes)):
        return type(x), x
    return (object(),)  # nobody can tell what it holds: never the same again


def refuse_autocast(device: torch.device) -> None:
    """Raise ValueError where autocast is on: it would cast inside our own operations too."""
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "autocast is on: build and use the objective outside of it, or cast the model itself"
        )


@contextmanager
def plain_kernels():
    """No monolithic kernels (fused encoder layers, oneDNN and cuDNN recurrences), no compiler."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        fast_encoder = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_encoder)
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        # Not cudnn.flags: it also reads TF32's old switch, which fails where the new ones differ.
        stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
        torch.backends.cudnn.enabled = False
        yield


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One product over all rows, whatever the layout of ``x``."""
    rows = x.reshape(-1, x.shape[-1])
    out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    return out.view(*x.shape[:-1], weight.shape[0])


def _gru_cell(from_input, from_hidden, hidden, input_bias=None, hidden_bias=None):
    """The GPU's op for a step of a GRU (its work space, of no use here, is left out)."""
    reset_i, update_i, new_i = _plus(from_input, input_bias).chunk(3, 1)
    reset_h, update_h, new_h = _plus(from_hidden, hidden_bias).chunk(3, 1)
    reset, update = (reset_i + reset_h).sigmoid(), (update_i + update_h).sigmoid()
    new = (new_i + reset * new_h).tanh()
    return (hidden - new) * update + new, hidden


def _lstm_cell(from_input, from_hidden, cell, input_bias=None, hidden_bias=None):
    """The same of an LSTM."""
    gates = _plus(from_input, input_bias) + _plus(from_hidden, hidden_bias)
    keep, forget, new, out = gates.chunk(4, 1)
    cell = forget.sigmoid() * cell + keep.sigmoid() * new.tanh()
    return out.sigmoid() * cell.tanh(), cell, cell


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


_FUSED_CELLS = {
    aten._thnn_fused_gru_cell.default: _gru_cell,
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
}


def trace(loss: CompositeLoss, inputs, targets, device) -> Graph:
    """The graph of the loss (of ``inputs`` and ``targets``) on this batch.

    Raises ValueError, with the reason, for what cannot be traced.
    """
    try:
        with plain_kernels(), Uninterrupted():
            # What the first forward pass makes and keeps, a table in a buffer say, is there then.
            _loss(loss, inputs, targets, 0)
            return _traced(loss, inputs, targets, device)
    except Exception as error:  # whatever a user's forward raises, tracing is not for it
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"the model cannot be traced: {type(error).__name__}: {reason[0] if reason else ''}"
        ) from error


def _traced(loss: CompositeLoss, inputs, targets, device) -> Graph:
    state = named_state(loss)
    live = list(state.values())
    batch, rebuild = tensors_of(inputs, targets)

    def run(state, tensors):
        return call_with(loss, state, *rebuild(tensors))

    def example():
        copies = {name: t.detach().clone() for name, t in state.items()}
        return copies, [tensor.detach() for tensor in batch]

    def both_passes() -> torch.fx.GraphModule:
        """The first takes composite ops apart, which may write in place to views; the second
        sees every write and turns it into a new value."""
        flat, tree = pytree.tree_flatten(example())
        table = {aten.linear.default: _linear, **_FUSED_CELLS}
        first = make_fx(lambda *a: run(*pytree.tree_unflatten(a, tree)), table)(*flat)
        functional = functionalize(first, remove="mutations")
        return make_fx(functional)(*pytree.tree_leaves(example()))

    # What torch.compile has compiled runs as it was written.
    eager = torch._dynamo.config.patch(error_on_nested_fx_trace=False)
    with eager, seeded(0, device):
        traced = run_under(NoReadValues(live), both_passes)
    _fold_expanded_products(traced.graph)
    _separate_dropout_masks(traced.graph)
    _refuse_read_statistics(traced.graph)
    return _read(traced, live, len(batch))


def _fold_expanded_products(graph: torch.fx.Graph) -> None:
    """A product of every item of a batch with one and the same matrix, as one product.

    Recurrent layers (on a transposed batch) expand their weight instead; a change of one
    element would then be a change in every copy.
    """
    keep = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
    for bmm in graph.find_nodes(op="call_function", target=aten.bmm.default):
        items, source = bmm.args
        while source.target in keep and _shape(source) == _shape(source.args[0]):
            source = source.args[0]
        if source.target is not aten.expand.default or len(_shape(source.args[0])) != 2:
            continue
        weight, (n, rows, inner) = source.args[0], _shape(items)
        with graph.inserting_before(bmm):
            flat = graph.call_function(aten.reshape.default, (items, [n * rows, inner]))
            product = graph.call_function(aten.mm.default, (flat, weight))
            out = graph.call_function(aten.view.default, (product, [n, rows, _shape(weight)[1]]))
        bmm.replace_all_uses_with(out)


def _separate_dropout_masks(graph: torch.fx.Graph) -> None:
    """``native_dropout``, as dropout is on a GPU, times a mask that no value changes.

    Drawn by the same op of ones, it is the mask that the model itself draws.
    """
    for dropout in graph.find_nodes(op="call_function", target=aten.native_dropout.default):
        x, p, train = dropout.args
        read = [result for result in dropout.users if result.users]
        if not train or any(result.args[1] != 0 for result in read):
            continue
        with graph.inserting_before(dropout):
            ones = graph.call_function(aten.ones_like.default, (x,))
            drawn = graph.call_function(aten.native_dropout.default, (ones, p, True))
            mask = graph.call_function(operator.getitem, (drawn, 0))
            out = graph.call_function(aten.mul.Tensor, (x, mask))
        for result in read:
            result.replace_all_uses_with(out)
        for drawn_before in (*dropout.users, dropout):  # or it would draw beside the other one
            graph.erase_node(drawn_before)


def _refuse_read_statistics(graph: torch.fx.Graph) -> None:
    """Raise ValueError if running statistics are read that the same forward pass has updated.

    The ops that update them do not say so, and the trace would read the old ones.
    """
    norms = [n for n in graph.nodes if "batch_norm" in str(n.target) and n.op == "call_function"]
    norms = {norm for norm in norms if any(a is True for a in norm.args)}  # in training
    for norm in norms:
        for statistics in norm.args[3:5]:
            if isinstance(statistics, torch.fx.Node) and not norms.issuperset(statistics.users):
                raise ValueError("it reads running statistics of a batch norm that trains")


def _shape(node: torch.fx.Node) -> list[int]:
    return list(node.meta["tensor_meta"].shape) if "tensor_meta" in node.meta else []


def _read(traced: torch.fx.GraphModule, state: list[Tensor], n_data: int) -> Graph:
    """Our nodes from torch's, without what the loss does not need.

    Raises ValueError, with the reason, for what is no graph of our kind.
    """
    traced.graph.eliminate_dead_code(is_impure_node=_stays)
    nodes: list[Node] = []
    number: dict[torch.fx.Node, int] = {}
    constants: list[Tensor] = []
    hidden = spans(state)
    loss = None
    for fx in traced.graph.nodes:
        if fx.op == "output":
            (loss,) = pytree.tree_leaves(fx.args)
            continue
        if fx.target is aten.empty_like.default:
            _name_the_shape(fx)
        if fx.target is aten.slice_scatter.default and len(fx.args) > 4:
            _name_the_end(fx)
        args, kwargs = torch.fx.node.map_arg((fx.args, fx.kwargs), lambda n: Ref(number[n]))
        if fx.op == "call_function":
            _check(fx.target)
            node = Node(len(nodes), fx.target, args, kwargs)
            node.dynamic = [number[n] for n in _deciding(fx)]
        else:
            node = Node(len(nodes), None)
            if fx.op == "get_attr":
                node.value = getattr(traced, fx.target).detach()
                constants.append(getattr(traced, fx.target))
                if shares_memory(node.value, hidden):
                    raise ValueError(
                        "it reads a parameter or buffer behind the module's back, not as the "
                        "module's own"
                    )
        meta = fx.meta.get("tensor_meta")
        node.shape = tuple(meta.shape) if hasattr(meta, "shape") else None
        number[fx] = node.number
        nodes.append(node)
    if not isinstance(loss, torch.fx.Node):
        raise ValueError("the loss does not depend on the model: the trace made it a constant")
    if loss.op == "placeholder":
        raise ValueError("the loss is a parameter itself, or a part of the batch")
    placeholders = [number[fx] for fx in traced.graph.nodes if fx.op == "placeholder"]
    n_state = len(state)
    if len(placeholders) != n_state + n_data:
        raise ValueError(
            f"the trace has {len(placeholders)} inputs, expected {n_state} parameters and buffers "
            f"and {n_data} tensors of the batch"
        )
    return Graph(
        nodes,
        number[loss],
        dict(zip(placeholders[:n_state], state, strict=True)),
        placeholders[n_state:],
        constants,
    )


def _stays(fx: torch.fx.Node) -> bool:
    """Whether the node is needed without a reader.

    A draw decides what the later ones give; and of what decides a shape, Python may have taken
    up the length.
    """
    is_random = torch.Tag.nondeterministic_seeded in getattr(fx.target, "tags", ())
    return is_random or bool(_deciding(fx)) or fx.op in ("placeholder", "output")


def _name_the_shape(fx: torch.fx.Node) -> None:
    """``empty_like``, which dropout begins with, reads a value only for its layout: say it."""
    meta = fx.meta["tensor_meta"]
    fx.target = aten.empty_strided.default
    fx.args = (list(meta.shape), list(meta.stride))
    fx.kwargs = {"dtype": meta.dtype, "device": fx.meta["val"].device}


def _name_the_end(fx: torch.fx.Node) -> None:
    """Of ``x[..., ::2] = y``, where vmap's rule adds the step to "as far as there is"."""
    x, y, dim, start, end, *step = fx.args
    if end is not None:
        fx.args = (x, y, dim, start, min(end, fx.meta["tensor_meta"].shape[dim]), *step)


def _deciding(fx: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes whose values decide the shape of this one's."""
    tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    if not tags & set(getattr(fx.target, "tags", ())):
        return []
    if fx.target is not aten.index.Tensor:
        return fx.all_input_nodes
    masks = [n for n in fx.args[1] if n is not None]
    return [n for n in masks if n.meta["val"].dtype in (torch.bool, torch.uint8)]


def _check(op) -> None:
    if op is operator.getitem:
        return
    if not isinstance(op, torch._ops.OpOverload):
        raise ValueError(f"the trace holds {op}, which is not a tensor operation")
    if op._schema.is_mutable:
        raise ValueError(f"the trace holds {op}, which writes in place")
