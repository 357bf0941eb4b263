"""The fused CPU evaluator against brute force, and what always holds of its losses."""

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import psfast
from psfast import extension, ops, reference_fused
from psfast.data import StateTrackingDataset
from psfast.models import DecoderOnlyTransformer, MaskedCrossEntropy
from psfast.objectives.fused import FusedObjective
from psfast.objectives.serial import SerialModelObjective

pytestmark = pytest.mark.skipif(
    extension.load() is not None, reason=f"no extension: {extension.load()}"
)
IGNORED = 100


def problem(
    *, V=11, d=12, layers=2, heads=3, ff=17, max_len=9, B=3, T=7, dropout=0.0, seed=0,
    dtype=torch.float64,
):  # fmt: skip
    """A model with no number left at its start value, and a batch with ragged supervision."""
    torch.manual_seed(seed)
    model = DecoderOnlyTransformer(V, d, layers, heads, ff, max_len, dropout).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    tokens = torch.randint(V, (B, T))
    targets = torch.randint(V, (B, T))
    targets[torch.rand(B, T) < 0.5] = IGNORED
    targets[-1] = IGNORED
    targets[0, T - 1] = 0
    return model, MaskedCrossEntropy(IGNORED), tokens, targets


def twins(**sizes):
    make = problem(**sizes)
    return FusedObjective(*make, seed=5), SerialModelObjective(*problem(**sizes), seed=5)


def trained(parts):
    """The problem when its model has learned it."""
    model, criterion, tokens, targets = parts
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        criterion(model(tokens), targets).backward()
        optimizer.step()
    return parts


