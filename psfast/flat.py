"""One contiguous buffer for all trainable parameters, the parameters as views of it."""

import ctypes
import operator
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

_PIECE = 2**20 - 3  # words at a time
_FEW_BYTES = 2**16  # that are copied sooner than a dozen operations take


def trainable(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters with ``requires_grad``, in order, each (tied) one once."""
    return [p for p in dict.fromkeys(params) if p.requires_grad]


def same_parameters(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    """Whether both hold the same parameters (the objects) in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def starts_of(tensors: Sequence[Tensor]) -> list[int]:
    """Where each begins among all their elements."""
    return list(accumulate((t.numel() for t in tensors[:-1]), initial=0))[: len(tensors)]


def checksum(tensors: Sequence[Tensor]) -> int:
    """Of the bits of all of them, in [0, 2^64): it tells one content from another."""
    total, waiting = 0, []
    for number, tensor in enumerate(tensors, 1):
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
        if tensor.device.type == "cpu" and tensor.nbytes <= _FEW_BYTES:
            content = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""
            total += number * zlib.crc32(content)
        else:
            waiting.append(number * _weighted_bits(tensor))
    if waiting:
        total += torch.stack([part.to(waiting[0].device) for part in waiting]).sum().item()
    return total % 2**64


def _weighted_bits(tensor: Tensor) -> Tensor:
    """An int64 scalar tensor."""
    words = tensor.view(-1).view(torch.uint8)
    if not len(words) % 8 and not words.storage_offset() % 8:
        words = words.view(torch.int64)
    weights = torch.arange(1, min(len(words), _PIECE) + 1, device=words.device)
    sums = [(part.long() * weights[: len(part)]).sum() for part in words.split(_PIECE)]
    return sum((value * (k + 1) for k, value in enumerate(sums)), weights.new_zeros(()))


class FlatParameters:
    """``buffer`` (N,) holds every element of ``params``; each parameter is a view of it.

    Coordinate ``index`` in [0, N) counts through ``params`` in order, each in row-major
    order. Parameters that already lie so in one buffer are adopted without a copy, so the
    optimizer and an objective over the same parameters share one buffer.

    params: distinct floating-point parameters of one dtype on one device, no two of which share
        memory. One parameter may be used in several places: that is how to tie weights.

    Raises ValueError when that does not hold, RuntimeError inside ``torch.inference_mode()``.
    """

    def __init__(self, params: Iterable[nn.Parameter]):
        self.params = list(params)
        _validate(self.params)
        self.offsets = [0, *accumulate(p.numel() for p in self.params)]
        self.size = self.offsets[-1]
        self.changes = 0
        self.attach()

    def attach(self) -> None:
        """Make every parameter a view of one buffer, keeping the values it has now."""
        check_no_inference_mode()
        buffer = self._shared_buffer()
        if buffer is None:
            _validate(self.params)  # .to() may have moved only some of them
            _check_memory(self.params)
            with torch.no_grad():
                buffer = torch.cat([p.detach().reshape(-1) for p in self.params])
            for p, start, stop in zip(self.params, self.offsets, self.offsets[1:], strict=False):
                p.data = buffer[start:stop].view(p.shape)
        self.buffer = buffer
        self._stamp = self._read_stamp()

    def changed(self) -> bool:
        """Whether anything but this object's own writes touched a parameter since the last call.

        Sees in-place changes (``load_state_dict``) and replaced storage (``.to(device)``,
        ``p.data = ...``); the latter are flattened anew. Writes through ``p.data`` in place
        leave no trace that torch records: call ``mark_changed`` after such.

        ``changes`` counts how often it was True. What is made of the parameters notes that number,
        and holds as long as it stays: no answer is lost to an interrupt.

        Raises RuntimeError inside ``torch.inference_mode()``, where what comes next would make
        tensors to keep.
        """
        check_no_inference_mode()
        versions, addresses = self._read_stamp()
        if (versions, addresses) == self._stamp:
            return False
        self.changes += 1
        if addresses != self._stamp[1]:
            self.attach()
        else:
            self._stamp = versions, addresses
        return True

    def mark_changed(self) -> None:
        """Make the next ``changed()`` return True, of every ``FlatParameters`` over these."""
        torch.autograd.graph.increment_version(self.params[0])

    def add(self, index: Tensor, delta: Tensor) -> None:
        """Add ``delta`` (M,) at the distinct coordinates ``index`` (M,), for good.

        Every other ``FlatParameters`` over the same parameters sees it as a change.
        """
        self.buffer.index_add_(0, index.to(self.buffer.device), delta.to(self.buffer))
        self.note_write()

    def note_write(self) -> None:
        """To be called after a write into ``buffer`` that is to stay."""
        torch.autograd.graph.increment_version(self.params[0])
        self._stamp[0][0] += 1

    def view(self, number: int) -> Tensor:
        """Parameter ``number`` as it lies in ``buffer``: nobody sees what is written to it."""
        start, stop = self.offsets[number : number + 2]
        return self.buffer[start:stop].view(self.params[number].shape)

    def fingerprint(self) -> int:
        """A checksum of the buffer's bits, to tell whether parameters are those of a checkpoint."""
        return checksum([self.buffer])

    def locate(self, index: int) -> tuple[int, int]:
        """The (number of the tensor, element in it) of coordinate ``index``."""
        if not 0 <= index < self.size:
            raise IndexError(f"index must lie in [0, {self.size}), got {index}")
        tensor = bisect_right(self.offsets, index) - 1
        return tensor, index - self.offsets[tensor]

    def _read_stamp(self) -> tuple[list[int], list[int]]:
        return [p._version for p in self.params], [p.data_ptr() for p in self.params]

    def _shared_buffer(self) -> Tensor | None:
        """The buffer if the parameters already lie in one, gapless and in order."""
        nonempty = [(p, s) for p, s in zip(self.params, self.offsets, strict=False) if p.numel()]
        first = nonempty[0][0]
        storage = first.untyped_storage()
        address = first.data_ptr()
        for p, start in nonempty:
            if (
                p.untyped_storage().data_ptr() != storage.data_ptr()
                or p.data_ptr() != address + start * first.element_size()
                or not p.is_contiguous()
                or p.dtype != first.dtype
            ):
                return None
        # Built from the storage: a view of `first` would share its version counter, and the
        # search's own trial writes would look like somebody else's changes.
        buffer = torch.empty(0, dtype=first.dtype, device=first.device)
        return buffer.set_(storage, first.storage_offset(), (self.size,), (1,))


def _validate(params: list[nn.Parameter]) -> None:
    if not params:
        raise ValueError("params must hold at least one trainable parameter, got none")
    if not any(p.numel() for p in params):
        raise ValueError(f"params must hold at least one element, got {len(params)} empty tensors")
    if len(set(params)) != len(params):
        raise ValueError("params must be distinct, got the same parameter more than once")
    kinds = {(p.dtype, p.device) for p in params}
    if len(kinds) > 1:
        names = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"params must have one dtype and one device, got {names}")
    dtype = params[0].dtype
    if not dtype.is_floating_point:
        raise ValueError(f"params must be floating-point, got {dtype}")
    if any(p.is_inference() for p in params):
        raise ValueError(
            "params must not be inference tensors: make the model outside torch.inference_mode()"
        )


