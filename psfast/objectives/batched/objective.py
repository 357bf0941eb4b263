"""``BatchedObjective``: K trial points as one forward pass, from the changed tensor on."""

import functools
import math
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from psfast.flat import trainable
from psfast.notices import warn_caller
from psfast.objectives.base import (
    CompositeLoss,
    Objective,
    check_block,
    check_point,
    sampled,
)
from psfast.objectives.batched.evaluate import Evaluator
from psfast.objectives.batched.incumbent import Incumbent, has_bits
from psfast.objectives.batched.opening import is_light, opening_of
from psfast.objectives.batched.plan import Plan
from psfast.objectives.batched.trace import (
    check_kernels,
    plain_loss,
    refuse_autocast,
    reproduces,
    signature,
    trace,
)
from psfast.objectives.batched.workspace import checked_workspace
from psfast.objectives.surroundings import full_float32
from psfast.objectives.watch import Watch

_CACHED = 1 << 20  # bytes that a value of a chunk takes on average, a core: more misses its cache
_LARGEST_CHUNK = 4096
_SPARSE_CACHED = 16 << 20  # the same of all values of the sparse part together
_TEMPORARY = 4  # as often its values' bytes the sparse part takes on the way
_SMALL_GROUP = 32  # trial points of one tensor that are worth a program of their own
_FEW = 16  # trial points that are sorted sooner in Python than by tensor operations
_MOST_COPIED = 1 << 28  # elements of parameters, for the trial points that are checked


def _evaluating(method: Callable) -> Callable:
    @functools.wraps(method)
    def evaluate(self, *args, **kwargs):
        with torch.no_grad(), full_float32(self.flat.buffer.device):
            return method(self, *args, **kwargs)

    return evaluate