def every_coordinate(objective, radius=0.1, stride=1):
    index = torch.arange(0, objective.flat.size, stride)
    sign = 1 - 2 * (torch.arange(len(index)) % 3 == 0).to(objective.flat.buffer.dtype)
    return index, sign * radius


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"d": 16, "heads": 2, "layers": 1, "ff": 8, "B": 5, "T": 1},
        {"d": 9, "heads": 1, "layers": 3, "V": 101, "T": 9, "B": 1, "max_len": 9},
        {"d": 20, "heads": 5, "ff": 33, "V": 17, "T": 9, "B": 9},
    ],
)
def test_every_coordinate_is_brute_force(sizes, dropout):
    fused, serial = twins(dropout=dropout, **sizes)
    # A vocabulary of one has the loss 0, and rounding around it.
    torch.testing.assert_close(fused(), serial(), rtol=1e-12, atol=1e-14)
    index, delta = every_coordinate(fused, stride=3)
    found, expected = fused.losses(index, delta), serial.losses(index, delta)
    error = (found - expected).abs() / expected
    names = [n for n, _ in fused.model.named_parameters()]
    worst = {names[fused.flat.locate(int(i))[0]] for i in index[error > 1e-9]}
    assert not worst


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), seed=st.integers(0, 10**6), dropout=st.sampled_from([0.0, 0.2]))
def test_random_sizes_are_brute_force(data, seed, dropout):
    draw = data.draw
    heads, T = draw(st.integers(1, 4)), draw(st.integers(1, 19))
    sizes = {
        "heads": heads,
        "d": heads * draw(st.integers(1, 9)),
        "layers": draw(st.integers(1, 3)),
        "ff": draw(st.integers(1, 40)),
        "V": draw(st.integers(1, 40)),
        "T": T,
        "max_len": T + draw(st.integers(0, 3)),
        "B": draw(st.integers(1, 20)),
    }
    fused, serial = twins(dropout=dropout, seed=seed, **sizes)
    index = torch.randint(fused.flat.size, (60,))
    delta = 0.1 * torch.randn(60, dtype=torch.float64)
    torch.testing.assert_close(
        fused.losses(index, delta), serial.losses(index, delta), rtol=1e-9, atol=1e-14
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_in_every_block(dtype, dropout):
    fused, _ = twins(dtype=dtype, dropout=dropout, d=16, heads=2, ff=40, B=5)
    index, delta = every_coordinate(fused, stride=2)
    whole = fused.losses(index, delta)
    order = torch.randperm(len(index))
    assert torch.equal(fused.losses(index[order], delta[order]), whole[order])
    for size in (1, 2, 7, 33):
        for start in range(0, len(index) - size, len(index) // 9):
            part = slice(start, start + size)
            assert torch.equal(fused.losses(index[part], delta[part]), whole[part])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(fused.losses(index, delta), whole)
    finally:
        torch.set_num_threads(threads)


def test_no_ops_have_the_incumbents_loss():
    fused, _ = twins(dtype=torch.float32)
    index, delta = every_coordinate(fused)
    unread = [i for i in range(len(index)) if _unread(fused, i)]
    assert len(unread) > 20
    losses = fused.losses(index, delta)
    assert torch.equal(losses[unread], fused().expand(len(unread)))
    tiny = torch.full_like(delta, 1e-12)  # lost in rounding, except at zeros: there are none
    assert torch.equal(fused.losses(index, tiny), fused().expand(len(index)))


def _unread(objective, index):
    """Rows of the two embeddings that no counted position reads."""
    tensor, element = objective.flat.locate(index)
    row = element // 12
    if tensor == 0:
        return row >= objective._plan.tokens.shape[1]
    return tensor == 1 and row not in objective._plan.tokens


@pytest.mark.parametrize("radius, most", [(0.1, 0.001), (0.01, 0.009), (0.001, 0.04)])
def test_float32_decides_as_float64(radius, most):
    """Accept or reject flips against float64, no more than PERFORMANCE gives for fp32.

    Measured on all of 40,000: 0.05%, 0.15% and 0.7%, where torch's own fp32 flips 0.2%, 1.1%
    and 5.6% (a fused loss is the incumbent's plus a small difference, not a second large sum).
    """
    torch.manual_seed(1)
    model = DecoderOnlyTransformer(dropout=0.0)
    data = StateTrackingDataset(4, 8, seed=1)
    fused = FusedObjective(model, MaskedCrossEntropy(), data.x, data.y)
    index = torch.randint(fused.flat.size, (20_000,))
    delta = radius * (1.0 - 2.0 * torch.randint(2, (20_000,)))
    value = fused.flat.buffer[index]
    moved = (value + delta).double() - value.double()
    low = fused.losses(index, delta) < fused()
    exact = FusedObjective(model.double(), MaskedCrossEntropy(), data.x, data.y)
    high = exact.losses(index, moved) < exact()
    assert 0.1 < high.double().mean() < 0.9
    assert (low != high).double().mean() <= most


def test_small_losses_are_finer_than_float32():
    """1 + what is not on top would round them to 6e-8, and hide many a decrease."""
    model, criterion, *batch = trained(problem(dtype=torch.float32))
    exact = SerialModelObjective(copy.deepcopy(model).double(), criterion, *batch)
    fused = FusedObjective(model, criterion, *batch)
    assert 1e-4 < exact().item() < 1e-2
    index, delta = every_coordinate(fused, radius=1e-3, stride=5)
    rounded = (fused.flat.buffer[index] + delta).double() - fused.flat.buffer[index].double()
    changes = fused.losses(index, delta) - fused()
    torch.testing.assert_close(changes, exact.losses(index, rounded) - exact(), rtol=0, atol=1e-8)


def test_accept_refreshes_as_a_full_refresh_does():
    fused, serial = twins(dtype=torch.float32, d=16, heads=2, layers=3, ff=24)
    index, delta = every_coordinate(fused, stride=5)
    for tensor in range(len(fused.params)):
        at = torch.tensor([fused.flat.offsets[tensor + 1] - 1])
        by = torch.tensor([0.05])
        ahead = fused.loss_at(at, by)
        fused.accept(at, by)
        serial.accept(at, by)
        assert torch.equal(fused(), ahead)
        kept = fused._plan.workspace.clone()
        found = fused.losses(index, delta)
        fused.flat.mark_changed()
        assert torch.equal(fused(), ahead)
        assert torch.equal(fused._plan.workspace, kept)
        assert torch.equal(fused.losses(index, delta), found)
    assert torch.equal(fused.flat.buffer, serial.flat.buffer)
    torch.testing.assert_close(fused(), serial(), rtol=1e-5, atol=0)


def test_loss_at_changes_nothing():
    fused, serial = twins(dropout=0.2)
    index = torch.randperm(fused.flat.size)[:40]
    delta = 0.1 * torch.randn(40, dtype=torch.float64)
    before, loss = fused.flat.buffer.clone(), fused()
    torch.testing.assert_close(fused.loss_at(index, delta), serial.loss_at(index, delta))
    assert torch.equal(fused.flat.buffer, before) and torch.equal(fused(), loss)


def test_follows_writes_of_others_and_of_frozen_parameters():
    model, criterion, tokens, targets = problem()
    chosen = [model.head.bias, model.blocks[1].ff[0].weight, model.position_embedding]
    fused = FusedObjective(model, criterion, tokens, targets, params=chosen)
    serial = SerialModelObjective(model, criterion, tokens, targets, params=chosen)
    index, delta = every_coordinate(fused)
    for write in (lambda: None, model.head.bias.zero_, model.final_norm.weight.zero_):
        with torch.no_grad():
            write()
        torch.testing.assert_close(fused(), serial())
        torch.testing.assert_close(fused.losses(index, delta), serial.losses(index, delta))
    fused.accept(index[::7], delta[::7])
    torch.testing.assert_close(fused(), serial())
    torch.testing.assert_close(fused.losses(index, delta), serial.losses(index, delta))


def test_goes_on_with_another_batch_and_mask():
    fused, serial = twins(dropout=0.3)
    index, delta = every_coordinate(fused, stride=11)
    state = torch.get_rng_state()
    for shape, seed in (((3, 7), None), ((3, 7), 9), ((2, 5), None)):
        tokens, targets = torch.ones(shape, dtype=torch.int32), torch.ones(shape, dtype=torch.int64)
        fused.set_batch(tokens, targets, seed=seed)
        serial.set_batch(tokens, targets, seed=seed)
        torch.testing.assert_close(fused(), serial())
        torch.testing.assert_close(fused.losses(index, delta), serial.losses(index, delta))
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def accept_many(model, fused):
    fused.accept(torch.arange(100), torch.full((100,), 0.1).double())


@torch.no_grad()
def write(model, fused):
    model.head.weight[0, 0] += 0.25


@torch.no_grad()
def write_frozen(model, fused):
    model.final_norm.weight[1] += 0.25


def interrupt(model, fused):
    """A batch that is refused, behind one whose refresh fails."""
    before, refresh = fused.inputs, ops.fused_refresh
    try:
        ops.fused_refresh = None
        with pytest.raises(TypeError):
            fused.set_batch(before.flip(1), fused.targets)
    finally:
        ops.fused_refresh = refresh
    with pytest.raises(ValueError, match="inputs"):
        fused.set_batch(before + 99, fused.targets)


def evaluate(model, fused):
    model.eval()


@pytest.mark.parametrize("freezes", [False, True])
@pytest.mark.parametrize("change", [None, accept_many, write, write_frozen, interrupt, evaluate])
def test_another_batch_after_changes_is_as_all_anew(change, freezes):
    """What is prepared of the weights is kept over batches: to the bit what a new one has."""
    model, criterion, tokens, targets = problem(dropout=0.3)
    params = [p for p in model.parameters() if not freezes or p is not model.final_norm.weight]
    fused = FusedObjective(model, criterion, tokens, targets, params=params, seed=1)
    for step in range(4):
        place = torch.tensor([7 + 60 * step, 500 + step, fused.flat.size - 1 - step])
        fused.accept(place, torch.full((3,), 0.1).double())
        if change is not None and step == 2:
            change(model, fused)
        batch = tokens.roll(step, 1), targets.roll(step, 0)
        fused.set_batch(*batch, seed=step)
        new = FusedObjective(model, criterion, *batch, params=params, seed=step)
        index, delta = every_coordinate(new)
        assert fused() == new()
        assert torch.equal(fused.losses(index, delta), new.losses(index, delta))


def test_without_supervision_the_loss_is_nan():
    model, criterion, tokens, targets = problem()
    fused = FusedObjective(model, criterion, tokens, torch.full_like(targets, IGNORED))
    assert math.isnan(fused())
    assert fused.losses(*every_coordinate(fused)).isnan().all()


def test_what_is_not_finite_never_wins():
    fused, _ = twins()
    index = torch.arange(fused.flat.size)
    losses = fused.losses(index, torch.full((len(index),), math.nan, dtype=torch.float64))
    assert not (losses < fused()).any()
    assert losses.isnan().float().mean() > 0.5
    huge = fused.losses(index, torch.full((len(index),), 1e300, dtype=torch.float64))
    assert not (huge == -math.inf).any()


def test_bad_blocks_raise():
    fused, _ = twins()
    one, by = torch.tensor([0]), torch.tensor([0.1])
    assert len(fused.losses(one[:0], by[:0])) == 0
    for bad in (-1, fused.flat.size):
        with pytest.raises(IndexError, match=r"index must lie in \[0, \d+\)"):
            fused.losses(torch.tensor([bad]), by)
    with pytest.raises(TypeError, match="index must be int64"):
        fused.losses(one.int(), by)
    with pytest.raises(ValueError, match="same length"):
        fused.losses(torch.tensor([0, 1]), by)
    wide = torch.arange(6).view(3, 2)[:, 0]  # not contiguous
    assert torch.equal(
        fused.losses(wide, by.expand(3)), fused.losses(wide.clone(), by.expand(3).clone())
    )


class Other(DecoderOnlyTransformer):
    pass


def test_refuses_what_it_cannot_serve():
    model, criterion, tokens, targets = problem()
    cases = [
        (Other(11, 12, 1, 3, 17, 9), criterion, "must be a DecoderOnlyTransformer, got Other"),
        (model, torch.nn.CrossEntropyLoss(), "must be a MaskedCrossEntropy"),
        (problem(dtype=torch.bfloat16)[0], criterion, "float32 and float64 only"),
        (problem()[0].to("meta"), criterion, "CPU"),
    ]
    tied = problem()[0]
    tied.head.weight = tied.token_embedding.weight
    hooked = problem()[0]
    hooked.blocks[0].register_forward_hook(lambda *_: None)
    patched = problem()[0]
    patched.head.forward = lambda x: x
    cases += [(tied, criterion, "tied"), (hooked, criterion, "hook"), (patched, criterion, "hook")]
    for other, loss, reason in cases:
        with pytest.raises(ValueError, match=reason):
            FusedObjective(other, loss, tokens, targets)
    with pytest.raises(ValueError, match=r"inputs must lie in \[0, 11\)"):
        FusedObjective(model, criterion, tokens + 5, targets)
    with pytest.raises(ValueError, match="max_len = 9"):
        FusedObjective(model, criterion, torch.zeros(1, 10).long(), torch.zeros(1, 10).long())
    with pytest.raises(ValueError, match="params must be the model's own"):
        FusedObjective(model, criterion, tokens, targets, params=list(hooked.parameters()))


def limited_norm(model):
    model.token_embedding.max_norm = 0.5


def one_more_layer(model):
    model.blocks[0].ff.append(torch.nn.ReLU())


def dropout_for_relu(model):
    model.blocks[0].ff[1] = torch.nn.Dropout(0.0)


def norm_for_relu(model):
    model.blocks[0].ff[1] = torch.nn.LayerNorm(17, elementwise_affine=False)


def other_heads(model):
    model.blocks[1].attention.n_heads = 4


def longer_head(model):
    model.head = torch.nn.Sequential(model.head, torch.nn.ReLU())


def other_order(model):
    model.blocks[0].ff = torch.nn.Sequential(*list(model.blocks[0].ff)[::-1])


def no_blocks(model):
    model.blocks = torch.nn.Identity()


def no_head(model):
    del model.head


def other_eps(model):
    model.blocks[1].ln1.eps = 0.1


CHANGES = [
    limited_norm, one_more_layer, dropout_for_relu, norm_for_relu, other_heads, longer_head,
    other_order, no_blocks, no_head, other_eps,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_refuses_every_other_architecture(change):
    model, *rest = problem()
    change(model)
    with pytest.raises(ValueError, match=r"must be as built|the same eps"):
        FusedObjective(model, *rest)


def test_refuses_while_all_modules_are_hooked():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="hook is on all modules"):
            FusedObjective(*problem())
    finally:
        handle.remove()


def arguments(seed=0, mask=False):
    """What the raw ops take: weights and a filled plan."""
    fused, _ = twins(seed=seed, dropout=0.2 if mask else 0.0)
    return fused._weights, fused._plan


@pytest.mark.parametrize("mask", [False, True])
def test_ops_are_their_plain_twins(mask):
    weights, plan = arguments(mask=mask)
    index = torch.randint(len(weights), (50,))
    delta = torch.randn(50, dtype=torch.float64)
    twin = reference_fused
    torch.testing.assert_close(
        ops.fused_refresh(weights, plan), twin.fused_refresh(weights, plan), rtol=1e-12, atol=0
    )
    moved = weights.index_add(0, index.unique(), torch.full((len(index.unique()),), 0.05).double())
    scratch = plan._replace(workspace=torch.zeros_like(plan.workspace))
    kept = plan.workspace.clone()
    torch.testing.assert_close(
        ops.fused_loss(moved, scratch), twin.fused_loss(moved, plan), rtol=1e-12, atol=0
    )
    assert torch.equal(plan.workspace, kept)
    torch.testing.assert_close(
        ops.fused_losses(weights, plan, index, delta),
        twin.fused_losses(weights, plan, index, delta),
        rtol=1e-9,
        atol=1e-14,
    )


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("margin, most, gap", [(1e-9, 99, 1.0), (1e-3, 99, 9.0), (1e-9, 4, 40.0)])
def test_descents_are_the_serial_loop(margin, most, gap, mask):
    weights, plan = arguments(mask=mask)
    torch.manual_seed(2)
    index = torch.randint(len(weights), (40,))
    delta = 0.2 * torch.randn(40, dtype=torch.float64)
    index[[0, 7]] = len(weights) - 1  # the head's last bias
    delta[[0, 7]] = torch.tensor([math.nan, math.inf]).double()
    runs = []
    for side in (ops, reference_fused):
        own = weights.clone()
        loss = ops.fused_refresh(own, plan).item()
        found = side.fused_descend(own, plan, index, delta, loss, margin, most, gap)
        losses, places, incumbents, (decided, accepted, evaluated) = found
        assert evaluated >= decided
        runs.append((own, losses[:decided], places[:accepted], incumbents[:accepted]))
        if side is ops:
            kept = plan.workspace.clone()
            ops.fused_refresh(own, plan)
            assert torch.equal(plan.workspace, kept)
    assert 3 < len(runs[0][2]) <= most
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][2], runs[1][2])
    for fast, slow in zip(runs[0], runs[1], strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-14, equal_nan=True)


