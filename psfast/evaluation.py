"""Loss, perplexity and accuracy over the supervised positions, and the batches they come in."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from psfast.flat import same_parameters, trainable
from psfast.objectives import objective
from psfast.objectives.base import Objective


class Scores(NamedTuple):
    """What a validation found, each position weighing the same whatever batch it is in.

    loss: the mean loss
    perplexity: exp(loss), accuracy: share of positions with the right argmax; both NaN where
        the targets are not classes
    count: supervised positions (without classes: samples)
    """

    loss: float
    perplexity: float
    accuracy: float
    count: int


class ScoreSums:
    """Adds up batches; ``result()`` is the ``Scores`` of all of them."""

    def __init__(self):
        self.loss, self.correct, self.count, self.classes = 0.0, 0, 0, True

    def add(self, criterion: nn.Module, outputs: Tensor, targets: Tensor) -> None:
        """``criterion``: with the mean reduction, and an ``ignore_index`` if it masks.

        outputs: (..., V) or (B, V, ...) with integer targets (...) are classes; anything else
        has a loss alone.

        Raises ValueError if no position is supervised.
        """
        supervised = supervised_positions(criterion, targets)
        if supervised is None or outputs.ndim != targets.ndim + 1:
            self.classes, count = False, len(targets)
        else:
            count = int(supervised.sum())
            # Classes come last in a sequence model's outputs, second in torch's own convention.
            predicted = outputs.argmax(-1 if outputs.shape[:-1] == targets.shape else 1)
            self.correct += int((predicted == targets)[supervised].sum())
        self.loss += float(criterion(outputs, targets)) * count
        self.count += count

    def result(self) -> Scores:
        if not self.count:
            raise ValueError("there was no batch to score")
        loss, nan = self.loss / self.count, math.nan
        if not self.classes:
            return Scores(loss, nan, nan, self.count)
        perplexity = math.exp(loss) if loss < 700 else math.inf  # exp(710) overflows
        return Scores(loss, perplexity, self.correct / self.count, self.count)


def supervised_positions(criterion: nn.Module, targets: Tensor) -> Tensor | None:
    """Where the targets count, bool in the shape of ``targets``; None if they are no classes.

    Raises ValueError if nowhere: such a batch has no loss.
    """
    if targets.is_floating_point():
        return None
    ignore_index = getattr(criterion, "ignore_index", None)
    if ignore_index is None:
        return torch.ones_like(targets, dtype=torch.bool)
    supervised = targets != ignore_index
    if not supervised.any():
        raise ValueError(
            f"a batch has no supervised position: all targets are ignore_index = {ignore_index}"
        )
    return supervised


@torch.no_grad()
def evaluate(model: nn.Module, criterion: nn.Module, loader: Iterable) -> Scores:
    """The ``Scores`` of ``model`` in eval mode over all batches; its mode is put back."""
    device = next(model.parameters()).device
    modes = modes_of(model)
    sums = ScoreSums()
    model.eval()
    try:
        for batch in loader:
            inputs, targets = (part.to(device) for part in unpack(batch))
            sums.add(criterion, model(inputs), targets)
    finally:
        set_modes(modes)
    return sums.result()


def modes_of(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Each module with its mode, for ``set_modes``."""
    return [(module, module.training) for module in model.modules()]


def set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Put the modules back into training or eval mode, as ``modes_of`` found them."""
    for module, training in modes:
        module.training = training


def unpack(batch) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of a batch that is a pair, or a mapping with "x" and "y"."""
    if isinstance(batch, Mapping) and "x" in batch and "y" in batch:
        return batch["x"], batch["y"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    got = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
    raise TypeError(f'a batch must be (inputs, targets) or {{"x": ..., "y": ...}}, got {got}')


class BatchObjectives:
    """One objective taken on from batch to batch, so that its traces and work space are kept.

    optimizer: its trainable parameters are the ones that are searched
    backend: see ``psfast.objective``
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        backend: str = "auto",
    ):
        self.model, self.criterion = model, criterion
        self.optimizer, self.backend = optimizer, backend
        self.objective: Objective | None = None
        self._place: _Place | None = None

    def on(self, inputs: Tensor, targets: Tensor, seed: int) -> Objective:
        """The objective on this batch, with the dropout mask of ``seed`` if there is dropout.

        The same batch and mask as before are the same objective: nothing is refreshed.

        Raises ValueError if no position is supervised.
        """
        supervised_positions(self.criterion, targets)
        if not self._has_dropout():
            seed = 0
        params = trainable(p for group in self.optimizer.param_groups for p in group["params"])
        if self.objective is not None and not same_parameters(params, self.objective.params):
            self.objective = self._place = None  # some were frozen or added since
        if self._place is not None and self._place.is_at(inputs, targets, seed):
            return self.objective
        self._place = None  # until this batch is in place
        if not self._taken_on(inputs, targets, seed):
            self.objective = objective(
                self.model,
                self.criterion,
                inputs,
                targets,
                params=params,
                backend=self.backend,
                seed=seed,
            )
        self._place = _Place((inputs, targets), (inputs._version, targets._version), seed)
        return self.objective

    def _taken_on(self, inputs: Tensor, targets: Tensor, seed: int) -> bool:
        if self.objective is None:
            return False
        try:
            self.objective.set_batch(inputs, targets, seed=seed)
        except ValueError:  # another shape or mode than its backend can serve
            return False
        return True

    def _has_dropout(self) -> bool:
        return any(
            isinstance(module, nn.modules.dropout._DropoutNd) and module.p and module.training
            for module in self.model.modules()
        )


class _Place(NamedTuple):
    """The batch and mask that an objective is on."""

    batch: tuple[Tensor, Tensor]
    versions: tuple[int, int]
    seed: int

    def is_at(self, inputs: Tensor, targets: Tensor, seed: int) -> bool:
        if seed != self.seed or self.versions != tuple(part._version for part in self.batch):
            return False  # another mask, or a batch that was written to since
        return all(
            a is b or (a.shape == b.shape and a.device == b.device and torch.equal(a, b))
            for a, b in zip(self.batch, (inputs, targets), strict=True)
        )