class BatchedObjective(Objective):
    """``criterion(model(inputs), targets)`` for blocks of trial points, for any traceable model.

    params: default: the model's trainable ones, tied ones once
    seed: of the dropout mask that all trial points share
    workspace: bytes that a chunk of trial points may take; default: a quarter of what is free

    The model is traced once; a trial point runs from the tensor that it changes on, on the
    incumbent's values, and many run stacked over shared weights. The trace holds for batches
    of the same shapes, the same modules and the same training mode; it is made anew for others,
    and for each batch that holds what torch cannot see into (arrays of NumPy, other objects).

    Where evaluating the model takes little but overhead, ``opening`` has a poll's first trial
    points one by one.

    Raises ValueError, with the reason, for a model that cannot be traced or whose trace does
    not reproduce it, and under autocast.
    """

    backend = "batched"
    confirms = True
    overhead = 256.0  # measured: 130 to 700, and less where the block is small

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable,
        inputs,
        targets,
        *,
        params: list[nn.Parameter] | None = None,
        seed: int = 0,
        workspace: int | None = None,
    ):
        super().__init__(trainable(model.parameters()) if params is None else params)
        self.model, self.criterion, self.seed = model, criterion, seed
        self.inputs, self.targets = inputs, targets
        self._composite = CompositeLoss(model, criterion)
        self._watch = Watch(self._composite, self.params)
        self.device = self.flat.buffer.device
        self.workspace = checked_workspace(workspace, self.device)
        self._warned = set()
        refuse_autocast(self.device)
        self._traced_for: tuple | None = None
        self._refresh()

    # --- what the search calls ------------------------------------------------------------

    @_evaluating
    def __call__(self) -> Tensor:
        self._follow()
        return self._incumbent.loss.clone()

    @_evaluating
    def losses(self, index: Tensor, delta: Tensor, *, stop_below: float | None = None) -> Tensor:
        check_block(index, delta)
        self._follow()
        index = index.to(self.device)
        if len(index) <= _FEW:
            return self._losses_of_few(index, delta, stop_below)
        groups = self._by_tensor(index)
        delta = self._rounded(index, delta)
        losses = self._incumbent.loss.repeat(len(index))
        for number, which in groups.items():
            plan = self._evaluator.plans[number]
            at = index[which] - self.flat.offsets[number]
            self._group(plan, at, delta[which], which, losses)
        return losses

    @_evaluating
    def loss_at(self, index: Tensor, delta: Tensor) -> Tensor:
        check_point(index, delta, self.flat.size)
        self._follow()
        index, delta = index.to(self.device), delta.to(self.device)
        self._incumbent.bring_up_to_date()
        buffer = self.flat.buffer
        saved = buffer[index]
        try:
            buffer[index] = saved + delta.to(buffer.dtype)
            return self._incumbent.loss_with(self._tensors_of(index)).clone()
        finally:
            buffer[index] = saved

    @torch.no_grad()
    def accept(self, index: Tensor, delta: Tensor) -> None:
        check_point(index, delta, self.flat.size)
        if self._has_looked is None:  # what has changed can wait: nothing is evaluated here
            self.flat.changed()
        device = self.flat.buffer.device
        self._incumbent.touch(self._tensors_of(index))
        self.flat.add(index.to(device), delta.to(device))

    @_evaluating
    def set_batch(self, inputs, targets, *, seed: int | None = None) -> None:
        if self._evaluator.graph.fixed_batch:
            self._traced_for = None
        try:
            with self._on_batch(inputs, targets, seed):
                self._fresh_of = None
                # Either evaluates it, or values that the model refuses would go unseen.
                if self.opening is not None and self._signature() == self._traced_for:
                    self.opening()  # blocks take it up in their turn
                else:
                    self._refresh()
                    self._incumbent.bring_up_to_date()
        except BaseException:
            self._fresh_of = self._traced_for = None  # it may be half on this batch
            raise

    # --- the incumbent ------------------------------------------------------------------------

    @_evaluating
    def _build(self) -> None:
        self._traced_for = None
        self.device = self.flat.buffer.device
        graph = trace(self._composite, self.inputs, self.targets, self.device)
        self._evaluator = Evaluator(graph, self.params, self._tensors())
        self._stops = torch.tensor(self.flat.offsets[1:], device=self.device)
        self._chunks: dict[int, int] = {}
        self._few_sizes: dict[tuple[int, int], int] = {}
        self._threads = torch.get_num_threads()
        self._take_batch()
        self._find_alone()
        self._verify()
        light = is_light(self._incumbent, self.device.type)
        self.opening = opening_of(self, self._composite, graph.constants) if light else None
        self._traced_for = self._signature()

    def _take_batch(self) -> None:
        batch = self._tensors()
        self._watch.look([*batch, *self._evaluator.graph.constants])
        self._incumbent.read_state(list(self._watch.parts()[1].values()))
        if self._evaluator.draw(batch, self.seed, self.device):
            self._forget_sizes()

    def _refresh(self) -> None:
        """Take up the state and the batch as they are now."""
        self._fresh_of = None
        self.flat.changed()  # what is checked is written to its buffer: they must lie there
        if self._signature() != self._traced_for:
            self._build()
        else:
            self._take_batch()
        self._fresh_of = self.flat.changes

    def _follow(self) -> None:
        """See what others have changed: the model, the batch, the number of threads."""
        if not self._must_look():
            return
        refuse_autocast(self.device)
        is_other = self._watch.changed()
        if is_other and self._evaluator.graph.fixed_batch:
            self._traced_for = None
        self.flat.changed()
        if self._fresh_of != self.flat.changes or is_other:
            self._refresh()
        if torch.get_num_threads() != self._threads:  # which bits are steady may depend on it
            self._threads = torch.get_num_threads()
            self._forget_sizes()
            self._evaluator.forget()
        self._find_alone()

    def _find_alone(self) -> None:
        if self._incumbent.alone is None:
            alone = self._incumbent.has_bits_alone()
            with self._another_point():
                alone = alone and self._incumbent.has_bits_alone()
            self._incumbent.alone = alone
            self._incumbent.touch(None)
            self._forget_sizes()

    def _forget_sizes(self) -> None:
        self._chunks.clear()
        self._few_sizes.clear()

    @property
    def _incumbent(self) -> Incumbent:
        return self._evaluator.incumbent

    def _tensors(self) -> list[Tensor]:
        leaves = pytree.tree_leaves((self.inputs, self.targets))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _signature(self) -> tuple:
        """What a trace holds for."""
        buffer = self.flat.buffer
        return *signature(self._watch, self.inputs, self.targets), buffer.dtype, buffer.device

    def _verify(self) -> None:
        """Raise ValueError unless the graph has the model's loss, here and at other points."""
        self._compare("the incumbent")
        check_kernels(self._composite, self.inputs, self.targets, self.seed)
        with self._another_point():
            self._compare("another point")
        self._compare_trial_points()

    @contextmanager
    def _another_point(self):
        """The incumbent moved a little, and back."""
        buffer = self.flat.buffer
        saved = buffer.clone()
        generator = torch.Generator(device=self.device).manual_seed(self.seed)
        kind = {"device": self.device, "dtype": buffer.dtype}
        step = torch.randn(buffer.shape, generator=generator, **kind)
        try:
            buffer.add_(step.mul_(0.05))
            self._incumbent.touch(None)
            yield
        finally:
            buffer.copy_(saved)
            self._incumbent.touch(None)

    def _compare(self, where: str) -> None:
        got = self._incumbent.loss
        args = (self._composite, self.inputs, self.targets, self.seed)
        expected = plain_loss(*args)
        if expected.ndim or got.ndim:
            raise ValueError(f"the loss must be a scalar, got shape {tuple(expected.shape)}")
        if self.device.type == "cpu" and not has_bits(expected, plain_loss(*args)):
            raise ValueError("the model's loss differs from one evaluation to the next")
        if not reproduces(got, expected):
            raise ValueError(
                f"the trace does not reproduce the model at {where}: loss {got.item():.9g}, "
                f"the model's {expected.item():.9g}; does its control flow depend on values, or "
                "does it read a parameter outside of torch?"
            )

    def _compare_trial_points(self) -> None:
        """The same for a trial point of each tensor, or of as many as the time is spent on."""
        names = {p: name for name, p in self._composite.named_parameters()}
        every = math.ceil(len(self.params) * self.flat.size / _MOST_COPIED)
        for number in range(0, len(self.params), every):
            start, stop = self.flat.offsets[number : number + 2]
            if start == stop:
                continue
            at = start + sampled(number, stop - start)
            index, delta = torch.tensor([at], device=self.device), torch.ones(1)
            (got,) = self._losses_of_few(index, delta, None)
            saved = self.flat.buffer[at].clone()
            try:
                self.flat.buffer[at] += 1.0
                expected = plain_loss(self._composite, self.inputs, self.targets, self.seed)
            finally:
                self.flat.buffer[at] = saved
            if not reproduces(got, expected):
                raise ValueError(
                    f"a trial point of {names[self.params[number]]} would have the loss "
                    f"{got.item():.9g}, the model's is {expected.item():.9g}"
                )

    # --- trial points --------------------------------------------------------------------------

    def _rounded(self, index: Tensor, delta: Tensor) -> Tensor:
        """The changes that the trial values, rounded as the parameters are, amount to."""
        value = self.flat.buffer.index_select(0, index)
        return (value + delta.to(self.device, value.dtype)).sub_(value)

    def _tensors_of(self, index: Tensor) -> frozenset[int]:
        if len(index) <= _FEW:
            return frozenset(self.flat.locate(i)[0] for i in index.tolist())
        return frozenset(torch.bucketize(index.to(self.device), self._stops, right=True).tolist())

    def _by_tensor(self, index: Tensor) -> dict[int, Tensor]:
        """number of a tensor -> the places in ``index`` of its trial points"""
        number = torch.bucketize(index, self._stops, right=True)
        order = torch.argsort(number, stable=True)
        counts = torch.bincount(number, minlength=len(self.params)).tolist()
        if len(counts) > len(self.params) or index.min() < 0:
            raise IndexError(f"index must lie in [0, {self.flat.size}), got {index.tolist()}")
        groups = order.split(counts)
        return {n: which for n, which in enumerate(groups) if len(which)}

    def _losses_of_few(self, index: Tensor, delta: Tensor, stop_below: float | None) -> Tensor:
        """The same by way of Python numbers, which are faster here than operations on tensors.

        One tensor's trial points after another's, by their first places; so it can stop early.
        """
        places: dict[int, list[int]] = {}
        at = []
        for place, i in enumerate(index.tolist()):
            number, element = self.flat.locate(i)
            at.append(element)
            places.setdefault(number, []).append(place)
        steps = self._rounded(index, delta)
        losses: list[float | None] = [None] * len(at)
        known = 0
        for number, group in places.items():
            for place, loss in zip(group, self._few(number, group, at, steps), strict=False):
                losses[place] = loss
            while stop_below is not None and known < len(at) and losses[known] is not None:
                known += 1
                if losses[known - 1] < stop_below:
                    return self._incumbent.like_loss(losses[:known])
        return self._incumbent.like_loss(losses)

    def _few(self, number: int, places: list[int], at: list[int], steps: Tensor) -> list[float]:
        """The losses of the trial points at these places, all of one tensor."""
        plan, losses = self._evaluator.plans[number], []
        while plan.nodes and len(losses) < len(places):
            rest = places[len(losses) :]
            try:
                key = (number, len(rest))
                if key not in self._few_sizes:
                    self._few_sizes[key] = self._chunk_size(plan, len(rest))
                size = self._few_sizes[key]
                part = rest[:size]  # a chunk has a size that was found to have the right bits
                padded = part + part[-1:] * (size - len(part))
                where = torch.tensor([at[k] for k in padded], device=self.device)
                first, is_alone = padded[0], len(padded) == 1
                step = steps[first : first + 1] if is_alone else steps[padded]
                found = self._evaluator.few(plan, where, step)
            except RuntimeError as error:
                self._halve(plan, error)
                continue
            same = [self._incumbent.loss.item()] * len(part) if found is None else None
            losses += same or found.tolist()[: len(part)]
        return losses or [self._incumbent.loss.item()] * len(places)

    def _group(self, plan: Plan, at: Tensor, delta: Tensor, which: Tensor, losses: Tensor) -> None:
        """Write the losses of the trial points of one tensor to their places ``which``."""
        if not plan.nodes or (
            len(at) <= _SMALL_GROUP and self._padded(plan, at, delta, which, losses)
        ):
            return
        self._evaluator.prepare(plan)
        # half of the workspace for the sparse values, half for what is stacked of them
        most = self.workspace // 2 // max(_TEMPORARY * plan.sparse_bytes, 1)
        if self.device.type == "cpu":
            most = min(most, max(self._most(plan), _SPARSE_CACHED // max(plan.sparse_bytes, 1)))
        step = min(max(1, most), _LARGEST_CHUNK)
        for start in range(0, len(at), step):
            chunk = slice(start, start + step)
            self._incumbent.bring_up_to_date()
            env = self._evaluator.sparse_part(plan, at[chunk], delta[chunk])
            changes = self._evaluator.changes(env, is_all_enough=True)
            moved = changes.nonzero().squeeze(1)
            if len(moved):
                if len(moved) < len(changes):
                    memo: dict = {}
                    env = {i: value.select(moved, memo) for i, value in env.items()}
                losses[which[chunk][moved]] = self._heavy(plan, env, len(moved)).to(losses.dtype)

    def _padded(self, plan: Plan, at: Tensor, delta: Tensor, which: Tensor, losses: Tensor) -> bool:
        """The same for a group that one chunk holds; whether there was memory for it."""
        try:
            size = self._chunk_size(plan, len(at))
            if size < len(at):
                return False
            filled = torch.arange(size, device=self.device).clamp_(max=len(at) - 1)
            found = self._evaluator.few(plan, at[filled], delta[filled])
        except RuntimeError as error:
            self._halve(plan, error)
            return False
        if found is not None:
            losses[which] = found[: len(at)].to(losses.dtype)
        return True

    def _heavy(self, plan: Plan, env: dict, count: int) -> Tensor:
        parts, start = [], 0
        while start < count:
            try:
                size = self._chunk_size(plan, count - start)
                chunk = env if size == count else self._chunk(env, start, size, count)
                parts.append(self._evaluator.losses(plan, chunk, size)[: count - start])
            except RuntimeError as error:
                self._halve(plan, error)
                continue
            start += size
        return torch.cat(parts)

    def _chunk(self, env: dict, start: int, size: int, count: int) -> dict:
        """The next ``size`` of ``count`` trial points, the last one repeated if need be."""
        places: Tensor | slice = slice(start, start + size)
        if count < start + size:
            places = torch.arange(start, start + size, device=self.device).clamp_(max=count - 1)
        memo: dict = {}
        return {i: value.select(places, memo) for i, value in env.items()}

    def _chunk_size(self, plan: Plan, count: int) -> int:
        """The chunk for the next of ``count`` trial points, a power of two; perhaps not for all.

        At most a quarter of it is padding, unless a smaller chunk would have other bits.
        """
        most = self._most(plan)
        size = least = self._incumbent.copies
        while size < min(count, most):
            size *= 2
        if size > least and count < size * 3 // 4:
            size //= 2
        enough = size
        while not self._is_steady(plan, size):
            if size == most:
                self._warn_once(
                    "bits",
                    "the last bits of a trial point's loss may depend on its block: this model has "
                    "an operation that computes the incumbent by other code than its trial points",
                )
                return enough
            size *= 2
        return size

    def _most(self, plan: Plan) -> int:
        if plan.number not in self._chunks:
            self._evaluator.prepare(plan)
            alive, typical = plan.footprint(self._evaluator.graph.nodes)
            bound = self.workspace // 2 // max(alive, 1)
            if self.device.type == "cpu":
                bound = min(bound, _CACHED * torch.get_num_threads() // max(typical, 1))
            bound = min(max(bound, self._incumbent.copies), _LARGEST_CHUNK)
            self._chunks[plan.number] = 1 << int(math.log2(bound))
        return self._chunks[plan.number]

    def _is_steady(self, plan: Plan, size: int) -> bool:
        """Whether chunks of this size give the incumbent, everywhere, the incumbent's bits."""
        key = size, self._incumbent.rows
        if key not in plan.sizes:
            at = torch.arange(size, device=self.device) % self.params[plan.number].numel()
            zero = torch.zeros(size, dtype=self.flat.buffer.dtype, device=self.device)
            self._incumbent.bring_up_to_date()
            env = self._evaluator.sparse_part(plan, at, zero)
            self._evaluator.losses(plan, env, size, check=True)
        return plan.sizes[key]

    def _halve(self, plan: Plan, error: Exception) -> None:
        most = self._most(plan)
        is_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not is_memory or most <= self._incumbent.copies:
            raise error
        self._chunks[plan.number] = most // 2
        self._few_sizes.clear()
        self._warn_once("memory", f"out of memory: going on with chunks of {most // 2}")

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warn_caller(message)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, workspace={self.workspace / 2**20:.0f} MiB"
