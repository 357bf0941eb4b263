"""The incumbent: the graph with its values in the nodes, as fresh as they are read."""

import operator
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from psfast.objectives.batched import dense, sparse
from psfast.objectives.batched.modes import no_fallback_notes
from psfast.objectives.batched.program import Program, Unrecordable, record
from psfast.objectives.batched.trace import Graph, Node, Ref
from psfast.objectives.batched.values import Batch
from psfast.random_state import seeded

aten = torch.ops.aten
_RECORD_AT = 1  # uses before; what runs once, as the check of a size, is not worth recording
_RANDOM = torch.Tag.nondeterministic_seeded
_FIRST_RESULT_ONLY = (  # is what the rules compute of these
    "max_pool2d_with_indices", "batch_norm", "native_layer_norm", "attention", "nll_loss",
    "embedding_bag",
)  # fmt: skip
# 5% less time in small programs, of which nobody wants a gradient
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


class Incumbent:
    """The graph with the incumbent's values in its nodes.

    graph: marked for ``params``
    alone: whether the incumbent has the same bits evaluated alone as stacked (a product of one
        row, say, gives other bits than one of many); None if that is not known
    fixed, moving: the nodes that no parameter changes, and the others

    The moving nodes are cut into segments where another parameter comes in. An accepted
    change makes the segments after it stale; one is run again when a value of it is read.

    Raises ValueError for a graph whose random draws depend on a parameter's values.
    """

    def __init__(self, graph: Graph, params: list):
        self.graph = graph
        own = {p: number for number, p in graph.state.items()}
        self.start = [own.get(p) for p in params]
        self.trained = set(self.start)
        self.rows: int | None = None
        self.alone: bool | None = None
        running = [n for n in graph.nodes if n.op is not None]
        self.fixed = [n for n in running if not n.depends]
        self.moving = [n for n in running if n.depends]
        for node in self.moving:
            if _RANDOM in getattr(node.op, "tags", ()) and not _draws_nothing(node):
                raise ValueError(f"{node.op} draws random numbers from values that change")
            if node.op is operator.getitem and node.args[1]:
                source = graph.nodes[node.args[0]].op
                if any(name in source._schema.name for name in _FIRST_RESULT_ONLY):
                    raise ValueError(f"it reads another result of {source} than the first")
            if node.dynamic and any(graph.nodes[i].depends for i in node.dynamic):
                raise ValueError(f"the shape of {node.op}'s result depends on the parameters")
        for node in graph.nodes:
            refs = {place: graph.nodes[a] for place, a in enumerate(node.args) if _is_ref(a)}
            node.shapes["weights"] = {place for place, read in refs.items() if read.weight}
            node.shapes["fixed"] = {place for place, read in refs.items() if not read.depends}
        self._cut()
        self._programs: dict[tuple, Program | int] = {}

    def _cut(self) -> None:
        """Set the segments, what each depends on, and which ones it reads."""
        self.segments: list[list[Node]] = []
        self._depends: list[frozenset[int]] = []
        self._segment_of: dict[int, int] = {}
        last = {}  # whether of parameters alone -> the last such segment
        for node in self.moving:
            s = last.get(node.weight)
            latest = max((self._segment_of.get(i, -1) for i in node.inputs), default=-1)
            if s is None or latest > s or not node.depends <= self._depends[s]:
                s = last[node.weight] = len(self.segments)
                self.segments.append([])
                self._depends.append(node.depends)
            self.segments[s].append(node)
            self._segment_of[node.number] = s
        self._reads = [
            {self._segment_of.get(i, s) for n in nodes for i in n.inputs} - {s}
            for s, nodes in enumerate(self.segments)
        ]
        self._stale = set(range(len(self.segments)))

    @property
    def copies(self) -> int:
        """As how many stacked trial points the incumbent is evaluated."""
        return 1 if self.alone else 2

    @property
    def loss(self) -> Tensor:
        self.bring_up_to_date()
        return self.graph.nodes[self.graph.loss].value

    def like_loss(self, values: float | list[float]) -> Tensor:
        """The values, or the value, as the loss's dtype and device have them."""
        return self.graph.nodes[self.graph.loss].value.new_tensor(values)

    def read_state(self, state: list[Tensor]) -> None:
        """Look at these parameters and buffers from now on (a module may have replaced them)."""
        for number, new in zip(self.graph.state, state, strict=True):
            self.graph.nodes[number].value = new.detach() if number in self.trained else new

    def draw(self, tensors: list[Tensor], seed: int, device: torch.device) -> bool:
        """Take a new batch: run what no parameter changes, the masks of ``seed`` among it.

        The first time everything runs, as the model does, for the shapes. Returns whether the
        shapes are others than they were.
        """
        nodes = self.graph.nodes
        for number, tensor in zip(self.graph.data, tensors, strict=True):
            nodes[number].value = tensor.detach()  # a tensor given twice is two values
        is_first = nodes[self.graph.loss].value is None
        with seeded(seed, device):
            for node in nodes if is_first else self.fixed:
                if node.op is not None:
                    node.value = _as_the_model(node, *self.arguments(node, {}))
        for node in nodes:
            node.batch_memo.clear()
        self.touch(None)
        before, had_one = self.rows, self.rows == 1
        self.rows = None
        if self.graph.rows is not None:
            self.rows = len(nodes[self.graph.rows].value)
        elif self.graph.masked is not None:
            target, ignored = self.graph.masked
            self.rows = int((nodes[target].value != ignored).sum())
        if before != self.rows and (had_one or self.rows == 1):
            self.alone = None  # a product of one row is what may differ
        return before != self.rows

    def forget(self) -> None:
        """What was found out about bits, and what is recorded, does not hold any more."""
        self.alone = None
        self._programs.clear()
        self.touch(None)

    # --- fresh and stale ------------------------------------------------------------------

    def touch(self, changed: frozenset[int] | None) -> None:
        """These tensors (None: any) have changed."""
        for s, depends in enumerate(self._depends):
            if changed is None or not changed.isdisjoint(depends):
                self._stale.add(s)
                for node in self.segments[s]:
                    node.memo.clear()

    def bring_up_to_date(self, needs: Iterable[int] | None = None) -> None:
        """Run the stale ones of these segments (default: all), of which each reads earlier ones."""
        for s in sorted(self._stale if needs is None else self._stale.intersection(needs)):
            self._run(s)
            self._stale.discard(s)

    def _run(self, s: int) -> None:
        nodes = self.segments[s]
        key = (s, self.rows, self.copies)
        program = self._programs.get(key, 0)
        if isinstance(program, Program):
            program.run()
            return

        def forward():
            return list(self.forward(nodes).values())

        self._note_use(self._programs, key, forward, (), nodes)
        for node, value in zip(nodes, forward(), strict=True):
            node.value = value

    def replay(self, programs: dict, key: tuple, function: Callable, inputs: list[Tensor]):
        """``function(*inputs)``, as a program once it has been used often enough to record it.

        The function may read the incumbent; a program brings up to date only what it reads.
        """
        program = programs.get(key, 0)
        if isinstance(program, Program):
            with _below_autograd():
                self.bring_up_to_date(program.needs)
                return program.run(*inputs)
        self.bring_up_to_date()
        self._note_use(programs, key, function, inputs, ())
        return function(*inputs)

    def _note_use(self, programs: dict, key: tuple, function: Callable, inputs, store) -> None:
        uses = programs.get(key, 0)
        if uses < _RECORD_AT:
            programs[key] = uses + 1
        elif uses == _RECORD_AT:
            try:
                programs[key] = program = record(function, inputs, self.graph.nodes, store)
                program.needs = self._needs(program.reads)
            except Unrecordable:
                programs[key] = _RECORD_AT + 1  # for good

    def _needs(self, numbers: set[int]) -> frozenset[int]:
        """The segments that these nodes' values come from."""
        needs = {self._segment_of[i] for i in numbers if i in self._segment_of}
        for s in reversed(range(len(self.segments))):
            if s in needs:
                needs |= self._reads[s]
        return frozenset(needs)

    # --- the values -----------------------------------------------------------------------

    def loss_with(self, changed: frozenset[int]) -> Tensor:
        """The loss with what the parameters are now, where only these tensors have changed.

        Everything else must be up to date.
        """
        nodes = [n for n in self.moving if not changed.isdisjoint(n.depends)]
        before = self.graph.nodes[self.graph.loss].value
        return self.forward(nodes).get(self.graph.loss, before)

    @no_fallback_notes()
    def forward(self, nodes: list[Node]) -> dict:
        """The new values of these nodes, by number; the others are as they are.

        Everything that depends on the batch runs as ``copies`` stacked trial points, so that
        the incumbent's bits are those of a trial point that changes nothing.
        """
        values: dict[int, object] = {}
        stacked: dict[int, object] = {}
        for node in nodes:
            number = node.number
            if node.op is operator.getitem:
                source, index = node.args
                whole = values[source] if source in values else self.graph.nodes[source].value
                values[number] = whole[index]
                if source in stacked and stacked[source][index] is not None:
                    stacked[number] = Batch(stacked[source][index])
                continue
            # alone, most ops are what their rules do with one; nothing needs to be stacked
            function = dense.plain(node) if self.alone and not node.weight else None
            if node.weight and node.op in sparse.VIEWS:
                function = node.op
            if function is not None:
                args, kwargs = self.arguments(node, values)
                out = function(*args, **kwargs)
                values[number] = tuple(out) if isinstance(out, list) else out
                continue
            args, kwargs = self.arguments(node, values, stacked)
            args, kwargs = self._copies(node, args, kwargs)
            out = dense.run(node, args, kwargs, self.copies)
            values[number] = _first(out, node.value, self.copies)
            if not node.weight:
                stacked[number] = out if isinstance(out, (tuple, list)) else Batch(out)
        return values

    def has_bits_alone(self) -> bool:
        """Whether the incumbent's values, as they are, have the same bits evaluated alone."""
        self.bring_up_to_date()
        together = {n.number: n.value for n in self.moving}
        before, self.alone = self.alone, True
        try:
            alone = self.forward(self.moving)
        finally:
            self.alone = before
        # of several results those that are read are nodes of their own
        single = [n.number for n in self.moving if isinstance(n.value, Tensor)]
        return all(has_bits(alone[i], together[i]) for i in single)

    def _copies(self, node: Node, args, kwargs):
        """The arguments with at least one of them stacked, as they are for a trial point."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if any(isinstance(leaf, Batch) for leaf in leaves):
            return args, kwargs
        names = pytree.tree_leaves((node.args, node.kwargs))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        read = {i: self.graph.nodes[names[i]] for i in tensors}
        data = [i for i in tensors if not read[i].weight]
        moving = [i for i in data if read[i].depends]  # a mask, say, is the same for all
        for i in moving or data or tensors:
            leaves[i] = Batch(leaves[i].expand(self.copies, *leaves[i].shape))
        return pytree.tree_unflatten(leaves, spec)

    def arguments(self, node: Node, changed: dict, stacked: dict | None = None):
        """args and kwargs of the op: the changed value of each input, else the incumbent's."""
        if node.places is None:
            kwargs = {k: self._value(v, changed, stacked) for k, v in node.kwargs.items()}
            return [self._value(a, changed, stacked) for a in node.args], kwargs
        args = list(node.args)
        for place in node.places:
            args[place] = self._value(args[place], changed, stacked)
        return args, node.kwargs

    def _value(self, a, changed: dict, stacked: dict | None):
        # A method: a recursive inner function is a cycle, which keeps its tensors for a while.
        if isinstance(a, Ref):
            got = None if stacked is None else stacked.get(a)
            got = changed.get(a) if got is None else got
            return self.graph.nodes[a].value if got is None else got
        if isinstance(a, (list, tuple)):
            return [self._value(x, changed, stacked) for x in a]
        return a


