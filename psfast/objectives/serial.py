"""One trial point after another: change a coordinate in place, evaluate, restore its value."""

import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from operator import attrgetter, methodcaller

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from psfast import random_state
from psfast.flat import FlatParameters, trainable
from psfast.notices import warn_caller
from psfast.objectives.base import (
    CompositeLoss,
    Descent,
    Objective,
    check_point,
    has_plain_memory,
    versions,
)
from psfast.objectives.surroundings import full_float32, uncached_autocast
from psfast.objectives.watch import Watch
from psfast.search import acceptance_bar

_BACKWARD = (
    "the closure runs backward(), which pattern search never needs and which makes a trial point "
    "about three times as slow; let it return the loss alone (with Lightning: add "
    "psfast.lightning.PatternSearchMixin)"
)
_DIFFERS = (
    "the model's loss differs from one evaluation to the next, {:.9g} and {:.9g}: a search takes "
    "the luckiest. Does the model draw from a generator of its own, NumPy's or Python's, or count "
    "its calls?"
)
_CELLS = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
_version = attrgetter("_version")
_address = methodcaller("data_ptr")


class SerialObjective(Objective):
    """Evaluates a closure at trial points; the twin of every faster backend.

    closure: () -> scalar loss, a tensor of one element or a number. It runs under
        ``torch.no_grad``; one that calls ``backward()`` is given gradients, with a warning.
    params: the parameters it depends on
    seed: the random state that every evaluation starts from, so that all trial points see
        the same dropout mask; the global random state is left as it was

    The old value is saved and written back, never recomputed. What an evaluation itself writes
    to parameters (an embedding's ``max_norm``) and buffers (BatchNorm statistics) is restored:
    nothing drifts.
    """

    backend = "serial"
    at_once = 64  # it stops behind the first lower one
    descends = True
    keeps_losses = True

    def __init__(self, closure: Callable, params: list[nn.Parameter], *, seed: int = 0):
        super().__init__(params)
        self.closure = closure
        self.seed = seed
        self._needs_grad = False
        self._warned = False
        self._cells = _Cells(self.flat)
        self._buffers: list[_SavedTensor] | None = []  # None: to be found
        self._written: set[nn.Parameter] = set()  # others than ``params`` that the closure writes
        self._incumbent: Tensor | None = None  # the parameters' values
        self._incumbent_of: int | None = None  # ``flat.changes`` that it is of
        self._versions: list[int] = []

    def __call__(self) -> Tensor:
        self._take_up()
        with self._evaluation(), self._found_buffers(), self._held_in_place():
            return torch.tensor(self._evaluate(), dtype=torch.float64)

    def losses(self, index: Tensor, delta: Tensor, *, stop_below: float | None = None) -> Tensor:
        check_point(index, delta, self.flat.size)
        self._get_ready()
        values = []
        with self._evaluation(), self._put_back():
            for _, _, value in self._trials(index, delta):
                values.append(value)
                if stop_below is not None and value < stop_below:
                    break
        return torch.tensor(values, dtype=torch.float64)

    def descend(self, index, delta, *, incumbent, margin, most, gap) -> Descent:
        """As every objective's; an accepted trial point costs no more than another."""
        self.interrupted = None
        check_point(index, delta, self.flat.size)
        self._get_ready()
        decided: list[float] = []
        kept: list[tuple] = []  # of each accepted one: how many were decided, coordinate, value
        end = self.patience  # of decided ones
        bar = acceptance_bar(incumbent, margin)
        try:
            with self._evaluation(), self._put_back():
                for i, new, value in self._trials(index, delta):
                    if -math.inf < value < bar:
                        kept.append((len(decided), i, new, value))
                        self._keep(i, new)
                        bar = acceptance_bar(value, margin)
                        end = len(decided) + 1 + self.patience
                    decided.append(value)
                    if len(kept) == most or len(decided) == end:
                        break
        except BaseException:
            self.interrupted = self._descent(decided, kept)
            raise
        finally:
            if kept:
                self._keep(*kept[-1][1:3])  # an interrupt may have come between
                self.flat.note_write()
        return self._descent(decided, kept)

    def _keep(self, i: int, new) -> None:
        self._cells.array[i] = new
        self._incumbent[i] = new

    @staticmethod
    def _descent(decided: list[float], kept: list[tuple]) -> Descent:
        if kept and kept[-1][0] == len(decided):  # an interrupt came between the two
            decided = [*decided, kept[-1][-1]]
        losses = torch.tensor(decided, dtype=torch.float64)
        incumbents = [value for *_, value in kept]
        return Descent(losses, [place for place, *_ in kept], incumbents, len(decided))

    def _trials(self, index: Tensor, delta: Tensor) -> Iterator[tuple]:
        """Each trial point's coordinate, its value there and its loss; the incumbent is back."""
        cells, delta = self._cells.array, delta.to(self.flat.buffer.dtype)
        for i, d in zip(index.tolist(), delta.tolist(), strict=True):
            saved = cells[i]
            cells[i] = new = saved + d
            loss = self._evaluate()
            cells[i] = saved
            yield i, new, loss

    def loss_at(self, index: Tensor, delta: Tensor) -> Tensor:
        check_point(index, delta, self.flat.size)
        self._get_ready()
        buffer = self.flat.buffer
        index, delta = index.to(buffer.device), delta.to(buffer)
        with self._evaluation(), self._put_back():
            saved = buffer[index]
            buffer[index] = saved + delta
            loss = self._evaluate()
            buffer[index] = saved
        return torch.tensor(loss, dtype=torch.float64)

    def accept(self, index: Tensor, delta: Tensor) -> None:
        check_point(index, delta, self.flat.size)
        was, self._incumbent_of = self._has_incumbent(), None
        index, delta = index.to(self.flat.buffer.device), delta.to(self.flat.buffer)
        self.flat.add(index, delta)
        if was:
            self._incumbent.index_add_(0, index, delta)
            self._incumbent_of = self.flat.changes

    def _has_incumbent(self) -> bool:
        """See what others have changed; whether the incumbent that is kept still is one."""
        self.flat.changed()
        if self._cells.buffer is not self.flat.buffer:
            self._cells = _Cells(self.flat)
        return self._incumbent_of == self.flat.changes

    def _take_up(self) -> None:
        """See what others have changed; keep the incumbent in case that the closure writes."""
        if not self._has_incumbent():
            buffer = self.flat.buffer
            if self._incumbent is None or self._incumbent.device != buffer.device:
                self._incumbent = torch.empty_like(buffer)
            self._incumbent = self._incumbent.to(buffer.dtype).copy_(buffer)
            self._incumbent_of = self.flat.changes
        self._versions = list(map(_version, self.params))

    def _get_ready(self) -> None:
        """For trial points: take up the buffers, too, if others have changed them."""
        self._take_up()
        if self._buffers is None or any(map(_SavedTensor.is_written, self._buffers)):
            with self._evaluation(), self._found_buffers():
                self._evaluate()

    @contextmanager
    def _put_back(self):
        """The incumbent is there again when an error or an interrupt, at any line, ends this."""
        try:
            yield
        except BaseException:
            self.flat.buffer.copy_(self._incumbent)
            raise

    def _evaluate(self) -> float:
        """The closure's loss here, as a number; what it writes is restored."""
        self._seed_all()
        try:
            return _as_number(self._call())
        finally:
            self._restore_buffers()
            # Our own writes go to the memory, or through a tensor with a counter of its own.
            if self._versions != list(map(_version, self.params)):
                self.flat.buffer.copy_(self._incumbent)
                self.flat.changed()
                self._incumbent_of = self.flat.changes
                self._versions = list(map(_version, self.params))

    def _restore_buffers(self) -> None:
        for buffer in self._buffers:
            if buffer.has_no_trace or buffer.is_written():
                buffer.restore()

    def _call(self):
        if self._needs_grad:
            with torch.enable_grad():
                return self.closure()
        try:
            return self.closure()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            self._needs_grad = True
            return self._call()

    @contextmanager
    def _no_gradients_left(self):
        """Drop gradients that the closure computes, and say once that it does."""
        without = [p for p in self.params if p.grad is None]
        try:
            yield
        finally:
            computed = [p for p in without if p.grad is not None]
            for p in computed:
                p.grad = None
            if computed and not self._warned:
                self._warned = True
                warn_caller(_BACKWARD)

    def _seed_all(self) -> None:
        random_state.seed_all(self.seed, self.flat.buffer.device)

    @contextmanager
    def _evaluation(self):
        """No gradients, neither recorded nor left behind; the global random state as it was."""
        device = self.flat.buffer.device
        with (
            torch.no_grad(),
            full_float32(device),
            uncached_autocast(),
            random_state.kept(device),
            self._no_gradients_left(),
        ):
            yield

    def _modules(self) -> Iterable[nn.Module]:
        """Those that are known before they run: a closure's are not."""
        return ()

    @contextmanager
    def _held_in_place(self):
        """Raise ValueError if the closure moves the parameters away from where we change them."""
        before = list(map(_address, self.params))
        yield
        if before != list(map(_address, self.params)):
            raise ValueError(
                "the closure moves its parameters to other memory, as an RNN's "
                "flatten_parameters() does on a GPU: call such before the search, not in forward()"
            )

    @contextmanager
    def _found_buffers(self):
        """Find the buffers, and how the closure writes to them; they are restored.

        Noted before each module runs. Other parameters are kept only from the first evaluation
        on that writes to them, as few models do: a frozen part may be large.
        """
        self._buffers, found, others, seen = [], [], [], set()
        own, thread = {None, *self.params}, threading.get_ident()

        def note(module: nn.Module, _inputs=None) -> None:
            if module in seen or threading.get_ident() != thread:  # torch's hook is for all
                return
            new = [part for part in module.modules() if part not in seen]
            seen.update(new)
            for part in new:
                for name, buffer in part._buffers.items():
                    if buffer is not None and not buffer.is_inference():  # which none can write
                        found.append(_SavedTensor(part, part._buffers, name, buffer))
                for name, p in part._parameters.items():
                    if p in self._written:
                        found.append(_SavedTensor(part, part._parameters, name, p))
                    elif p not in own:
                        others.append((versions([p]), part, name, p))

        for module in self._modules():
            note(module)
        note = torch.compiler.disable(note)  # Dynamo, that traces hooks, fails at this one
        handle = nn.modules.module.register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()
            for before, part, name, p in others:
                if before != versions([p]):
                    self._written.add(p)
                    found.append(_SavedTensor(part, part._parameters, name, p))
            for buffer in found:
                buffer.has_no_trace = buffer.has_no_trace or buffer.has_changed_unseen()
            self._buffers = found
            self._restore_buffers()


