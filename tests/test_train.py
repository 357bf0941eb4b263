"""The command ``psfast-train``: the document's overrides, its outputs, its refusals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("hydra")
pytest.importorskip("lightning")

TINY = [
    "datamodule.batch_size=4",
    "model.d_model=16",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.d_ff=16",
    "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.enable_progress_bar=false",
    "threads=1",
]


def command(*overrides, cwd, **variables):
    """variables: of the environment; None takes one out"""
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    environment |= {"HYDRA_FULL_ERROR": None, **variables}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.Popen(
        [sys.executable, "-m", "psfast.train", *overrides],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*overrides, cwd, **variables):
    process = command(*overrides, cwd=cwd, **variables)
    out, err = process.communicate(timeout=280)  # the extension may compile first
    return process.returncode, out, err


def the_run(cwd) -> Path:
    (folder,) = (path.parent for path in Path(cwd).glob("outputs/**/.hydra"))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The command in this process: (overrides) -> the run's folder. Saves starting Python."""
    from psfast import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    threads = torch.get_num_threads()

    def start(*overrides):
        flags = [o for o in overrides if o.startswith("--")]
        rest = [o for o in overrides if not o.startswith("--")]
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it
        monkeypatch.setattr(sys, "argv", ["psfast-train", *flags, *TINY, *rest])
        train.main()
        return max(tmp_path.glob("**/.hydra"), key=lambda path: path.stat().st_mtime_ns).parent

    yield start
    torch.set_num_threads(threads)


def test_the_quick_test_of_the_document(tmp_path):
    status, out, err = run(
        "--config-name=pattern_search_train",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=3",
        "trainer.limit_val_batches=2",
        "logger.offline=True",
        "task.evaluations_per_batch=50",
        "task.pattern_search_radius=0.1",
        "threads=1",
        cwd=tmp_path,
    )
    assert status == 0, err
    folder = the_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == [
        "evaluations",
        "seconds",
        "evaluations_per_second",
        "train_loss_first",
        "train_loss_last",
        "val_loss_first",
        "val_loss_last",
        "val_accuracy",
        "radius",
        "checkpoint",
    ]
    assert summary["evaluations"] >= 6 * 50 and summary["radius"] == 0.1
    assert summary["val_loss_last"] < summary["val_loss_first"]
    assert Path(summary["checkpoint"]).exists()
    assert list(folder.glob("wandb/offline-run-*"))
    for name in summary:
        assert f"\n{name} " in out
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


def test_the_custom_configuration_of_the_document(here):
    folder = here(
        "trainer.max_epochs=1",
        "model.d_model=32",
        "model.n_layers=2",
        "datamodule.batch_size=8",
        "train_dataset.n_samples=500",
        "train_dataset.seq_len=[4,8]",
        "task.pattern_search_radius=0.01",
        "logger=none",
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["radius"] == 0.01
    state = torch.load(summary["checkpoint"], weights_only=False)
    assert state["state_dict"]["model.head.weight"].shape == (102, 32)
    assert state["global_step"] == 3


@pytest.mark.parametrize("optimizer", ["reference", "adam", "sgd"])
def test_the_other_optimizers(here, optimizer):
    folder = here(f"optimizer={optimizer}", "trainer.max_epochs=1", "logger=none")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["evaluations"] is None) == (optimizer != "reference")
    assert summary["val_loss_last"] != summary["val_loss_first"]


@pytest.mark.parametrize("logger", ["csv", "tensorboard", "wandb"])
def test_every_logger_leaves_a_csv_to_plot(here, logger):
    folder = here(f"logger={logger}", "trainer.max_epochs=1")
    assert logger != "tensorboard" or list((folder / logger).glob("events.*"))
    metrics = (folder / "csv/metrics.csv").read_text()
    assert "accepted/model.head.weight" in metrics
    header, *rows = metrics.splitlines()
    for name in ("train_loss", "val_perplexity", "test_accuracy", "radius", "accepted"):
        assert name in header.split(",")
    assert len(rows) >= 3


