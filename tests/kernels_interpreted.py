"""Run by test_kernels.py, in a process of its own whose Triton interprets: losses of the fused
kernels against float64 brute force. Sizes are odd and tiny; the interpreter is slow."""

import copy
import math

import numpy as np
import pytest
import torch
from descents import serial_descent
from psfast.kernels import configs, evaluation, order, plan

import psfast
from psfast import polling, search
from psfast.objectives import fused_cuda
from psfast.objectives.fused_cuda import FusedCudaObjective

SIZES = {
    # Two sequences a tile and padding in every direction.
    "T 17": dict(B=3, T=17, vocab_size=19, d_model=24, n_layers=2, n_heads=3, d_ff=40),
    # Several tiles, d_k = 8, the vocabulary in two parts.
    "three tiles": dict(B=9, T=5, vocab_size=102, d_model=16, n_layers=1, n_heads=2, d_ff=16),
}
# So many supervised rows that those of one trial point fill two tiles.
MANY_ROWS = dict(B=6, T=16, vocab_size=7, d_model=16, n_layers=2, n_heads=1, d_ff=20, ignored=0)
TWO_BLOCKS = dict(B=2, T=4, vocab_size=5, d_model=16, n_layers=2, n_heads=1, d_ff=4, ignored=1)
WIDE = dict(B=2, T=18, vocab_size=7, d_model=132, n_layers=1, n_heads=3, d_ff=20)


@pytest.fixture(autouse=True)
def rows_are_alike(monkeypatch):
    """Products whose rows have the same bits wherever they stand in a tile, as on a GPU; those of
    NumPy, by which the interpreter computes, have not."""

    def matmul(a, b, dtype):
        return np.einsum("...ij,...jk->...ik", a, b, dtype=dtype)

    monkeypatch.setattr(np, "matmul", matmul)


