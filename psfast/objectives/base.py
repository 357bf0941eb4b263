"""What every objective offers to the search."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from psfast.flat import FlatParameters, check_no_inference_mode, checksum, memory_of

_FEW = 16  # numbers that Python compares sooner than an operation on a tensor


class Descent(NamedTuple):
    """What ``Objective.descend`` did with its K trial points.

    losses: (K',) float64 on the CPU, K' <= K, of those that were decided, in order
    places: of the accepted ones among them
    incumbents: the incumbent's loss after each accepted one
    evaluated: trial points evaluated, some perhaps more than once
    """

    losses: Tensor
    places: list[int]
    incumbents: list[float]
    evaluated: int


class Objective:
    """The loss as a function of the parameters, on one fixed batch and one dropout mask.

    params: the parameters that ``index`` counts through, in order
    flat: their one buffer
    backend: how blocks are evaluated: "serial", "graph", "vmap", "batched" or "fused"
    why_not: backend -> the reason it does not serve here
    overhead: what a block costs beside its trial points, about, in trial points; from it the
        search finds the block size that suits how often trial points are accepted
    at_once: trial points that a block should always have: they take no longer than one, or none
        is evaluated behind the first lower one
    descends: whether it has ``descend``
    largest_gap: trial points between two accepted ones, about, up to which that is faster
    is_asynchronous: whether ``losses`` leaves a device to work and returns before it is done, and
        may be called again meanwhile: what it returned stays as it is
    interrupted: what the last ``descend`` had done when it raised, which stays; None: all that it
        did is to be taken back by the caller
    opening: another objective, of the same loss but for rounding, that is to evaluate the first
        ``patience`` trial points of a poll where the accepted ones lie no further apart
    patience: how many trial points may fail in a row before ``descend`` ends
    keeps_losses: whether an accepted trial point's loss is, to the bit, the incumbent's from then
        on; where it is not, the search asks for the latter
    is_pure: whether an evaluation of the model changes nothing that is to stay, such as BatchNorm's
        statistics
    confirms: whether the search is to ask for the latter also before it accepts a trial point that
        is lower by little more than rounding

    A backend implements ``__call__``, ``losses``, ``loss_at`` and ``accept``. None of the
    first three changes a parameter, a buffer or the global random state. All of them, and
    ``set_batch``, raise RuntimeError inside ``torch.inference_mode()``.
    """

    backend: str
    overhead = 8.0
    at_once = 1
    descends = False
    largest_gap = 64.0
    patience: float = math.inf
    is_asynchronous = False
    interrupted: Descent | None = None
    opening: "Objective | None" = None
    keeps_losses = False
    is_pure = False
    confirms = False
    inputs = targets = None
    _checksum: tuple | None = None  # the tensors of the batch, their versions, and theirs
    _has_looked: bool | None = None  # None: outside of ``undisturbed``

    def __init__(self, params: Sequence[nn.Parameter]):
        self.flat = FlatParameters(params)
        self.params = self.flat.params
        self.why_not: dict[str, str] = {}

    def __call__(self) -> Tensor:
        """The incumbent's loss, a scalar tensor."""
        raise NotImplementedError

    def losses(self, index: Tensor, delta: Tensor, *, stop_below: float | None = None) -> Tensor:
        """The losses of K trial points, each the incumbent plus ``delta[k]`` at ``index[k]``.

        index: (K,) int64 in [0, N); delta: (K,) -> losses: (K,), in the loss's dtype

        stop_below: a backend that evaluates one trial point, or a few, after another may stop
        at the first loss below this; it returns the losses of the K' <= K trial points up to
        that one. The others ignore it.
        """
        raise NotImplementedError

    def loss_at(self, index: Tensor, delta: Tensor) -> Tensor:
        """The loss, a scalar tensor, of the ONE point with all these changes.

        index: (M,) int64, distinct; delta: (M,)
        """
        raise NotImplementedError

    def accept(self, index: Tensor, delta: Tensor) -> None:
        """Make these changes the incumbent. index: (M,) int64, distinct; delta: (M,)"""
        raise NotImplementedError

    def descend(
        self,
        index: Tensor,
        delta: Tensor,
        *,
        incumbent: float,
        margin: float,
        most: int,
        gap: float,
    ) -> Descent:
        """The serial loop over K trial points: each one whose loss is low enough is accepted.

        Low enough is below the incumbent's loss of that moment by more than ``margin``; ends
        behind the accepted trial point number ``most``, or ``patience`` failures in a row. For
        where so many are accepted that a call of ``losses`` and one of ``accept`` for each of them
        would cost more than they do.

        index: (K,) int64; delta: (K,); incumbent: the incumbent's loss
        gap: trial points between two accepted ones, about; decides nothing but the speed
        """
        raise NotImplementedError(f"{type(self).__name__} takes one accepted trial point at a time")

    def set_batch(self, inputs, targets, *, seed: int | None = None) -> None:
        """Go on with another batch, and with the dropout mask of ``seed`` if one is given.

        What does not depend on the batch (traces, work space, compiled code) is kept. A batch
        that cannot be served raises and leaves the one before in place; "serial" only sees
        that when it evaluates. The mask stays until another ``seed`` comes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no batch to set")

    def batch_checksum(self) -> int:
        """Tells the batch from others; 0 where it is not known, as a closure's."""
        if self._checksum is None or self._checksum[1] != versions(self._checksum[0]):
            leaves = tree_leaves((self.inputs, self.targets))
            leaves = [t for t in leaves if type(t) is Tensor and has_plain_memory(t)]
            total = 1 + checksum(leaves) if leaves else 0
            self._checksum = leaves, versions(leaves), total
        return self._checksum[2]

    @contextmanager
    def _on_batch(self, inputs, targets, seed: int | None) -> Iterator[None]:
        """For ``set_batch``: on this batch from now on, unless what is done inside raises."""
        check_no_inference_mode()
        before = self.inputs, self.targets, self.seed
        self.inputs, self.targets = inputs, targets
        self._checksum = None
        self.seed = self.seed if seed is None else seed
        try:
            yield
        except BaseException:
            self.inputs, self.targets, self.seed = before
            self._checksum = None
            raise

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Inside, nobody else changes the model or the batch: that is looked for but once."""
        try:
            self._has_looked = False
            yield
        finally:
            self._has_looked = None

    def look_again(self) -> None:
        """Inside ``undisturbed``: another objective has changed the parameters."""
        if self._has_looked:
            self._has_looked = False

    def _must_look(self) -> bool:
        """Whether others may have changed something since the last call."""
        if self._has_looked:
            return False
        if self._has_looked is not None:
            self._has_looked = True
        return True

    def __getstate__(self):
        raise TypeError(
            f"{type(self).__name__} is neither copied nor pickled: it stands for one model in one "
            "process; build another with psfast.objective"
        )

    def extra_repr(self) -> str:
        opening = f", opening={self.opening.backend!r}" if self.opening else ""
        return f"backend={self.backend!r}, N={self.flat.size}{opening}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def has_plain_memory(t: Tensor) -> bool:
    return t.layout is torch.strided and not (t.is_nested or t._is_zerotensor())


def versions(leaves: Sequence) -> list[int | None]:
    """Each tensor's count of writes in place; None for an inference tensor and for no tensor."""
    return [t._version if isinstance(t, Tensor) and not t.is_inference() else None for t in leaves]


def sampled(number: int, size: int) -> int:
    """The element of tensor ``number`` that is compared with the model: not only first ones."""
    return (2 * (number % 3) + 1) * size // 6


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, by name; tied ones once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def call_with(module: nn.Module, state: Mapping[str, Tensor], *arguments):
    """``module(*arguments)`` with ``state``, by the names of ``named_state``, in its own's place.

    ``functional_call`` ties names by itself, but takes the parameters away from a module that goes
    by two of them, such as a layer that is used again.
    """
    own = named_state(module)
    instead = {own[name]: tensor for name, tensor in state.items()}
    everywhere = {
        name: instead[tensor]
        for prefix, part in module.named_modules()
        for named in (part.named_parameters, part.named_buffers)
        for name, tensor in named(prefix, recurse=False, remove_duplicate=False)
        if tensor in instead
    }
    return functional_call(module, everywhere, arguments, tie_weights=False)


def tensors_of(inputs, targets) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], tuple]]:
    """The tensors of a batch, and the function that makes (inputs, targets) of others in their
    places."""
    leaves, spec = tree_flatten((inputs, targets))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: Sequence[Tensor]) -> tuple:
        batch = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            batch[i] = tensor
        return tree_unflatten(batch, spec)

    return [leaves[i] for i in places], rebuild


