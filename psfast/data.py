"""State-tracking datasets: tokens move a state, the model predicts each next state."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import permutations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from psfast.checks import check_count
from psfast.notices import warn_caller

SPLITS = {"train": range(0, 8), "val": range(8, 9), "test": range(9, 10)}  # tenths of all inputs
SMALLEST_SPLIT_SPACE = 128


def parity(tokens: Tensor) -> Tensor:
    """State i is the parity of the zeros in ``tokens[:, :i + 1]``.

    tokens: (n, L) int64 -> states: (n, L) int64 in {0, 1}
    """
    return (tokens == 0).cumsum(1) % 2


def modular_addition(mod: int) -> Callable[[Tensor], Tensor]:
    """A ground truth: state i is the sum of the first i + 1 tokens modulo ``mod``."""
    check_count("mod", mod)
    return partial(_modular_sum, mod=mod)


def permutation_composition(n_elements: int) -> Callable[[Tensor], Tensor]:
    """A ground truth: the word problem of the symmetric group S_n (3 for S3, 5 for S5).

    Token k is permutation k of ``n_elements`` things in lexicographic order (0 is the
    identity); state i is the product of the first i + 1 tokens, the newest applied last. So
    ``vocab_size`` is at most n!, and the states go up to n! - 1: the 120 of S5 reach past the
    default special tokens, so S5 needs ``sep_token=120, pad_token=121`` and a model with
    ``vocab_size=122``.
    """
    if not isinstance(n_elements, int) or not 1 <= n_elements <= 5:
        raise ValueError(f"n_elements must be an integer from 1 to 5, got {n_elements!r}")
    return partial(_compose, n_elements=n_elements)


class StateTrackingDataset(Dataset):
    """``n_samples`` random token sequences and the states they lead through.

    Sample: {"x": (T,) int64, "y": (T,) int64}. For a sequence of L tokens with the states
    s_1 ... s_L (``ground_truth_fn``), T = 2 L and

        x:  t_1 ... t_L   sep   s_1 ... s_{L-1}
        y:  pad ... pad   s_1   s_2 ... s_L

    so each supervised position predicts the NEXT state. With ``return_intermediates=False``,
    T = L + 1 and only the last state is asked for, at the separator.

    seq_len: L, or a pair (shortest, longest) for a length drawn for each sample; then batch
    with ``collate``.
    ground_truth_fn: (n, L) int64 tokens -> (n, L) int64 states, each in [0, sep_token); state
    i may use the tokens up to i. See ``parity``, ``modular_addition``,
    ``permutation_composition``.
    split: "train", "val" or "test": draw only from the 80%, 10% or 10% of all inputs that a
    fixed hash assigns to it, so that no test input is in any training set, whatever the seeds
    and sizes. None draws from all inputs. Where fewer than 128 inputs exist they are too few
    to share out, and every split draws from all of them.

    What a perfect score means depends on the space: only 256 inputs of 8 bits exist, about 205
    of them for training, so 200 training samples show most of them. Accuracy 1.0 on the 8-bit
    validation set says that the rule carries over to the 26 or so inputs held back, not that
    it carries over to longer sequences.

    The data depend on the arguments alone; the global random state is left untouched.

    Raises ValueError or TypeError for sizes and tokens that cannot be, and for a
    ``ground_truth_fn`` that returns anything but such states.
    """

    def __init__(
        self,
        n_samples: int,
        seq_len: int | Sequence[int],
        vocab_size: int = 2,
        ground_truth_fn: Callable[[Tensor], Tensor] = parity,
        return_intermediates: bool = True,
        sep_token: int = 99,
        pad_token: int = 100,
        seed: int = 0,
        *,
        split: str | None = None,
    ):
        shortest, longest = _length_range(seq_len)
        _check_sizes(n_samples, vocab_size, sep_token, pad_token)
        check_count("seed", seed, least=0, below=2**61)
        if not callable(ground_truth_fn):
            raise TypeError(f"ground_truth_fn must be callable, got {ground_truth_fn!r}")
        if split is not None and split not in SPLITS:
            raise ValueError(f"split must be one of {list(SPLITS)} or None, got {split!r}")
        self.sep_token = sep_token
        self.pad_token = pad_token
        # One stream a split: the same seed does not give the splits of a small space the same data.
        stream = 0 if split is None else 1 + list(SPLITS).index(split)
        generator = torch.Generator().manual_seed(4 * seed + stream)
        lengths = torch.randint(shortest, longest + 1, (n_samples,), generator=generator)
        width = 2 * longest if return_intermediates else longest + 1
        self.x = torch.full((n_samples, width), pad_token)
        self.y = torch.full((n_samples, width), pad_token)
        few = [L for L in range(shortest, longest + 1) if _is_too_small(L, vocab_size)]
        if split is not None and few:
            warn_caller(
                f"only {vocab_size ** few[-1]} inputs of length {few[-1]} exist, too few to share "
                f"out: split={split!r} draws from all of them, as the other splits do"
            )
        for L in range(shortest, longest + 1):
            rows = (lengths == L).nonzero().squeeze(1)
            tokens = _draw(len(rows), L, vocab_size, split, generator)
            states = _checked_states(ground_truth_fn, tokens, sep_token)
            self.x[rows, :L] = tokens
            self.x[rows, L] = sep_token
            if return_intermediates:
                self.x[rows, L + 1 : 2 * L] = states[:, :-1]
                self.y[rows, L : 2 * L] = states
            else:
                self.y[rows, L] = states[:, -1]
        self.lengths = (2 * lengths if return_intermediates else lengths + 1).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        T = self.lengths[i]
        return {"x": self.x[i, :T], "y": self.y[i, :T]}


def collate(items: Sequence[dict[str, Tensor]], pad_token: int = 100) -> dict[str, Tensor]:
    """One batch of samples of any lengths: {"x": (B, T), "y": (B, T)}, padded at the end.

    The padding is unsupervised, and behind every supervised position, so a causal model's
    loss does not depend on it.
    """
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_value=float(pad_token))
    return {name: pad([item[name] for item in items]) for name in ("x", "y")}


class EpochSampler(Sampler[int]):
    """The order of one epoch, a pure function of (seed, epoch): ``set_epoch`` chooses it.

    Lightning and ``psfast.fit`` call ``set_epoch`` before each pass, so a resumed run sees
    the batches that the uninterrupted one would have seen.
    """

    def __init__(self, n_samples: int, seed: int = 0):
        check_count("seed", seed, least=0, below=2**43)
        self.n_samples = n_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go on with the order of ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_samples

    def __iter__(self):
        # One number for both: distinct as long as there are fewer than 2**20 epochs.
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        return iter(torch.randperm(self.n_samples, generator=generator).tolist())


class ResumableLoader(DataLoader):
    """A ``DataLoader`` that a checkpoint taken in the middle of an epoch resumes in its place.

    ``state_dict`` holds the epoch and the number of its batches handed out; after
    ``load_state_dict`` the sampler is at that epoch, and the first pass leaves out as many if it
    still is then.

    dataset: any map-style dataset; seed: of the order, drawn anew each epoch (``EpochSampler``).
    sampler: of another order, as Lightning gives one with ``overfit_batches``; if it has no
        ``epoch``, its passes cannot be told apart, and a resumed one starts at its beginning
    """

    def __init__(
        self, dataset: Dataset, *, seed: int = 0, sampler: Sampler | None = None, **kwargs
    ):
        if sampler is None:
            sampler = EpochSampler(len(dataset), seed)
        super().__init__(dataset, sampler=sampler, **kwargs)
        self._epoch, self._handed_out, self._resuming = None, 0, False

    def _sampler_epoch(self) -> int | None:
        return getattr(self.sampler, "epoch", None)

    def __iter__(self):
        if not (self._resuming and self._epoch == self._sampler_epoch()):
            self._epoch, self._handed_out = self._sampler_epoch(), 0
        self._resuming = False
        for number, batch in enumerate(super().__iter__()):
            if number >= self._handed_out:
                self._handed_out += 1
                yield batch

    def state_dict(self) -> dict[str, int | None]:
        epoch = self._sampler_epoch()
        is_known = epoch is not None and epoch == self._epoch
        return {"epoch": epoch, "handed_out": self._handed_out if is_known else 0}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        self._epoch, self._handed_out, self._resuming = state["epoch"], state["handed_out"], True
        if self._epoch is not None and hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self._epoch)


def _modular_sum(tokens: Tensor, mod: int) -> Tensor:
    return tokens.cumsum(1) % mod


def _compose(tokens: Tensor, n_elements: int) -> Tensor:
    table = _product_table(n_elements)
    if tokens.numel() and tokens.max() >= len(table):
        raise ValueError(
            f"vocab_size must be at most {n_elements}! = {len(table)} for "
            f"permutation_composition({n_elements}), got the token {tokens.max().item()}"
        )
    states = torch.empty_like(tokens)
    state = torch.zeros_like(tokens[:, 0])
    for i in range(tokens.shape[1]):
        state = table[tokens[:, i], state]
        states[:, i] = state
    return states


@lru_cache
def _product_table(n_elements: int) -> Tensor:
    """table[a, b] is the number of the permutation "first b, then a". (n!, n!) int64"""
    elements = list(permutations(range(n_elements)))
    number = {p: k for k, p in enumerate(elements)}
    return torch.tensor([[number[tuple(a[i] for i in b)] for b in elements] for a in elements])


def _draw(n: int, L: int, vocab_size: int, split: str | None, generator: torch.Generator) -> Tensor:
    """``n`` inputs of the split, with replacement: (n, L) int64."""
    if split is None or _is_too_small(L, vocab_size):
        return torch.randint(vocab_size, (n, L), generator=generator)
    tenths = SPLITS[split]
    kept, missing = [], n
    while missing:
        n_drawn = 11 * missing // len(tenths) + 64  # about what is needed, and a tenth more
        tokens = torch.randint(vocab_size, (n_drawn, L), generator=generator)
        tenth = _hash(tokens) % 10
        tokens = tokens[(tenth >= tenths.start) & (tenth < tenths.stop)][:missing]
        kept.append(tokens)
        missing -= len(tokens)
    return torch.cat(kept) if kept else torch.empty(0, L, dtype=torch.int64)


def _is_too_small(L: int, vocab_size: int) -> bool:
    """Whether there are too few inputs of length ``L`` to share them out to the splits."""
    # In logarithms: vocab_size ** L may be too large to compute.
    return L * math.log(vocab_size) < math.log(SMALLEST_SPLIT_SPACE)


def _hash(tokens: Tensor) -> Tensor:
    """(n, L) int64 -> (n,) int64 in [0, 2**31), the same on every machine and in every version."""
    mixed = torch.full((len(tokens),), tokens.shape[1])
    for i in range(tokens.shape[1]):
        # All factors below 2**31, so that nothing overflows (Lehmer's generator).
        mixed = (mixed * 48271 + tokens[:, i] + 1) % 2147483647
        mixed = (mixed * 16807 + (mixed >> 15)) % 2147483647
    return mixed


def _length_range(seq_len: int | Sequence[int]) -> tuple[int, int]:
    pair = tuple(seq_len) if isinstance(seq_len, Sequence) else (seq_len, seq_len)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair):
        raise TypeError(f"seq_len must be an integer or a pair of integers, got {seq_len!r}")
    low, high = pair
    if not 1 <= low <= high:
        raise ValueError(f"seq_len must be >= 1, or a pair of such in order, got {seq_len!r}")
    return low, high


def _check_sizes(n_samples: int, vocab_size: int, sep_token: int, pad_token: int) -> None:
    for name, value in (("n_samples", n_samples), ("vocab_size", vocab_size)):
        check_count(name, value)
    for name, value in (("sep_token", sep_token), ("pad_token", pad_token)):
        check_count(name, value, least=0)
    if not vocab_size <= sep_token < pad_token:
        raise ValueError(
            "the special tokens must lie behind the vocabulary, vocab_size <= sep_token < "
            f"pad_token, got vocab_size={vocab_size}, sep_token={sep_token}, pad_token={pad_token}"
        )


def _checked_states(
    ground_truth_fn: Callable[[Tensor], Tensor], tokens: Tensor, sep_token: int
) -> Tensor:
    states = ground_truth_fn(tokens.clone())  # a copy: the user's function may write in place
    if not isinstance(states, Tensor) or states.dtype != torch.int64:
        kind = states.dtype if isinstance(states, Tensor) else type(states).__name__
        raise ValueError(f"ground_truth_fn must return an int64 tensor, got {kind}")
    if states.shape != tokens.shape:
        raise ValueError(
            f"ground_truth_fn must return one state a token, shape {tuple(tokens.shape)}, "
            f"got {tuple(states.shape)}"
        )
    if states.numel() and not 0 <= states.min() <= states.max() < sep_token:
        low, high = states.min().item(), states.max().item()
        remedy = (
            f": pass sep_token={high + 1}, pad_token={high + 2} and a model with vocab_size >= "
            f"{high + 3}"
        )
        raise ValueError(
            f"ground_truth_fn must return states in [0, sep_token) = [0, {sep_token}), got "
            f"{low} to {high}{remedy if low >= 0 else ''}"
        )
    return states
