"""Trial points: from a changed tensor on, sparse as long as that lasts, then stacked."""

import operator

import torch
from torch import Tensor

from psfast.objectives.batched import dense, sparse
from psfast.objectives.batched.incumbent import Incumbent, has_bits
from psfast.objectives.batched.modes import no_fallback_notes
from psfast.objectives.batched.plan import Plan
from psfast.objectives.batched.program import is_over
from psfast.objectives.batched.rows import keep_counted_rows
from psfast.objectives.batched.sparse_layers import HEAVY
from psfast.objectives.batched.trace import Graph, Node
from psfast.objectives.batched.values import Batch, Column, OneHot

# A look whether trial points change anything takes a tenth of the time of one that does: where
# they mostly did lately, it is taken now and then.
_RARELY, _LOOK_EVERY, _LATELY = 1 / 16, 16, 1 / 8
_MOST_ROWS_SEEN = 16  # numbers of counted rows that are told apart before all are forgotten


class Evaluator:
    """The losses of trial points of ``incumbent``; ``plans`` has what runs, by tensor.

    Raises ValueError for a graph that ``Incumbent`` refuses.
    """

    def __init__(self, graph: Graph, params: list, tensors: list[Tensor]):
        graph.mark(params)
        graph = keep_counted_rows(graph, tensors)
        graph.mark(params)
        self.incumbent = Incumbent(graph, params)
        self.graph = graph
        self._rows_seen: set[int | None] = set()
        live = {graph.loss}
        for node in reversed(graph.nodes):
            if node.number in live:
                live.update(node.inputs)
        moving = [n for n in self.incumbent.moving if n.number in live]
        self.plans = [Plan(i, [n for n in moving if i in n.depends]) for i in range(len(params))]

    def draw(self, tensors: list[Tensor], seed: int, device) -> bool:
        """Take a new batch. Returns whether the shapes are others than they were."""
        has_other_shapes = self.incumbent.draw(tensors, seed, device)
        self._rows_seen.add(self.incumbent.rows)
        if len(self._rows_seen) > _MOST_ROWS_SEEN:  # there is a program for each, of each tensor
            self._rows_seen = {self.incumbent.rows}
            self.forget()
        return has_other_shapes

    def forget(self) -> None:
        """What was found out about sizes and bits does not hold any more."""
        self.incumbent.forget()
        for plan in self.plans:
            plan.forget()

    def prepare(self, plan: Plan) -> None:
        """Find out, once, which nodes of the plan stay sparse."""
        if plan.light is None:
            self.incumbent.bring_up_to_date()
            value = self.graph.nodes[self.incumbent.start[plan.number]].value
            at = torch.zeros(1, dtype=torch.int64, device=value.device)
            self.sparse_part(plan, at, value.new_zeros(1))

    def sparse_part(self, plan: Plan, at: Tensor, delta: Tensor) -> dict:
        """The sparse values that the rest of the plan reads, by node, for K trial points."""
        start = self.incumbent.start[plan.number]
        env = {start: OneHot(self.graph.nodes[start].value, at, delta, True)}
        if plan.light is None:
            self._find_light(plan, start, env)
        else:
            for node in plan.light:
                env[node.number] = self._light(node, env)
        return {i: env[i] for i in plan.needed if env[i] is not None}

    def changes(self, env: dict, is_all_enough: bool = False) -> Tensor:
        """(K,) bool: which trial points differ from the incumbent in what the rest reads.

        is_all_enough: look at no more values once all differ, which waits for the device
        """
        first, *rest = env.values()
        found = first.changes()
        for value in rest:
            if is_all_enough and found.all():
                break
            found = found | value.changes()
        return found

    def few(self, plan: Plan, at: Tensor, delta: Tensor) -> Tensor | None:
        """The losses of a few trial points of one tensor, as many as a chunk has. -> (K,)

        None if none of them was found to change anything.
        """
        K, rows = len(at), self.incumbent.rows
        looks = plan.idle > _RARELY or plan.uses % _LOOK_EVERY == 0 or not plan.sizes.get((K, rows))

        def run(at, delta):
            env = self.sparse_part(plan, at, delta)
            return None if looks and is_over(self.changes(env)) else self._run(plan, env, K)

        losses = self.incumbent.replay(plan.programs, ("few", K, rows, looks), run, [at, delta])
        plan.uses += 1
        if looks:
            plan.idle += _LATELY * ((losses is None) - plan.idle)
        return losses

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
        args, kwargs = self.incumbent.arguments(node, env)
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

        return self.incumbent.replay(plan.programs, ("heavy", K, self.incumbent.rows), run, tensors)

    @no_fallback_notes()
    def _run(self, plan: Plan, env: dict, K: int, check: bool = False) -> Tensor:
        env = dict(env)
        same = True
        for node in plan.heavy:
            out = self._heavy(node, env, K, plan.spare.get(node.number))
            if check:
                same = same and has_bits(out, node.value)
            env[node.number] = out
            for i in plan.last_use.get(node.number, ()):
                env.pop(i, None)
        if check:
            plan.sizes[K, self.incumbent.rows] = bool(same)
        loss = env.get(self.graph.loss)
        return loss.dense() if loss is not None else self.incumbent.loss.expand(K)

    def _heavy(self, node: Node, env: dict, K: int, spare: int | None):
        """spare: the place of an argument that nobody reads any more."""
        if node.op is operator.getitem:
            source, index = node.args
            out = env.get(source)
            if out is None or out[index] is None:
                return None
            return out[index] if isinstance(out[index], Column) else Batch(out[index])
        args, kwargs = self.incumbent.arguments(node, env)
        rule = HEAVY.get(node.op)
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
