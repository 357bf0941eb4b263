"""Running the graph: once for the incumbent, and from a changed tensor on for its trial points."""

import operator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from psfast.objectives.batched import dense, sparse
from psfast.objectives.batched.rows import keep_counted_rows
from psfast.objectives.batched.trace import Graph, Node, Ref, seeded
from psfast.objectives.batched.values import Batch, Column, OneHot

aten = torch.ops.aten
COPIES = 2  # a product of one row gives other bits than one of many: the incumbent is never alone
_RANDOM = torch.Tag.nondeterministic_seeded


class Plan:
    """What runs for a trial point that changes tensor ``number``.

    nodes: those whose value depends on it and that the loss depends on, in running order
    light: the first of them, whose values stay sparse; None until they have been found
    heavy: the others
    needed: the numbers of the sparse values that the heavy ones read
    spare: number of a node -> the place of an argument that it may overwrite
    sizes: chunk size -> whether its bits are those of every other size
    """

    def __init__(self, number: int, nodes: list[Node]):
        self.number = number
        self.nodes = nodes
        self.light: list[Node] | None = None
        self.heavy: list[Node] = []
        self.needed: list[int] = []
        self.last_use: dict[int, list[int]] = {}
        self.spare: dict[int, int] = {}
        self.sizes: dict[int, bool] = {}

    def split(self, light: list[Node], start: int) -> None:
        """Set light and heavy. start: the number of the tensor's own node."""
        self.light = light
        done = {start, *(n.number for n in light)}
        self.heavy = [n for n in self.nodes if n.number not in done]
        self.needed = sorted({i for n in self.heavy for i in n.inputs if i in done})
        last = {i: n.number for n in self.heavy for i in n.inputs}
        for i, user in last.items():
            self.last_use.setdefault(user, []).append(i)
        self._find_spare(last)

    def _find_spare(self, last: dict[int, int]) -> None:
        """Note the arguments that a node may write its result over.

        That is one that nobody reads later, in memory that no value read later shares.
        """
        origin: dict[int, int] = {}  # the node that allocated the memory of each value
        until: dict[int, list[int]] = {}
        for node in self.heavy:
            n = node.number
            is_view = node.is_view and node.inputs[0] in origin
            origin[n] = origin[node.inputs[0]] if is_view else n
            until.setdefault(origin[n], []).append(n)
        for node in self.heavy:
            for place, a in enumerate(node.args):
                if not isinstance(a, Ref) or a not in origin:
                    continue
                sharing = [last.get(n, n) for n in until[origin[a]] if n != a]
                if last[a] == node.number and all(user < node.number for user in sharing):
                    self.spare.setdefault(node.number, place)

    def footprint(self, nodes: list[Node]) -> tuple[int, int]:
        """Bytes a trial point: (at most alive at once, an op's own on average), stacked."""
        sizes = {n.number: _bytes(n.value) for n in self.heavy}
        sizes.update({i: _bytes(nodes[i].value) for i in self.needed})
        alive = most = sum(sizes[i] for i in self.needed)
        for node in self.heavy:
            alive += sizes[node.number]
            most = max(most, 2 * sizes[node.number] + alive)  # what the op itself takes
            alive -= sum(sizes.get(i, 0) for i in self.last_use.get(node.number, ()))
        return most, sum(sizes.values()) // max(len(sizes), 1)


def _bytes(value) -> int:
    if isinstance(value, (tuple, list)):
        return sum(_bytes(v) for v in value)
    return value.nbytes if isinstance(value, Tensor) else 0


class Evaluator:
    """The graph with the incumbent's values in its nodes.

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

    def _live(self) -> set[int]:
        live = {self.graph.loss}
        for node in reversed(self.graph.nodes):
            if node.number in live:
                live.update(node.inputs)
        return live

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
            node.memo = {}
        rows = None if self.graph.rows is None else len(nodes[self.graph.rows].value)
        if rows != self.rows:  # other shapes: other arithmetic, other sizes
            self.rows = rows
            for plan in self.plans:
                plan.sizes.clear()

    def refresh(self, changed: frozenset[int] | None = None) -> None:
        """Compute the incumbent's values that depend on these tensors (None: on any)."""
        for number, value in self._forward(changed).items():
            self.graph.nodes[number].value = value
        for node in self.moving:
            if changed is None or changed & node.depends:
                node.memo = {}

    def loss_with(self, changed: frozenset[int]) -> Tensor:
        """The loss with what the parameters are now, where only these tensors have changed."""
        return self._forward(changed).get(self.graph.loss, self.loss)

    def _forward(self, changed: frozenset[int] | None) -> dict:
        """The new values of the nodes that depend on these tensors, by number.

        Everything that depends on the batch runs as ``COPIES`` stacked trial points, so that
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
            out = dense.run(node, args, kwargs, COPIES)
            values[number] = _first(out, node.value)
            if not node.weight:
                stacked[number] = out if isinstance(out, (tuple, list)) else Batch(out)
        return values

    def _copies(self, node: Node, args, kwargs):
        """The arguments with at least one of them stacked, as they are for a trial point."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if any(isinstance(leaf, Batch) for leaf in leaves):
            return args, kwargs
        names = pytree.tree_leaves((node.args, node.kwargs))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        data = [i for i in tensors if not self.graph.nodes[names[i]].weight]
        for i in data or tensors:
            leaves[i] = Batch(leaves[i].expand(COPIES, *leaves[i].shape))
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
        env = {start: OneHot(self.graph.nodes[start].value, at, delta)}
        if plan.light is None:
            self._find_light(plan, start, env)
        else:
            for node in plan.light:
                env[node.number] = self._light(node, env)
        return {i: env[i] for i in plan.needed if env[i] is not None}

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
        plan.split(light, start)

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


def _stacked(a):
    return Batch(a.dense()) if isinstance(a, (Column, OneHot)) else a


def _first(out, before):
    """Copy 0 of a stacked result; what it leaves out stays as it was."""
    if not isinstance(out, (tuple, list)):
        return out[0].clone()
    kept = [b if o is None else o[0].clone() for o, b in zip(out, before, strict=False)]
    return tuple(kept)


def _has_bits(value, base) -> bool:
    if value is None:
        return True
    if isinstance(value, (tuple, list)):
        pairs = zip(value, base, strict=False)
        return all(_has_bits(Batch(v), b) for v, b in pairs if isinstance(v, Tensor))
    value = value.dense()
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
