"""What runs for the trial points of one tensor, and in how much memory."""

from collections.abc import Sequence

from torch import Tensor

from psfast.objectives.batched.program import Program
from psfast.objectives.batched.trace import Node, Ref
from psfast.objectives.batched.values import Column, OneHot


class Plan:
    """What runs for a trial point that changes tensor ``number``.

    nodes: those whose value depends on it and that the loss depends on, in running order
    light: the first of them, whose values stay sparse; None until they have been found
    heavy: the others
    sparse_bytes: that the values of the light nodes take, a trial point
    needed: the numbers of the sparse values that the heavy ones read
    layout: of the sparse values that the heavy ones read: number, dim (None: a ``OneHot``),
        whether a ``OneHot`` is whole, and the places of its two tensors
    spare: number of a node -> the place of an argument that it may overwrite
    sizes: (chunk size, counted rows) -> whether its bits are those of every other size
    programs: what is recorded (``Incumbent.replay``)
    uses: how often a few trial points were evaluated
    idle: how often, lately, those that were looked at changed nothing (a share)
    """

    def __init__(self, number: int, nodes: list[Node]):
        self.number = number
        self.nodes = nodes
        self.light: list[Node] | None = None
        self.heavy: list[Node] = []
        self.sparse_bytes = 0
        self.needed: list[int] = []
        self.layout: list[tuple] = []
        self.last_use: dict[int, list[int]] = {}
        self.spare: dict[int, int] = {}
        self.sizes: dict[tuple, bool] = {}
        self.programs: dict[tuple, Program | int] = {}
        self.uses = 0
        self.idle = 0.0

    def forget(self) -> None:
        """What was found out about bits, and what is recorded, does not hold any more."""
        self.sizes.clear()
        self.programs.clear()

    def split(self, light: list[Node], start: int, env: dict) -> None:
        """Set light and heavy.

        start: the number of the tensor's own node; env: light's values for one trial point
        """
        self.light = light
        self.sparse_bytes = sum(
            t.nbytes
            for values in env.values()
            for value in (values if isinstance(values, tuple) else (values,))
            if value is not None
            for t in value.parts()
        )
        done = {start, *(n.number for n in light)}
        self.heavy = [n for n in self.nodes if n.number not in done]
        self.needed = sorted({i for n in self.heavy for i in n.inputs if i in done})
        if not self.heavy:
            self.needed = [self.nodes[-1].number]  # the loss
        last = {i: n.number for n in self.heavy for i in n.inputs}
        for i, user in last.items():
            self.last_use.setdefault(user, []).append(i)
        self._find_spare(last)
        place: dict[int, int] = {}
        for i in self.needed:
            if env[i] is not None:
                parts = [place.setdefault(id(t), len(place)) for t in env[i].parts()]
                whole = getattr(env[i], "whole", False)
                self.layout.append((i, getattr(env[i], "dim", None), whole, *parts))

    def sparse_values(self, nodes: list[Node], tensors: Sequence[Tensor]) -> dict:
        """What the heavy nodes read, by node, from the tensors that it is made of."""
        env = {}
        for i, dim, whole, *parts in self.layout:
            a, b = (tensors[place] for place in parts)
            base = nodes[i].value
            env[i] = OneHot(base, a, b, whole) if dim is None else Column(base, dim, a, b)
        return env

    def _find_spare(self, last: dict[int, int]) -> None:
        """Note the arguments that a node may write its result over.

        That is one that nobody reads later, in memory that no value read later shares.
        """
        # the node that allocated the memory of each value; sparse ones are made dense once
        origin: dict[int, int] = {i: i for i in self.needed}
        until: dict[int, list[int]] = {i: [i] for i in self.needed}
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
            most = max(most, 3 * sizes[node.number] + alive)  # what the rule itself takes
            alive -= sum(sizes.get(i, 0) for i in self.last_use.get(node.number, ()))
        return most, sum(sizes.values()) // max(len(sizes), 1)


def _bytes(value) -> int:
    if isinstance(value, (tuple, list)):
        return sum(_bytes(v) for v in value)
    return value.nbytes if isinstance(value, Tensor) else 0
