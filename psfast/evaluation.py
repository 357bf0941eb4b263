"""Loss, perplexity and accuracy over the supervised positions, and the batches they come in."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from psfast.flat import same_parameters, trainable
from psfast.notices import warn_caller
from psfast.objectives import BACKENDS, objective
from psfast.objectives.base import CompositeLoss, Objective, versions
from psfast.random_state import draws


class Scores(NamedTuple):
    """What a validation found, each position weighing the same whatever batch it is in.

    loss: the mean loss, also where the criterion's reduction is "sum"; with class weights the
        mean that they weigh
    perplexity: exp(loss), NaN unless the criterion is a plain cross-entropy over classes
    accuracy: share of positions with the right argmax, NaN unless it is a cross-entropy over
        classes (``torch.nn.CrossEntropyLoss``, ``NLLLoss``, ``psfast.MaskedCrossEntropy`` or
        another criterion with an ``ignore_index`` for outputs (..., V), targets (...))
    count: supervised positions (without classes: samples)
    """

    loss: float
    perplexity: float
    accuracy: float
    count: int


class ScoreSums:
    """Adds up batches; ``result()`` is the ``Scores`` of all of them."""

    def __init__(self):
        self.loss, self.weight, self.correct, self.count = 0.0, 0.0, 0, 0
        self.classes = self.plain = True

    def add(self, criterion: Callable, outputs, targets) -> None:
        """Score one batch. Raises ValueError if no position is supervised."""
        supervised = supervised_positions(criterion, targets)
        count = weight = sample_count(targets) if supervised is None else int(supervised.sum())
        dim = _class_dim(criterion, outputs, targets)
        if dim is None:
            self.classes = False
        else:
            hits = outputs.argmax(dim) == targets
            self.correct += int(hits[supervised].sum())
            if getattr(criterion, "weight", None) is not None:
                weight = float(criterion.weight[targets[supervised]].sum())
                self.plain = False
            self.plain = self.plain and not getattr(criterion, "label_smoothing", 0.0)
        loss = float(criterion(outputs, targets))
        self.loss += loss if getattr(criterion, "reduction", "mean") == "sum" else loss * weight
        self.weight += weight
        self.count += count

    def result(self) -> Scores:
        if not self.count:
            raise ValueError("there was no batch to score")
        loss, nan = self.loss / self.weight if self.weight else math.nan, math.nan
        if not self.classes:
            return Scores(loss, nan, nan, self.count)
        perplexity = math.exp(loss) if loss < 700 else math.inf  # exp(710) overflows
        accuracy = self.correct / self.count
        return Scores(loss, perplexity if self.plain else nan, accuracy, self.count)


def _class_dim(criterion: Callable, outputs, targets) -> int | None:
    """The dimension of ``outputs`` that holds the classes' scores, None if there are no classes."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    over_classes = isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss))
    if (over_classes or criterion is F.cross_entropy) and not targets.is_floating_point():
        return min(1, outputs.ndim - 1)
    # MaskedCrossEntropy, and a user's own that masks as it does
    if hasattr(criterion, "ignore_index") and outputs.shape[:-1] == targets.shape:
        return -1
    return None


def sample_count(targets) -> int:
    """How many samples a batch holds, by the first tensor or array of its targets."""
    return next((len(leaf) for leaf in tree_leaves(targets) if getattr(leaf, "ndim", 0)), 1)


