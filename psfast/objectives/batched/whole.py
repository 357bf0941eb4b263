"""The whole loss under ``torch.vmap``: for modules that cannot be traced."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from psfast.flat import trainable
from psfast.objectives.base import CompositeLoss, Objective, check_block, check_point
from psfast.objectives.batched.incumbent import has_bits
from psfast.objectives.batched.interrupts import Uninterrupted
from psfast.objectives.batched.modes import NoHiddenReads, no_fallback_notes, run_under
from psfast.objectives.batched.opening import opening_of
from psfast.objectives.batched.trace import (
    check_kernels,
    plain_kernels,
    refuse_autocast,
    reproduces,
    signature,
)
from psfast.objectives.batched.workspace import checked_workspace
from psfast.objectives.watch import Watch
from psfast.random_state import seeded

_LARGEST_CHUNK = 64
_CHUNKS_COMPARED = 128  # of each smaller size: few losses have other bits where some have
_LEAST_COMPARED = 4  # of them for each tensor


class VmapObjective(Objective):
    """``criterion(model(inputs), targets)`` for blocks: K copies of the one tensor that changes.

    params: default: the model's trainable ones, tied ones once
    seed: of the dropout mask that all trial points share
    workspace: bytes that a chunk of trial points may take; default: a quarter of what is free

    Control flow may depend on the batch (which is not stacked), not on a parameter. Nothing is
    reused from the incumbent and every layer after the changed one runs with K-fold weights
    or inputs, so ``batched`` is far faster where it serves.

    Chunks have one of few sizes, that were found to have the same bits, and are filled up. Their
    first member is the incumbent: a trial point that has its bits has exactly its loss.

    What ``forward`` keeps in an attribute (``self.last = x``) is torch's stand-in for K values,
    of no use afterwards; the next forward pass of the model replaces it.

    Raises ValueError, with the reason, where vmap fails or does not reproduce the model, and
    under autocast.
    """

    backend = "vmap"
    confirms = True

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
        self.inputs, self.targets, self.seed = inputs, targets, seed
        self.workspace = checked_workspace(workspace, self.flat.buffer.device)
        self._composite = CompositeLoss(model, criterion)
        self._watch = Watch(self._composite, self.params)
        self._incumbent: Tensor | None = None
        self._fresh_of: int | None = None  # ``flat.changes`` that it is of
        self._verified_for: tuple | None = None
        self._refresh()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        self._follow()
        if self._incumbent is None:
            self._incumbent = self._plain()
        return self._incumbent.clone()

    @torch.no_grad()
    def losses(self, index: Tensor, delta: Tensor, *, stop_below: float | None = None) -> Tensor:
        check_block(index, delta)
        incumbent, buffer = self(), self.flat.buffer
        found = [self.flat.locate(i) for i in index.tolist()]
        groups: dict[int, list[int]] = {}
        for place, (number, _) in enumerate(found):
            groups.setdefault(number, []).append(place)
        at = torch.tensor([element for _, element in found], device=buffer.device)
        delta = delta.to(buffer.device, buffer.dtype)
        losses = incumbent.repeat(len(found))
        for number, places in groups.items():
            which = torch.tensor(places, device=buffer.device)
            for part in which.split(self._sizes[-1] - 1):
                losses[part] = self._chunk(number, at[part], delta[part], incumbent)
        return losses

    @torch.no_grad()
    def loss_at(self, index: Tensor, delta: Tensor) -> Tensor:
        check_point(index, delta, self.flat.size)
        self._follow()
        buffer = self.flat.buffer
        index, delta = index.to(buffer.device), delta.to(buffer)
        saved = buffer[index]
        try:
            buffer[index] = saved + delta
            return self._plain()
        finally:
            buffer[index] = saved

    @torch.no_grad()
    def accept(self, index: Tensor, delta: Tensor) -> None:
        check_point(index, delta, self.flat.size)
        self._follow()
        self._incumbent = None
        self.flat.add(index.to(self.flat.buffer.device), delta.to(self.flat.buffer))

    @torch.no_grad()
    def set_batch(self, inputs, targets, *, seed: int | None = None) -> None:
        try:
            with self._on_batch(inputs, targets, seed):
                self._refresh()
                (self.opening or self)()
        except BaseException:
            self._verified_for = None
            raise

    def _follow(self) -> None:
        """See what others have changed of the model and the batch."""
        if not self._must_look():
            return
        refuse_autocast(self.flat.buffer.device)
        is_other = self._watch.changed() or torch.get_num_threads() != self._threads
        self.flat.changed()
        if self._fresh_of != self.flat.changes or is_other or self._verified_for is None:
            self._refresh()

    def _refresh(self) -> None:
        """Take up the state and the batch as they are now."""
        self._incumbent = None
        self.flat.changed()  # what is checked is written to its buffer: they must lie there
        self._threads = torch.get_num_threads()  # which sizes are steady may depend on it
        found = *signature(self._watch, self.inputs, self.targets), self._threads
        if found != self._verified_for:
            self._verified_for = None
            self._watch.look(())
            self._verify()
            self.opening = opening_of(self, self._composite)
            self._verified_for = found
        self._watch.look(pytree.tree_leaves((self.inputs, self.targets)))
        self._fresh_of = self.flat.changes

    # --- evaluation -----------------------------------------------------------------------

    def _evaluate(self, run: Callable) -> Tensor:
        seed = seeded(self.seed, self.flat.buffer.device)
        with Uninterrupted(), no_fallback_notes(), plain_kernels(), seed:
            return run()

    def _loss(self, state: dict) -> Tensor:
        buffers = dict(self._composite.named_buffers())
        return self._composite.on_copies_of(buffers, state, self.inputs, self.targets)

    def _plain(self) -> Tensor:
        return self._evaluate(lambda: self._loss({}))

    def _stacked(self, number: int, values: Tensor) -> Tensor:
        """The losses with each of ``values`` (K, *shape) in the place of one tensor. -> (K,)"""
        name = self._names[number]
        run = torch.vmap(lambda value: self._loss({name: value}), randomness="same")
        return self._evaluate(lambda: run(values))

    def _chunk(self, number: int, at: Tensor, delta: Tensor, incumbent: Tensor) -> Tensor:
        count = len(at)
        size = next(s for s in self._sizes if s > count)
        values = self.params[number].detach().expand(size, *self.params[number].shape).clone()
        rows = torch.arange(1, count + 1, device=at.device)
        values.view(size, -1)[rows, at] += delta
        losses = self._stacked(number, values)
        return torch.where(losses == losses[0], incumbent, losses)[1 : count + 1]

    # --- what vmap can do here ------------------------------------------------------------

    @torch.no_grad()
    def _verify(self) -> None:
        refuse_autocast(self.flat.buffer.device)
        names = {p: name for name, p in self._composite.named_parameters()}
        self._names = [names[p] for p in self.params]
        one = _Allocations()
        copies = {name: p.detach().clone() for p, name in names.items()}
        plain = run_under(one, self._evaluate, lambda: self._loss(copies))
        written = [name for name, copy in copies.items() if copy._version]
        if written:
            raise ValueError(f"the forward pass writes to the parameter {written[0]!r}")
        if plain.ndim:
            raise ValueError(f"the loss must be a scalar, got shape {tuple(plain.shape)}")
        if not has_bits(plain, self._plain()):
            raise ValueError("the model's loss differs from one evaluation to the next")
        check_kernels(self._composite, self.inputs, self.targets, self.seed)
        widest = max(p.nbytes for p in self.params)
        most = max(2, min(_LARGEST_CHUNK, self.workspace // (one.bytes + 2 * widest)))
        sizes = {2, min(8, most), most}
        generator = torch.Generator(device=plain.device).manual_seed(self.seed)
        for number in range(len(self.params)):
            sizes &= self._steady_sizes(number, sizes, most, generator)
        self._sizes = sorted(sizes)

    def _steady_sizes(self, number: int, sizes: set, most: int, generator: torch.Generator) -> set:
        """Which of these chunk sizes give the losses the bits that the largest gives them.

        Raises ValueError if a loss is not the model's, or if its bits depend on its place.
        """
        p = self.params[number]
        shape = most, *p.shape
        step = torch.randn(shape, generator=generator, dtype=p.dtype, device=p.device)
        values = step.mul_(0.05).add_(p)
        own, saved = self.flat.view(number), p.detach().clone()
        try:
            own.copy_(values[0])
            first = self._plain()
            own.copy_(values[-1])
            expected = torch.stack([first, self._plain()])
        finally:
            own.copy_(saved)

        def found(values: Tensor) -> Tensor:
            try:
                return run_under(NoHiddenReads(p), self._stacked, number, values)
            except Exception as error:  # whatever a user's forward raises, vmap is not for it
                reason = str(error).strip().splitlines()
                raise ValueError(
                    f"vmap fails: {type(error).__name__}: {reason[0] if reason else ''}"
                ) from error

        losses = found(values)
        if losses.shape != (most,) or not reproduces(losses[[0, -1]], expected):
            raise ValueError(f"vmap does not reproduce the model when {self._names[number]} moves")
        if not has_bits(found(values.flip(0)).flip(0), losses):
            raise ValueError("the bits of a loss depend on its place in the chunk under vmap")

        count = max(_LEAST_COMPARED, _CHUNKS_COMPARED // len(self.params))

        def is_steady(size: int) -> bool:
            starts = range(0, most - size + 1, size)[:count]
            return all(
                has_bits(found(values[start : start + size]), losses[start : start + size])
                for start in starts
            )

        return {size for size in sizes if size == most or is_steady(size)}


class _Allocations(TorchDispatchMode):
    """bytes: of all results of the operations within; at least what is alive at a time."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            self.bytes += value.nbytes if isinstance(value, Tensor) else 0
        return out