@pytest.mark.parametrize("ground_truth", ["s5", "modular_addition"])
def test_the_other_ground_truths(here, ground_truth):
    folder = here(f"ground_truth={ground_truth}", "trainer.max_epochs=1", "logger=none")
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_the_sizes_of_the_document(size):
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    import psfast

    with initialize_config_module("psfast.configs", version_base="1.3"):
        config = compose(
            "pattern_search_train", overrides=[f"model={size}", f"data={size}", "logger=none"]
        )
    sizes = {"small": (64, 2, 200, 8), "medium": (128, 4, 500, 12), "large": (256, 6, 1000, 16)}
    d_model, n_layers, n_samples, seq_len = sizes[size]
    assert (config.model.d_model, config.model.n_layers) == (d_model, n_layers)
    if size == "small":
        count = sum(p.numel() for p in instantiate(config.model).parameters())
        assert count == 121_446
    data = instantiate(config.train_dataset)
    assert isinstance(data, psfast.StateTrackingDataset)
    assert len(data) == n_samples and len(data[0]["x"]) == 2 * seq_len


def test_a_model_of_the_users_own_has_no_keys_but_its_own(tmp_path):
    from hydra import compose, initialize_config_module

    (tmp_path / "model").mkdir()
    own = "_target_: torch.nn.Embedding\nnum_embeddings: 102\nembedding_dim: 102\n"
    (tmp_path / "model" / "mine.yaml").write_text(own)
    with initialize_config_module("psfast.configs", version_base="1.3"):
        config = compose(
            "pattern_search_train", overrides=[f"hydra.searchpath=[{tmp_path}]", "model=mine"]
        )
    assert set(config.model) == {"_target_", "num_embeddings", "embedding_dim"}


def test_a_sweep_gives_each_run_its_folder(here, tmp_path):
    here("--multirun", "task.pattern_search_radius=0.1,0.01", "trainer.max_epochs=1")
    summaries = sorted(tmp_path.glob("outputs/multirun/*/*/*/summary.json"))
    assert [path.parent.name for path in summaries] == ["0", "1"]
    assert [json.loads(path.read_text())["radius"] for path in summaries] == [0.1, 0.01]
    for path in summaries:
        assert len(list(path.parent.glob("wandb/offline-run-*"))) == 1


