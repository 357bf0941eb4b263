"""A decoder-only transformer's loss on the CPU, from trial point to loss in one C++ call."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from psfast import ops
from psfast.flat import same_parameters, starts_of, trainable
from psfast.objectives.base import Descent, check_block, check_range
from psfast.objectives.fused_model import FusedModelObjective, sizes_of, why_not_fused_model
from psfast.objectives.watch import Watch
from psfast.random_state import seeded

_NONE = torch.empty(0, dtype=torch.int64)
_FEW = 64  # accepted coordinates up to which preparing what each one touches is cheaper


class FusedObjective(FusedModelObjective):
    """``MaskedCrossEntropy(model(inputs), targets)``, whole blocks of trial points at a time.

    model: a ``DecoderOnlyTransformer`` in float32 or float64 on the CPU
    criterion: a ``MaskedCrossEntropy``
    inputs, targets: (B, T) integers
    params: those that ``index`` counts through, in order; default: all trainable ones
    seed: of the dropout mask, the one that a forward pass under this seed would draw

    Losses are float64, also where the model is float32: the incumbent's plus the difference.
    A trial point that cannot change the loss has the incumbent's, bitwise; any other's has the
    same bits whatever its block, its place there and the number of threads. Parameters must be
    finite: where one is infinite the loss may be NaN though the model's is not.

    Raises ValueError with the reason where it cannot serve.
    """

    descends = True

    def __init__(self, model, criterion, inputs, targets, *, params=None, seed: int = 0):
        params = trainable(model.parameters()) if params is None else list(params)
        reason = why_not_fused_model(model, criterion)
        reason = reason or ops.why_not_fused(model.head.weight.device, model.head.weight.dtype)
        if reason:
            raise ValueError(reason)
        self._all = list(model.parameters())
        known = dict(zip(self._all, starts_of(self._all), strict=True))
        super().__init__(params)
        self.model, self.criterion, self.seed = model, criterion, seed
        self.inputs, self.targets = inputs, targets
        self._watch = Watch(model, self.params)
        # The ops count through all parameters; None where `index` does so too.
        self._shift = None
        if not same_parameters(self._all, self.params):
            starts = torch.tensor([known[p] for p in self.params])
            self._bounds = torch.tensor(self.flat.offsets[1:])
            self._shift = starts - torch.tensor(self.flat.offsets[:-1])
        self._plan = self._scratch = None
        self._written: list[Tensor] = []  # what was accepted since the last refresh
        self._fresh_of: int | None = None
        self._weights_of: int | None = None  # the same of the prepared weights alone
        self._prepare()

    def __call__(self) -> Tensor:
        self._follow()
        return self._loss.clone()

    def losses(self, index: Tensor, delta: Tensor, *, stop_below: float | None = None) -> Tensor:
        check_block(index, delta)
        self._follow()
        return ops.fused_losses(self._weights, self._plan, *self._for_ops(index, delta))

    def loss_at(self, index: Tensor, delta: Tensor) -> Tensor:
        check_block(index, delta)
        self._follow()
        index, delta = self._for_ops(index, delta)
        if self._scratch is None:
            self._scratch = torch.zeros_like(self._plan.workspace)
        weights = self._weights.index_add(0, index, delta)
        return ops.fused_loss(weights, self._plan._replace(workspace=self._scratch))

    def accept(self, index: Tensor, delta: Tensor) -> None:
        check_block(index, delta)
        self._follow()
        inner, moved = self._for_ops(index, delta)
        with self._changing():
            self._written.append(inner)
            self.flat.add(index, delta)
            if self._shift is not None:
                self._weights[inner] += moved

    def descend(self, index, delta, *, incumbent, margin, most, gap) -> Descent:
        check_block(index, delta)
        self._follow()
        inner, moved = self._for_ops(index, delta)
        with self._changing():
            try:
                found = ops.fused_descend(
                    self._weights, self._plan, inner, moved, incumbent, margin, most, gap
                )
            except BaseException:
                self.flat.note_write()  # some may have been accepted
                raise
            losses, places, incumbents, counts = found
            decided, accepted, evaluated = counts.tolist()
            if accepted:
                places, incumbents = places[:accepted], incumbents[:accepted]
                self._loss = incumbents[-1].clone()
                if self._shift is not None:
                    self.flat.buffer[index[places]] = self._weights[inner[places]]
                self.flat.note_write()
        return Descent(
            losses[:decided], places[:accepted].tolist(), incumbents[:accepted].tolist(), evaluated
        )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        weights_of, self._weights_of = self._weights_of, None
        with super()._changing():
            yield
        self._weights_of = weights_of

    def _prepare(self) -> None:
        """Take up the model and the batch as they are now."""
        if self._watch.changed():
            self._weights_of = None  # before the look below, or an interrupt could hide it
        if self._take_up():
            self._all = list(self.model.parameters())
        inputs, targets = self.inputs.long().contiguous(), self.targets.long().contiguous()
        sizes = sizes_of(self.model, self.criterion)
        mask = _dropout_masks(self.model, inputs.shape, self.seed)
        old = self._plan
        self.flat.changed()
        is_other = self._is_of_other_dtype()
        is_new = old is None or is_other or old.sizes != sizes or old.tokens.shape != inputs.shape
        if is_new or (old.mask is None) != (mask is None):  # some products are of a loss without
            self._weights_of = None
        if is_new:
            eps = self.model.final_norm.eps
            self._plan = ops.fused_plan(sizes, eps, inputs, targets, mask, self.flat.buffer)
            self._scratch = None
        else:
            self._plan = old._replace(tokens=inputs, targets=targets, mask=mask)
        self._refresh(same_batch=False)

    def _is_of_other_dtype(self) -> bool:
        return self._plan is not None and self._plan.workspace.dtype != self.flat.buffer.dtype

    def _for_ops(self, index: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        index = index.contiguous()
        check_range(index, self.flat.size)
        if self._shift is not None:
            index = index + self._shift[torch.bucketize(index, self._bounds, right=True)]
        return index, delta.to(self.flat.buffer.dtype).contiguous()

    def _follow(self) -> None:
        looks = self._must_look()
        if looks:
            self.flat.changed()
        has_other_values = self._fresh_of != self.flat.changes
        is_new = self._fresh_of is None
        if looks and (is_new or self._watch.changed() or self._is_of_other_dtype()):
            self._fresh_of = None
            self._prepare()
        elif has_other_values or self._written:
            self._refresh(same_batch=True)

    def _refresh(self, same_batch: bool) -> None:
        """Take up the parameters' values; or only what was accepted, as late as this: between an
        accept and the next evaluation there often is another batch."""
        changed = None
        if self._weights_of == self.flat.changes:
            written = torch.cat(self._written) if self._written else _NONE
            changed = written if len(written) <= _FEW else None
        elif self._shift is None:
            self._weights = self.flat.buffer
        else:
            self._weights = torch.cat([p.detach().reshape(-1) for p in self._all])
        self._fresh_of = self._weights_of = None
        self._loss = ops.fused_refresh(self._weights, self._plan, changed, same_batch)
        self._written.clear()
        self._fresh_of = self._weights_of = self.flat.changes


def _dropout_masks(model, shape: torch.Size, seed: int) -> Tensor | None:
    """(n_layers, B, T, d_model): what dropout multiplies by, as a forward pass under ``seed``."""
    drops = [block.ff[3] for block in model.blocks]
    if not any(drop.training and drop.p for drop in drops):
        return None
    ones = torch.ones(*shape, model.head.in_features, dtype=model.head.weight.dtype)
    with seeded(seed, ones.device):
        return torch.stack([F.dropout(ones, drop.p, drop.training) for drop in drops])