def closure_of(objective: Objective) -> Callable:
    """The loss of an objective's model and criterion on its batch of the moment.

    It does not keep the objective: a cycle would hold model and batch until Python collects
    garbage.
    """
    own = weakref.ref(objective)

    def closure():
        f = own()
        return f.criterion(f.model(f.inputs), f.targets)

    return closure


class SerialModelObjective(SerialObjective):
    """``criterion(model(inputs), targets)``, one trial point after another.

    Evaluates it, so that a batch which the model refuses is refused here, and again, to warn of a
    loss that differs.
    """

    def __init__(self, model, criterion, inputs, targets, *, params=None, seed: int = 0):
        self.model, self.criterion = model, criterion
        self.inputs, self.targets = inputs, targets
        searched = trainable(model.parameters()) if params is None else params
        super().__init__(closure_of(self), searched, seed=seed)
        self._composite = CompositeLoss(model, criterion)
        self._watch = Watch(self._composite, self.params)
        self()  # which finds what is to be restored
        first, second = self().item(), self().item()
        if not math.isclose(first, second, rel_tol=1e-4) and first == first:
            warn_caller(_DIFFERS.format(first, second))

    def _take_up(self) -> None:
        if self._watch.has_other_parts():
            self._take_up_parts()
        super()._take_up()

    def _take_up_parts(self) -> None:
        self._buffers = None  # other modules, or other ones that train: other buffers
        self._watch.look(())

    def _modules(self) -> Iterable[nn.Module]:
        return self._composite.modules()

    def set_batch(self, inputs, targets, *, seed: int | None = None) -> None:
        with self._on_batch(inputs, targets, seed):
            pass  # the next evaluation reads it


