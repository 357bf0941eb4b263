"""Lightning: the mixin that runs a search step, ready-made tasks, the data module.

Nothing but this file, ``callbacks.py`` and ``train.py`` imports lightning.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from psfast.checks import check_count, check_number
from psfast.data import ResumableLoader, StateTrackingDataset, collate
from psfast.evaluation import (
    BatchObjectives,
    Scores,
    ScoreSums,
    sample_count,
    supervised_positions,
    unpack,
)
from psfast.models import DecoderOnlyTransformer, MaskedCrossEntropy
from psfast.objectives import Objective, check_backend
from psfast.optimizer import PatternSearch
from psfast.random_state import seeded
from psfast.reference import ReferencePatternSearch
from psfast.search import derive_seed
from psfast.search_simplex import SimplexGradient
from psfast.trial_metrics import uncounted

_LINE_SECONDS = 5.0
# Checkpoints of modules that keep one among their hyperparameters load with torch's defaults.
torch.serialization.add_safe_globals([SimplexGradient])


class BatchReport(NamedTuple):
    """What the search did on one training batch; None is what the reference does not tell.

    evaluations: trial points; accepted: coordinates of the changes, one more each time that it
    changed; loss_before: the incumbent's loss at first
    """

    evaluations: int
    accepted: list[int] | None
    loss_before: float | None
    evaluations_per_second: float


class PatternSearchMixin:
    """Put before ``LightningModule`` to train it with ``psfast.PatternSearch``.

        class MyModule(psfast.lightning.PatternSearchMixin, L.LightningModule):
            def configure_optimizers(self):
                return psfast.PatternSearch(self.parameters(), radius=0.1)

    Nothing else changes, but that ``on_before_optimizer_step``, where gradients are looked at, is
    not called. With automatic optimization one training batch is one search step, without any
    backward pass. Trial points run ``training_step`` without gradients, with
    ``self.log`` switched off and with the module's torchmetrics held still (they return NaN:
    a loss takes the functions of ``torchmetrics.functional``); then ``training_step`` runs once
    more on the accepted state, and what it logs is logged. It also updates BatchNorm
    statistics. A module whose loss is ``criterion(model(inputs), targets)`` says so in
    ``search_parts`` and gets the fast backends of ``psfast.objective``.

    A poll that takes long says every few seconds how far it is; a ``progress`` of the user's on
    the optimizer is called instead.

    Logged each batch: ``radius``, ``evaluations`` (in all), ``accepted`` (changes on this
    batch), ``evaluations_per_second``.

    With manual optimization call ``self.search_step(closure)`` in ``training_step``.

    evaluations_per_batch: search steps go on with one batch until they have decided so many
        trial points; None: one step a batch
    backend: of ``psfast.objective``, if there are ``search_parts``

    Refused with an error that names the argument: gradient clipping, accumulate_grad_batches,
    precision="16-mixed", more than one device.
    """

    evaluations_per_batch: int | None = None
    backend = "auto"
    last_search: BatchReport | None = None
    _in_trial = False
    _found: tuple[Objective, Tensor] | None = None  # what this batch's search ended on
    _objectives: BatchObjectives | None = None
    _told: frozenset[str] = frozenset()  # what need not be said again

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if L.LightningModule in order[: order.index(PatternSearchMixin)]:
            raise TypeError(
                f"{cls.__name__} must have PatternSearchMixin before LightningModule among its "
                "bases: behind it, it does nothing"
            )

    def search_parts(self, batch) -> tuple[nn.Module, nn.Module, Tensor, Tensor] | None:
        """(model, criterion, inputs, targets) if ``criterion(model(inputs), targets)`` is the loss.

        The same model and criterion for every batch keep what was prepared for them.
        None, the default, means that only ``training_step`` can tell the loss.
        """
        return None

    def search_step(self, closure: Callable | Objective, optimizer=None) -> Tensor:
        """One step of the search in manual optimization; counts in ``global_step``.

        closure: returns the loss; it runs once more on the accepted state, and only then
            ``self.log`` and BatchNorm take notice. Or a ``psfast.objective``, whose model runs
            once more, for BatchNorm.
        optimizer: default: ``self.optimizers()``; one that is not Lightning's wrapper does not
            count in ``global_step``, as everywhere in Lightning

        Returns the incumbent's loss.
        """
        wrapped = self.optimizers() if optimizer is None else optimizer
        search, counts = _unwrapped(wrapped), isinstance(wrapped, LightningOptimizer)
        if not _is_search(search):
            got = f"{len(search)} of them" if isinstance(search, list) else type(search).__name__
            raise TypeError(f"optimizer must be one psfast.PatternSearch, got {got}")
        refuse_what_cannot_work(self.trainer)
        seed = _mask_seed(search)
        # As LightningOptimizer.step does; it would hide an Objective in a closure.
        if counts:
            wrapped._on_before_step()
        with self._trials():
            loss = self._search(search, closure, steps=1)
        if counts:
            wrapped._on_after_step()
        again = closure
        if isinstance(closure, Objective):
            has_model = hasattr(closure, "model") and not closure.is_pure
            again = partial(closure.model, closure.inputs) if has_model else None
        if again is not None:
            with torch.no_grad(), seeded(seed, self.device), _without_backward():
                again()
        self._log_search(search)
        return loss

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """One batch's search steps, then ``training_step`` once more on the accepted state."""
        search = _unwrapped(optimizer)
        if not _is_search(search):
            return super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        refuse_what_cannot_work(self.trainer)
        training_step, own = self.training_step, self.__dict__.get("training_step")

        @torch.no_grad()
        def search_then_log(*args, **kwargs):
            batch = args[0] if args else next(iter(kwargs.values()))
            if isinstance(batch, Iterator):
                raise MisconfigurationException(
                    "training_step must take a batch, as all trial points are to see the same: "
                    "replace its dataloader_iter"
                )
            seed = _mask_seed(search)
            with self._trials():
                objective = self._objective(search, batch, seed)
                if objective is None:
                    objective = _loss_of(partial(training_step, *args, **kwargs))
                loss = self._search(search, objective)
            if isinstance(objective, Objective) and self.last_search.evaluations:
                self._found = objective, loss  # once converged, it may be of an earlier batch
            with seeded(seed, self.device):  # the mask of the search, so that the losses agree
                output = training_step(*args, **kwargs)
            self._log_search(search)
            return output

        # Lightning's closure runs self.training_step in its precision and profiling contexts:
        # the search takes its place for one call, and runs inside them too.
        self.training_step = search_then_log
        try:
            optimizer_closure()
        finally:
            self._found = None
            del self.training_step
            if own is not None:  # a compiled one
                self.training_step = own

    def __getstate__(self) -> dict:
        """For copies and pickles, which build an objective of their own."""
        state = super().__getstate__()
        state.pop("_objectives", None)
        return state

    def backward(self, loss: Tensor, *args, **kwargs) -> None:
        """Nothing, if the optimizer is a search."""
        if not self.automatic_optimization or not _is_search(self.trainer.optimizers[0]):
            return super().backward(loss, *args, **kwargs)
        # No gradients here. A batch that is only accumulated comes by on its way to no step.
        refuse_what_cannot_work(self.trainer)

    def log(self, *args, **kwargs) -> None:
        """``LightningModule.log``, but nothing at trial points."""
        if not self._in_trial:
            super().log(*args, **kwargs)

    def _search(self, search, objective, steps: int | None = None) -> Tensor:
        """One batch's search steps; ``self.last_search`` tells what they did."""
        reports, start, started = [], search.evaluations, time.perf_counter()
        with _lines_in_long_polls(search):
            while True:
                before = search.evaluations
                loss = search.step(objective)
                reports.append(getattr(search, "last_poll", None))
                decided = search.evaluations - start
                enough = decided >= (self.evaluations_per_batch or 0) or len(reports) == steps
                if enough or search.evaluations == before:  # converged
                    break
        seconds = max(time.perf_counter() - started, 1e-9)
        known = reports[0] is not None  # the reference reports nothing
        self.last_search = BatchReport(
            evaluations=decided,
            accepted=[index for r in reports for index, _ in r.accepted] if known else None,
            loss_before=reports[0].loss_before if known else None,
            evaluations_per_second=decided / seconds,
        )
        return loss

    def _objective(self, search, batch, seed) -> Objective | None:
        parts = self.search_parts(batch)
        if parts is None:
            if isinstance(search, PatternSearch):
                self._tell_once("training_step at one trial point after another: no search_parts")
            return None
        if not isinstance(parts, (tuple, list)) or len(parts) != 4:
            raise TypeError(
                "search_parts must return (model, criterion, inputs, targets) or None, got "
                + (f"{len(parts)} values" if isinstance(parts, (tuple, list)) else repr(parts))
            )
        model, criterion, inputs, targets = parts
        supervised_positions(criterion, targets)
        # Autocast, and the reference's own faults, live in training_step.
        if not isinstance(search, PatternSearch):
            return None
        if torch.is_autocast_enabled(self.device.type):
            self._tell_once(
                "training_step at one trial point after another: the fast backends serve no "
                'autocast (precision="32-true" has none)'
            )
            return None
        known = self._objectives
        asked = (model, criterion, search)
        if known is None or (known.model, known.criterion, known.optimizer) != asked:
            objectives = BatchObjectives(model, criterion, search, self.backend)
            chosen = objectives.on(inputs, targets, seed)
            # Not as a submodule, and not in the module's state: it belongs to this process.
            self.__dict__["_objectives"] = objectives
            if known is None:
                reasons = "".join(f"; not {name!r}: {why}" for name, why in chosen.why_not.items())
                rank_zero_info(f"psfast: backend {chosen.backend!r}{reasons}")
            elif known.criterion is not criterion:
                self._tell_once(
                    "search_parts returned another criterion than before, so its objective is "
                    "built anew: return the same object each time, unless the loss has changed",
                    rank_zero_warn,
                )
        return self._objectives.on(inputs, targets, seed)

    def _tell_once(self, message: str, tell: Callable | None = None) -> None:
        if message not in self._told:
            self._told |= {message}
            (tell or rank_zero_info)(f"psfast: {message}")

    def _log_search(self, search) -> None:
        report = self.last_search
        self.log("radius", search.radius, prog_bar=True, batch_size=1)
        self.log("evaluations", float(search.evaluations), batch_size=1)
        self.log("evaluations_per_second", report.evaluations_per_second, batch_size=1)
        if report.accepted is not None:
            self.log("accepted", float(len(report.accepted)), batch_size=1)

    @contextmanager
    def _trials(self):
        """Inside, nothing is logged or counted: most of what would be is rejected."""
        self._in_trial = True
        try:
            with uncounted(self):
                yield
        finally:
            self._in_trial = False


