"""The ready-made tasks and the data module in Lightning, and runs that go on."""

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_runs import Recorder, loader, trainer

import psfast
from psfast.callbacks import LastCheckpoint, RunSummary
from psfast.data import StateTrackingDataset
from psfast.lightning import (
    GradientTask,
    PatternSearchTask,
    PatternSearchTransformer,
    StateTrackingDataModule,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def small_transformer(**options):
    torch.manual_seed(0)
    return PatternSearchTransformer(102, 8, 1, 2, 8, max_len=24, **options)


def small_data(batch_size=5):
    sets = [StateTrackingDataset(13, (2, 4), seed=0, split=name) for name in psfast.data.SPLITS]
    return StateTrackingDataModule(*sets, batch_size=batch_size)


class OwnParts(PatternSearchTask):
    def search_parts(self, batch):
        return super().search_parts(batch)


@pytest.mark.parametrize(
    ("kind", "backend", "passes"),
    [
        (PatternSearchTask, "fused", 0),
        (PatternSearchTask, "batched", 1),  # a module of any kind may count its passes
        (OwnParts, "fused", 1),  # its search may be on another loss
    ],
)
def test_a_task_takes_the_loss_that_its_fused_search_found(
    tmp_path, monkeypatch, kind, backend, passes
):
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 8, "dropout": 0.0}
    model, forward = psfast.DecoderOnlyTransformer(**sizes), psfast.DecoderOnlyTransformer.forward
    calls, losses = [], []

    def counted(self, inputs):
        if not task._in_trial:
            calls.append(inputs)
        return forward(self, inputs)

    class Losses(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            loss = module.criterion(forward(model, batch["x"]), batch["y"]).item()
            losses.append((trainer.logged_metrics["train_loss"].item(), loss))

    monkeypatch.setattr(psfast.DecoderOnlyTransformer, "forward", counted)
    task = kind(model, 0.1, backend=backend)
    run = trainer(tmp_path, Losses(), max_epochs=1, limit_train_batches=3, limit_val_batches=0)
    run.fit(task, StateTrackingDataModule())
    assert len(calls) == 3 * passes
    for logged, loss in losses:
        assert logged == pytest.approx(loss, rel=1e-5)
    if not passes:
        assert losses[-1][0] == run.optimizers[0].last_poll.loss_after


def test_the_transformer_task_uses_one_objective_and_logs_scores(tmp_path):
    module, recorder = small_transformer(max_evaluations=50), Recorder()
    fit = trainer(tmp_path, recorder)
    fit.fit(module, datamodule=small_data())
    assert {"val_loss", "val_perplexity", "val_accuracy"} <= set(fit.callback_metrics)
    (tested,) = fit.test(module, datamodule=small_data(), verbose=False)
    assert set(tested) == {"test_loss", "test_perplexity", "test_accuracy"}
    assert {"train_loss", "radius", "evaluations", "accepted", "evaluations_per_second"} <= set(
        recorder.steps[0]
    )
    scores = psfast.evaluation.evaluate(
        module.model, module.criterion, small_data().test_dataloader()
    )
    assert tested["test_loss"] == pytest.approx(scores.loss)
    assert tested["test_accuracy"] == pytest.approx(scores.accuracy)


def test_any_model_and_frozen_parameters(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    net[0].requires_grad_(False)
    frozen = net[0].weight.clone()
    task = PatternSearchTask(net, 0.2, criterion=nn.MSELoss())
    fit = trainer(tmp_path)
    fit.fit(task, loader(), loader())
    assert torch.equal(net[0].weight, frozen)
    assert fit.callback_metrics["val_loss"] > 0 and "val_accuracy" not in fit.callback_metrics


def test_the_gradient_task_trains_with_gradients(tmp_path):
    task = GradientTask(psfast.DecoderOnlyTransformer(102, 8, 1, 2, 8), psfast_adam)
    recorder = Recorder()
    trainer(tmp_path, recorder).fit(task, datamodule=small_data())
    assert recorder.backwards == 6
    assert recorder.steps[-1]["train_loss"] < recorder.steps[0]["train_loss"]


def psfast_adam(params):
    return torch.optim.Adam(params, lr=0.01)


def test_a_task_refuses_what_is_no_model_and_no_radius():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        PatternSearchTask(3)
    with pytest.raises(ValueError, match="radius must be"):
        PatternSearchTask(nn.Linear(1, 1), float("nan"))
    with pytest.raises(ValueError, match="pattern_search_radius must be > 0.0.*got -1"):
        PatternSearchTask(nn.Linear(1, 1), -1)
    with pytest.raises(ValueError, match="backend must be one of 'auto'.*got 'bogus'"):
        PatternSearchTask(nn.Linear(1, 1), backend="bogus")
    with pytest.raises(ValueError, match="evaluations_per_batch must be >= 1"):
        PatternSearchTask(nn.Linear(1, 1), evaluations_per_batch=0)


def test_a_batch_without_supervised_positions_is_refused(tmp_path):
    nothing = [{"x": torch.ones(4, dtype=torch.int64), "y": torch.full((4,), 100)}]
    data = StateTrackingDataModule(nothing)
    with pytest.raises(ValueError, match="no supervised position"):
        trainer(tmp_path, limit_val_batches=0).fit(small_transformer(), datamodule=data)


def test_a_standalone_transformer_comes_back_from_its_checkpoint(tmp_path):
    search = psfast.SimplexGradient(working_set=30)
    module = small_transformer(radius=0.05, expand=2.0, max_evaluations=5, search=search)
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(module, datamodule=small_data())
    fit.save_checkpoint(tmp_path / "t.ckpt")
    loaded = PatternSearchTransformer.load_from_checkpoint(tmp_path / "t.ckpt")
    tokens = torch.ones(1, 3, dtype=torch.int64)
    assert torch.equal(loaded.eval()(tokens), module.eval()(tokens))
    assert loaded.configure_optimizers().expand == 2.0
    assert loaded.configure_optimizers().search == search


def test_the_first_batches_are_overfitted_in_every_epoch(tmp_path):
    seen = []

    class Batches(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(batch["x"])

    fit = trainer(tmp_path, Batches(), overfit_batches=2)
    fit.fit(small_transformer(max_evaluations=7), datamodule=small_data())
    assert fit.global_step == 4
    assert torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:]))