def problem(B, T, *, dropout=0.1, spread=0.2, seed=0, ignored=6, **sizes):
    torch.manual_seed(seed)
    model = psfast.DecoderOnlyTransformer(max_len=T + 3, dropout=dropout, **sizes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    V = sizes["vocab_size"]
    inputs = torch.randint(V - 1, (B, T))  # the last token is never read
    targets = torch.randint(V, (B, T))
    targets[:, : min(ignored, T - 1)] = 100
    targets[0, T - 2 :] = 100
    return model, psfast.MaskedCrossEntropy(), inputs, targets


class BruteForce:
    """Change, forward, restore, in float64, with the objective's dropout mask."""

    def __init__(self, objective):
        self.objective = objective
        self.model = copy.deepcopy(objective.model).double()
        model, p = objective.model, objective.model.blocks[0].ff[3].p
        dropped = model.training and p > 0
        shape = (*objective.inputs.shape, model.token_embedding.embedding_dim)
        self.masks = [1.0] * len(model.blocks)
        if dropped:
            with torch.random.fork_rng():
                torch.manual_seed(objective.seed)
                ones = torch.ones(shape)
                self.masks = [torch.dropout(ones, p, True).double() for _ in model.blocks]

    def __call__(self):
        model, inputs = self.model, self.objective.inputs
        with torch.no_grad():
            x = model.token_embedding(inputs) + model.position_embedding[: inputs.shape[1]]
            for block, mask in zip(model.blocks, self.masks, strict=True):
                x = x + block.attention(block.ln1(x))
                x = x + block.ff[:3](block.ln2(x)) * mask
            logits = model.head(model.final_norm(x))
            return self.objective.criterion(logits, self.objective.targets).item()

    def losses(self, index, delta):
        found = []
        names = {p: name for name, p in self.objective.model.named_parameters()}
        mine = dict(self.model.named_parameters())
        for i, d in zip(index.tolist(), delta.tolist(), strict=True):
            number, element = self.objective.flat.locate(i)
            p = mine[names[self.objective.params[number]]].data.view(-1)
            old = p[element].item()
            p[element] = (p[element].float() + d).double()
            found.append(self())
            p[element] = old
        return torch.tensor(found, dtype=torch.float64)


def points(objective, each, seed=1, radius=0.1):
    """``each`` trial points of every parameter tensor."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.cat(
        [
            offset + torch.randint(p.numel(), (each,), generator=generator)
            for p, offset in zip(objective.params, objective.flat.offsets, strict=False)
        ]
    )
    sign = torch.randint(2, (len(index),), generator=generator) * 2 - 1
    return index, sign * radius


def check(objective, index, delta, *, bound=1e-6):
    brute = BruteForce(objective)
    base = brute()
    assert objective().item() == pytest.approx(base, abs=2e-6)
    got = objective.losses(index, delta) - objective()
    expected = brute.losses(index, delta) - base
    error = (got - expected).abs()
    worst = int(error.argmax())
    number, element = objective.flat.locate(int(index[worst]))
    assert error[worst] < bound, (number, element, got[worst], expected[worst])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_tensor_against_float64(sizes):
    objective = FusedCudaObjective(*problem(**sizes), seed=3)
    check(objective, *points(objective, 1))


def test_small_losses_are_finer_than_float32():
    model, criterion, inputs, targets = problem(**SIZES["three tiles"], dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
    objective = FusedCudaObjective(model, criterion, inputs, targets)
    assert 1e-4 < objective().item() < 1e-2
    index, delta = points(objective, 1, radius=1e-3)
    check(objective, index[::2], delta[::2], bound=1e-8)


def test_many_supervised_rows():
    objective = FusedCudaObjective(*problem(**MANY_ROWS))
    assert objective._rows.parts == 2
    check(objective, *points(objective, 1))


def test_a_wide_model_goes_through_memory():
    objective = FusedCudaObjective(*problem(**WIDE))
    assert objective._plan.config.blocks.staged and objective._plan.config.tail.staged
    index, delta = points(objective, 1)
    check(objective, index[::3], delta[::3])


@pytest.mark.parametrize("mode", [mode for mode in configs.MODES if mode != "fp16x3"])
def test_the_other_modes(mode):
    # The interpreter computes all of them in float32, so this checks their code, not their error.
    objective = FusedCudaObjective(*problem(**SIZES["three tiles"]), precision=mode)
    index, delta = points(objective, 1)
    check(objective, index[::5], delta[::5])


def test_a_loss_does_not_depend_on_its_block(monkeypatch):
    objective = FusedCudaObjective(*problem(**SIZES["three tiles"]))
    index, delta = points(objective, 1)
    index, delta = index[::3], delta[::3]
    together = objective.losses(index, delta)
    assert len(index) > 5
    with monkeypatch.context() as patch:  # sorted, in several launches and in two pieces
        patch.setattr(evaluation, "_SORTED", 2)
        patch.setattr(evaluation, "CAPACITY", 5)
        patch.setattr(plan, "_BEHIND_BYTES", 4 * objective._rows.packed.shape[1] * 16 * 3)
        objective._blocks = None
        for _ in range(2):
            assert torch.equal(together, objective.losses(index, delta))
    objective._blocks = None
    backwards = objective.losses(index.flip(0), delta.flip(0)).flip(0)
    assert torch.equal(together, backwards)
    assert torch.equal(together[2:3], objective.losses(index[2:3], delta[2:3]))
    assert objective.losses(index[:0], delta[:0]).shape == (0,)


def test_exact_no_ops_have_the_incumbents_loss():
    objective = FusedCudaObjective(*problem(**SIZES["T 17"]))
    model, offsets = objective.model, dict(zip(objective.params, objective.flat.offsets[:-1]))  # noqa: B905
    d, d_k, T = 24, 8, 17
    qkv = model.blocks[1].attention.qkv
    unread = [
        offsets[model.token_embedding.weight] + 18 * d + 5,  # a token that does not occur
        offsets[model.position_embedding] + (T + 1) * d,  # a position behind the sequences
        offsets[qkv.bias] + 3 * d_k + d_k + 2,  # a key's bias: the softmax drops it
    ]
    with torch.no_grad():
        model.blocks[0].ff[0].bias[7] = -1e4  # a hidden unit that is dead at all rows
    unread += [
        offsets[model.blocks[0].ff[0].weight] + 7 * d + 3,
        offsets[model.blocks[0].ff[0].bias] + 7,
        offsets[model.blocks[0].ff[2].weight] + 2 * 40 + 7,
    ]
    index = torch.tensor(unread)
    losses = objective.losses(index, torch.full((len(index),), 0.1))
    assert torch.equal(losses, objective().expand(len(index)))
    tiny = objective.losses(torch.tensor([offsets[model.head.bias]]), torch.tensor([1e-30]))
    assert tiny.item() == objective().item()  # lost in the rounding of the parameter


def test_what_dropout_drops_is_an_exact_no_op():
    objective = FusedCudaObjective(*problem(**TWO_BLOCKS, dropout=0.8), seed=3)
    masks = objective._masks(objective.inputs.shape, 0.8)
    read = objective.targets != 100
    offsets = dict(zip(objective.params, objective.flat.offsets[:-1], strict=False))
    index = []
    for block, (layer, mask) in enumerate(zip(objective.model.blocks, masks, strict=True)):
        # What the last block's other rows pass on, nobody reads.
        kept = mask[read].any(0) if block == len(masks) - 1 else mask.flatten(0, 1).any(0)
        dropped = (~kept).nonzero()[:, 0]
        assert len(dropped)
        for row in dropped.tolist():
            index += [offsets[layer.ff[2].bias] + row, offsets[layer.ff[2].weight] + 4 * row]
    index = torch.tensor(index)
    losses = objective.losses(index, torch.full((len(index),), 0.1))
    assert torch.equal(losses, objective().expand(len(index)))
    check(objective, index, torch.full((len(index),), 0.1))


def test_accept_loss_at_and_foreign_changes():
    objective = FusedCudaObjective(*problem(**SIZES["three tiles"]), seed=2)
    index, delta = points(objective, 1)
    index, delta = index[[0, 3, 9]], delta[[0, 3, 9]]
    before = objective.flat.buffer.clone()
    promised = objective.loss_at(index, delta)
    assert torch.equal(objective.flat.buffer, before)
    objective.accept(index, delta)
    assert objective().item() == promised.item()
    assert objective().item() == pytest.approx(BruteForce(objective)(), abs=2e-6)
    with torch.no_grad():
        objective.model.blocks[0].ff[0].weight.mul_(1.5)
    assert objective().item() == pytest.approx(BruteForce(objective)(), abs=2e-6)
    check(objective, index, delta)


@pytest.mark.parametrize("method", ["accept", "__call__"])
def test_a_refresh_that_fails_leaves_the_incumbent(monkeypatch, method):
    sizes = {"vocab_size": 11, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}
    objective = FusedCudaObjective(*problem(2, 5, **sizes))
    index, delta = torch.tensor([3]), torch.tensor([0.5])
    values, before = objective.flat.buffer.clone(), objective()
    block = points(objective, 1)
    losses = objective.losses(*block)

    def fails(self):
        raise RuntimeError("the device is out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(evaluation.Refresh, "__call__", fails)
        if method == "accept":
            objective.accept(index, delta)
        with torch.no_grad():
            objective.params[0].add_(0.0)
        objective()
    assert torch.equal(objective.flat.buffer, values)
    assert torch.equal(objective(), before)
    assert torch.equal(objective.losses(*block), losses)


@pytest.mark.parametrize(
    "sizes, frozen, margin, most",
    [
        (SIZES["three tiles"], False, 2e-3, 99),
        (SIZES["three tiles"], True, 0.0, 3),
        (TWO_BLOCKS, False, 0.0, 99),
    ],
)
def test_a_descent_is_the_serial_loop(sizes, frozen, margin, most):
    twins = []
    for _ in range(2):
        model, *rest = problem(**sizes)
        model.blocks[0].attention.requires_grad_(not frozen)
        twins.append(FusedCudaObjective(model, *rest, seed=2))
    loop, serial = twins
    index, delta = points(loop, 1)
    index = torch.cat([index, index[:3]])  # some twice: there and back again
    delta = torch.cat([delta, -delta[:3]])
    delta[2] = math.nan
    expected = serial_descent(serial, index, delta, margin, most)
    before = loop().item()
    found = loop.descend(index, delta, incumbent=before, margin=margin, most=most, gap=2.0)
    assert 2 < len(expected[1]) < len(expected[0])
    assert found.losses.tolist() == pytest.approx(expected[0], abs=0, rel=0, nan_ok=True)
    assert (found.places, found.incumbents) == expected[1:]
    assert len(expected[0]) <= found.evaluated
    assert torch.equal(loop.flat.buffer, serial.flat.buffer)
    assert loop().item() == serial().item()
    again = loop.descend(index[:5], delta[:5], incumbent=before, margin=9.0, most=1, gap=20.0)
    assert again.places == [] and len(again.losses) == 5
    few, kept = serial.losses(index[:5], delta[:5]), loop._descents[4]
    assert len(loop._descents) == 2  # with larger blocks where less is accepted
    torch.testing.assert_close(again.losses, few, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(loop.flat.buffer, serial.flat.buffer)
    for twin in twins:  # another batch of the same shape
        twin.set_batch(twin.inputs.flip(0), twin.targets.flip(0), seed=4)
    index, delta = index[8:14], delta[8:14]
    expected = serial_descent(serial, index, delta, 0.0, 2)
    found = loop.descend(index, delta, incumbent=loop().item(), margin=0.0, most=2, gap=2.0)
    assert loop._descents[4] is kept
    assert (found.losses.tolist(), found.places, found.incumbents) == expected


def test_a_descent_beyond_fp16s_range_is_the_serial_loop():
    """Trial points that leave it and fail, some that take the incumbent along, a way back."""
    twins = []
    for _ in range(2):
        model, *rest = problem(**TWO_BLOCKS)
        for block in model.blocks:
            block.ff[2].weight.data[:, :2] = 1e-9  # how much these hidden units matter
        twins.append(FusedCudaObjective(model, *rest, seed=2))
    loop, serial = twins
    offset = dict(zip(loop.params, loop.flat.offsets, strict=False))
    index, delta = (values[:20] for values in points(loop, 1))
    unit, other = (offset[block.ff[0].bias] for block in loop.model.blocks)
    fails = offset[loop.model.blocks[1].ln2.bias]
    far = {3: (fails, -1e7), 6: (unit, 1e5), 9: (fails, -1e7), 11: (unit, -9e4)}
    far |= {13: (other, 1e5), 15: (other, -9e4), len(index) - 1: (unit + 1, 1e5)}
    for place, (at, change) in far.items():
        index[place], delta[place] = at, change
    expected = serial_descent(serial, index, delta, -1e-4, 99)  # a little worse is good enough
    found = loop.descend(index, delta, incumbent=loop().item(), margin=-1e-4, most=99, gap=2.0)
    assert set(far) - set(expected[1]) == {3, 9}
    assert found.losses.tolist() == expected[0]
    assert (found.places, found.incumbents) == expected[1:]
    assert torch.equal(loop.flat.buffer, serial.flat.buffer)
    assert loop().item() == serial().item() == found.incumbents[-1]


def test_a_descent_from_beyond_fp16s_range_is_the_serial_loop():
    """Accepts late in the model where the fallback has filled the cache, the way back, more."""
    twins = []
    for _ in range(2):
        model, *rest = problem(**TWO_BLOCKS)
        model.blocks[0].ff[0].bias.data[0] = 1e5
        model.blocks[0].ff[2].weight.data[:, 0] = 1e-9  # how much this hidden unit matters
        twins.append(FusedCudaObjective(model, *rest, seed=2))
    loop, serial = twins
    offset = dict(zip(loop.params, loop.flat.offsets, strict=False))
    early, late = loop.model.blocks
    changed = late.ln1.bias, late.ff[2].bias, early.ff[0].bias, late.ln1.bias
    index = torch.tensor([offset[p] for p in changed])
    delta = torch.tensor([0.01, 0.01, -9e4, 0.02])
    expected = serial_descent(serial, index, delta, -1.0, 99)
    found = loop.descend(index, delta, incumbent=loop().item(), margin=-1.0, most=99, gap=2.0)
    assert expected[1] == list(range(len(index)))
    assert (found.losses.tolist(), found.places, found.incumbents) == expected
    assert loop().item() == serial().item()


def test_another_batch_another_mask_and_no_dropout():
    model, criterion, inputs, targets = problem(**SIZES["three tiles"])
    state = torch.get_rng_state()
    objective = FusedCudaObjective(model, criterion, inputs, targets, seed=2)
    first = objective().item()
    objective.set_batch(inputs[:2], targets[:2], seed=4)
    assert objective().item() == pytest.approx(BruteForce(objective)(), abs=2e-6)
    objective.set_batch(inputs, targets, seed=2)
    assert objective().item() == first
    assert torch.equal(torch.get_rng_state(), state)
    model.blocks[0].ff[3].p = 1.0
    objective.set_batch(inputs, targets)
    assert objective().item() == pytest.approx(BruteForce(objective)(), abs=2e-6)
    model.eval()
    objective.set_batch(inputs, targets)
    with torch.no_grad():
        expected = criterion(model(inputs), targets).item()
    assert objective().item() == pytest.approx(expected, abs=2e-6)
    objective.set_batch(inputs, torch.full_like(targets, 100))
    assert math.isnan(objective().item())


def test_targets_without_a_sign_have_the_same_loss():
    sizes = {"vocab_size": 11, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}
    model, criterion, inputs, targets = problem(2, 5, **sizes)
    objective = FusedCudaObjective(model, criterion, inputs, targets)
    before = objective()
    objective.set_batch(inputs, targets.to(torch.uint8))
    assert torch.equal(objective(), before)


def test_inference_mode_is_refused_and_leaves_no_trace():
    sizes = {"vocab_size": 11, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}
    objective = FusedCudaObjective(*problem(2, 5, **sizes))
    index, delta = torch.tensor([3]), torch.tensor([0.5])
    with torch.inference_mode():
        for call in (objective, lambda: objective.loss_at(index, delta)):
            with pytest.raises(RuntimeError, match="inference_mode"):
                call()
    for _ in range(2):  # what is made at the first
        objective.loss_at(index, delta)


@pytest.mark.parametrize(
    ("sequences", "supervised", "stays"),
    [(6, 90, True), (6, 60, True), (4, 50, True), (1, 16, False), (3, 0, False)],
)
def test_a_smaller_batch_stays_in_place(sequences, supervised, stays):
    model, criterion, inputs, targets = problem(**MANY_ROWS)
    objective = FusedCudaObjective(model, criterion, inputs, targets)
    rows, blocks = objective._rows, objective._on_current(None, evaluation.BlockLoop)
    inputs, targets = inputs[:sequences].flip(1), targets[:sequences].clone()
    targets.view(-1)[supervised:] = 100
    objective.set_batch(inputs, targets)
    assert (objective._rows is rows) == stays  # so captured graphs go on
    assert (objective._on_current(blocks, evaluation.BlockLoop) is blocks) == stays
    new = FusedCudaObjective(model, criterion, inputs, targets)
    assert new._rows.groups * 2 >= objective._rows.groups
    index, delta = points(new, 2)
    torch.testing.assert_close(objective(), new(), rtol=0, atol=0, equal_nan=True)
    found, expected = objective.losses(index, delta), new.losses(index, delta)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_batch_of_more_tiles_than_a_grid_holds_is_refused(monkeypatch):
    model, criterion, inputs, targets = problem(**MANY_ROWS)
    monkeypatch.setattr(fused_cuda, "_GRID", 1)
    with pytest.raises(ValueError, match="must fill <= 1 tiles of rows, it fills 2"):
        FusedCudaObjective(model, criterion, inputs, targets)


def test_frozen_parameters_are_read_and_not_counted():
    model, *rest = problem(**SIZES["three tiles"])
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    objective = FusedCudaObjective(model, *rest)
    assert len(objective.params) == 6
    check(objective, *points(objective, 1))


def test_parameters_of_another_dtype_are_refused_until_they_are_back():
    sizes = {"vocab_size": 11, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}
    objective = FusedCudaObjective(*problem(2, 5, **sizes))
    before = objective()
    objective.model.double()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must be in float32, got torch\.float64"):
            objective()
    objective.model.float()
    assert torch.equal(objective(), before)


def test_parameters_that_are_not_where_the_cache_is_get_another_one():
    sizes = {"vocab_size": 11, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}
    objective = FusedCudaObjective(*problem(2, 5, **sizes))
    before, plan = objective(), objective._plan
    plan.device = torch.device("meta")  # as if they had been moved from there
    assert torch.equal(objective(), before) and objective._plan is not plan


def test_beyond_fp16s_range_it_evaluates_again():
    model, *rest = problem(**SIZES["three tiles"])
    objective = FusedCudaObjective(model, *rest)
    offset = dict(zip(objective.params, objective.flat.offsets[:-1]))  # noqa: B905
    index = torch.tensor([offset[model.blocks[0].ff[0].bias] + 3, offset[model.head.bias]])
    # The first hidden unit becomes 1e5, too much for fp16; its weights out make that 1e-5.
    with torch.no_grad():
        model.blocks[0].ff[2].weight[:, 3] = 1e-5
    check(objective, index, torch.tensor([1e5, 0.1]))
    with torch.no_grad():
        model.blocks[0].ff[0].bias[3] = 1e5  # the incumbent too, and what w1 is times SCALE
    check(objective, index, torch.tensor([1e3, 0.1]))


def test_nan_stays_in_its_trial_point():
    objective = FusedCudaObjective(*problem(**SIZES["three tiles"]))
    N = objective.flat.size
    index = torch.tensor([0, 200, N - 1, -1, N])
    delta = torch.tensor([math.nan, math.inf, 0.1, 0.1, 0.1])
    losses = objective.losses(index, delta)
    used = bool((objective.inputs == 0).any())
    assert math.isnan(losses[0]) == used
    assert not math.isfinite(losses[1]) or losses[1] == objective()
    assert math.isfinite(losses[2])
    assert torch.isnan(losses[3:]).all()
    objective.set_batch(objective.inputs.clamp(min=1), objective.targets)
    offset = dict(zip(objective.params, objective.flat.offsets[:-1]))  # noqa: B905
    index[0] = offset[objective.model.token_embedding.weight]
    losses = objective.losses(index, delta)
    assert losses[0] == objective()  # the first token occurs no more
    assert torch.isnan(losses[3:]).all()


def test_kernels_that_get_a_loss_wrong_are_found(monkeypatch):
    objective = FusedCudaObjective(*problem(**SIZES["three tiles"]), seed=3)
    masks, names = (
        objective._masks(objective.inputs.shape, 0.1),
        dict(objective.model.named_parameters()),
    )
    monkeypatch.setattr(fused_cuda, "_checked", set())
    right, calls = objective._losses, []

    def wrong(*arguments):
        calls.append(arguments)
        losses = right(*arguments)
        losses[3] += 1e-3
        losses[5] = math.nan
        return losses

    monkeypatch.setattr(objective, "_losses", wrong)
    third, fifth = list(names)[3], list(names)[5]
    with pytest.raises(ValueError, match=f"wrong on this device, at a change of {third}, {fifth}$"):
        objective._check(masks)
    monkeypatch.setattr(objective, "_losses", right)
    objective._check(masks)
    monkeypatch.setattr(objective, "_losses", wrong)
    objective._check(masks)  # not a second time
    assert len(calls) == 1


@pytest.mark.parametrize("method", ["losses", "refresh"])
def test_kernels_that_are_wrong_out_of_fp16s_range_alone_are_found(monkeypatch, method):
    objective = FusedCudaObjective(*problem(**SIZES["three tiles"] | {"n_layers": 2}), seed=3)
    masks = objective._masks(objective.inputs.shape, 0.1)
    monkeypatch.setattr(fused_cuda, "_checked", set())
    run = objective._plan._run

    def without_repair(*arguments, first=None, repair=False, **options):
        if not (repair and (first is not None) == (method == "refresh")):
            run(*arguments, first=first, repair=repair, **options)

    monkeypatch.setattr(objective._plan, "_run", without_repair)
    ends = "blocks.0.ln2.bias, blocks.1.ln2.bias"
    with pytest.raises(ValueError, match=f"wrong on this device, at a change of {ends}$"):
        objective._check(masks)
    monkeypatch.setattr(objective._plan, "_run", run)
    objective._check(masks)


def test_says_why_it_cannot_serve():
    model, criterion, inputs, targets = problem(**SIZES["three tiles"])
    tied = copy.deepcopy(model)
    tied.head.weight = tied.token_embedding.weight
    deep = problem(B=1, T=4, vocab_size=5, d_model=300, n_layers=1, n_heads=1, d_ff=4)
    cases = [
        ((torch.nn.Linear(2, 2), criterion, inputs, targets), "DecoderOnlyTransformer, got Linear"),
        ((model, torch.nn.CrossEntropyLoss(), inputs, targets), "MaskedCrossEntropy, got Cross"),
        (
            (copy.deepcopy(model).double(), criterion, inputs, targets),
            r"float32, got torch.float64",
        ),
        ((tied, criterion, inputs, targets), "tied"),
        ((model, criterion, inputs + 200, targets), r"inputs must lie in \[0, 102\)"),
        ((model, criterion, inputs, targets + 101), r"targets must lie in \[0, 102\)"),
        ((model, criterion, inputs[:, :3], targets), "same shape"),
        (deep, "no kernel configuration for d_model = 300"),
    ]
    for arguments, reason in cases:
        with pytest.raises(ValueError, match=reason):
            FusedCudaObjective(*arguments)
    with pytest.raises(ValueError, match="precision must be one of .*, got 'bf16'"):
        FusedCudaObjective(model, criterion, inputs, targets, precision="bf16")


@pytest.mark.parametrize("total", [2, 6, 30, 1042, 5000])
def test_the_poll_order_is_drawn_as_on_a_cpu(total):
    keys, sides = search.permutation(3, 7, total)
    for start, count in ((0, total), (total // 3, total // 2)):
        for dtype in (torch.float32, torch.float64):
            index, sign = order.draw(keys, sides, start, count, total, torch.zeros(1, dtype=dtype))
            entries = search.poll_order(3, 7, start, count, total)
            expected = search.coordinates(entries)
            assert torch.equal(index, expected[0]) and torch.equal(sign, expected[1].to(dtype))


def test_the_kernel_that_draws_is_tried_where_it_draws(monkeypatch):
    tried = []
    monkeypatch.setattr(order, "draw", lambda *given: tried.append(given[-1].device))
    device = torch.device("meta")  # the current one may be full, or of another kind
    assert polling._kernel_to_draw(device) is order.draw and tried == [device]
