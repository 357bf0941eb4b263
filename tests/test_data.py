"""The datasets: their form, their ground truths, their splits, their order."""

from functools import partial
from itertools import permutations, product

import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    SequentialSampler,
)

from psfast.data import (
    ResumableLoader,
    StateTrackingDataset,
    collate,
    modular_addition,
    parity,
    permutation_composition,
)


def inputs_of(dataset, seq_len):
    return {tuple(row) for row in dataset.x[:, :seq_len].tolist()}


def test_the_sequence_form_of_the_document():
    sample = StateTrackingDataset(200, 8)[0]
    bits = sample["x"][:8].tolist()
    states = [bits[: i + 1].count(0) % 2 for i in range(8)]
    assert sample["x"].dtype == sample["y"].dtype == torch.int64
    assert sample["x"].tolist() == [*bits, 99, *states[:-1]]
    assert sample["y"].tolist() == [100] * 8 + states


def test_no_target_is_shown_by_its_own_or_an_earlier_position_alone():
    """Copying the input's last shown state must not solve the task (the reference's fault)."""
    data = StateTrackingDataset(500, 8)
    copied = data.x[:, 9:] == data.y[:, 9:]
    assert 0.3 < copied.float().mean() < 0.7


def test_the_final_state_alone():
    data = StateTrackingDataset(50, 5, return_intermediates=False)
    for x, y in zip(data.x, data.y, strict=True):
        assert x.tolist() == [*x[:5].tolist(), 99]
        assert y.tolist() == [100] * 5 + [x[:5].tolist().count(0) % 2]


@pytest.mark.parametrize("mod", [1, 3, 7])
def test_modular_addition(mod):
    tokens = torch.randint(5, (17, 9))
    for row, states in zip(tokens.tolist(), modular_addition(mod)(tokens).tolist(), strict=True):
        assert states == [sum(row[: i + 1]) % mod for i in range(9)]


@pytest.mark.parametrize("n_elements", [1, 2, 3, 5])
def test_permutation_composition_moves_things_about(n_elements):
    elements = list(permutations(range(n_elements)))
    tokens = torch.randint(len(elements), (7, 11))
    for row, states in zip(
        tokens.tolist(), permutation_composition(n_elements)(tokens).tolist(), strict=True
    ):
        image = tuple(range(n_elements))
        for token, state in zip(row, states, strict=True):
            image = tuple(elements[token][place] for place in image)
            assert elements[state] == image


def test_s5_needs_other_special_tokens_and_says_which():
    s5 = permutation_composition(5)
    with pytest.raises(ValueError, match=r"sep_token=1\d+, pad_token=1\d+"):
        StateTrackingDataset(500, 8, 60, s5)
    data = StateTrackingDataset(500, 8, 120, s5, sep_token=120, pad_token=121)
    assert data.y[:, 8:].max() > 99 and data.x.max() == 120
    with pytest.raises(ValueError, match="vocab_size must be at most 3! = 6"):
        StateTrackingDataset(50, 8, 7, permutation_composition(3))


def test_an_own_ground_truth():
    def largest_so_far(tokens):
        return tokens.cummax(1).values

    data = StateTrackingDataset(30, 6, 10, largest_so_far)
    for x, y in zip(data.x.tolist(), data.y.tolist(), strict=True):
        assert y[6:] == [max(x[: i + 1]) for i in range(6)]


