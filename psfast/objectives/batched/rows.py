"""The rows that a masked loss does not count need not be computed.

Where the loss is a cross-entropy with ignored targets, what lies before it row by row (the
head, the last norm, the last feed-forward layer, back to where rows mix) runs on the counted
rows alone: the same graph, with a selection where that region begins.
"""

import math
import operator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from psfast.objectives.batched.trace import Graph, Node, Ref

aten = torch.ops.aten
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


def keep_counted_rows(graph: Graph, tensors: list[Tensor]) -> Graph:
    """The graph on the counted rows, or the same graph where there is nothing to gain.

    tensors: of the batch; what they ignore says whether there is something to gain. The new
    graph is right for every batch; its ``rows`` is the number of the node of the row numbers.
    Call after ``Graph.mark``.
    """
    loss = _masked_loss(graph)
    if loss is None:
        return graph
    integers = [t for t in tensors if not t.is_floating_point()]
    if any((t == loss.args[4]).any() for t in integers):
        region = _Region(graph, loss)
        if region.members:
            return region.rewritten()
    graph.masked = int(loss.args[1]), loss.args[4]
    return graph


def _masked_loss(graph: Graph) -> Node | None:
    found = [n for n in graph.nodes if n.op is aten.nll_loss_forward.default]
    if len(found) != 1:
        return None
    (loss,) = found
    scores, target, _, reduction, _ = loss.args
    shape = graph.nodes[scores].shape
    if graph.nodes[target].depends or not reduction or shape is None or len(shape) != 2:
        return None
    return loss


class _Region:
    """The nodes before ``loss`` that treat each row for itself and are read by no others."""

    def __init__(self, graph: Graph, loss: Node):
        self.graph = graph
        self.loss = loss
        self.rows = graph.nodes[loss.args[0]].shape[0]
        users: dict[int, set[int]] = {}
        for node in graph.nodes:
            for i in node.inputs:
                users.setdefault(i, set()).add(node.number)
        inside = {loss.number}
        for node in reversed(graph.nodes[: loss.number]):
            mine = users.get(node.number, set())
            if mine and mine <= inside and node.depends and self._is_by_row(node):
                inside.add(node.number)
        self.members = inside - {loss.number}

    def _has_rows(self, number: int) -> bool:
        shape = self.graph.nodes[number].shape
        return bool(shape) and len(shape) > 1 and math.prod(shape[:-1]) == self.rows

    def _is_by_row(self, node: Node) -> bool:
        nodes, op = self.graph.nodes, node.op
        if node.weight or node.kwargs:
            return False
        if op is aten.native_layer_norm.default:
            weights = [a for a in node.args[2:4] if isinstance(a, Ref)]
            by_row = len(node.args[1]) == 1 and all(nodes[a].weight for a in weights)
            return by_row and self._has_rows(node.args[0])
        if op is operator.getitem:
            is_norm = nodes[node.args[0]].op is aten.native_layer_norm.default
            return is_norm and node.args[1] == 0 and self._has_rows(node.number)
        if not self._has_rows(node.number):
            return False
        if op in (aten.mm.default, aten.addmm.default):
            *bias, x, weight = node.args
            if any(len(nodes[b].shape or ()) > 1 for b in bias):
                return False
            return all(nodes[a].weight for a in (*bias, weight)) and x not in self.graph.state
        if op in _RESHAPES:
            return nodes[node.args[0]].shape is not None and (
                nodes[node.args[0]].shape[-1] == node.shape[-1] and self._has_rows(node.args[0])
            )
        if op is aten._log_softmax.default:
            return node.args[1] % len(node.shape) == len(node.shape) - 1
        return torch.Tag.pointwise in getattr(op, "tags", ()) and all(
            nodes[i].shape is not None
            and (len(nodes[i].shape) < 2 if nodes[i].weight else nodes[i].shape == node.shape)
            for i in node.inputs
        )

    def _target_first(self) -> list[Node]:
        """The nodes, in an order in which the targets are known before the region begins."""
        needed, waiting = set(), [int(self.loss.args[1])]
        while waiting:
            number = waiting.pop()
            needed.add(number)
            waiting += self.graph.nodes[number].inputs
        nodes = self.graph.nodes
        first = [n for n in nodes if n.op is None or n.number in needed]
        return first + [n for n in nodes if n.op is not None and n.number not in needed]

    def rewritten(self) -> Graph:
        """A graph in which the region's values are (counted rows, width)."""
        old = self.graph.nodes
        nodes: list[Node] = []
        place: dict[int, int] = {}
        selected: dict[int, int] = {}

        def emit(op, *args) -> int:
            nodes.append(Node(len(nodes), op, args))
            return len(nodes) - 1

        def counted(number: int) -> Ref:
            """The counted rows of a value of the region, or of one that enters it."""
            if number in self.members or old[number].weight:
                return Ref(place[number])
            if number not in selected:
                source = Ref(place[number])
                if len(old[number].shape) > 2:
                    source = Ref(
                        emit(aten.reshape.default, source, [self.rows, old[number].shape[-1]])
                    )
                selected[number] = emit(aten.index_select.default, source, 0, Ref(rows))
            return Ref(selected[number])

        rows = -1
        for node in self._target_first():
            if rows < 0 and (node.number in self.members or node is self.loss):
                target, ignored = self.loss.args[1], self.loss.args[4]
                hits = emit(aten.ne.Scalar, Ref(place[target]), ignored)
                # where nothing counts all rows do: of none there are no shapes, and no loss NaN
                none = emit(aten.logical_not.default, Ref(emit(aten.any.default, Ref(hits))))
                hits = emit(aten.logical_or.default, Ref(hits), Ref(none))
                rows = emit(aten.squeeze.dim, Ref(emit(aten.nonzero.default, Ref(hits))), 1)
            if node.number in self.members and node.op in _RESHAPES:
                place[node.number] = int(counted(node.args[0]))
                continue
            inside = node.number in self.members or node is self.loss
            of_rows = set(node.inputs) if inside else set()
            if node is self.loss:
                of_rows = {int(a) for a in node.args[:2]}  # the third is of the classes

            def to(i: int, of_rows=of_rows) -> Ref:
                return counted(i) if i in of_rows else Ref(place[i])

            args, kwargs = pytree.tree_map(
                lambda a, to=to: to(a) if isinstance(a, Ref) else a, (node.args, node.kwargs)
            )
            if node.op is aten._log_softmax.default and inside:
                args = (args[0], 1, args[2])
            new = Node(len(nodes), node.op, tuple(args), kwargs)
            new.value, new.shape = node.value, node.shape
            new.dynamic = [place[i] for i in node.dynamic]
            place[node.number] = new.number
            nodes.append(new)
        state = {place[i]: tensor for i, tensor in self.graph.state.items()}
        data = [place[i] for i in self.graph.data]
        graph = Graph(nodes, place[self.graph.loss], state, data, self.graph.constants)
        graph.rows = rows
        return graph