def supervised_positions(criterion: Callable, targets) -> Tensor | None:
    """Where the targets count, bool in the shape of ``targets``; None if they are no classes.

    Raises ValueError if nowhere: such a batch has no loss.
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    default = -100 if criterion is F.cross_entropy else None
    ignore_index = getattr(criterion, "ignore_index", default)
    if ignore_index is None:
        return torch.ones_like(targets, dtype=torch.bool)
    supervised = targets != ignore_index
    if not supervised.any():
        raise ValueError(
            f"a batch has no supervised position: all targets are ignore_index = {ignore_index}"
        )
    return supervised


@torch.no_grad()
def evaluate(model: nn.Module, criterion: Callable, loader: Iterable) -> Scores:
    """The ``Scores`` of ``model`` in eval mode over all batches; its mode is put back."""
    device = next(model.parameters()).device
    modes = modes_of(model)
    sums = ScoreSums()
    model.eval()
    try:
        for batch in loader:
            inputs, targets = unpack(batch, device)
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


def unpack(batch, device: torch.device | None = None) -> tuple:
    """(inputs, targets) of a batch that is a pair, or a mapping with "x" and "y".

    Each is a tensor, or a nest of lists, tuples and dicts that holds tensors. device: where the
    tensors go; None leaves them.

    Raises TypeError for anything else, and for a part that is None.
    """
    if isinstance(batch, Mapping) and "x" in batch and "y" in batch:
        parts = batch["x"], batch["y"]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        parts = tuple(batch)
    else:
        got = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f'a batch must be (inputs, targets) or {{"x": ..., "y": ...}}, got {got}')
    for name, part in zip(("inputs", "targets"), parts, strict=True):
        if part is None:
            raise TypeError(f"a batch must have {name}, got None")
    if device is None:
        return parts
    return tree_map(lambda part: part.to(device) if _moves(part) else part, parts, is_leaf=_moves)


def _moves(part) -> bool:
    return hasattr(part, "to")  # a tensor, or what holds some and knows how to move them


class BatchObjectives:
    """One objective taken on from batch to batch, so that its traces and work space are kept.

    optimizer: its trainable parameters are the ones that are searched
    backend: see ``psfast.objective``

    A batch that the objective refuses has one of its own, of a backend that serves it, which is
    said once; the next batch comes to the first one again.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable,
        optimizer: torch.optim.Optimizer,
        backend: str = "auto",
    ):
        self.model, self.criterion = model, criterion
        self.optimizer, self.backend = optimizer, backend
        self.objective: Objective | None = None
        self._first: Objective | None = None
        self._place: _Place | None = None
        self._draws: dict[tuple, bool] = {}
        self._warned = False

    def on(self, inputs, targets, seed: int) -> Objective:
        """The objective on this batch, with the dropout mask of ``seed`` if it draws any.

        The same batch and mask as before are the same objective: nothing is refreshed.

        Raises ValueError if no position is supervised.
        """
        supervised_positions(self.criterion, targets)
        modes = tuple(module.training for module in self.model.modules())
        if modes not in self._draws:
            self._draws[modes] = self._draws_random_numbers(inputs, targets)
        seed = seed if self._draws[modes] else 0
        params = trainable(p for group in self.optimizer.param_groups for p in group["params"])
        if self._first is not None and not same_parameters(params, self._first.params):
            self.objective = self._first = self._place = None  # some were frozen or added since
        if self._place is not None and self._place.is_at(inputs, targets, seed):
            return self.objective
        self._place = None  # until this batch is in place
        known = dict.fromkeys(f for f in (self._first, self.objective) if f is not None)
        self.objective = next(
            (f for f in known if _takes_on(f, inputs, targets, seed)), None
        ) or self._built(inputs, targets, params, seed)
        self._place = _Place.of(inputs, targets, seed)
        return self.objective

    @torch.no_grad()
    def _draws_random_numbers(self, inputs, targets) -> bool:
        """Whether the loss does, by whatever module or function: one evaluation on copies."""
        loss = CompositeLoss(self.model, self.criterion)
        device = self.optimizer.param_groups[0]["params"][0].device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when it is evaluated
            try:
                return draws(lambda: loss.on_copies(inputs, targets), device)
            except Exception:  # the objective will say what is wrong
                return True

    def _built(self, inputs, targets, params: list[nn.Parameter], seed: int) -> Objective:
        options = {"params": params, "backend": self.backend, "seed": seed}
        found = objective(self.model, self.criterion, inputs, targets, **options)
        first = self._first
        if first is None or BACKENDS.index(found.backend) <= BACKENDS.index(first.backend):
            self._first = found
        elif not self._warned:
            self._warned = True
            reason = found.why_not.get(first.backend, "it refuses the batch")
            warn_caller(
                f"a batch is evaluated by {found.backend!r}, not by {first.backend!r} as those "
                f"before: {reason}"
            )
        return found


def _takes_on(known: Objective, inputs, targets, seed: int) -> bool:
    try:
        known.set_batch(inputs, targets, seed=seed)
    except ValueError:  # another shape or mode than its backend can serve
        return False
    return True


class _Place(NamedTuple):
    """The batch and mask that an objective is on."""

    leaves: list
    spec: TreeSpec
    versions: list[int | None]
    seed: int

    @classmethod
    def of(cls, inputs, targets, seed: int) -> "_Place":
        leaves, spec = tree_flatten((inputs, targets))
        return cls(leaves, spec, versions(leaves), seed)

    def is_at(self, inputs, targets, seed: int) -> bool:
        if seed != self.seed or self.versions != versions(self.leaves):
            return False  # another mask, or a batch that was written to since
        leaves, spec = tree_flatten((inputs, targets))
        return spec == self.spec and all(map(_same, self.leaves, leaves))


def _same(a, b) -> bool:
    """Whether both hold the same; of an object that is no tensor nobody can tell."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.device == b.device and torch.equal(a, b))
    return isinstance(a, (int, float, str)) and type(a) is type(b) and a == b
