"""A poll's first trial points one after another, where blocks cost more than what they save."""

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from psfast.objectives.base import CompositeLoss, Descent, Objective, versions
from psfast.objectives.batched.incumbent import Incumbent
from psfast.objectives.batched.trace import refuse_autocast
from psfast.objectives.serial import SerialModelObjective
from psfast.random_state import seeded

# Floating-point operations of an average node, by the kind of device. A block, and an accepted
# change, take a launch and some Python for each node; a plain evaluation one or less, and all of
# the work. Measured where half of the trial points are lower, beside the serial loop: on a CPU
# blocks take 3.7 times as long at 0.12 million (an MLP), as long at 0.3 and 0.4 (a small CNN, a
# small transformer); on an H100 2.6 and 1.6 times at 0.4 and 6 million (a small transformer).
_LIGHT = {"cpu": 200_000, "cuda": 10_000_000}
_TINY_POLL = 64  # trial points: with so few, what each kind of loss finds lower may go in a ring
_MOVING = 0.5  # of the nodes; dropout masks are some that do not


class Opening(SerialModelObjective):
    """The loss as the model itself computes it, for the trial points that a poll begins with.

    While much improves, most polls end with them: then nothing is ever stacked, and what
    is kept of the incumbent need not be brought up to date.

    owner: the objective whose opening it is; it has the batch and the mask. Not kept: a cycle
        would hold model and batch until Python collects garbage.
    loss: the owner's; constants: tensors that it reads, beside the model's and the batch

    Raises ValueError for a model that moves its parameters.
    """

    patience = 8  # what a block and an accepted change cost in plain evaluations: 8 to 26

    _known: tuple[Tensor, tuple] | None = None  # the incumbent's loss, and what it holds for
    _last: tuple = ()  # the last trial point at this incumbent, and its loss

    def __init__(self, owner: Objective, loss: CompositeLoss, constants: Sequence[Tensor]):
        self._constants = constants
        self._owner = weakref.ref(owner)
        batch = owner.inputs, owner.targets
        super().__init__(loss.model, loss.criterion, *batch, params=owner.params, seed=owner.seed)
        if 2 * self.flat.size <= _TINY_POLL:
            self.patience = math.inf

    def __call__(self) -> Tensor:
        self._follow_owner()
        self.flat.changed()
        if self._known is None or self._known[1] != self._place() or self._watch.changed():
            self._forget()
            self._get_ready()
            with self._evaluation(), self._held_in_place():
                loss = self._evaluate()
            batch = pytree.tree_leaves((self.inputs, self.targets))
            self._watch.look([*batch, *self._constants])
            self._know(loss)
        return self._known[0].clone()

    def _follow_owner(self) -> None:
        """Be on its batch, whatever kept a ``set_batch`` of it from its end."""
        own = self._owner() or self
        same = self.inputs is own.inputs and self.targets is own.targets
        if not (same and self.seed == own.seed):
            self._forget()
            self.inputs, self.targets, self.seed = own.inputs, own.targets, own.seed

    def _forget(self) -> None:
        self._known, self._last = None, ()

    def _place(self) -> tuple[int, int]:
        return self.flat.changes, torch.get_num_threads()  # on which bits may depend

    def _know(self, loss: float) -> None:
        self._known = torch.tensor(loss, dtype=self._dtype), self._place()

    def losses(self, index: Tensor, delta: Tensor, *, stop_below: float | None = None) -> Tensor:
        losses = super().losses(index, delta, stop_below=stop_below)
        if len(losses):
            last = len(losses) - 1
            self._last = index[last].item(), delta[last].item(), losses[last].item()
        return losses

    def accept(self, index: Tensor, delta: Tensor) -> None:
        known, self._known = self._known, None
        last, self._last = self._last, ()
        super().accept(index, delta)
        is_last = last and (index.tolist(), delta.tolist()) == ([last[0]], [last[1]])
        if is_last and known is not None and known[1] == self._place():
            self._know(last[2])

    def descend(self, *args, **kwargs) -> Descent:
        descent = super().descend(*args, **kwargs)
        if descent.places:
            self._know(descent.incumbents[-1])
        return descent

    def _keep(self, i: int, new) -> None:
        self._forget()
        super()._keep(i, new)

    def _take_up(self) -> None:
        refuse_autocast(self.flat.buffer.device)  # as the blocks that follow do
        self._follow_owner()
        super()._take_up()

    def _take_up_parts(self) -> None:
        self._forget()
        super()._take_up_parts()

    def _call(self):
        loss = super()._call()
        self._dtype = loss.dtype
        return loss


def opening_of(
    objective: Objective, loss: CompositeLoss, constants: Sequence[Tensor] = ()
) -> Opening | None:
    """An objective's, of this loss; None where the serial loop refuses it.

    None also where there are buffers, or where the loss writes to parameters that are not searched:
    the serial loop evaluates on the model's own, which an interrupt may keep it from restoring.
    Blocks have copies.
    """
    if next(loss.buffers(), None) is not None or _writes_to_others(objective, loss):
        return None
    try:
        return Opening(objective, loss, constants)
    except ValueError:  # a forward pass that moves the parameters
        return None


def _writes_to_others(objective: Objective, loss: CompositeLoss) -> bool:
    named = dict(loss.named_parameters())
    own = set(objective.params)
    searched = {name: p for name, p in named.items() if p in own}
    others = {name: p.detach().clone() for name, p in named.items() if p not in own}
    before = versions(list(others.values()))
    if others:
        with torch.no_grad(), seeded(objective.seed, objective.flat.buffer.device):
            loss.on_copies_of(searched, others, objective.inputs, objective.targets)
    return before != versions(list(others.values()))


def is_light(incumbent: Incumbent, kind: str) -> bool:
    """Whether the loss takes little but the overhead of its operations, on this kind of device.

    By counting, not by the clock: two runs are to decide alike. Not where a good part of it is the
    same at every trial point, as behind frozen layers: blocks have that once.
    """
    nodes = [n for n in incumbent.graph.nodes if n.op is not None and not n.is_view]
    moving = sum(bool(node.depends) for node in nodes)
    work = 0
    for node in nodes:
        count = flop_registry.get(node.op.overloadpacket)
        if count is not None:
            args, kwargs = incumbent.arguments(node, {})
            work += count(*args, **kwargs, out_val=node.value)
    is_little = work < _LIGHT.get(kind, _LIGHT["cpu"]) * len(nodes)
    return is_little and moving >= _MOVING * len(nodes)