class _Cells:
    """The buffer's elements as Python numbers.

    Reading and writing one through ctypes takes 20 ns where a tensor index takes 3 us, which
    would be most of what a trial point of a small model costs beside its closure.
    """

    def __init__(self, flat: FlatParameters):
        buffer = flat.buffer
        self.buffer = buffer  # the memory below is alive as long as this is
        if buffer.device.type == "cpu" and buffer.dtype in _CELLS:
            cells = _CELLS[buffer.dtype] * len(buffer)
            self.array = cells.from_address(buffer.data_ptr())
        else:
            self.array = _TensorCells(buffer)


class _TensorCells:
    """The same for any device and dtype, without a host sync: a value is a 0-d tensor."""

    def __init__(self, buffer: Tensor):
        self.buffer = buffer

    def __getitem__(self, index: int) -> Tensor:
        return self.buffer[index].clone()

    def __setitem__(self, index: int, value: Tensor) -> None:
        self.buffer[index] = value


class _SavedTensor:
    """A module's buffer, or a parameter that is not searched, as it was.

    has_no_trace: whether an evaluation may write to it without a trace in its version counter,
        as batch_norm does with its statistics
    """

    def __init__(self, module: nn.Module, table: Mapping, name: str, value: Tensor):
        # A scripted module's own are not to be replaced, and another object at each look.
        self.owner = table if isinstance(table, dict) else {name: value}
        self.name, self.value, self.copy = name, value, value.detach().clone()
        self.has_no_trace = isinstance(module, _NormBase) and module.training
        self._version = value._version

    def is_written(self) -> bool:
        """Whether there is a trace of a write since it was noted, or restored."""
        value = self.value
        return self.owner.get(self.name) is not value or value._version != self._version

    def has_changed_unseen(self) -> bool:
        is_seen = self.is_written() or not has_plain_memory(self.value)
        return not is_seen and not torch.equal(self.value, self.copy)

    def note(self) -> None:
        """The value of now is the one to be restored."""
        self.copy.copy_(self.value)
        self._version = self.value._version

    def restore(self) -> None:
        self.owner[self.name] = self.value
        if self.value.shape != self.copy.shape:
            self.value.resize_(self.copy.shape)
        self.value.copy_(self.copy)
        self._version = self.value._version


def _as_number(loss) -> float:
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        return float(loss.item())
    if isinstance(loss, Real) and not isinstance(loss, bool):  # NumPy's too
        return float(loss)
    if isinstance(loss, Tensor):
        got = f"a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}"
    else:
        got = f"{type(loss).__name__}"
    raise TypeError(f"the closure must return a scalar loss, got {got}")