@pytest.mark.parametrize(
    "ground_truth_fn, message",
    [
        (lambda tokens: tokens.float(), "int64 tensor, got torch.float32"),
        (lambda tokens: None, "int64 tensor, got NoneType"),
        (lambda tokens: tokens[:, -1], r"shape \(4, 6\), got \(4,\)"),
        (lambda tokens: tokens + 99, r"in \[0, sep_token\) .*: pass sep_token=101"),
        (lambda tokens: tokens - 1, r"in \[0, sep_token\) = \[0, 99\), got -1 to 0$"),
    ],
)
def test_a_bad_ground_truth_is_refused(ground_truth_fn, message):
    with pytest.raises(ValueError, match=message):
        StateTrackingDataset(4, 6, ground_truth_fn=ground_truth_fn)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_samples": 0}, "n_samples"),
        ({"seq_len": 0}, "seq_len"),
        ({"seq_len": (5, 3)}, "seq_len"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 100}, "special tokens"),
        ({"pad_token": 99}, "special tokens"),
        ({"split": "valid"}, "split"),
        ({"seq_len": None}, "seq_len must be an integer or a pair of integers, got None"),
        ({"seq_len": "a"}, "seq_len must be"),
        ({"seq_len": (1, 2, 3)}, "seq_len must be"),
        ({"seq_len": True}, "seq_len must be"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
        ({"pad_token": "a"}, "pad_token must be an integer"),
        ({"ground_truth_fn": None}, "ground_truth_fn must be callable, got None"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        StateTrackingDataset(**{"n_samples": 3, "seq_len": 8, **arguments})


def test_the_data_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = StateTrackingDataset(50, (3, 9), seed=5, split="val")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = StateTrackingDataset(50, (3, 9), seed=5, split="val")
    other = StateTrackingDataset(50, (3, 9), seed=6, split="val")
    assert torch.equal(first.x, again.x) and torch.equal(first.y, again.y)
    assert not torch.equal(first.x, other.x)


def test_the_splits_share_no_input_and_together_are_everything():
    seen = {name: set() for name in ("train", "val", "test")}
    for name, inputs in seen.items():
        for seed in range(2):
            inputs |= inputs_of(StateTrackingDataset(4000, 8, seed=seed, split=name), 8)
    assert sum(map(len, seen.values())) == 256 == len(set.union(*seen.values()))
    assert 20 <= len(seen["val"]) <= 35 and 20 <= len(seen["test"]) <= 35


def test_a_space_too_small_to_share_out_is_in_every_split():
    with pytest.warns(UserWarning, match="only 32 inputs of length 5 exist") as warned:
        inputs = inputs_of(StateTrackingDataset(1000, 5, split="test"), 5)
    assert inputs == set(product((0, 1), repeat=5))
    assert len(warned) == 1 and warned[0].filename == __file__
    with pytest.warns(UserWarning, match="length 6") as warned:
        StateTrackingDataset(10, (2, 9), split="val")
    assert len(warned) == 1


def test_mixed_lengths_in_one_batch_are_padded_and_unsupervised():
    short, long = StateTrackingDataset(3, 2), StateTrackingDataset(2, 4)
    loader = DataLoader(ConcatDataset([short, long]), batch_size=5, collate_fn=collate)
    batch = next(iter(loader))
    assert batch["x"].shape == batch["y"].shape == (5, 8)
    assert batch["x"].dtype == batch["y"].dtype == torch.int64
    assert (batch["x"][:3, 4:] == 100).all() and (batch["y"][:3, 4:] == 100).all()
    assert torch.equal(batch["x"][3:], long.x)


def test_a_range_of_lengths_draws_each_and_keeps_the_form():
    data = StateTrackingDataset(60, (1, 4))
    assert {len(sample["x"]) for sample in data} == {2, 4, 6, 8}
    for sample in data:
        L = len(sample["x"]) // 2
        states = parity(sample["x"][None, :L])[0]
        assert sample["x"][L] == 99 and torch.equal(sample["x"][L + 1 :], states[:-1])
        assert (sample["y"][:L] == 100).all() and torch.equal(sample["y"][L:], states)


def test_the_loader_goes_on_in_the_middle_of_an_epoch():
    data = StateTrackingDataset(23, 4)
    make = partial(ResumableLoader, data, batch_size=5, seed=3)
    whole = make()
    epochs = []
    for epoch in range(2):
        whole.sampler.set_epoch(epoch)
        epochs.append([batch["x"] for batch in whole])
    assert not torch.equal(epochs[0][0], epochs[1][0])

    killed = make()
    killed.sampler.set_epoch(1)
    batches = iter(killed)
    for _ in range(2):
        next(batches)
    resumed = make()
    resumed.load_state_dict(killed.state_dict())
    assert resumed.state_dict() == killed.state_dict() == {"epoch": 1, "handed_out": 2}
    rest = [batch["x"] for batch in resumed]
    assert all(map(torch.equal, rest, epochs[1][2:])) and len(rest) == 3
    resumed.sampler.set_epoch(0)
    assert all(map(torch.equal, [batch["x"] for batch in resumed], epochs[0]))


def test_a_state_of_a_finished_epoch_leaves_nothing_out_of_the_next():
    data = StateTrackingDataset(10, 4)
    loader = ResumableLoader(data, batch_size=5)
    list(loader)
    fresh = ResumableLoader(data, batch_size=5)
    fresh.load_state_dict(loader.state_dict())
    fresh.sampler.set_epoch(1)
    assert len(list(fresh)) == 2


def test_the_loader_takes_another_order():
    """Lightning gives it one with ``overfit_batches``, and with "ddp" on one device."""
    data = StateTrackingDataset(10, 4)
    make = partial(ResumableLoader, data, batch_size=5, seed=3)
    loaders = [make(sampler=SequentialSampler(data)) for _ in range(2)]
    next(iter(loaders[0]))
    for state in (loaders[0].state_dict(), make().state_dict()):
        loaders[1].load_state_dict(state)
        batches = [batch["x"] for batch in loaders[1]]
        assert torch.equal(torch.cat(batches), data.x)
    loaders = [make(sampler=DistributedSampler(data, 1, 0)) for _ in range(2)]
    loaders[0].sampler.set_epoch(4)
    batches = iter(loaders[0])
    next(batches)
    loaders[1].load_state_dict(loaders[0].state_dict())
    (last,) = loaders[1]
    assert torch.equal(last["x"], next(batches)["x"])


def test_seeds_beyond_what_a_generator_takes_are_named():
    with pytest.raises(ValueError, match="seed must be < "):
        StateTrackingDataset(4, 8, seed=2**62)
    with pytest.raises(ValueError, match="seed must be < "):
        ResumableLoader(StateTrackingDataset(4, 8), seed=2**62)