def test_a_run_killed_in_mid_epoch_goes_on_bit_for_bit(tmp_path, here):
    overrides = [
        "logger=none",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=20",
        "callbacks.last.seconds=0",
        "task.evaluations_per_batch=10",
    ]
    whole = torch.load(
        json.loads((here(*overrides) / "summary.json").read_text())["checkpoint"],
        weights_only=False,
    )
    place = tmp_path / "killed"
    place.mkdir()
    process = command(*TINY, *overrides, cwd=place)
    while not (found := list(place.glob("outputs/**/last.ckpt"))):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(place.glob("outputs/**/summary.json"))
    steps = torch.load(found[0], weights_only=False)["global_step"]
    assert 0 < steps < 40 and steps % 20, "the kill came too late to test anything"

    resumed = here(*overrides, f"ckpt_path={found[0]}")
    summary = json.loads((resumed / "summary.json").read_text())
    last = torch.load(resumed / "checkpoints/last.ckpt", weights_only=False)
    assert last["global_step"] == whole["global_step"] == 40
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, last["state_dict"][name]), name
    assert whole["optimizer_states"][0]["search"] == last["optimizer_states"][0]["search"]
    assert summary["evaluations"] == whole["optimizer_states"][0]["search"]["evaluations"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_amid_a_validation_ends_behind_it(
    tmp_path, here, monkeypatch, capsys, signum
):
    from psfast.lightning import PatternSearchTask

    overrides = ["logger=csv", "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=1"]
    whole, handler = here(*overrides), signal.getsignal(signal.SIGTERM)
    step, told = PatternSearchTask.validation_step, []

    def interrupted(self, *batch):
        if self.trainer.current_epoch == 1 and not told:
            told.append(signum)
            signal.raise_signal(signum)
        return step(self, *batch)

    monkeypatch.setattr(PatternSearchTask, "validation_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        here(*overrides)
    assert stopped.value.code == 128 + signum
    err = capsys.readouterr().err
    assert ("stopping after this validation" in err) == (signum == signal.SIGINT)
    last = max(tmp_path.glob("outputs/**/last.ckpt"), key=lambda path: path.stat().st_mtime)
    assert (last.parent.parent / "summary.json").exists()
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed = here(*overrides, f"ckpt_path={last}")
    states = [
        torch.load(run / "checkpoints/last.ckpt", weights_only=False) for run in (whole, resumed)
    ]
    assert states[0]["global_step"] == states[1]["global_step"]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_ends_after_its_batch(tmp_path, here, signum):
    overrides = [
        "logger=csv",
        "trainer.limit_train_batches=4000",
        "train_dataset.n_samples=16000",
        "task.evaluations_per_batch=10",
        "trainer.check_val_every_n_epoch=2",
    ]
    place = tmp_path / "stopped"
    place.mkdir()
    process = command(*TINY, *overrides, "callbacks.last.seconds=0.2", cwd=place)
    while not (found := list(place.glob("outputs/**/last.ckpt"))):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and "Traceback" not in err
    assert ("stopping after this batch" in err) == (signum == signal.SIGINT)
    folder = the_run(place)
    summary = json.loads((folder / "summary.json").read_text())
    last = torch.load(found[0], weights_only=False)
    steps = last["global_step"]
    assert summary["checkpoint"] == str(found[0]) and "checkpoint" in out
    assert summary["evaluations"] == last["optimizer_states"][0]["search"]["evaluations"]
    assert 0 < steps < 3990, "the signal came too late to test anything"
    # Not a step is lost or repeated: the losses of the next ones are a whole run's.
    more = [*overrides, f"trainer.max_steps={steps + 10}"]
    resumed, whole = here(*more, f"ckpt_path={found[0]}"), here(*more)
    states = [
        torch.load(run / "checkpoints/last.ckpt", weights_only=False) for run in (resumed, whole)
    ]
    assert states[0]["global_step"] == steps + 10
    for name, value in states[1]["state_dict"].items():
        assert torch.equal(value, states[0]["state_dict"][name]), name


def test_a_run_goes_on_in_its_own_folder_from_the_checkpoint_that_its_summary_names(here, capfd):
    first = here("logger=csv", "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1")
    path = json.loads((first / "summary.json").read_text())["checkpoint"]
    logged = (first / "csv/metrics.csv").read_text()
    again = here(
        "logger=csv", "trainer.max_epochs=3", f"ckpt_path={path}", f"hydra.run.dir={first}"
    )
    assert again == first and (first / "csv/metrics.before-1.csv").read_text() == logged
    assert (first / "csv/metrics.csv").read_text() != logged
    assert "metrics.before-1.csv" in capfd.readouterr().err
    logged = (first / "csv/metrics.csv").read_text()
    here("logger=none", "trainer.max_epochs=4", f"ckpt_path={path}", f"hydra.run.dir={first}")
    assert (first / "csv/metrics.csv").read_text() == logged


def test_without_a_validation_before_training_there_is_no_first_loss(here):
    folder = here("logger=none", "trainer.max_epochs=1", "trainer.num_sanity_val_steps=0")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val_loss_first"] is None and summary["val_loss_last"] > 0


def test_a_resumed_run_says_which_settings_the_checkpoints_run_had_besides(here):
    options = ["logger=none", "train_dataset.n_samples=40", "model.dropout=0.3"]
    options += ["task.pattern_search_radius=0.5"]
    last = here(*options, "trainer.max_epochs=1") / "checkpoints" / "last.ckpt"
    more = ["logger=none", "trainer.max_epochs=2", f"ckpt_path={last}"]
    message = (
        r"checkpoint's run was given other settings: model.dropout=0.3 \(here 0.1\), "
        r"train_dataset.n_samples=40 \(here 200\). To go on with that run, give them again"
    )
    with pytest.warns(UserWarning, match=message):
        here(*more)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        here(*more, *options)
    assert not [w for w in told if "settings" in str(w.message)]


def test_a_resumed_run_says_which_settings_are_its_checkpoints(here):
    options = ["logger=none", "trainer.max_epochs=1"]
    last = here(*options) / "checkpoints" / "last.ckpt"
    more = ["logger=none", "trainer.max_epochs=2", f"ckpt_path={last}"]
    message = r"task.pattern_search_radius=0.5 is not the optimizer's radius: .* checkpoint, 0.06"
    with pytest.warns(UserWarning, match=message) as told:
        resumed = here(*more, "task.pattern_search_radius=0.5", "seed=0")
    assert json.loads((resumed / "summary.json").read_text())["radius"] == 0.06
    assert not [w for w in told if "seed" in str(w.message)]  # the same one
    with pytest.warns(UserWarning, match="seed=7 is not the optimizer's seed: .* checkpoint, 0"):
        here(*more, "seed=7")


@pytest.mark.parametrize(
    "first, then, message",
    [
        ("pattern_search", "adam", "the same optimizer: its state has no .*betas.*, which Adam"),
        ("adam", "pattern_search", "must come from a psfast.PatternSearch"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused(here, capfd, first, then, message):
    options = ["logger=none", "trainer.max_epochs=1"]
    last = here(f"optimizer={first}", *options) / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit):
        here(f"optimizer={then}", "logger=none", "trainer.max_epochs=2", f"ckpt_path={last}")
    assert re.search(f"psfast-train: error: .*{message}", capfd.readouterr().err)


def test_a_checkpoint_of_another_model_says_what_to_give_again(here, capfd):
    last = here("logger=none", "trainer.max_epochs=1") / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit):
        here("logger=none", "trainer.max_epochs=2", "model.d_ff=32", f"ckpt_path={last}")
    err = capfd.readouterr().err
    assert "the same model, got one of model.d_ff=16 (here 32): give that again" in err


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.width=3"], "Could not override 'model.width'"),
        (["model=huge"], "Could not find 'model/huge'"),
        (["task.pattern_search_radius=-1"], "radius must be > 0"),
        (["task.pattern_search_radius=nan"], "radius must be > 0"),
        (["task.pattern_search_radius=big"], "radius must be a number, got 'big'"),
        (["datamodule.batch_size=0"], "batch_size must be >= 1, got 0"),
        (["model.n_heads=3"], "d_model must be divisible by n_heads"),
        (["train_dataset.seq_len=80"], "max_len = 128, got T = 160"),
        (["trainer.gradient_clip_val=1.0"], "remove Trainer(gradient_clip_val=1.0)"),
        (["trainer.accumulate_grad_batches=2"], "accumulate_grad_batches=2"),
        (["save_dir=/dev/null/runs"], "/dev/null/runs"),
        (["ckpt_path=nowhere.ckpt"], "ckpt_path must be a checkpoint's file, got nowhere.ckpt"),
        ([f"ckpt_path={__file__}"], "ckpt_path must be a checkpoint of psfast-train, got"),
        (
            ["trainer.max_time=5"],
            "AttributeError: 'int' object has no attribute 'total_seconds' (at",
        ),
        (["threads=0"], "threads must be >= 1, got 0"),
        (["seed=-1"], "seed must be >= 0, got -1"),
        (["seed=5000000000"], "seed must be < 4294967296"),
        (["logger=wandb", "logger.offline=maybe"], "logger.offline must be true, false or null"),
        (["trainer.devices=2", "trainer.accelerator=cpu"], "2 devices by Trainer(devices=1)"),
        (["task.backend=bogus"], "backend must be one of 'auto', 'fused'"),
    ],
)
def test_bad_input_ends_with_one_line(here, capfd, tmp_path, overrides, message):
    with pytest.raises(SystemExit) as exit:
        here("logger=none", "trainer.max_epochs=1", *overrides)
    assert exit.value.code == 1
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("psfast-train: err")]
    assert message in line
    assert not list(tmp_path.glob("**/summary.json"))


