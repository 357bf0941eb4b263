"""``psfast-train``: assembles a run from the Hydra configuration in ``psfast/configs``."""

import logging
import os
import signal
import sys
import threading
import traceback
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

_NOT_OF_USE = (
    ".*does not have many workers.*",
    ".*LeafSpec.*is deprecated.*",
    ".*Previous log files in this directory will be deleted.*",  # they are kept
)
_OF_BAD_CODE = (AssertionError, AttributeError, ArithmeticError, IndexError)

# What decides a run's results; the rest says how long it runs and what is kept of it.
_RESULT = (
    "seed",
    "model",
    "train_dataset",
    "val_dataset",
    "test_dataset",
    "datamodule",
    "optimizer",
    "task",
)


def train(config) -> None:
    """One run: build, fit, validate, test, summarise. ``config``: see ``psfast/configs``.

    Ctrl-C and SIGTERM end it after the batch, with a checkpoint and a summary, by SystemExit.
    """
    import lightning
    import torch
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from omegaconf import OmegaConf

    from psfast.callbacks import (
        AcceptanceByTensor,
        RunSettings,
        RunSummary,
        ValidationsEnd,
        finish_wandb,
        write_summary,
    )
    from psfast.checks import check_count
    from psfast.lightning import PatternSearchMixin, refuse_what_cannot_work

    for not_of_use in _NOT_OF_USE:
        warnings.filterwarnings("ignore", message=not_of_use)
    logging.getLogger("lightning").propagate = False  # Hydra's would say it all again
    check_count("seed", config.seed, least=0, below=2**32)  # numpy's, which Lightning seeds too
    check_count("threads", config.threads, optional=True)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    if config.ckpt_path is not None:
        _check_checkpoint(Path(config.ckpt_path))
    failed = True
    try:
        loggers = [logger] if (logger := instantiate(config.logger)) else []
        if loggers and not isinstance(logger, CSVLogger):  # psfast.plots reads the CSV
            loggers.append(CSVLogger(run_dir, name=None, version="csv"))
        if loggers:
            _keep_former_metrics(run_dir / "csv" / "metrics.csv")
        task = instantiate(
            config.task, model=instantiate(config.model), optimizer=instantiate(config.optimizer)
        )
        datamodule = instantiate(
            config.datamodule,
            train_dataset=instantiate(config.train_dataset),
            val_dataset=instantiate(config.val_dataset),
            test_dataset=instantiate(config.test_dataset),
        )
        settings = OmegaConf.to_container(config, resolve=True)
        keys = [override.partition("=")[0].lstrip("+~") for override in hydra.overrides.task]
        given = {key: OmegaConf.select(config, key) for key in keys}
        summary = RunSummary()
        run_settings = RunSettings({name: settings[name] for name in _RESULT}, given)
        callbacks = [  # those that keep something first: what saves comes behind
            run_settings,
            AcceptanceByTensor(),
            summary,
            *instantiate(config.callbacks).values(),
            ValidationsEnd(),
        ]
        trainer = instantiate(config.trainer, logger=loggers, callbacks=callbacks)
        if isinstance(task, PatternSearchMixin):
            refuse_what_cannot_work(trainer)
        for logger in loggers:
            logger.log_hyperparams(settings)
        status = 0
        with _ctrl_c_waits(trainer) as pressed:
            try:
                trainer.fit(task, datamodule, ckpt_path=config.ckpt_path)
            except SIGTERMException:
                status = 128 + (signal.SIGINT if pressed else signal.SIGTERM)
            except RuntimeError as error:
                if config.ckpt_path is None or "loading state_dict" not in str(error):
                    raise
                raise ValueError(
                    "ckpt_path must be a checkpoint of the same model, got one of "
                    f"{run_settings.other_model(config.ckpt_path)}: give that again"
                ) from error
        if not status:  # the last epochs may have had no validation of their own
            trainer.validate(task, datamodule, verbose=False)
        table = write_summary(summary.values(trainer), run_dir / "summary.json")
        if not status:
            trainer.test(task, datamodule, verbose=False)
        failed = bool(status)
    finally:
        finish_wandb(failed)
    print(f"\n{table}\n{'summary':<24}{run_dir / 'summary.json'}")
    if status:
        sys.exit(status)


def _check_checkpoint(path: Path) -> None:
    """Raise for what is no checkpoint; torch's and Lightning's own errors do not name it."""
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path must be a checkpoint's file, got {path}")
    if not zipfile.is_zipfile(path) or "pytorch-lightning_version" not in torch.load(
        path, map_location="cpu", mmap=True, weights_only=False
    ):
        raise ValueError(f"ckpt_path must be a checkpoint of psfast-train, got {path}")


def _keep_former_metrics(path: Path) -> None:
    """A run that goes on in its own folder: Lightning would delete what was logged before."""
    if path.exists():
        number = 1
        while (kept := path.with_name(f"metrics.before-{number}.csv")).exists():
            number += 1
        path.rename(kept)
        print(f"psfast: what this folder's last run logged is now {kept}", file=sys.stderr)


@contextmanager
def _ctrl_c_waits(trainer):
    """In ``trainer.fit``, the first Ctrl-C is a SIGTERM, which waits for the batch to end.

    Yields a list, empty until then. The second Ctrl-C ends the run at once.
    """
    pressed: list[int] = []
    on_interrupt = signal.getsignal(signal.SIGINT)

    def wait(signum, frame):
        signal.signal(signal.SIGINT, on_interrupt)
        if not (trainer.training or trainer.validating):
            return on_interrupt(signum, frame)
        pressed.append(signum)
        part = "validation" if trainer.validating else "batch"
        print(f"\npsfast: stopping after this {part}; Ctrl-C again to stop now", file=sys.stderr)
        signal.raise_signal(signal.SIGTERM)

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(on_interrupt):  # ignored, as behind nohup
        yield pressed
        return
    signal.signal(signal.SIGINT, wait)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, on_interrupt)


def main() -> None:
    """The command: bad input ends it with one line and exit status 1."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing
    try:
        import hydra

        hydra.main("pkg://psfast.configs", "pattern_search_train", version_base="1.3")(train)()
    except Exception as error:
        if wants_traceback:
            raise
        print(f"psfast-train: error: {_one_line(error)}", file=sys.stderr)
        print("(HYDRA_FULL_ERROR=1 shows where it comes from)", file=sys.stderr)
        sys.exit(1)


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f'{error}; install the training extra: pip install "psfast[train]"'
    if type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    words = error.args[0] if isinstance(error, KeyError) and error.args else error  # unquoted
    line = " ".join(str(words).split())
    if isinstance(error, _OF_BAD_CODE):  # of a library that had not expected the value
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = f"{type(error).__name__}: {line} (at {place.filename}:{place.lineno})"
    return line or type(error).__name__


if __name__ == "__main__":
    main()