def test_a_dataset_without_samples_is_not_replaced():
    empty = torch.utils.data.Subset(StateTrackingDataset(3, 4), [])
    assert StateTrackingDataModule(val_dataset=empty).val_dataset is empty


@pytest.mark.parametrize("kill_at", [2, 3, 4])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, kill_at):
    """Step 3 is the last of an epoch; the model has dropout, the search a bounded poll."""

    class Killed(Exception):
        pass

    class Kill(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == kill_at:
                raise Killed

    def parts():
        summary = RunSummary()
        last = LastCheckpoint(tmp_path, seconds=0)
        return small_transformer(max_evaluations=7), last, summary

    whole, _, whole_summary = parts()
    trainer(tmp_path, whole_summary, max_epochs=3).fit(whole, datamodule=small_data())
    killed, last, summary = parts()
    with pytest.raises(Killed):
        trainer(tmp_path, last, summary, Kill(), max_epochs=3).fit(killed, datamodule=small_data())
    torch.manual_seed(99)
    resumed, last, summary = parts()
    fit = trainer(tmp_path, last, summary, max_epochs=3)
    fit.fit(resumed, datamodule=small_data(), ckpt_path=last.path, weights_only=False)
    assert fit.global_step == 9
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert summary.first == whole_summary.first and summary.last == whole_summary.last


def test_a_finished_run_goes_on_from_its_best_or_last_checkpoint(tmp_path):
    whole = small_transformer(max_evaluations=7)
    trainer(tmp_path, max_epochs=3).fit(whole, datamodule=small_data())
    best = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    last = LastCheckpoint(tmp_path)
    trainer(tmp_path, best, last, max_epochs=1).fit(
        small_transformer(max_evaluations=7), datamodule=small_data()
    )
    for path in (best.best_model_path, last.path):
        resumed = small_transformer(max_evaluations=7)
        fit = trainer(tmp_path, max_epochs=3)
        fit.fit(resumed, datamodule=small_data(), ckpt_path=path, weights_only=False)
        assert fit.global_step == 9
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (path, name)