def test_a_models_own_state_is_no_checkpoint_to_go_on_from(here, capfd, tmp_path):
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "model.pt")
    with pytest.raises(SystemExit):
        here("logger=none", "ckpt_path=model.pt")
    err = capfd.readouterr().err
    assert "ckpt_path must be a checkpoint of psfast-train, got model.pt" in err


def test_wandb_without_a_key_logs_offline_by_itself(tmp_path):
    """As on a new machine: in a process of its own, as wandb reads its settings once."""
    (tmp_path / "home").mkdir()
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    variables = dict.fromkeys(name for name in os.environ if name.startswith("WANDB_"))
    variables |= {"WANDB_MODE": None, "NETRC": None}
    variables |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": cache}
    status, _, err = run(*TINY, "trainer.max_epochs=1", cwd=tmp_path, **variables)
    assert status == 0, err
    assert "no Weights & Biases key, logging offline" in err
    assert list(the_run(tmp_path).glob("wandb/offline-run-*"))


def test_wandb_online_without_a_key_says_what_to_do(here, capfd, monkeypatch, tmp_path):
    import wandb

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # forgets the mode of the tests before
    with pytest.raises(SystemExit):
        here("logger.offline=False", "trainer.max_epochs=1")
    assert "run `wandb login`" in capfd.readouterr().err