@contextmanager
def _lines_in_long_polls(search):
    """Lightning's bar stands still within a batch: say every few seconds how far the poll is."""
    if not isinstance(search, PatternSearch) or search.progress is not None:  # the user's own
        yield
        return
    last = time.perf_counter()

    def progress(tried: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if tried and now - last > _LINE_SECONDS:
            last = now
            rank_zero_info(f"psfast: {tried:,} of the poll's {total:,} trial points tried")

    search.progress = progress
    try:
        yield
    finally:
        search.progress = None


class _Task(L.LightningModule):
    """The steps and the scores that both tasks share."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        criterion: nn.Module | None = None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.criterion = MaskedCrossEntropy() if criterion is None else criterion
        self.make_optimizer = optimizer

    def forward(self, inputs):
        """The model's outputs."""
        return self.model(inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.model.parameters())

    def training_step(self, batch, batch_idx) -> Tensor:
        inputs, targets = unpack(batch)
        supervised_positions(self.criterion, targets)
        loss = self._loss(inputs, targets)
        self.log("train_loss", loss, prog_bar=True, batch_size=sample_count(targets))
        return loss

    def _loss(self, inputs, targets) -> Tensor:
        return self.criterion(self.model(inputs), targets)

    def on_train_start(self) -> None:
        """Raises MisconfigurationException if the checkpoint was of another optimizer."""
        optimizer = self.trainer.optimizers[0]
        missing = optimizer.defaults.keys() - optimizer.param_groups[0].keys()
        missing.discard("differentiable")  # torch adds it to the defaults of any that it loads
        if missing:
            raise MisconfigurationException(
                "the checkpoint must be of a run with the same optimizer: its state has no "
                f"{', '.join(sorted(missing))}, which {type(optimizer).__name__} needs"
            )

    def on_validation_epoch_start(self) -> None:
        self._sums = ScoreSums()

    def validation_step(self, batch, batch_idx) -> None:
        inputs, targets = unpack(batch)
        self._sums.add(self.criterion, self.model(inputs), targets)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val", self._sums.result())

    def on_test_epoch_start(self) -> None:
        self._sums = ScoreSums()

    def test_step(self, batch, batch_idx) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_scores("test", self._sums.result())

    def _log_scores(self, stage: str, scores: Scores) -> None:
        self.log(f"{stage}_loss", scores.loss, prog_bar=True)
        if not math.isnan(scores.perplexity):
            self.log(f"{stage}_perplexity", scores.perplexity)
        if not math.isnan(scores.accuracy):
            self.log(f"{stage}_accuracy", scores.accuracy, prog_bar=True)


class PatternSearchTask(PatternSearchMixin, _Task):
    """Trains any model by pattern search on ``criterion(model(inputs), targets)``.

    Batches are (inputs, targets) or {"x": inputs, "y": targets}. Logged: train_loss each
    step; val_loss and test_loss each epoch, over the supervised positions, each weighing the
    same, for a cross-entropy over classes with val_perplexity, val_accuracy and test_...; and
    what ``PatternSearchMixin`` logs.

    model: any module
    pattern_search_radius: the first step length
    optimizer: ``psfast.PatternSearch``, or a ``partial`` of it with further options; called
        with the parameters and the radius
    criterion: default: ``MaskedCrossEntropy()``
    evaluations_per_batch, backend: see ``PatternSearchMixin``
    """

    def __init__(
        self,
        model: nn.Module,
        pattern_search_radius: float = 0.1,
        optimizer: Callable[..., torch.optim.Optimizer] = PatternSearch,
        criterion: nn.Module | None = None,
        evaluations_per_batch: int | None = None,
        backend: str = "auto",
    ):
        super().__init__(model, partial(optimizer, radius=pattern_search_radius), criterion)
        check_number("pattern_search_radius", pattern_search_radius, above=0.0)
        check_count("evaluations_per_batch", evaluations_per_batch, optional=True)
        check_backend(backend)
        self.evaluations_per_batch = evaluations_per_batch
        self.backend = backend

    def search_parts(self, batch):
        """The task's model and criterion, on the batch's inputs and targets."""
        return self.model, self.criterion, *unpack(batch)

    def _loss(self, inputs, targets) -> Tensor:
        """The one that the search ended on, where another evaluation would do nothing beside."""
        objective, loss = self._found or (None, None)
        is_own = type(self).search_parts is PatternSearchTask.search_parts
        if objective is None or not (objective.is_pure and is_own):
            return super()._loss(inputs, targets)
        return loss


class PatternSearchTransformer(PatternSearchTask):
    """A ``DecoderOnlyTransformer`` that trains itself by pattern search: all in one class.

    radius, seed and any further options are ``psfast.PatternSearch``'s.
    """

    def __init__(
        self,
        vocab_size: int = 102,
        d_model: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        d_ff: int = 256,
        max_len: int = 128,
        dropout: float = 0.1,
        *,
        pad_token: int = 100,
        radius: float = 0.1,
        evaluations_per_batch: int | None = None,
        **search_options,
    ):
        super().__init__(
            DecoderOnlyTransformer(vocab_size, d_model, n_layers, n_heads, d_ff, max_len, dropout),
            radius,
            partial(PatternSearch, **search_options),
            MaskedCrossEntropy(pad_token),
            evaluations_per_batch,
        )
        self.save_hyperparameters()


class GradientTask(_Task):
    """``PatternSearchTask`` with a gradient optimizer instead, for comparison.

    optimizer: makes the optimizer from the parameters; default: ``torch.optim.Adam``
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        criterion: nn.Module | None = None,
    ):
        super().__init__(model, optimizer, criterion)


class StateTrackingDataModule(L.LightningDataModule):
    """Loaders for three datasets, by default the "small" ones of 8 bits, sharing no input.

    Any map-style datasets of {"x", "y"} samples serve; different lengths are padded. The
    training order is a function of (seed, epoch), and a checkpoint taken in the middle of an
    epoch resumes there.
    """

    def __init__(
        self,
        train_dataset: Dataset | None = None,
        val_dataset: Dataset | None = None,
        test_dataset: Dataset | None = None,
        *,
        batch_size: int = 4,
        pad_token: int = 100,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        check_count("batch_size", batch_size)
        given = train_dataset, val_dataset, test_dataset
        usual = ((200, "train"), (50, "val"), (50, "test"))
        self.train_dataset, self.val_dataset, self.test_dataset = (
            StateTrackingDataset(n, 8, seed=seed, split=split) if dataset is None else dataset
            for seed, (dataset, (n, split)) in enumerate(zip(given, usual, strict=True))
        )
        self.seed = seed
        self._options = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0,
            "collate_fn": partial(collate, pad_token=pad_token),
        }

    def train_dataloader(self) -> DataLoader:
        return ResumableLoader(self.train_dataset, seed=self.seed, **self._options)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_dataset, **self._options)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_dataset, **self._options)


def _unwrapped(optimizer):
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _is_search(optimizer) -> bool:
    return isinstance(optimizer, (PatternSearch, ReferencePatternSearch))


def _mask_seed(search) -> int:
    """One dropout mask a poll; plain numbers of the checkpoint decide it."""
    stream = search.polls if isinstance(search, PatternSearch) else search.evaluations
    return derive_seed(search.seed, stream)


def _loss_of(training_step: Callable) -> Callable:
    def closure():
        output = training_step()
        if isinstance(output, dict):
            if "loss" not in output:
                raise TypeError(
                    f"training_step must return a dict with 'loss', got {sorted(output)}"
                )
            output = output["loss"]
        if output is None:
            raise TypeError("training_step must return a scalar loss, got None")
        return output

    return closure


@contextmanager
def _without_backward():
    """Leave a closure at its ``backward()``, which has nothing to do here."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise


def refuse_what_cannot_work(trainer: L.Trainer) -> None:
    """Raise MisconfigurationException for what a search cannot do, naming the argument."""
    if trainer.gradient_clip_val:
        raise MisconfigurationException(
            "pattern search has no gradients to clip: remove "
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val})"
        )
    if trainer.accumulate_grad_batches > 1:
        raise MisconfigurationException(
            "pattern search has no gradients to accumulate: remove Trainer("
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}) and raise the batch size"
        )
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.precision == "16-mixed":
        raise MisconfigurationException(
            "pattern search compares losses that half precision cannot tell apart, and has no "
            'gradients to scale: replace Trainer(precision="16-mixed") by "32-true" or "bf16-mixed"'
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(
            "PatternSearchMixin searches in one process: replace Trainer with "
            f"{trainer.world_size} devices by Trainer(devices=1)"
        )
