"""Pattern search in Lightning: what a user's own module sees, and what is refused."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

L = pytest.importorskip("lightning")

from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint  # noqa: E402
from lightning_runs import batches, loader, trainer  # noqa: E402
from torchmetrics import MeanMetric  # noqa: E402

import psfast  # noqa: E402
from psfast.callbacks import LastCheckpoint, RunSummary  # noqa: E402
from psfast.data import StateTrackingDataset  # noqa: E402
from psfast.lightning import (  # noqa: E402
    GradientTask,
    PatternSearchMixin,
    PatternSearchTask,
    PatternSearchTransformer,
    StateTrackingDataModule,
)

pytestmark = pytest.mark.filterwarnings("ignore")


class Plain(L.LightningModule):
    """A user's module: BatchNorm, dropout, a metric, its own logging."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1)
        )
        self.mean_loss = MeanMetric()
        self.options = {"radius": 0.3, **options}
        self.calls = 0

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        self.calls += 1
        loss = self.loss(batch)
        self.mean_loss(loss.detach())
        self.log("loss", loss)
        self.log("mean_loss", self.mean_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return psfast.PatternSearch(self.parameters(), **self.options)


class Searched(PatternSearchMixin, Plain):
    pass


class Manual(PatternSearchMixin, Plain):
    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        def closure():
            self.calls += 1
            loss = self.loss(batch)
            self.log("inside", loss)
            return loss

        self.log("loss", self.search_step(closure).float())


class Recorder(Callback):
    """The logged values of every step, and the backward passes."""

    def __init__(self):
        self.steps, self.backwards, self.global_steps = [], 0, []

    def on_after_backward(self, trainer, module):
        self.backwards += any(p.grad is not None for p in module.parameters())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append({k: v.item() for k, v in trainer.logged_metrics.items()})
        self.global_steps.append(trainer.global_step)


def no_backward(*args, **kwargs):
    raise AssertionError("a backward pass was run")


def test_a_users_module_runs_without_any_backward_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", no_backward)
    monkeypatch.setattr(torch.autograd, "backward", no_backward)
    module, recorder = Searched(), Recorder()
    fit = trainer(tmp_path, recorder)
    fit.fit(module, loader(), loader())
    assert recorder.backwards == 0
    assert recorder.global_steps == [1, 2, 3, 4, 5, 6]
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_the_logs_show_the_accepted_state_once_a_step(tmp_path):
    module, recorder = Searched(), Recorder()
    seen = []

    class Reports(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            report = trainer.optimizers[0].last_poll
            seen.append((report, trainer.optimizers[0].evaluations))

    fit = trainer(tmp_path, recorder, Reports(), max_epochs=1)
    fit.fit(module, loader())
    for step, (report, evaluations) in zip(recorder.steps, seen, strict=True):
        assert step["loss"] == report.loss_after, "the same dropout mask, so the same bits"
        assert step["accepted"] == len(report.accepted)
        assert step["evaluations"] == evaluations
        assert step["radius"] == pytest.approx(0.3)
        assert step["evaluations_per_second"] > 0
    losses = [step["loss"] for step in recorder.steps]
    assert fit.callback_metrics["mean_loss"] == pytest.approx(sum(losses) / 3), (
        "torchmetrics see the accepted states alone"
    )
    assert module.calls > 6
    assert module.net[1].num_batches_tracked == 3, "BatchNorm sees one pass a step"


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


def test_it_decides_as_a_plain_loop_does(tmp_path):
    module = Searched()
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    twin = Plain()
    search = twin.configure_optimizers()
    for batch in batches():
        seed = psfast.search.derive_seed(0, search.polls)
        search.step(lambda batch=batch: twin.loss(batch))
        with psfast.random_state.seeded(seed, torch.device("cpu")), torch.no_grad():
            twin.loss(batch)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_a_closure_dict_and_more_than_one_step_a_batch(tmp_path):
    class Dict(Searched):
        evaluations_per_batch = 15

        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "extra": 1}

    module, recorder = Dict(max_evaluations=4), Recorder()
    fit = trainer(tmp_path, recorder, max_epochs=1)
    fit.fit(module, loader())
    assert 45 <= fit.optimizers[0].evaluations <= 3 * 18
    assert fit.global_step == 3
    assert max(step["accepted"] for step in recorder.steps) > 1


def test_a_long_poll_says_how_far_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("psfast.optimizer._PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr("psfast.lightning._LINE_SECONDS", 0.0)
    fit = trainer(tmp_path, max_epochs=1)
    with caplog.at_level("INFO"):
        fit.fit(Searched(block_size=2), loader())
    assert "trial points tried" in caplog.text
    assert fit.optimizers[0].progress is None


def test_a_converged_search_ends_its_batch(tmp_path):
    class Patient(Searched):
        evaluations_per_batch = 10**9

    module = Patient(min_radius=0.2)
    module.net[3].p = 0.0  # a new mask in every poll would let every poll find something
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(module, loader())
    assert fit.optimizers[0].converged and fit.global_step == 3


def test_manual_optimization(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", no_backward)
    module, recorder = Manual(), Recorder()
    fit = trainer(tmp_path, recorder, max_epochs=1)
    fit.fit(module, loader(), loader())
    assert recorder.global_steps == [1, 2, 3]
    for step in recorder.steps:
        assert step["inside"] == step["loss"], "of the accepted state"
        assert {"radius", "evaluations", "accepted", "evaluations_per_second"} <= set(step)
    assert fit.optimizers[0].evaluations > 3
    assert module.net[1].num_batches_tracked == 3


def test_manual_optimization_with_an_optimizer_as_it_was_built(tmp_path):
    class Unwrapped(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.search_step(lambda: self.loss(batch), optimizer)

    module, recorder = Unwrapped(), Recorder()
    trainer(tmp_path, recorder, max_epochs=1).fit(module, loader())
    assert [step["accepted"] for step in recorder.steps] == [1.0] * 3
    assert recorder.global_steps == [0, 0, 0]


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda m: [psfast.PatternSearch(part.parameters()) for part in (m.net[0], m.net[1])], "2"),
        (lambda m: torch.optim.SGD(m.parameters()), "SGD"),
    ],
)
def test_a_search_step_without_one_search_is_refused(tmp_path, make, got):
    class Other(Manual):
        def configure_optimizers(self):
            return make(self)

    with pytest.raises(TypeError, match=f"optimizer must be one psfast.PatternSearch, got {got}"):
        trainer(tmp_path).fit(Other(), loader())


def test_manual_optimization_with_a_closure_that_still_calls_backward(tmp_path):
    class Backward(Manual):
        def training_step(self, batch, batch_idx):
            def closure():
                loss = self.loss(batch)
                self.log("loss", loss)
                self.manual_backward(loss)
                return loss

            self.search_step(closure)

    recorder = Recorder()
    fit = trainer(tmp_path, recorder, max_epochs=1)
    fit.fit(Backward(), loader())
    assert fit.global_step == 3 and "loss" in recorder.steps[0]


def test_manual_optimization_with_an_objective_and_with_a_plain_step(tmp_path):
    class WithObjective(Manual):
        def training_step(self, batch, batch_idx):
            f = psfast.objective(self.net, nn.functional.mse_loss, *batch)
            self.log("loss", self.search_step(f))

    class PlainStep(Manual):
        def training_step(self, batch, batch_idx):
            self.log("loss", self.optimizers().step(lambda: self.loss(batch)))

    for kind in (WithObjective, PlainStep):
        fit = trainer(tmp_path, max_epochs=1)
        fit.fit(kind(), loader())
        assert fit.global_step == 3 and fit.optimizers[0].evaluations > 0


def test_without_the_mixin_the_swap_works_and_one_warning_names_the_waste(tmp_path):
    module = Plain()
    before = [p.clone() for p in module.parameters()]
    fit = trainer(tmp_path, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.fit(module, loader())
    told = [w for w in caught if "PatternSearchMixin" in str(w.message)]
    assert len(told) == 1 and "backward" in str(told[0].message)
    assert fit.global_step == 3 and fit.optimizers[0].evaluations > 0
    assert not all(map(torch.equal, before, module.parameters()))


def test_max_steps_early_stopping_and_checkpoints_as_usual(tmp_path):
    fit = trainer(tmp_path, max_epochs=-1, max_steps=4)
    fit.fit(Searched(), loader())
    assert fit.global_step == 4

    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    fit = trainer(tmp_path, best, stop, max_epochs=20)
    fit.fit(Searched(), loader(), loader())
    assert stop.stopped_epoch and fit.current_epoch < 20
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    Searched.load_from_checkpoint(best.best_model_path, weights_only=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val=0.5"),
        ({"accumulate_grad_batches": 2}, r"accumulate_grad_batches=2"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, options, message):
    module = Searched()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, **options).fit(module, loader())
    assert all(map(torch.equal, before, module.parameters()))


def test_half_precision_with_a_scaler_is_refused(tmp_path):
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Scaled(MixedPrecision):
        """The 16-mixed plugin without the GPU that its scaler asks for."""

        def __init__(self):
            super().__init__("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))

    with pytest.raises(MisconfigurationException, match="16-mixed"):
        trainer(tmp_path, plugins=[Scaled()]).fit(Searched(), loader())


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_work(tmp_path, precision):
    fit = trainer(tmp_path, max_epochs=1, precision=precision)
    fit.fit(Searched(), loader())
    assert fit.global_step == 3 and fit.optimizers[0].evaluations > 0


@pytest.mark.parametrize("value", [None, torch.ones(2)])
def test_a_training_step_without_a_scalar_loss_is_refused(tmp_path, value):
    class Wrong(Searched):
        def training_step(self, batch, batch_idx):
            return value

    got = "None" if value is None else "a tensor"
    with pytest.raises(TypeError, match=f"must return a scalar loss, got {got}"):
        trainer(tmp_path).fit(Wrong(), loader())


def test_a_training_step_without_a_loss_in_its_dict_is_refused(tmp_path):
    class Wrong(Searched):
        def training_step(self, batch, batch_idx):
            return {"los": self.loss(batch)}

    with pytest.raises(TypeError, match=r"must return a dict with 'loss', got \['los'\]"):
        trainer(tmp_path).fit(Wrong(), loader())


def test_a_training_step_that_draws_its_batches_is_refused(tmp_path):
    class Draws(Searched):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(MisconfigurationException, match="must take a batch"):
        trainer(tmp_path).fit(Draws(), loader())


def test_an_exception_in_a_trial_point_leaves_the_module_usable(tmp_path):
    class Failing(Searched):
        def training_step(self, batch, batch_idx):
            if self.calls == 5:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path).fit(module, loader())
    assert "training_step" not in module.__dict__ and not module._in_trial
    module.calls = 6
    fit = trainer(tmp_path, Recorder(), max_epochs=1)
    fit.fit(module, loader())
    assert "loss" in fit.logged_metrics


def test_a_learning_rate_scheduler_is_refused_by_name(tmp_path):
    class Scheduled(Searched):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(KeyError, match="PatternSearch has no 'lr', only a radius"):
        trainer(tmp_path).fit(Scheduled(), loader())


# -- the ready-made tasks ----------------------------------------------------------------------


def small_transformer(**options):
    torch.manual_seed(0)
    return PatternSearchTransformer(102, 8, 1, 2, 8, max_len=24, **options)


def small_data(batch_size=5):
    sets = [StateTrackingDataset(13, (2, 4), seed=0, split=name) for name in psfast.data.SPLITS]
    return StateTrackingDataModule(*sets, batch_size=batch_size)


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


class InParts(PatternSearchMixin, L.LightningModule):
    """Tells its parts; the criterion is another one from the second batch on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.criterion = nn.Linear(3, 1), nn.MSELoss()

    def search_parts(self, batch):
        return self.net, self.criterion, *batch

    def training_step(self, batch, batch_idx):
        return self.criterion(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        report = self.trainer.optimizers[0].last_poll
        assert report.loss_after == pytest.approx(outputs["loss"].item())
        if batch_idx == 0:
            self.criterion = nn.L1Loss()

    def configure_optimizers(self):
        return psfast.PatternSearch(self.parameters(), radius=0.3)


def test_another_criterion_is_taken_up_with_a_warning(tmp_path):
    module = InParts()
    with pytest.warns(UserWarning, match="search_parts returned another criterion") as warned:
        trainer(tmp_path, max_epochs=2).fit(module, loader())
    assert module._objectives.criterion is module.criterion
    assert sum("another criterion" in str(warning.message) for warning in warned) == 1


@pytest.mark.parametrize(
    "module, precision, reason",
    [(Searched, "32-true", "no search_parts"), (InParts, "bf16-mixed", "serve no autocast")],
)
def test_it_says_once_why_trial_points_run_one_by_one(
    tmp_path, monkeypatch, module, precision, reason
):
    told = []
    monkeypatch.setattr(psfast.lightning, "rank_zero_info", told.append)
    monkeypatch.setattr(InParts, "on_train_batch_end", L.LightningModule.on_train_batch_end)
    module = module()
    trainer(tmp_path, max_epochs=2, precision=precision).fit(module, loader())
    assert len([line for line in told if reason in line]) == 1


def test_parts_that_are_not_four_are_refused(tmp_path):
    class Two(InParts):
        def search_parts(self, batch):
            return self.net, self.criterion

    with pytest.raises(TypeError, match=r"must return \(model, criterion.* or None, got 2 values"):
        trainer(tmp_path, max_epochs=1).fit(Two(), loader())


def test_the_mixin_behind_lightnings_module_is_refused():
    with pytest.raises(TypeError, match="PatternSearchMixin before LightningModule"):

        class Wrong(L.LightningModule, PatternSearchMixin):
            pass


def test_a_module_that_was_trained_in_parts_is_copied_and_saved(tmp_path):
    module = InParts()
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    copied = copy.deepcopy(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    for other in (copied, loaded):
        trainer(tmp_path, max_epochs=1).fit(other, loader())
        assert all(map(torch.equal, other.parameters(), module.parameters()))


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
