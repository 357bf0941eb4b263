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
from lightning_runs import Recorder, batches, loader, trainer  # noqa: E402
from torchmetrics import MeanMetric  # noqa: E402

import psfast  # noqa: E402
from psfast.lightning import PatternSearchMixin  # noqa: E402

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

    for kind, counted in ((WithObjective, 3), (PlainStep, 0)):
        module, fit = kind(), trainer(tmp_path, max_epochs=1)
        fit.fit(module, loader())
        assert fit.global_step == 3 and fit.optimizers[0].evaluations > 0
        assert module.net[1].num_batches_tracked == counted


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
