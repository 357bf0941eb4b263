"""The plain training loop and its scores."""

import copy
import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import psfast
from psfast import loop
from psfast.data import ResumableLoader
from psfast.evaluation import BatchObjectives, ScoreSums, evaluate, unpack
from psfast.loop import fit


def regression(batches=1, seed=0):
    """A linear model, its optimizer-ready batches, and the loss it can reach."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, 17, 3, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    torch.manual_seed(seed)
    return nn.Linear(3, 1), list(zip(x, y, strict=True))


class Flat(nn.Module):
    """A loss that nothing lowers; ``event`` happens at evaluation number ``at``."""

    def __init__(self, at=math.inf, event=None):
        super().__init__()
        self.calls, self.at, self.event = 0, at, event

    def forward(self, outputs, targets):
        self.calls += 1
        if self.calls >= self.at:
            raise self.event
        return outputs.sum() * 0.0


def test_it_trains_and_tells_what_happened():
    model, batches = regression()
    search = psfast.PatternSearch(model.parameters(), radius=0.5)
    seen = []
    history = fit(
        model,
        nn.MSELoss(),
        batches,
        search,
        max_steps=80,
        val_loader=batches,
        val_every=30,
        callback=lambda step, report: seen.append((step, report)),
        progress=False,
    )
    assert history.stopped == "max_steps" and len(history.polls) == 80
    assert seen == list(enumerate(history.polls, start=1))
    assert [step for step, _ in history.validation] == [0, 30, 60, 80]
    assert history.validation[-1][1].loss < 0.01 * history.validation[0][1].loss
    assert math.isnan(history.validation[-1][1].accuracy)
    assert history.validation[-1][1].loss == pytest.approx(history.polls[-1].loss_after)
    assert sum(report.evaluations for report in history.polls) == search.evaluations


def test_without_a_limit_it_goes_through_the_loader_once():
    model, batches = regression(batches=3)
    search = psfast.PatternSearch(model.parameters())
    history = fit(model, nn.MSELoss(), batches, search, val_loader=batches, progress=False)
    assert history.stopped == "end of loader" and len(history.polls) == 3
    assert [step for step, _ in history.validation] == [0, 3]


class Numbers(torch.utils.data.Dataset):
    """Six samples of the regression, which note when they are taken."""

    def __init__(self):
        (self.x, self.y), *_ = regression()[1]
        self.taken = []

    def __len__(self):
        return 6

    def __getitem__(self, i):
        self.taken.append(i)
        return self.x[i], self.y[i]


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6])  # of 3 steps a pass
def test_a_resumed_loader_goes_on_with_its_order(stop):
    def run(steps, saved=None):
        data, (model, _) = Numbers(), regression()
        search = psfast.PatternSearch(model.parameters(), max_evaluations=3)
        loader = ResumableLoader(data, batch_size=2)
        parts = (model, search, loader)
        if saved is not None:
            for part, state in zip(parts, saved, strict=True):
                part.load_state_dict(state)
        saved = []

        def callback(step, report):
            if step == stop:
                saved.extend(copy.deepcopy(part.state_dict()) for part in parts)

        options = {"max_steps": steps, "callback": callback, "progress": False}
        fit(model, nn.MSELoss(), loader, search, **options)
        return data.taken, search.state_dict(), saved

    taken, state, saved = run(8)
    rest, resumed, _ = run(8 - stop, saved)
    assert rest[-2 * (8 - stop) :] == taken[2 * stop :]
    assert resumed == state


def test_each_fit_goes_on_to_the_next_order():
    data, (model, _) = Numbers(), regression()
    loader = ResumableLoader(data, batch_size=6)
    search = psfast.PatternSearch(model.parameters())
    for _ in range(3):
        fit(model, nn.MSELoss(), loader, search, progress=False)
    passes = [tuple(data.taken[at : at + 6]) for at in (0, 6, 12)]
    assert all(sorted(order) == list(range(6)) for order in passes) and len(set(passes)) == 3


def test_one_batch_is_one_objective_however_the_steps_are_cut():
    ends = []
    for max_evaluations, max_steps in ((None, 12), (2, 10_000)):
        model, batches = regression()
        search = psfast.PatternSearch(
            model.parameters(), radius=0.5, max_evaluations=max_evaluations, min_radius=0.1
        )
        copies = [tuple(part.clone() for part in batches[0]) for _ in range(2)]
        history = fit(model, nn.MSELoss(), copies, search, max_steps=max_steps * 5, progress=False)
        assert history.stopped == "converged"
        accepted = [change for report in history.polls for change in report.accepted]
        ends.append((accepted, search.evaluations, search.radius))
    assert ends[0] == ends[1]


def test_it_can_stop_at_a_callbacks_word():
    model, batches = regression()
    search = psfast.PatternSearch(model.parameters())
    history = fit(
        model,
        nn.MSELoss(),
        batches,
        search,
        max_steps=9,
        callback=lambda step, report: step == 4,
        progress=False,
    )
    assert history.stopped == "callback" and len(history.polls) == 4


def test_time_runs_out_in_the_middle_of_a_poll(monkeypatch):
    monkeypatch.setattr("psfast.optimizer._PROGRESS_SECONDS", 0.0)
    model, batches = regression()
    search = psfast.PatternSearch(model.parameters(), block_size=1)
    told = []
    search.progress = lambda tried, total: told.append((tried, total))
    history = fit(model, Flat(), batches, search, max_seconds=1e-6, progress=False)
    assert history.stopped == "max_seconds" and history.polls == []
    assert told and told[0][1] == 8, "the user's own progress is called too"
    assert len(told) == 1, "and then the step ended"
    told.clear()
    search.step(lambda: model(batches[0][0]).sum() * 0.0)
    assert told, "the user's own progress is back in place"


def test_ctrl_c_ends_it_with_the_incumbent_in_place():
    model, batches = regression()
    before = [p.clone() for p in model.parameters()]
    search = psfast.PatternSearch(model.parameters())
    history = fit(model, Flat(5, KeyboardInterrupt()), batches, search, progress=False)
    assert history.stopped == "interrupted" and history.polls == []
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_ctrl_c_amid_a_validation_returns_the_history(at):
    class Validation(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            if self.passes == at:
                raise KeyboardInterrupt
            return super().__iter__()

    model, batches = regression()
    search = psfast.PatternSearch(model.parameters())
    val = Validation(batches)
    steps = len(batches) + 1  # the third validation is the one at the end
    history = fit(
        model, nn.MSELoss(), batches, search, max_steps=steps, val_loader=val, progress=False
    )
    assert history.stopped == "interrupted" and len(history.validation) == at - 1
    assert len(history.polls) == [0, len(batches), steps][at - 1]


def test_an_exception_leaves_the_incumbent_and_is_raised_on():
    model, batches = regression()
    before = [p.clone() for p in model.parameters()]
    search = psfast.PatternSearch(model.parameters())
    model.eval()
    with pytest.raises(ZeroDivisionError):
        fit(model, Flat(5, ZeroDivisionError()), batches, search, progress=False)
    assert all(map(torch.equal, before, model.parameters()))
    assert not model.training and search.progress is None


def test_a_module_in_eval_mode_stays_so_in_a_model_that_trains():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    _, batches = regression()
    model[1].eval()
    before = model[1].running_mean.clone()
    search = psfast.PatternSearch(model.parameters())
    fit(model, nn.MSELoss(), batches, search, max_steps=3, val_loader=batches, progress=False)
    assert torch.equal(model[1].running_mean, before) and model[2].num_batches_tracked == 3
    assert [module.training for module in model] == [True, False, True, True]
    model.eval()
    fit(model, nn.MSELoss(), batches, search, max_steps=1, progress=False)
    assert model[1].num_batches_tracked == 1 and not any(m.training for m in model.modules())


def test_batch_norm_sees_one_forward_pass_a_step_and_dropout_no_global_randomness():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    _, batches = regression(batches=2)
    search = psfast.PatternSearch(model.parameters())
    state = torch.get_rng_state()
    fit(model, nn.MSELoss(), batches, search, max_steps=5, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].num_batches_tracked == 5
    assert model.training


@pytest.mark.parametrize("installed", [True, False])
def test_progress_moves_inside_a_poll(installed, capsys, monkeypatch):
    monkeypatch.setattr("psfast.optimizer._PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(loop, "_LINE_SECONDS", 0.0)
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    model, batches = regression()
    search = psfast.PatternSearch(model.parameters(), block_size=3)
    fit(model, Flat(), batches, search, max_steps=2)
    shown = capsys.readouterr().err
    assert "poll 3 of 8" in shown and "radius" in shown


def test_loaders_that_do_not_know_their_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(batches)

    model, batches = regression()
    search = psfast.PatternSearch(model.parameters(), max_evaluations=3)
    loaders = [torch.utils.data.DataLoader(Stream(), batch_size=None) for _ in range(2)]
    history = fit(model, nn.MSELoss(), loaders[0], search, val_loader=loaders[1], progress=False)
    assert len(history.polls) == len(batches) and len(history.validation) == 2


def test_bad_input_is_refused():
    model, batches = regression()
    search = psfast.PatternSearch(model.parameters())
    criterion = nn.MSELoss()
    with pytest.raises(TypeError, match=r"must be a psfast\.PatternSearch, got Adam"):
        fit(model, criterion, batches, torch.optim.Adam(model.parameters()), progress=False)
    with pytest.raises(ValueError, match="max_steps must be >= 1, got 0"):
        fit(model, criterion, batches, search, max_steps=0, progress=False)
    with pytest.raises(ValueError, match="max_seconds must be > 0"):
        fit(model, criterion, batches, search, max_seconds=-1.0, progress=False)
    with pytest.raises(TypeError, match="max_seconds must be a number, got 'a'"):
        fit(model, criterion, batches, search, max_seconds="a", progress=False)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        fit(None, criterion, batches, search, progress=False)
    with pytest.raises(TypeError, match="criterion must be callable, got int"):
        fit(model, 3, batches, search, progress=False)
    with pytest.raises(TypeError, match="^loader must be an iterable of batches, got int"):
        fit(model, criterion, 3, search, progress=False)
    with pytest.raises(TypeError, match="^val_loader must be an iterable of batches, got int"):
        fit(model, criterion, batches, search, val_loader=3, progress=False)
    with pytest.raises(TypeError, match="^val_loader must be .* anew each time.* got generator"):
        fit(model, criterion, batches, search, val_loader=(b for b in batches), progress=False)
    with pytest.raises(TypeError, match="callback must be callable or None, got int"):
        fit(model, criterion, batches, search, callback=3, progress=False)
    with pytest.raises(TypeError, match="a batch must have targets, got None"):
        fit(model, criterion, [(batches[0][0], None)], search, progress=False)
    with pytest.raises(ValueError, match="loader gave no batch in pass 1"):
        fit(model, criterion, [], search, progress=False)
    with pytest.raises(ValueError, match="loader gave no batch in pass 2"):
        fit(model, criterion, iter(batches), search, max_steps=3, progress=False)
    with pytest.raises(TypeError, match="a batch must be"):
        fit(model, criterion, [3], search, progress=False)
    with pytest.raises(TypeError, match=r"got \['input', 'y'\]"):
        unpack({"input": 1, "y": 2})


def test_a_batch_without_supervised_positions_is_refused():
    model = psfast.DecoderOnlyTransformer(102, 8, 1, 2, 8)
    search = psfast.PatternSearch(model.parameters())
    nothing = {"x": torch.ones(2, 4, dtype=torch.int64), "y": torch.full((2, 4), 100)}
    with pytest.raises(ValueError, match="no supervised position"):
        fit(model, psfast.MaskedCrossEntropy(), [nothing], search, progress=False)


def test_scores_weigh_every_supervised_position_the_same():
    torch.manual_seed(0)
    logits = torch.randn(5, 7, 102)
    targets = torch.randint(4, (5, 7))
    targets[:3, 2:] = 100
    criterion = psfast.MaskedCrossEntropy()
    sums = ScoreSums()
    for part in (slice(0, 3), slice(3, 5)):
        sums.add(criterion, logits[part], targets[part])
    scores = sums.result()
    supervised = targets != 100
    assert scores.count == supervised.sum() == 20
    assert scores.loss == pytest.approx(criterion(logits, targets).item())
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))
    right = (logits.argmax(-1) == targets)[supervised].float().mean().item()
    assert scores.accuracy == pytest.approx(right)


def test_scores_of_torchs_own_class_convention():
    logits, targets = torch.randn(3, 4, 6), torch.randint(4, (3, 6))
    sums = ScoreSums()
    sums.add(nn.CrossEntropyLoss(), logits, targets)
    assert sums.result().accuracy == pytest.approx(
        (logits.argmax(1) == targets).float().mean().item()
    )


def scores_of(criterion, logits, targets, cuts=(0, 4, 6)):
    sums = ScoreSums()
    for start, stop in itertools.pairwise(cuts):
        sums.add(criterion, logits[start:stop], targets[start:stop])
    return sums.result()


def test_where_there_are_as_many_classes_as_positions_the_criterion_tells_them_apart():
    logits, targets = torch.randn(6, 5, 5), torch.randint(5, (6, 5))
    right = (logits.argmax(1) == targets).float().mean().item()
    assert scores_of(nn.CrossEntropyLoss(), logits, targets).accuracy == pytest.approx(right)
    right = (logits.argmax(2) == targets).float().mean().item()
    scores = scores_of(psfast.MaskedCrossEntropy(), logits, targets)
    assert scores.accuracy == pytest.approx(right)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.1, 1.0, 5.0])])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_scores_do_not_depend_on_how_the_data_are_batched(reduction, weight, smoothing):
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 3), torch.tensor([0, 1, 1, 2, 2, -100])
    options = {"weight": weight, "label_smoothing": smoothing}
    scores = scores_of(nn.CrossEntropyLoss(reduction=reduction, **options), logits, targets)
    mean = nn.CrossEntropyLoss(**options)(logits, targets).item()
    assert scores.loss == pytest.approx(mean) and scores.count == 5
    assert scores.accuracy == (logits.argmax(1) == targets).sum().item() / 5
    if weight is None and not smoothing:
        assert scores.perplexity == pytest.approx(math.exp(mean))
    else:
        assert math.isnan(scores.perplexity)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_is_no_cross_entropy_over_classes_has_a_loss_alone(reduction):
    outputs, counts = torch.randn(6, 3), torch.randint(5, (6,))
    scores = scores_of(lambda out, y: F.poisson_nll_loss(out.sum(1), y), outputs, counts)
    assert math.isnan(scores.accuracy) and math.isnan(scores.perplexity)
    criterion = nn.MSELoss(reduction=reduction)
    scores = scores_of(criterion, outputs[:, 0], outputs[:, 1], cuts=(0, 5, 6))
    mean = F.mse_loss(outputs[:, 0], outputs[:, 1]).item()
    assert scores.loss == pytest.approx(mean) and math.isnan(scores.accuracy)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, inputs):
        return {"sum": self.a(inputs["a"]) + self.b(inputs["b"]), "a": self.a(inputs["a"])}


def test_batches_of_nested_inputs_targets_and_outputs():
    def criterion(outputs, targets):
        return F.mse_loss(outputs["sum"], targets[0]) + F.mse_loss(outputs["a"], targets[1])

    torch.manual_seed(0)
    model = TwoInputs()
    a, b, y = torch.randn(7, 3), torch.randn(7, 3), torch.randn(2, 7, 1)
    search = psfast.PatternSearch(model.parameters(), radius=0.3)
    batches = [({"a": a.clone(), "b": b}, (y[0], y[1])) for a in (a, a)]
    history = fit(
        model, criterion, batches, search, max_steps=30, val_loader=batches, progress=False
    )
    assert history.validation[-1][1].loss < history.validation[0][1].loss
    objectives = BatchObjectives(model, criterion, search)
    first = objectives.on(*batches[0], seed=1)()
    assert objectives._place.is_at(*batches[1], seed=0)
    batches[0][0]["a"].mul_(2.0)
    assert objectives.on(*batches[0], seed=1)() != first


def test_evaluate_uses_eval_mode_and_puts_every_mode_back():
    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.9))
    model[0].eval()
    _, batches = regression()
    assert evaluate(model, nn.MSELoss(), batches) == evaluate(model, nn.MSELoss(), batches)
    assert model.training and model[1].training and not model[0].training


def test_the_same_batch_and_mask_are_the_same_objective():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.Linear(2, 1))
    _, ((x, y), (other_x, other_y)) = regression(batches=2)
    objectives = BatchObjectives(model, nn.MSELoss(), psfast.PatternSearch(model.parameters()))
    first = objectives.on(x, y, seed=1)
    first_loss = first().item()
    assert objectives.on(x.clone(), y, seed=1)().item() == first_loss
    assert objectives.on(x, y, seed=2)().item() != first_loss
    assert objectives.on(other_x, other_y, seed=1)().item() != first_loss
    assert objectives.on(x, y, seed=1)().item() == first_loss
    x.mul_(2.0)
    assert objectives.on(x, y, seed=1)().item() != first_loss
    model[0].requires_grad_(False)
    assert objectives.on(x, y, seed=1).params == list(model[2].parameters())


def test_a_users_own_masked_cross_entropy_is_scored_as_classes():
    class Own(nn.Module):
        ignore_index = 7

        def forward(self, logits, targets):
            kept = targets != self.ignore_index
            return nn.functional.cross_entropy(logits[kept], targets[kept])

    logits, targets = torch.randn(4, 5, 3), torch.randint(0, 3, (4, 5))
    targets[:, :2] = 7
    sums, expected = ScoreSums(), ScoreSums()
    sums.add(Own(), logits, targets)
    expected.add(psfast.MaskedCrossEntropy(ignore_index=7), logits, targets)
    assert sums.result() == pytest.approx(expected.result())


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("make", "masks"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), 5),
        (Attends, 5),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU()), 5),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval(), 1),
        (lambda: nn.Linear(4, 4), 1),
    ],
)
def test_every_poll_has_a_mask_of_its_own_whatever_draws_it(make, masks):
    torch.manual_seed(0)
    model, x = make(), torch.randn(3, 2, 4)
    optimizer = psfast.PatternSearch(model.parameters())
    state = torch.get_rng_state()
    objectives = BatchObjectives(model, nn.MSELoss(), optimizer)
    losses = {objectives.on(x, x.flip(0), seed)().item() for seed in range(5)}
    assert len(losses) == masks and torch.equal(torch.get_rng_state(), state)


def test_a_step_that_was_cut_after_an_accept_is_validated(monkeypatch):
    monkeypatch.setattr("psfast.optimizer._PROGRESS_SECONDS", 0.0)
    model, batches = regression()
    search = psfast.PatternSearch(model.parameters(), radius=1e-3, max_accepts=10**6)
    clock = SimpleNamespace(perf_counter=lambda: float(search.evaluations > 20))
    monkeypatch.setattr(loop, "time", clock)
    options = {"max_seconds": 0.5, "val_loader": batches, "progress": False}
    history = fit(model, nn.MSELoss(), batches, search, **options)
    assert history.stopped == "max_seconds" and not history.polls and search.evaluations
    (first, before), (last, after) = history.validation
    assert first == last == 0 and after.loss < before.loss
    assert after.loss == pytest.approx(nn.MSELoss()(model(batches[0][0]), batches[0][1]).item())


@pytest.mark.parametrize("steps", [1, 2, 3, 5])  # of 3 a pass
def test_fits_of_some_steps_each_go_on_through_the_data(steps):
    def order(calls, steps):
        data, (model, _) = Numbers(), regression()
        loader = ResumableLoader(data, batch_size=2)
        search = psfast.PatternSearch(model.parameters())
        seen = []

        def callback(step, report):
            seen.append(tuple(data.taken[-2:]))

        options = {"max_steps": steps, "callback": callback, "progress": False}
        for _ in range(calls):
            fit(model, nn.MSELoss(), loader, search, **options)
        return seen

    assert order(30 // steps, steps) == order(1, 30)


class Branches(nn.Module):
    """What only a loop can evaluate, on small batches."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        out = self.linear(x)
        return out * float(out.sum()) if len(x) < 4 else out


def test_a_batch_that_the_fast_backend_refuses_has_another_and_the_next_has_not():
    torch.manual_seed(0)
    model = Branches()
    objectives = BatchObjectives(model, nn.MSELoss(), psfast.PatternSearch(model.parameters()))
    served = []
    with pytest.warns(UserWarning, match="evaluated by 'serial', not by 'batched'") as told:
        for size in (8, 3, 8, 2, 8):
            f = objectives.on(torch.randn(size, 3), torch.randn(size, 1), 0)
            served.append((size, f.backend))
            index, delta = torch.arange(4), torch.ones(4)
            brute = psfast.objective(model, nn.MSELoss(), f.inputs, f.targets, backend="serial")
            torch.testing.assert_close(
                f.losses(index, delta).double(), brute.losses(index, delta), rtol=1e-5, atol=1e-6
            )
    assert served == [(size, "batched" if size == 8 else "serial") for size, _ in served]
    assert len([w for w in told if "evaluated by" in str(w.message)]) == 1