def _is_ref(a) -> bool:
    return isinstance(a, Ref)


def _first(out, before, copies: int):
    """Copy 0 of a stacked result; what it leaves out stays as it was."""
    if isinstance(out, (tuple, list)):
        pairs = zip(out, before, strict=False)
        return tuple(b if o is None else _first(o, b, copies) for o, b in pairs)
    return out[0].clone() if copies > 1 else out[0]


def has_bits(value, base) -> bool:
    if value is None:
        return True
    if isinstance(value, (tuple, list)):
        pairs = zip(value, base, strict=False)
        return all(has_bits(v, b) for v, b in pairs if isinstance(v, Tensor))
    value = value if isinstance(value, Tensor) else value.dense()
    return bool(((value == base) | (value.isnan() & base.isnan())).all())


def _draws_nothing(node: Node) -> bool:
    """Whether an op that may draw random numbers is called with a drop probability of 0."""
    names = [argument.name for argument in node.op._schema.arguments]
    if "dropout_p" not in names:
        return False
    place = names.index("dropout_p")
    return not (node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p"))


def _as_the_model(node: Node, args: list, kwargs: dict):
    """The op on plain tensors, with the model's own draws and without its side effects."""
    if node.op is aten.bernoulli.p:
        # as dropout draws it: in the order of the memory, which the functional op forgets
        return torch.empty_like(args[0]).bernoulli_(args[1])
    if node.op is not operator.getitem and "batch_norm" in node.op._schema.name:
        # these ops write to the running statistics that they are given
        args = [
            *args[:3],
            *(a.clone() if isinstance(a, Tensor) else a for a in args[3:5]),
            *args[5:],
        ]
    return node.op(*args, **kwargs)
