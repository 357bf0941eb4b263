"""The pure functions: poll order, acceptance, block sizes, when a poll fails."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psfast.search import (
    Decision,
    PollState,
    acceptance_bar,
    acceptance_margin,
    advance,
    advance_through,
    best_improvement,
    block_size,
    coordinates,
    derive_seed,
    first_improvement,
    kept_places,
    noise_floor,
    noise_level,
    poll_order,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**62), st.integers(0, 100))
def test_poll_order_is_a_permutation(total, seed, order):
    entries = poll_order(seed, order, 0, total, total)
    assert torch.equal(entries.sort().values, torch.arange(total))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 500), st.data())
def test_poll_order_is_a_function_of_the_place_alone(total, data):
    start = data.draw(st.integers(0, total))
    count = data.draw(st.integers(0, total - start))
    whole = poll_order(7, 3, 0, total, total)
    assert torch.equal(poll_order(7, 3, start, count, total), whole[start : start + count])


def test_poll_order_never_changes_between_versions():
    # A checkpoint resumes only as long as these stay what they are.
    assert poll_order(0, 0, 0, 8, 242_892).tolist() == [
        231387,
        182760,
        234207,
        238526,
        84420,
        115781,
        29836,
        85750,
    ]
    assert derive_seed(1, 2, 3) == 1359406628498057490


def test_poll_orders_of_two_polls_or_seeds_have_little_in_common():
    total = 10_000
    first = poll_order(0, 0, 0, total, total)
    for other in (poll_order(0, 1, 0, total, total), poll_order(1, 0, 0, total, total)):
        assert (first == other).sum() < 20  # one place in `total` agrees by chance, on average


def test_poll_order_looks_random():
    """No drift along the permutation: neighbours and places are uncorrelated."""
    total = 4096
    entries = poll_order(5, 0, 0, total, total).double()
    with_place = torch.stack([entries, torch.arange(total).double()])
    with_next = torch.stack([entries[1:], entries[:-1]])
    for pair in (with_place, with_next):
        assert torch.corrcoef(pair)[0, 1].abs() < 5 / math.sqrt(total)


def test_poll_order_rejects_places_outside():
    with pytest.raises(ValueError, match="outside"):
        poll_order(0, 0, 5, 6, 10)


def test_coordinates_cover_both_signs():
    index, sign = coordinates(torch.arange(6))
    assert index.tolist() == [0, 0, 1, 1, 2, 2]
    assert sign.tolist() == [1, -1, 1, -1, 1, -1]


@pytest.mark.parametrize(
    "losses, first, best",
    [
        ([3.0, 0.5, 0.2], 1, 2),
        ([1.0, 1.0], None, None),
        ([math.nan, 0.9, math.nan, 0.9], 1, 1),
        ([math.inf, math.nan], None, None),
        ([-math.inf, 0.5], 1, 1),
        ([-math.inf, math.nan, math.inf], None, None),
        ([2.0], None, None),
        ([0.5], 0, 0),
    ],
)
@pytest.mark.parametrize("more", [0, 100])  # few are read by Python, many by torch
def test_acceptance(losses, first, best, more):
    losses = torch.tensor(losses + [3.0] * more, dtype=torch.float64)
    decision = first_improvement(losses, 1.0)
    assert decision.chosen == first
    assert decision.decided == (len(losses) if first is None else first + 1)
    decision = best_improvement(losses, 1.0)
    assert decision.chosen == best
    assert decision.decided == len(losses)
    assert decision.nan == losses.isnan().sum()
    if best is not None:
        assert decision.loss == losses[best]


def test_a_poll_fails_only_when_all_have_failed_at_one_incumbent():
    total, state = 10, PollState(incumbent=1.0)
    fail = first_improvement(torch.full((4,), 2.0), 1.0)
    state, failed = advance(state, fail, total)
    assert not failed and state.tried == state.position == 4
    success = first_improvement(torch.tensor([2.0, 0.5]), 1.0)
    state, failed = advance(state, success, total)
    assert not failed and state.tried == 0 and state.position == 6 and state.incumbent == 0.5
    state, failed = advance(state, fail, total)
    assert not failed and state.position == 0 and state.order == 0
    state, failed = advance(state, fail, total)
    assert not failed
    state, failed = advance(state, first_improvement(torch.full((2,), 2.0), 0.5), total)
    assert failed and state.order == 1 and state.position == state.tried == 0
    assert state.evaluations == 16 and state.polls == 2


def test_blocks_grow_while_nothing_improves():
    state = PollState(incumbent=1.0)
    sizes = []
    while state.tried < 10**5:
        sizes.append(block_size(state))
        failed = first_improvement(torch.full((sizes[-1],), 2.0), 1.0)
        state, _ = advance(state, failed, 10**6)
    assert sizes[:4] == [1, 1, 1, 1] and sizes[-1] > 10**4 and sizes == sorted(sizes)
    assert len(sizes) < 60


def test_blocks_shrink_with_the_gap_between_successes():
    sizes = [block_size(PollState(mean_gap=gap)) for gap in (1.0, 2.5, 25.0, 1000.0)]
    assert sizes == [1, 2, 20, 126]


def test_blocks_suit_the_machine():
    """Where a block costs as much as thousands of trial points, a failing poll has few."""
    state, sizes = PollState(incumbent=1.0), []
    while state.tried < 242_892:
        sizes.append(block_size(state, overhead=4096.0, at_once=128))
        failed = first_improvement(torch.full((sizes[-1],), 2.0), 1.0)
        state, _ = advance(state, failed, 10**6)
    assert sizes[0] == 128 and len(sizes) < 20
    assert block_size(PollState(mean_gap=2.5, tried=3), at_once=32) == 32


def test_the_bar_is_the_incumbents_loss_unless_more_is_asked():
    assert acceptance_bar(5.1, acceptance_margin(0.3, 0.0, 0.0)) == 5.1
    margin = acceptance_margin(0.5, 0.1, 0.25)
    assert margin == 0.1 * 0.25 + 0.25
    assert acceptance_bar(5.0, margin) == 5.0 - margin
    for missing in (None, math.nan, math.inf):
        assert acceptance_bar(missing, margin) == math.inf


@pytest.mark.parametrize("more", [0, 100])
def test_a_bar_that_float32_has_not_is_the_same_for_every_block_size(more):
    losses = torch.tensor([1.0] + [3.0] * more)
    assert first_improvement(losses, 1.0 + 1e-9).chosen == 0
    assert best_improvement(losses, 1.0 + 1e-9).chosen == 0
    assert first_improvement(losses, 1.0 - 1e-9).chosen is None


def test_a_descent_in_parts():
    nan, inf = math.nan, math.inf
    losses = [5.0, nan, 4.5, 4.4, -inf, nan, 3.0, 4.0]
    assert kept_places(losses, 5.0, 0.0, 9) == [2, 3, 6]
    assert kept_places(losses, 5.0, 0.2, 9) == [2, 6]
    assert kept_places(losses, 5.0, 0.0, 2) == [2, 3]
    assert kept_places(losses, nan, 0.0, 9) == [0, 2, 3, 6]


@pytest.mark.parametrize("places", [[], [0], [2, 3, 6], [0, 1, 2, 11]])
def test_advancing_through_a_descent_is_advancing_by_each_of_its_parts(places):
    total, incumbents = 40, [4.0 - 0.1 * place for place in places]
    state = PollState(position=33, tried=5, nan=2, incumbent=5.0, mean_gap=2.7, noise=1e-9, lap=1)
    one_by_one, start = state, 0
    for place, loss in zip(places, incumbents, strict=True):
        decision = Decision(place - start, loss, place + 1 - start, 1)
        one_by_one, failed = advance(one_by_one, decision, total)
        assert not failed
        start = place + 1
    assert advance_through(state, places, incumbents, total) == one_by_one


@given(st.integers(0, 2**32), st.sampled_from([1e-9, 1e-3, 10.0]), st.integers(6, 16))
@settings(max_examples=100, deadline=None)
def test_the_noise_of_a_smooth_function_is_found_within_its_scatter(seed, noise, count):
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(count, dtype=torch.float64)
    smooth = 5.0 + noise * (3.0 * t + 0.1 * t.square())
    errors = noise * torch.randn(count, generator=generator, dtype=torch.float64)
    level = noise_level((smooth + errors).tolist())
    assert level == 0.0 or 0.05 * noise < level < 5.0 * noise


def test_noise_is_found_in_most_draws_and_right_on_average():
    draws = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)).double()
    levels = torch.tensor([noise_level(losses) for losses in draws.tolist()])
    found = levels[levels > 0]
    assert len(found) > 300
    assert 0.8 < found.square().mean().sqrt() < 1.2


@pytest.mark.parametrize(
    "losses",
    [
        [1.0] * 8,
        [2.0 * k for k in range(8)],
        [0.5 * k * k for k in range(8)],
        [1.0, math.nan, 2.0, 1.0, 1.5, 1.0, 2.0, 1.0],
        [1.0, math.inf, 2.0, 1.0, -math.inf, 1.0, 2.0, 1.0],
    ],
)
def test_a_loss_without_noise_or_without_a_value_has_none(losses):
    assert noise_level(losses) == 0.0


def test_a_poll_of_noise_alone_stays_above_the_floor():
    generator = torch.Generator().manual_seed(0)
    for total in (2, 100, 20_000):
        losses = torch.randn(100, total, generator=generator)
        incumbents = torch.randn(100, 1, generator=generator)
        feigned = (losses < incumbents - noise_floor(1.0, total)).any(1)
        assert feigned.float().mean() < 0.25
