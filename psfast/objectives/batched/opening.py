"""A poll's first trial points one after another, where blocks cost more than what they save."""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from psfast.objectives.base import CompositeLoss, Descent, Objective
from psfast.objectives.batched.incumbent import Incumbent
from psfast.objectives.batched.trace import refuse_autocast
from psfast.objectives.serial import SerialModelObjective

# Floating-point operations of an average node, by the kind of device. A block, and an accepted
# change, take a launch and some Python for each node; a plain evaluation one or less, and all of
# the work. Measured where half of the trial points are lower, beside the serial loop: on a CPU
# blocks take 3.7 times as long at 0.12 million (an MLP), as long at 0.3 and 0.4 (a small CNN, a
# small transformer); on an H100 2.6 and 1.6 times at 0.4 and 6 million (a small transformer).
_LIGHT = {"cpu": 200_000, "cuda": 10_000_000}
_MOVING = 0.5  # of the nodes; dropout masks are some that do not


class Opening(SerialModelObjective):
    """The loss as the model itself computes it, for the trial points that a poll begins with.

    While much improves, most polls end with them: then nothing is ever stacked, and what
    is kept of the incumbent need not be brought up to date.
    """

    patience = 8  # what a block and an accepted change cost in plain evaluations: 8 to 26

    def __init__(self, *args, **kwargs):
        self._known: Tensor | None = None  # the incumbent's loss
        self._last: tuple = ()  # the last trial point at this incumbent, and its loss
        self._threads = torch.get_num_threads()
        super().__init__(*args, **kwargs)

    def __call__(self) -> Tensor:
        known, self._known = self._known, None  # an interrupt may come behind the look
        threads = torch.get_num_threads()  # bits may depend on it
        is_same = threads == self._threads and not self._watch.changed()
        if known is None or not is_same or not self._has_incumbent():
            self._last, self._threads = (), threads
            known = super().__call__().to(self._dtype)
            self._watch.look(pytree.tree_leaves((self.inputs, self.targets)))
        self._known = known
        return known.clone()

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
        if is_last and known is not None:
            self._known = torch.tensor(last[2], dtype=self._dtype)

    def descend(self, *args, **kwargs) -> Descent:
        descent = super().descend(*args, **kwargs)
        if descent.places:
            self._known = torch.tensor(descent.incumbents[-1], dtype=self._dtype)
        return descent

    def _keep(self, i: int, new) -> None:
        self._known, self._last = None, ()
        super()._keep(i, new)

    def set_batch(self, inputs, targets, *, seed: int | None = None) -> None:
        self._known = None
        super().set_batch(inputs, targets, seed=seed)

    def _take_up(self) -> None:
        refuse_autocast(self.flat.buffer.device)  # as the blocks that follow do
        known, self._known = self._known, None
        if not self._watch.has_other_parts() and self._has_incumbent():
            self._known = known
        super()._take_up()

    def _call(self):
        loss = super()._call()
        self._dtype = loss.dtype
        return loss


def opening_of(objective: Objective, loss: CompositeLoss) -> Opening | None:
    """An objective's, of this loss; None where the serial loop refuses it.

    None also where there are buffers: the serial loop evaluates on the model's own, which an
    interrupt may keep it from restoring, and does not find those that the incumbent leaves as
    they are. Blocks have copies.
    """
    if next(loss.buffers(), None) is not None:
        return None
    arguments = loss.model, loss.criterion, objective.inputs, objective.targets
    try:
        return Opening(*arguments, params=objective.params, seed=objective.seed)
    except ValueError:  # a forward pass that moves the parameters
        return None


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