def copies_of(state: Sequence[Tensor], batch: Sequence[Tensor]) -> list[Tensor]:
    """Copies of ``state``, then the tensors of ``batch``, copied where they share memory with it.

    Those that share memory have copies that share it, too.
    """
    tensors = [*state, *batch]
    copies = [*(t.detach().clone() for t in state), *batch]
    for numbers in sharing_memory(tensors):
        if min(numbers) < len(state):
            memory = tensors[numbers[0]].untyped_storage().clone()
            for number in numbers:
                t = tensors[number]
                empty = torch.empty(0, dtype=t.dtype, device=t.device)
                copies[number] = empty.set_(memory, t.storage_offset(), t.shape, t.stride())
    return copies


def sharing_memory(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of those that overlap with others, together."""
    plain = [n for n, t in enumerate(tensors) if has_plain_memory(t) and t.numel()]
    spans = [(tensors[n].untyped_storage().data_ptr(), *memory_of(tensors[n]), n) for n in plain]
    groups: list[list[int]] = []
    end = (0, 0)
    for storage, start, stop, number in sorted(spans):
        if (storage, start) < end:
            groups[-1].append(number)
        else:
            groups.append([number])
        end = max(end, (storage, stop))
    return [group for group in groups if len(group) > 1]


class CompositeLoss(nn.Module):
    """inputs, targets -> ``criterion(model(inputs), targets)``, as one module."""

    def __init__(self, model: nn.Module, criterion: Callable):
        super().__init__()
        self.model = model
        self.criterion = criterion

    def forward(self, inputs, targets):
        return self.criterion(self.model(inputs), targets)

    def on_copies(self, inputs, targets) -> Tensor:
        """The loss; what the forward pass writes to parameters and buffers is lost."""
        return self.on_copies_of(named_state(self), {}, inputs, targets)

    def on_copies_of(self, state: Mapping[str, Tensor], given: Mapping, inputs, targets) -> Tensor:
        """The same with copies of ``state`` alone, and ``given`` in its own's place; both by name.

        What shares memory, also a batch with a buffer, does so here.
        """
        batch, rebuild = tensors_of(inputs, targets)
        copies = copies_of(list(state.values()), batch)
        copied = dict(zip(state, copies, strict=False))
        return call_with(self, {**copied, **given}, *rebuild(copies[len(state) :]))


def check_block(index: Tensor, delta: Tensor) -> None:
    """Raise for a block that no backend can evaluate. Reads shapes and dtypes only."""
    for name, value in (("index", index), ("delta", delta)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.ndim != 1:
            raise ValueError(f"{name} must have shape (K,), got {tuple(value.shape)}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if not delta.is_floating_point():
        raise TypeError(f"delta must be floating-point, got {delta.dtype}")
    if index.shape != delta.shape:
        raise ValueError(
            f"index and delta must have the same length, got {len(index)} and {len(delta)}"
        )


def check_point(index: Tensor, delta: Tensor, size: int) -> None:
    """Raise for changes that make no point. Reads the indices."""
    check_block(index, delta)
    check_range(index, size)


def check_range(index: Tensor, size: int) -> None:
    """Raise IndexError unless all of ``index`` (K,) lie in [0, size)."""
    if len(index):
        found = index.tolist() if len(index) <= _FEW else [i.item() for i in index.aminmax()]
        low, high = min(found), max(found)
        if low < 0 or high >= size:
            raise IndexError(f"index must lie in [0, {size}), got values from {low} to {high}")