def test_ops_pass_opcheck():
    weights, plan = arguments()
    index, delta = torch.tensor([1, 5]), torch.tensor([0.1, 0.2]).double()
    base = (weights, *plan.arguments())
    torch.library.opcheck(torch.ops.psfast.fused_losses.default, (*base, index, delta))
    torch.library.opcheck(torch.ops.psfast.fused_loss.default, base)
    torch.library.opcheck(torch.ops.psfast.fused_refresh.default, (*base, None, True))
    torch.library.opcheck(torch.ops.psfast.fused_refresh.default, (*base, index, False))
    numbers = (index, delta, 5.0, 0.0, 9, 1.0)
    torch.library.opcheck(torch.ops.psfast.fused_descend.default, (*base, *numbers))


def test_raw_ops_name_what_is_wrong():
    weights, plan = arguments()
    index, delta = torch.tensor([0]), torch.tensor([0.1]).double()

    def refuses(message, weights=weights, index=index, delta=delta, **replaced):
        with pytest.raises(RuntimeError, match=message):
            ops.fused_losses(weights, plan._replace(**replaced), index, delta)

    refuses("index must lie in", index=torch.tensor([len(weights)]))
    refuses("index must lie in", index=torch.tensor([-1]))
    refuses("index has the wrong dtype", index=torch.tensor([0], dtype=torch.int32))
    refuses("delta has the wrong dtype", delta=delta.float())
    refuses("delta must have 1 dimensions", delta=delta[None])
    refuses("same length", index=torch.tensor([0, 1]))
    refuses("weights must hold", weights=weights[:-1])
    refuses("weights must be float32 or float64", weights=weights.half(), delta=delta.half())
    refuses("weights must be contiguous", weights=torch.stack([weights, weights], 1)[:, 0])
    refuses("workspace must hold", workspace=plan.workspace[:-1])
    refuses("workspace has the wrong dtype", workspace=plan.workspace.float())
    refuses("tokens must lie in", tokens=plan.tokens + 11)
    refuses("targets must be ignore_index or", targets=plan.targets + 200)
    refuses("targets must have the shape", targets=plan.targets[:, 1:].contiguous())
    refuses("mask must have shape", mask=torch.ones(1, 1, 1, 1).double())
    refuses("d_model must be divisible", sizes=plan.sizes._replace(n_heads=5))
    refuses("sizes", sizes=plan.sizes._replace(n_layers=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 60.0])
