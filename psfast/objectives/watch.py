"""What others do to a model and its batch while an objective stands for them."""

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_

from torch import Tensor, nn

from psfast.objectives.base import named_state

_training, _version = attrgetter("training"), attrgetter("_version")


class Watch:
    """Sees what changes in ``root`` and in a batch, but for the values of ``params``.

    Those values are ``FlatParameters``' to watch. Here it is which tensors and submodules the
    modules have, who trains, and the values of the other parameters, of buffers and of the
    batch. Plain attributes (the ``p`` of a dropout), hooks and writes through ``.data`` leave
    no trace.

    Raises ValueError for ``params`` that are not ``root``'s.
    """

    def __init__(self, root: nn.Module, params: Sequence[nn.Parameter]):
        self._root, self._params = root, params
        known = set(root.parameters())
        foreign = sum(p not in known for p in params)
        if foreign:
            raise ValueError(f"params must be the model's own, got {foreign} others")
        self._names = {p: name for name, p in root.named_parameters()}
        self._modules: list[nn.Module] = []
        self._modes: list[bool] | None = None  # nothing is known yet
        self.look(())

    def look(self, batch: Iterable) -> None:
        """Take what is there, and the tensors in ``batch``, as known from now on.

        Raises ValueError if a parameter is not the model's any more.
        """
        if self.has_other_parts():
            self._look_at_parts()
        tensors = {*self._state.values(), *(t for t in batch if isinstance(t, Tensor))}
        tensors = tensors.difference(self._params)
        self._tensors = [t for t in tensors if not t.is_inference()]  # those have no version
        self._versions = self._read_versions()

    def _look_at_parts(self) -> None:
        self._modes = None
        self._state = named_state(self._root)
        tensors = set(self._state.values())
        for p in self._params:
            if p not in tensors:
                raise ValueError(
                    f"the parameter {self._names[p]!r} of this objective is not the model's any "
                    "more (a new nn.Parameter or load_state_dict(assign=True) takes its place): "
                    "build another objective"
                )
        modules = list(self._root.modules())
        tables = [t for m in modules for t in (m._parameters, m._buffers, m._modules)]
        tables = [t for t in tables if isinstance(t, dict)]  # scripted modules' are fixed
        self._empty = [t for t in tables if not t]
        self._entries = [t.values() for t in tables if t]
        self._objects = list(chain.from_iterable(self._entries))
        self._modules = modules
        self._modes = self._read_modes()

    def parts(self) -> tuple[list[nn.Module], dict[str, Tensor]]:
        """The modules, and ``named_state`` of the root, as they are now."""
        if self.has_other_parts():
            return list(self._root.modules()), named_state(self._root)
        return self._modules, self._state

    # Every evaluation asks: these run in a few microseconds.

    def changed(self) -> bool:
        """Whether anything is not as it was at the last look."""
        return self._versions != self._read_versions() or self.has_other_parts()

    def has_other_parts(self) -> bool:
        """Whether a tensor or a submodule was replaced, or a module's mode was changed."""
        return (
            self._modes != self._read_modes()
            or any(self._empty)
            or sum(map(len, self._entries)) != len(self._objects)
            or not all(map(is_, chain.from_iterable(self._entries), self._objects))
        )

    def _read_modes(self) -> list[bool]:
        return list(map(_training, self._modules))

    def _read_versions(self) -> list[int]:
        return list(map(_version, self._tensors))
