"""The batched objective against brute force, and what every objective promises."""

import warnings

import pytest
import torch
from models import CASES, build, classes, some_points
from torch import nn

import psfast
from psfast.objectives.batched import BatchedObjective
from psfast.objectives.serial import SerialModelObjective


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_brute_force(name):
    arguments = build(name)
    f, brute = BatchedObjective(*arguments), SerialModelObjective(*arguments)
    index, delta = some_points(f, 5)
    torch.testing.assert_close(f(), brute(), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        f.losses(index, delta), brute.losses(index, delta), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_written(name):
    arguments = build(name)
    model = arguments[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    f = BatchedObjective(*arguments)
    index, delta = some_points(f, 2)
    f(), f.losses(index, delta), f.loss_at(index[:1], delta[:1])
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_a_loss_does_not_depend_on_its_block(name, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of bits that depend on the block, too
        f = BatchedObjective(*build(name, dtype))
        index, delta = some_points(f, 7)
        together = f.losses(index, delta)
        for size in (1, 7, 40):
            blocks = zip(index.split(size), delta.split(size), strict=True)
            parts = [f.losses(i, d) for i, d in blocks]
            assert torch.equal(torch.cat(parts), together)
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(1))
        assert torch.equal(f.losses(index[order], delta[order]), together[order])
        repeated = index.repeat(30), delta.repeat(30)
        assert torch.equal(f.losses(*repeated), together.repeat(30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_a_trial_point_that_changes_nothing_has_the_incumbents_loss(name, dtype):
    f = BatchedObjective(*build(name, dtype))
    index, delta = some_points(f, 3)
    assert torch.equal(f.losses(index, delta * 0), f().expand(len(index)))


def test_what_the_batch_never_reads_is_an_exact_no_op():
    model, criterion, inputs, targets = build("decoder", torch.float32)
    inputs.clamp_(max=5)
    f = BatchedObjective(model, criterion, inputs, targets)
    names = [name for name, _ in model.named_parameters()]
    embedding = f.flat.offsets[names.index("token_embedding.weight")]
    position = f.flat.offsets[names.index("position_embedding")]
    index = torch.tensor([embedding + 6 * 8 + 1, position + 6 * 8, embedding + inputs[0, 0] * 8])
    losses = f.losses(index, torch.ones(3))
    assert torch.equal(losses[:2], f().expand(2))
    assert losses[2] != f()


def test_dead_units_are_exact_no_ops():
    model, criterion, inputs, targets = build("mlp", torch.float32)
    with torch.no_grad():
        model[0].bias[2] = -100.0
    f = BatchedObjective(model, criterion, inputs, targets)
    index = torch.arange(2 * 5, 3 * 5)
    assert torch.equal(f.losses(index, torch.full((5,), 0.1)), f().expand(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "decoder", "gru"])
def test_a_loss_does_not_depend_on_how_often_its_tensor_was_polled(name, dtype):
    """At first every few trial points are looked at, whether they change anything."""
    f = BatchedObjective(*build(name, dtype))
    index, delta = some_points(f, 3)
    expected = f.losses(index, delta)
    plans = f._evaluator.plans
    for _ in range(40):
        alone = torch.cat([f.losses(index[k : k + 1], delta[k : k + 1]) for k in range(len(index))])
        assert torch.equal(alone, expected)
        none = f.losses(index[:1], torch.zeros(1, dtype=dtype))  # also where nobody looks
        assert torch.equal(none[0], f())
    assert any("few" in key and False in key for plan in plans for key in plan.programs)


def test_trial_points_of_rows_that_are_seldom_read_are_looked_at():
    model, criterion, inputs, targets = build("decoder")
    inputs.clamp_(max=5)
    f = BatchedObjective(model, criterion, inputs, targets)
    number = [name for name, _ in model.named_parameters()].index("token_embedding.weight")
    unread = f.flat.offsets[number] + 6 * 8
    for i in range(unread, unread + 30):
        point = torch.tensor([i]), torch.tensor([0.1], dtype=torch.float64)
        assert torch.equal(f.losses(*point)[0], f())
    assert f._evaluator.plans[number].idle > 0.5


@pytest.mark.parametrize("name", ["decoder", "gru", "cnn", "used twice", "tied"])
def test_accept_refreshes_the_incumbent(name):
    arguments = build(name)
    f, brute = BatchedObjective(*arguments), SerialModelObjective(*arguments)
    index, delta = some_points(f, 3)
    for start in (0, 5, 11):
        which = torch.unique(index[start : start + 3])
        steps = delta[: len(which)]
        at = f.loss_at(which, steps)
        torch.testing.assert_close(at, brute.loss_at(which, steps), rtol=1e-9, atol=1e-12)
        f.accept(which, steps)
        assert torch.equal(f(), at)
        assert torch.equal(f(), BatchedObjective(*arguments)())
        torch.testing.assert_close(
            f.losses(index, delta), brute.losses(index, delta), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("name", CASES)
def test_what_is_brought_up_to_date_has_the_bits_of_what_is_new(name):
    """Also where it runs as programs, after some uses: a resumed run goes on bit for bit."""
    arguments = build(name, torch.float32)
    f = BatchedObjective(*arguments)
    index, delta = some_points(f, 4)
    for k in range(len(index)):
        f.losses(index[k : k + 1], delta[k : k + 1])  # brings up to date only what it reads
        f.accept(index[k : k + 1], 0.1 * delta[k : k + 1])
        if k % 8 == 7:
            fresh = BatchedObjective(*arguments)
            assert torch.equal(f.losses(index[:3], delta[:3]), fresh.losses(index[:3], delta[:3]))
            assert torch.equal(f.losses(index, delta), fresh.losses(index, delta))
            assert torch.equal(f(), fresh())


def test_a_block_of_a_few_may_stop_at_an_improvement():
    f = BatchedObjective(*build("mlp"))
    index, delta = some_points(f, 2)
    losses = f.losses(index, delta)
    bound = losses[3].item() + 1e-9
    first = (losses < bound).nonzero()[0].item()
    assert torch.equal(f.losses(index, delta, stop_below=bound), losses[: first + 1])
    assert torch.equal(f.losses(index, delta, stop_below=losses.min().item()), losses)


def test_changes_by_others_are_seen():
    arguments = build("cnn")
    f, brute = BatchedObjective(*arguments), SerialModelObjective(*arguments)
    f()
    model = arguments[0]
    state = {key: value * 1.1 for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    torch.testing.assert_close(f(), brute(), rtol=1e-9, atol=0)
    model.float()
    f.inputs, brute.inputs = f.inputs.float(), brute.inputs.float()
    torch.testing.assert_close(f().double(), brute().double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["decoder", "cnn", "gru"])
def test_another_batch(name):
    model, criterion, inputs, targets = build(name)
    f = BatchedObjective(model, criterion, inputs, targets)
    graph = f._evaluator.graph
    _, _, inputs, targets = build(name, seed=1)
    if name == "decoder":
        targets[0, -1] = 100  # fewer supervised positions than the traced batch has
    for seed in (None, 5):
        f.set_batch(inputs, targets, seed=seed)
        brute = SerialModelObjective(model, criterion, inputs, targets, seed=seed or 0)
        index, delta = some_points(f, 3)
        torch.testing.assert_close(f(), brute(), rtol=1e-9, atol=0)
        torch.testing.assert_close(
            f.losses(index, delta), brute.losses(index, delta), rtol=1e-9, atol=1e-12
        )
    assert f._evaluator.graph is graph
    half = slice(0, len(inputs) - 1)
    f.set_batch(inputs[half], targets[half])
    brute = SerialModelObjective(model, criterion, inputs[half], targets[half], seed=5)
    torch.testing.assert_close(f(), brute(), rtol=1e-9, atol=0)
    model.eval()
    f.set_batch(inputs[half], targets[half])
    torch.testing.assert_close(f(), brute(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["mlp", "decoder", "gru", "cnn"])
def test_bits_hold_for_another_number_of_threads(name):
    f = BatchedObjective(*build(name, torch.float32))
    index, delta = some_points(f, 7)
    f.losses(index, delta)
    threads = torch.get_num_threads()
    try:
        for count in (3, 2):
            torch.set_num_threads(count)
            together = f.losses(index, delta)
            parts = [f.losses(i, d) for i, d in zip(index.split(3), delta.split(3), strict=True)]
            assert torch.equal(torch.cat(parts), together)
            assert torch.equal(f.losses(index, delta * 0), f().expand(len(index)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Tanh])
def test_changed_columns_have_the_bits_of_whole_values(activation):
    """On CPU these ops compute the last few elements by other code than the rest."""
    model = nn.Sequential(nn.Linear(8, 64), activation(), nn.Linear(64, 64), nn.Linear(64, 3))
    f = BatchedObjective(model, nn.CrossEntropyLoss(), torch.randn(3, 8), torch.tensor([0, 1, 2]))
    index, delta = torch.randint(576, (601,)), torch.randn(601)
    together = f.losses(index, delta)
    for size in (33, 97):
        parts = [f.losses(i, d) for i, d in zip(index.split(size), delta.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), together)


def test_bad_arguments():
    arguments = build("mlp")
    with pytest.raises(ValueError, match="workspace must be"):
        BatchedObjective(*arguments, workspace=0)
    f = BatchedObjective(*arguments)
    for index in (f.flat.size, -1):
        for K in (1, 100):
            with pytest.raises(IndexError, match="index must lie in"):
                f.losses(torch.tensor([index] * K), torch.ones(K))
    with pytest.raises(ValueError, match="must be a scalar"):
        BatchedObjective(arguments[0], lambda out, y: out, *arguments[2:])


@pytest.mark.parametrize("acceptance", ["first", "best"])
@pytest.mark.parametrize("name", ["mlp", "decoder", "gru"])
def test_the_search_takes_the_serial_steps(name, acceptance):
    taken = []
    for backend, block_size in (("serial", 8), ("batched", 8), ("batched", None)):
        if block_size is None and acceptance == "best":
            continue  # the best of another block is another step
        arguments = build(name)
        f = psfast.objective(*arguments, backend=backend, seed=2)
        optimizer = psfast.PatternSearch(
            f.params, radius=0.2, acceptance=acceptance, block_size=block_size, seed=1
        )
        taken.append([])
        for _ in range(6):
            optimizer.step(f)
            taken[-1] += optimizer.last_poll.accepted
    assert taken[0]
    assert all(steps == taken[0] for steps in taken)


def test_a_batch_without_supervision_has_no_loss():
    model, criterion, inputs, targets = build("tied")
    none = torch.full_like(targets, 100)
    index, delta = torch.tensor([0, 5]), torch.ones(2)
    assert BatchedObjective(model, criterion, inputs, none)().isnan()
    f = BatchedObjective(model, criterion, inputs, targets)
    before = f()
    f.set_batch(inputs, none)
    assert f().isnan() and f.losses(index, delta).isnan().all()
    f.set_batch(inputs, targets)
    assert f() == before


@pytest.mark.parametrize("backend", ["batched", "vmap"])
def test_an_incumbent_without_a_loss_is_served(backend):
    model, criterion, inputs, targets = build("mlp")
    with torch.no_grad():
        model[4].bias[1] = torch.nan
    f = psfast.objective(model, criterion, inputs, targets, backend=backend)
    index = torch.arange(f.flat.size)
    assert f().isnan() and f.losses(index, torch.ones(len(index))).isnan().all()
    with torch.no_grad():
        model[4].bias[1] = 0.0
    brute = SerialModelObjective(model, criterion, inputs, targets)
    torch.testing.assert_close(f(), brute(), rtol=1e-9, atol=0)


def test_no_notes_of_torch_are_printed(capfd):
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3))
    f = BatchedObjective(model, nn.CrossEntropyLoss(), torch.randint(0, 10, (5, 2)), classes(5))
    f.losses(*some_points(f, 9))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "decoder", "gru"])
def test_the_loss_after_an_accept_depends_on_the_parameters_alone(name, dtype):
    """Not on what was tried before: a run that goes on from a checkpoint knows nothing of that."""
    f, fresh = (BatchedObjective(*build(name, dtype)) for _ in range(2))
    index, delta = some_points(f, 6)
    for k in range(40):
        place = slice(k % len(index), k % len(index) + 1)
        f.losses(index[place], delta[place])
        f.accept(index[place], delta[place])
        fresh.accept(index[place], delta[place])
        assert torch.equal(f(), fresh())
        assert torch.equal(f.losses(index, delta), fresh.losses(index, delta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_at_a_point_is_the_incumbents_there_to_the_bit(name, dtype):
    f = BatchedObjective(*build(name, dtype))
    for index, delta in zip(*(part[:8].split(1) for part in some_points(f, 2)), strict=True):
        there = f.loss_at(index, delta)
        f.accept(index, delta)
        assert torch.equal(f(), there)