def test_a_logit_that_dominates_and_is_taken_away(dtype, gap):
    torch.manual_seed(0)
    model = psfast.DecoderOnlyTransformer(11, 8, 1, 2, 16, max_len=6, dropout=0.0).to(dtype)
    with torch.no_grad():
        model.head.bias[3] += gap
    inputs, targets = torch.randint(0, 11, (2, 6)), torch.full((2, 6), 3)
    targets[0] = torch.randint(0, 11, (6,))
    arguments = model, psfast.MaskedCrossEntropy(), inputs, targets
    fused, serial = (psfast.objective(*arguments, backend=b) for b in ("fused", "serial"))
    delta = torch.tensor([-60.0, -39.0, -20.0, -5.0, -0.5, 0.5, 5.0, 39.0], dtype=dtype)
    index = torch.full((8,), fused.flat.size - 11 + 3)
    torch.testing.assert_close(
        fused.losses(index, delta), serial.losses(index, delta), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("delta", [-3000.0, -900.0, 900.0, 3000.0])
def test_logits_too_far_apart_for_exp_have_their_loss(delta):
    torch.manual_seed(0)
    model = psfast.DecoderOnlyTransformer(5, 2, 1, 1, 3, max_len=4, dropout=0.0).double()
    with torch.no_grad():
        model.head.bias.add_(torch.tensor([2000.0, 0.0, -1000.0, 1000.0, 1000.0]))
    batch = torch.randint(5, (2, 3)), torch.randint(5, (2, 3))
    fused, serial = (
        psfast.objective(model, psfast.MaskedCrossEntropy(), *batch, backend=name)
        for name in ("fused", "serial")
    )
    index = torch.arange(fused.flat.size - 15, fused.flat.size)  # of the head
    delta = torch.full((15,), delta, dtype=torch.float64)
    torch.testing.assert_close(fused.losses(index, delta), serial.losses(index, delta))
