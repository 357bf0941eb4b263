"""What a training run keeps and tells: checkpoints, summary, acceptance by tensor, W&B."""

import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from psfast.flat import trainable


class LastCheckpoint(L.Callback):
    """Keeps ``dirpath/last.ckpt`` at most ``seconds`` old, and writes it when training ends.

    SIGTERM, which Lightning heeds after the batch (with ``ValidationsEnd`` also after the
    validation behind it), ends it too. Written whole or not at all: a run killed at any moment
    leaves one that resumes.
    """

    def __init__(self, dirpath: str, seconds: float = 30.0):
        self.path = Path(dirpath) / "last.ckpt"
        self.seconds = seconds
        self._saved = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if time.monotonic() - self._saved >= self.seconds:
            self._save(trainer)

    def on_train_end(self, trainer, module) -> None:
        self._save(trainer)

    def on_exception(self, trainer, module, exception) -> None:
        # Only here is it sure that the state is that of the end of a batch.
        if isinstance(exception, SIGTERMException) and trainer.training:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        unfinished = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(unfinished, weights_only=False)
        unfinished.replace(self.path)
        self._saved = time.monotonic()


class ValidationsEnd(L.Callback):
    """SIGTERM waits for the end of a fit's validation: no checkpoint could go on from amid one."""

    def __init__(self):
        self._handler: Callable | int | None = None  # of others
        self._came = False

    def on_validation_start(self, trainer, module) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and in_main:
            self._handler = signal.signal(signal.SIGTERM, self._wait)

    def _wait(self, signum, frame) -> None:
        self._came = True

    def on_validation_end(self, trainer, module) -> None:
        self._put_back()
        if self._came:
            self._came = False
            signal.raise_signal(signal.SIGTERM)

    def on_exception(self, trainer, module, exception) -> None:
        self._put_back()

    def _put_back(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None


class RunSettings(L.Callback):
    """Keeps a run's configuration in its checkpoints; warns where a resumed run has another.

    The state of the optimizer goes on as it was, so that the run continues bit for bit: some of
    what was given anew has no effect. What is no state (data, batch size, dropout) goes on as the
    new run has it, so what the first run was given must be given again.

    config: the parts of the configuration that decide the results, nested
    given: keys of the configuration with their values, of what was given to this run
    """

    def __init__(self, config: Mapping[str, object], given: Mapping[str, object]):
        self.config = dict(_flattened(config))
        self.given = given
        self._before: dict[str, object] | None = None  # not resumed

    def state_dict(self) -> dict:
        return {"config": self.config}

    def load_state_dict(self, state: dict) -> None:
        self._before = state["config"]

    def on_train_start(self, trainer, module) -> None:
        if self._before is None:
            return
        optimizer = trainer.optimizers[0]
        kept = dict(optimizer.param_groups[0])
        kept |= {n: getattr(optimizer, n) for n in ("radius", "seed") if hasattr(optimizer, n)}
        for key, value in self.given.items():
            name = _state_name(key)
            if name in kept and kept[name] != value:
                rank_zero_warn(
                    f"{key}={value} is not the optimizer's {name}: it goes on with that of the "
                    f"checkpoint, {kept[name]}"
                )
        missing = [
            text
            for key, text in self._differing(self._before)
            if key not in self.given
            and not (key.startswith(_OPTIMIZER) and _state_name(key) in kept)
        ]
        if missing:
            rank_zero_warn(
                f"the checkpoint's run was given other settings: {', '.join(missing)}. To go on "
                "with that run, give them again"
            )

    def other_model(self, checkpoint: str) -> str:
        """What the model of the checkpoint's run was given, and what this run's is."""
        before = torch.load(checkpoint, weights_only=False)["callbacks"][self.state_key]["config"]
        return ", ".join(text for key, text in self._differing(before) if key.startswith("model."))

    def _differing(self, before: dict[str, object]) -> list[tuple[str, str]]:
        """Each key that another run gave another value, and what to say of it."""
        keys = sorted(before.keys() | self.config.keys())
        pairs = [(key, before.get(key), self.config.get(key)) for key in keys]
        return [(key, f"{key}={then} (here {now})") for key, then, now in pairs if then != now]


_OPTIMIZER = ("optimizer.", "task.pattern_search_")


def _state_name(key: str) -> str:
    """What the optimizer's state calls the setting."""
    return key.rpartition(".")[2].removeprefix("pattern_search_")


def _flattened(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class AcceptanceByTensor(L.Callback):
    """Logs ``accepted/NAME`` of each tensor at a validation: its changes since the one before.

    Not each batch, as so many values would take a noticeable part of a short search step.
    """

    def __init__(self):
        self._accepted: list[int] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        report = getattr(module, "last_search", None)
        if report is not None and report.accepted is not None:
            self._accepted += report.accepted

    def state_dict(self) -> dict:
        return {"accepted": self._accepted}

    def load_state_dict(self, state: dict) -> None:
        self._accepted = list(state["accepted"])

    def on_validation_end(self, trainer, module) -> None:
        if not self._accepted:
            return
        groups = trainer.optimizers[0].param_groups
        params = trainable(p for group in groups for p in group["params"])
        names = {p: name for name, p in module.named_parameters()}
        ends = torch.tensor([p.numel() for p in params]).cumsum(0)
        tensor = torch.bucketize(torch.tensor(self._accepted), ends, right=True)
        counts = tensor.bincount(minlength=len(params)).tolist()
        values = {f"accepted/{names[p]}": float(n) for p, n in zip(params, counts, strict=True)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._accepted = []


class RunSummary(L.Callback):
    """First and last losses, trial points and time of a run, also over resumed parts of it.

    ``values(trainer)`` gives them; the first val_loss is the sanity check's, which sees the
    model before any step.
    """

    def __init__(self):
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.seconds_before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self.seconds_before + running

    def on_train_start(self, trainer, module) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.last["train_loss"] = outputs["loss"].item()
        report = getattr(module, "last_search", None)
        before = None if report is None else report.loss_before
        self.first.setdefault("train_loss", self.last["train_loss"] if before is None else before)

    def on_validation_end(self, trainer, module) -> None:
        for name in ("val_loss", "val_accuracy"):
            if name in trainer.callback_metrics:
                self.last[name] = trainer.callback_metrics[name].item()
                if trainer.global_step == 0:
                    self.first.setdefault(name, self.last[name])

    def on_train_end(self, trainer, module) -> None:
        self.seconds_before, self._started = self.seconds, None

    def state_dict(self) -> dict:
        return {"first": self.first, "last": self.last, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.first, self.last = dict(state["first"]), dict(state["last"])
        self.seconds_before = state["seconds"]

    def values(self, trainer: L.Trainer) -> dict[str, float | str | None]:
        """The keys of ``summary.json``; None for what this run has not."""
        search = trainer.optimizers[0]
        evaluations = getattr(search, "evaluations", None)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        kept = [c.path for c in trainer.callbacks if isinstance(c, LastCheckpoint)]
        last = [path for path in kept if path.exists()]
        return {
            "evaluations": evaluations,
            "seconds": self.seconds,
            "evaluations_per_second": evaluations and evaluations / max(self.seconds, 1e-9),
            "train_loss_first": self.first.get("train_loss"),
            "train_loss_last": self.last.get("train_loss"),
            "val_loss_first": self.first.get("val_loss"),
            "val_loss_last": self.last.get("val_loss"),
            "val_accuracy": self.last.get("val_accuracy"),
            "radius": getattr(search, "radius", None),
            "checkpoint": best or (str(last[0]) if last else None),
        }


def write_summary(values: dict, path: Path) -> str:
    """Write ``values`` as JSON to ``path``, whole or not at all; returns them as a table."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(values, indent=2) + "\n")
    unfinished.replace(path)
    shown = {name: f"{v:,.6g}" if isinstance(v, float) else v for name, v in values.items()}
    shown = {name: f"{v:,}" if isinstance(v, int) else v for name, v in shown.items()}
    return "\n".join(f"{name:<24}{'-' if v is None else v}" for name, v in shown.items())


def wandb_logger(name: str, offline: bool | None = None, **options) -> WandbLogger:
    """A ``WandbLogger`` for a run called ``name`` with a unique suffix.

    offline: None means: if there is no API key. Raises MisconfigurationException for False
        without one. WANDB_MODE, and a mode in wandb's own settings, come first.
    """
    import wandb

    if offline not in (None, True, False):
        raise TypeError(f"logger.offline must be true, false or null, got {offline!r}")
    mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
    if mode in ("offline", "dryrun", "disabled"):
        offline = mode != "disabled"  # with it, nothing is to be written either
    elif not offline and not wandb.login(prompt=False, verify=False):
        if offline is False:
            raise MisconfigurationException(
                "logger.offline=False needs a Weights & Biases key: run `wandb login`, or set "
                "WANDB_API_KEY, or leave logger.offline out and sync later with `wandb sync`"
            )
        rank_zero_info("psfast: no Weights & Biases key, logging offline (see `wandb sync`)")
        offline = True
    if offline:
        if options.get("log_model"):
            raise MisconfigurationException("log_model needs a run that is not offline")
        # Lightning's own `offline` only sets WANDB_MODE, which wandb has read by now, and says so.
        options["mode"] = "offline"
    return WandbLogger(name=f"{name}-{secrets.token_hex(2)}", **options)


def finish_wandb(failed: bool) -> None:
    """End the W&B run of this process, if there is one, so that the next starts its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=int(failed))