def _check_memory(params: list[nn.Parameter]) -> None:
    """Raise for parameters that share elements: one flat buffer would quietly part them."""
    storages: dict[int, list[int]] = {}
    for number, p in enumerate(params):
        if p.numel():
            storages.setdefault(p.untyped_storage().data_ptr(), []).append(number)
    for numbers in storages.values():
        spans = sorted(_span(params[number]) for number in numbers)
        if all(end < start for (_, end), (start, _) in pairwise(spans)):
            continue
        # Overlapping spans may still hold different elements, as two columns do.
        places = torch.cat([_places(params[number]) for number in numbers])
        if len(places.unique()) < len(places):
            raise ValueError(
                f"params must not share memory, got numbers {numbers} of shapes "
                f"{[tuple(params[number].shape) for number in numbers]} in one storage; to tie "
                "weights, assign the parameter itself: a.weight = b.weight"
            )


def _span(p: nn.Parameter) -> tuple[int, int]:
    """The first and the last place of ``p`` in its storage."""
    return p.storage_offset(), p.storage_offset() + reach(p)


def memory_of(tensor: Tensor) -> tuple[int, int]:
    """Where its elements lie: the first address, and the one behind the last."""
    start = tensor.data_ptr()
    return start, start + (reach(tensor) + 1) * tensor.element_size()


def reach(tensor: Tensor) -> int:
    """How many elements behind its first one ``tensor`` has its last one in memory."""
    return sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _places(p: nn.Parameter) -> Tensor:
    """Where in its storage each element of ``p`` lies, (numel,) int64."""
    places = torch.arange(_span(p)[1] + 1)
    return places.as_strided(p.shape, p.stride(), p.storage_offset()).flatten()


def check_no_inference_mode() -> None:
    """Raise inside ``torch.inference_mode()``: what is made there can never be changed again."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "pattern search does not work inside torch.inference_mode(): use torch.no_grad(), or "
            "neither, as it never records gradients"
        )
