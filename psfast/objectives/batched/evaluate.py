"""Running the graph: once for the incumbent, and from a changed tensor on for its trial points."""

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from psfast.objectives.batched import dense, sparse
from psfast.objectives.batched.plan import Plan
from psfast.objectives.batched.program import Unrecordable, record
from psfast.objectives.batched.rows import keep_counted_rows
from psfast.objectives.batched.trace import Graph, Node, Ref, seeded
from psfast.objectives.batched.values import Batch, Column, OneHot

aten = torch.ops.aten
_RECORD_AT = 3  # uses; recording takes a few times as long as what it saves in one
_RANDOM = torch.Tag.nondeterministic_seeded


class Evaluator:
    """The graph with the incumbent's values in its nodes.

    alone: whether the incumbent has the same bits evaluated alone as stacked (a product of one
        row, say, gives other bits than one of many); None if that is not known

    Raises ValueError for a graph whose random draws depend on a parameter's values.
    """

    def __init__(self, graph: Graph, params: list, tensors: list[Tensor]):
        self.params = params
        graph.mark(params)
        self.graph = graph = keep_counted_rows(graph, tensors)
        graph.mark(params)
        own = {p: number for number, p in graph.state.items()}
        self.start = [own.get(p) for p in params]
        self.trained = set(self.start)
        self.rows: int | None = None
        self.alone: bool | None = None
        self._refreshes: dict[tuple, Callable | int] = {}
        live = self._live()
        self.running = [n for n in graph.nodes if n.op is not None]
        self.fixed = [n for n in self.running if not n.depends]
        self.moving = [n for n in self.running if n.depends]
        for node in self.moving:
            if _RANDOM in getattr(node.op, "tags", ()) and not _draws_nothing(node):
                raise ValueError(f"{node.op} draws random numbers from values that change")
            if node.dynamic and any(graph.nodes[i].depends for i in node.dynamic):
                raise ValueError(f"the shape of {node.op}'s result depends on the parameters")
        self.plans = [
            Plan(i, [n for n in self.moving if i in n.depends and n.number in live])
            for i in range(len(params))
        ]
        for node in graph.nodes:
            node.shapes["weights"] = {
                place
                for place, a in enumerate(node.args)
                if isinstance(a, Ref) and graph.nodes[a].weight
            }
            node.shapes["fixed"] = {
                place
                for place, a in enumerate(node.args)
                if isinstance(a, Ref) and not graph.nodes[a].depends
            }

    def _live(self) -> set[int]:
        live = {self.graph.loss}
        for node in reversed(self.graph.nodes):
            if node.number in live:
                live.update(node.inputs)
        return live

    @property
    def copies(self) -> int:
        """As how many stacked trial points the incumbent is evaluated."""
        return 1 if self.alone else 2

    @property
    def loss(self) -> Tensor:
        return self.graph.nodes[self.graph.loss].value

    # --- the incumbent --------------------------------------------------------------------

    def read_state(self, state: list[Tensor]) -> None:
        """Look at these parameters and buffers from now on (a module may have replaced them)."""
        for number, new in zip(self.graph.state, state, strict=True):
            self.graph.nodes[number].value = new.detach() if number in self.trained else new

    def draw(self, tensors: list[Tensor], seed: int, device: torch.device) -> None:
        """Take a new batch: run what no parameter changes, the masks of ``seed`` among it.

        The first time everything runs, as the model does, for the shapes.
        """
        nodes = self.graph.nodes
        for number, tensor in zip(self.graph.data, tensors, strict=True):
            nodes[number].value = tensor
        is_first = nodes[self.graph.loss].value is None
        with seeded(seed, device):
            for node in self.running if is_first else self.fixed:
                args, kwargs = self._arguments(node, {})
                node.value = _as_the_model(node, args, kwargs)
        for node in self.running:
            node.memo.clear()
            node.batch_memo.clear()
        rows = None if self.graph.rows is None else len(nodes[self.graph.rows].value)
        if rows != self.rows:  # other shapes: other arithmetic, other sizes
            self.rows = rows
            self.forget()

    def forget(self) -> None:
        """What was found out about sizes and bits does not hold any more."""
        self.alone: bool | None = None
        self._refreshes.clear()
        for plan in self.plans:
            plan.forget()

    def refresh(self, changed: frozenset[int] | None = None) -> None:
        """Compute the incumbent's values that depend on these tensors (None: on any)."""
        moved = [n for n in self.moving if changed is None or changed & n.depends]
        # of sets of several tensors there are too many to keep a program for each
        programs = self._refreshes if changed is None or len(changed) == 1 else {}
        forward = lambda: list(self._forward(changed).values())  # noqa: E731
        values = self._replay(programs, (changed, self.copies), forward, store=moved)
        for node, value in zip(moved, values or (), strict=False):
            node.value = value
        for node in moved:
            node.memo.clear()

    def loss_with(self, changed: frozenset[int]) -> Tensor:
        """The loss with what the parameters are now, where only these tensors have changed."""
        return self._forward(changed).get(self.graph.loss, self.loss)

    def _forward(self, changed: frozenset[int] | None) -> dict:
        """The new values of the nodes that depend on these tensors, by number.

        Everything that depends on the batch runs as ``copies`` stacked trial points, so that
        the incumbent's bits are those of a trial point that changes nothing.
        """
        values: dict[int, object] = {}
        stacked: dict[int, object] = {}
        for node in self.moving:
            if changed is not None and changed.isdisjoint(node.depends):
                continue
            number = node.number
            if node.op is operator.getitem:
                source, index = node.args
                values[number] = values[source][index]
                if source in stacked and stacked[source][index] is not None:
                    stacked[number] = Batch(stacked[source][index])
                continue
            args, kwargs = self._arguments(node, values, stacked)
            if node.weight and node.op in sparse.VIEWS:
                values[number] = node.op(*args, **kwargs)
                continue
            args, kwargs = self._copies(node, args, kwargs)
            out = dense.run(node, args, kwargs, self.copies)
            values[number] = _first(out, node.value, self.copies)
            if not node.weight:
                stacked[number] = out if isinstance(out, (tuple, list)) else Batch(out)
        return values

    def _replay(self, programs: dict, key, function: Callable, inputs=(), store=()):
        """``function(*inputs)``, as a program once it has been used often enough to record it.

        store: the nodes that a program writes the results to, instead of returning them
        """
        program = programs.get(key, 0)
        if callable(program):
            return program(*inputs)
        if program < _RECORD_AT:
            programs[key] = program + 1
        elif program == _RECORD_AT:
            try:
                programs[key] = record(function, inputs, self.graph.nodes, store)
            except Unrecordable:
                programs[key] = _RECORD_AT + 1  # for good
        return function(*inputs)

    def has_bits_alone(self) -> bool:
        """Whether the incumbent's values, as they are, have the same bits evaluated alone."""
        together = {n.number: n.value for n in self.moving}
        before, self.alone = self.alone, True
        try:
            alone = self._forward(None)
        finally:
            self.alone = before
        return all(_has_bits(alone[i], value) for i, value in together.items())

    def _copies(self, node: Node, args, kwargs):
        """The arguments with at least one of them stacked, as they are for a trial point."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if any(isinstance(leaf, Batch) for leaf in leaves):
            return args, kwargs
        names = pytree.tree_leaves((node.args, node.kwargs))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        data = [i for i in tensors if not self.graph.nodes[names[i]].weight]
        for i in data or tensors:
            leaves[i] = Batch(leaves[i].expand(self.copies, *leaves[i].shape))
        return pytree.tree_unflatten(leaves, spec)

    def _arguments(self, node: Node, changed: dict, stacked: dict | None = None):
        """args and kwargs of the op: the changed value of each input, else the incumbent's."""
        nodes = self.graph.nodes

        def value(a):
            if isinstance(a, Ref):
                got = None if stacked is None else stacked.get(a)
                got = changed.get(a) if got is None else got
                return nodes[a].value if got is None else got
            if isinstance(a, (list, tuple)):
                return [value(x) for x in a]
            return a

        if node.places is None:
            kwargs = {k: value(v) for k, v in node.kwargs.items()}
            return [value(a) for a in node.args], kwargs
        args = list(node.args)
        for place in node.places:
            args[place] = value(args[place])
        return args, node.kwargs

    # --- trial points ------------------------------------------------------------------------

    def sparse_part(self, plan: Plan, at: Tensor, delta: Tensor) -> dict:
        """The sparse values that the rest of the plan reads, by node, for K trial points."""
        start = self.start[plan.number]
        env = {start: OneHot(self.graph.nodes[start].value, at, delta, True)}
        if plan.light is None:
            self._find_light(plan, start, env)
        else:
            for node in plan.light:
                env[node.number] = self._light(node, env)
        return {i: env[i] for i in plan.needed if env[i] is not None}

    def changes(self, env: dict) -> Tensor:
        """(K,) bool: which trial points differ from the incumbent in what the rest reads."""
        first, *rest = (value.changes() for value in env.values())
        for other in rest:
            first = first | other
        return first

    def few(self, plan: Plan, at: Tensor, delta: Tensor) -> Tensor | None:
        """The losses of a few trial points of one tensor, as many as a chunk has. -> (K,)

        None if none of them changes anything.
        """
        K = len(at)

        def start(at, delta):
            env = self.sparse_part(plan, at, delta)
            return [self.changes(env), *_tensors(env)]

        changes, *tensors = self._replay(plan.programs, ("light", K), start, [at, delta])
        if True not in changes.tolist():
            return None
        return self._losses(plan, tensors, K)


    def _find_light(self, plan: Plan, start: int, env: dict) -> None:
        light, deferred = [], set()
        for node in plan.nodes:
            if deferred.isdisjoint(node.inputs):
                out = self._light(node, env)
                if out is not NotImplemented:
                    env[node.number] = out
                    light.append(node)
                    continue
            deferred.add(node.number)
        plan.split(light, start, env)

    def _light(self, node: Node, env: dict):
        if node.op is operator.getitem:
            source, index = node.args
            return env[source][index] if env.get(source) is not None else None
        rule = sparse.light_rule(node)
        if rule is None or all(env.get(i) is None for i in node.inputs):
            return NotImplemented
        args, kwargs = self._arguments(node, env)
        return rule(node, *args, **kwargs)

    def losses(self, plan: Plan, env: dict, K: int, check: bool = False) -> Tensor:
        """The losses of K trial points from their sparse values on. -> (K,)

        check: the trial points are the incumbent: note in ``plan.sizes`` whether every value
            has the incumbent's bits.
        """
        return self._run(plan, env, K, check) if check else self._losses(plan, _tensors(env), K)

    def _losses(self, plan: Plan, tensors: list[Tensor], K: int) -> Tensor:
        def run(*tensors):
            return self._run(plan, plan.sparse_values(self.graph.nodes, tensors), K)

        return self._replay(plan.programs, ("heavy", K), run, tensors)

    def _run(self, plan: Plan, env: dict, K: int, check: bool = False) -> Tensor:
        env = dict(env)
        same = True
        for node in plan.heavy:
            out = self._heavy(node, env, K, plan.spare.get(node.number))
            if check:
                same = same and _has_bits(out, node.value)
            env[node.number] = out
            for i in plan.last_use.get(node.number, ()):
                env.pop(i, None)
        if check:
            plan.sizes[K] = bool(same)
        loss = env.get(self.graph.loss)
        return loss.dense() if loss is not None else self.loss.expand(K)

    def _heavy(self, node: Node, env: dict, K: int, spare: int | None):
        """spare: the place of an argument that nobody reads any more."""
        if node.op is operator.getitem:
            source, index = node.args
            out = env.get(source)
            if out is None or out[index] is None:
                return None
            return out[index] if isinstance(out[index], Column) else Batch(out[index])
        args, kwargs = self._arguments(node, env)
        rule = sparse.HEAVY.get(node.op)
        if rule is not None:
            out = rule(node, K, *args, **kwargs)
            if out is not NotImplemented:
                return Batch(out)
        is_changed = False
        for place, a in enumerate(args):
            if isinstance(a, (Column, OneHot)):
                name = node.args[place]
                args[place] = env[name] = Batch(a.dense())  # for its other readers too
            elif isinstance(a, list):
                args[place] = [_stacked(x) for x in a]
            if isinstance(args[place], Batch):
                is_changed = True
        if not is_changed and all(env.get(i) is None for i in node.inputs):
            return None
        if node.kwargs:
            kwargs = {name: _stacked(a) for name, a in kwargs.items()}
        if spare is not None:
            out = dense.overwrite(node, args, spare)
            if out is not None:
                return Batch(out)
        out = dense.run(node, args, kwargs, K)
        return out if isinstance(out, (tuple, list)) else Batch(out)


def _tensors(env: dict) -> list[Tensor]:
    """The tensors that sparse values are made of besides the incumbent's, each once."""
    found = [t for value in env.values() for t in value.parts()]
    return list({id(t): t for t in found}.values())


def _stacked(a):
    return Batch(a.dense()) if isinstance(a, (Column, OneHot)) else a


def _first(out, before, copies: int):
    """Copy 0 of a stacked result; what it leaves out stays as it was."""
    if isinstance(out, (tuple, list)):
        pairs = zip(out, before, strict=False)
        return tuple(b if o is None else _first(o, b, copies) for o, b in pairs)
    return out[0].clone() if copies > 1 else out[0]


def _has_bits(value, base) -> bool:
    if value is None:
        return True
    if isinstance(value, (tuple, list)):
        pairs = zip(value, base, strict=False)
        return all(_has_bits(v, b) for v, b in pairs if isinstance(v, Tensor))
    value = value if isinstance(value, Tensor) else value.dense()
    return bool(((value == base) | (value.isnan() & base.isnan())).all())


def _draws_nothing(node: Node) -> bool:
    """Whether an op that may draw random numbers is called with a drop probability of 0."""
    name = node.op._schema.name
    return "attention" in name and not any(a for a in node.args[3:4])


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
