"""A decoder-only transformer's loss on a GPU, by Triton kernels from trial point to loss."""

import functools
import operator
import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from psfast.flat import trainable
from psfast.objectives.base import Descent, check_block
from psfast.objectives.fused_check import wrong_tensors
from psfast.objectives.fused_model import FusedModelObjective, sizes_of, why_not_fused_model
from psfast.objectives.watch import Watch
from psfast.ops import FusedPlan
from psfast.random_state import seeded

if TYPE_CHECKING:  # it needs Triton
    from psfast.kernels.descent import DescentLoop

_INT32 = 2**31 - 1
_GRID = 65_535  # programs in a grid's second dimension
# What a block costs beside its trial points, in (rows x layers x d_model^2) of one trial point.
_OVERHEAD = 20_000.0 * 64 * 2 * 64**2  # 0.8 ms of the host beside 0.04 us, measured on an H100
_checked: set[tuple] = set()  # the kernels that have computed the right losses in this process


class FusedCudaObjective(FusedModelObjective):
    """``MaskedCrossEntropy(model(inputs), targets)``, whole blocks of trial points at a time.

    model: a ``DecoderOnlyTransformer`` in float32 on a CUDA device, of compute capability 8.0 or
        more, d_model <= 256, in heads of 128 at most; of 64 where d_model > 128 and a program
        may have less than 128 KiB of shared memory
    criterion: a ``MaskedCrossEntropy``
    inputs, targets: (B, T) int64; T <= 32, with d_model <= 64 on a Hopper chip T <= 64
    params: those that ``index`` counts through, in order; default: all trainable ones
    seed: of the dropout mask, the same one that a forward pass under this seed would draw
    precision: "fp16x3" (three tensor-core passes over fp16 halves; what leaves fp16's range
        is evaluated again with "tf32x3"), "tf32x3" or "fp32"

    Losses are float64: the incumbent's plus a difference that the kernel computes, so that
    they are finer than the float32 loss itself. A trial point that cannot change the loss has
    the incumbent's, bitwise. No method waits for the device, but for ``set_batch``, ``descend``
    and, at its second use, what is recorded as a CUDA graph. An index outside [0, N) gives NaN.
    Parameters must be finite: where one is infinite the loss may be NaN though the model's is not.

    Under ``TRITON_INTERPRET=1`` it runs, slowly, on the CPU.

    Raises ValueError with the reason where it cannot serve, and where the kernels' losses, at a
    trial point of each tensor, are not those of float64 arithmetic in plain torch.
    """

    descends = True
    largest_gap = 4096.0
    is_asynchronous = True

    def __init__(
        self, model, criterion, inputs, targets, *, params=None, seed=0, precision="fp16x3"
    ):
        params = trainable(model.parameters()) if params is None else list(params)
        reason = why_not_fused_model(model, criterion)
        reason = reason or _why_not(model.head.weight.device, model.head.weight.dtype)
        if reason:
            raise ValueError(reason)
        super().__init__(params)
        try:
            from triton.errors import TritonError

            from psfast.kernels import configs, descent, evaluation, plan
        except ImportError as error:
            raise ValueError(f"the fused backend on a GPU needs triton: {error}") from error
        if precision not in configs.MODES:
            raise ValueError(f"precision must be one of {configs.MODES}, got {precision!r}")
        self.model, self.criterion = model, criterion
        self.precision, self.seed = precision, seed
        self._configs, self._kernels = configs, plan
        self._evaluation, self._descent = evaluation, descent
        self._errors = TritonError
        self.inputs, self.targets = inputs, targets
        self._watch = Watch(model, self.params)
        self._plan = self._rows = self._cache = self._values = None
        self._refreshed = self._blocks = self._trial = None
        self._descents: dict[int, DescentLoop] = {}  # by the size of their blocks
        self._fresh_of: int | None = None
        self._prepare()

    @property
    def at_once(self) -> int:
        return max(1, self._kernels.PROGRAMS // self._rows.groups)

    @property
    def overhead(self) -> float:
        plan = self._plan
        work = self._rows.about.shape[1] * plan.sizes.n_layers * plan.sizes.padded_model**2
        return max(8.0, _OVERHEAD / work)

    def __call__(self) -> Tensor:
        self._follow()
        return self._refreshed.loss[0].clone()

    def losses(self, index: Tensor, delta: Tensor, *, stop_below: float | None = None) -> Tensor:
        check_block(index, delta)
        self._follow()
        device = self.flat.buffer.device
        index = index.to(device, non_blocking=True).contiguous()
        delta = delta.to(device, torch.float32, non_blocking=True).contiguous()
        if not len(index):
            return self._refreshed.loss[:0].clone()
        return self._losses(index, delta)

    def _losses(self, index: Tensor, delta: Tensor) -> Tensor:
        self._blocks = self._on_current(self._blocks, self._evaluation.BlockLoop)
        return self._blocks.losses(index, delta)

    def _on_current(self, known, kind):
        """``known``, or a new one of this kind where the memory that it stands for is another."""
        parts = self._plan, self._cache, self._values, self._rows
        if known is not None and all(map(operator.is_, known.parts, parts)):
            return known
        return kind(*parts)

    def loss_at(self, index: Tensor, delta: Tensor) -> Tensor:
        check_block(index, delta)
        self._follow()
        return self._loss_at(index, delta)

    def _loss_at(self, index: Tensor, delta: Tensor) -> Tensor:
        plan, rows, values = self._plan, self._rows, self._values
        known = self._trial.parts if self._trial else (None,) * 4
        if known[0] is not plan or known[3] is not rows or known[2].shape != values.shape:
            parts = plan, plan.new_cache(rows), torch.empty_like(values), rows
            self._trial = self._evaluation.Refresh(*parts)
        device, trial = values.device, self._trial.parts[2]
        trial.copy_(values)
        change = delta.to(device, torch.float32, non_blocking=True)
        trial.index_add_(0, index.to(device, non_blocking=True), change)
        self._trial()
        return self._trial.loss[0].clone()

    def accept(self, index: Tensor, delta: Tensor) -> None:
        check_block(index, delta)
        self._follow()
        at = index.to(self.flat.buffer.device)
        saved = self.flat.buffer[at]
        with self._changing():
            try:
                self.flat.add(at, delta)
                self._refresh()
            except BaseException:  # the memory may not suffice
                self.flat.buffer[at] = saved
                raise

    def descend(self, index, delta, *, incumbent, margin, most, gap) -> Descent:
        """As every objective's; a host sync serves several accepted trial points."""
        check_block(index, delta)
        self._follow()
        size = self._descent.block_size(self._plan, self._rows, gap, self.overhead)
        make = functools.partial(self._descent.DescentLoop, size)
        loop = self._descents[size] = self._on_current(self._descents.get(size), make)
        device = self.flat.buffer.device
        index, delta = index.to(device, non_blocking=True), delta.to(device, non_blocking=True)
        with self._changing():
            try:
                found = loop.run(index, delta, margin, most, self._refreshed)
            finally:
                if self._fixed:
                    self.flat.buffer.copy_(self._values[: self.flat.size])
                self.flat.note_write()
        return Descent(*found)

    def _prepare(self) -> None:
        """Take up the model and the batch as they are now."""
        head = self.model.head.weight
        if reason := _why_not(head.device, head.dtype):
            raise ValueError(reason)
        self._take_up()
        inputs, targets = self.inputs, self.targets
        searched = set(self.params)
        self._fixed = [p for p in self.model.parameters() if p not in searched]
        block = self.model.blocks[0]
        dropout = block.ff[3].p if block.ff[3].training else 0.0
        sizes = self._configs.Sizes(
            d_model=self.model.token_embedding.embedding_dim,
            n_heads=block.attention.n_heads,
            d_ff=block.ff[0].out_features,
            vocab_size=self.model.vocab_size,
            n_layers=len(self.model.blocks),
            positions=self._configs.padded_positions(inputs.shape[1]),
            dropout=dropout > 0,
        )
        new = self._plan is None or (self._plan.sizes, self._plan.device) != (sizes, inputs.device)
        if new:
            capability, shared_memory = _chip(inputs.device)
            config = self._configs.choose_config(sizes, capability, shared_memory, self.precision)
            if config is None:
                raise ValueError(
                    f"no kernel configuration for d_model = {sizes.d_model} in heads of "
                    f"{sizes.d_model // sizes.n_heads} and T = {inputs.shape[1]} on this device, "
                    f"of compute capability {capability} with {shared_memory} B of shared memory"
                )
            self._plan = self._kernels.TransformerPlan(
                self.model, self.params, sizes, config, self.precision
            )
            self._rows = self._cache = self._values = None
        masks = self._masks(inputs.shape, dropout) if dropout > 0 else None
        # In 64 bits: uint8, which cross_entropy takes, has no -1.
        scored = torch.where(targets == self.criterion.ignore_index, -1, targets.long())
        rows = self._plan.rows(inputs, scored, masks, dropout, self._rows)
        sizes_of = self._plan.cache_sizes
        largest = max(sizes_of(rows).values())
        if largest > _INT32:
            raise ValueError(f"the cache of this batch needs {largest} > {_INT32} elements")
        tiles = max(rows.groups, rows.parts)
        if tiles > _GRID:
            raise ValueError(f"the batch must fill <= {_GRID} tiles of rows, it fills {tiles}")
        if self._cache is None or sizes_of(rows) != sizes_of(self._rows):
            self._cache = self._plan.new_cache(rows)
        if self._rows is None or not self._rows.take_over(rows):
            self._rows = rows
            self._refreshed = self._blocks = self._trial = None  # before others take their room
            self._descents.clear()
        self.flat.changed()
        try:
            self._refresh()
            if new:  # compile what evaluates blocks now, not in the middle of a poll
                zero = torch.zeros(1, dtype=torch.int64, device=inputs.device)
                self._losses(zero, zero.float())
            if inputs.device.type == "cuda":
                self._check(masks)
        except self._errors as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"the kernels do not run on this device: {reason}") from error
        self._fresh_of = self.flat.changes

    def _check(self, masks: Tensor | None) -> None:
        """Raise ValueError if the kernels get a loss wrong; once for each that was compiled."""
        plan, rows = self._plan, self._rows
        kernels = (plan.device, plan.sizes, plan.config, plan.mode, rows.each)
        if kernels in _checked or not rows.count.item():
            return
        mask = None if masks is None else masks * rows.inv_keep
        sizes = sizes_of(self.model, self.criterion)
        batch = FusedPlan(sizes, plan.eps, self.inputs.long(), self.targets.long(), mask, None)
        wrong = wrong_tensors(self.model, self.params, batch, self._losses, self._loss_at)
        if wrong:
            raise ValueError(
                f"the kernels get the loss wrong on this device, at a change of {', '.join(wrong)}"
            )
        _checked.add(kernels)

    def _follow(self) -> None:
        if not self._must_look():
            return
        self.flat.changed()
        if self._fresh_of is None or self._watch.changed() or self._is_elsewhere():
            self._fresh_of = None
            self._prepare()
        elif self._fresh_of != self.flat.changes:
            with self._changing():
                self._refresh()

    def _is_elsewhere(self) -> bool:
        """Whether the parameters went where the cache is not: kernels would read it from there."""
        buffer = self.flat.buffer
        return buffer.device != self._plan.device or buffer.dtype != torch.float32

    def _refresh(self) -> None:
        if self._fixed and self._values is not None:
            self._values.copy_(self._all_values())  # stays where a captured graph reads it
        else:
            self._values = self._all_values()
        self._refreshed = self._on_current(self._refreshed, self._evaluation.Refresh)
        self._refreshed()

    def _all_values(self) -> Tensor:
        """The flat parameters, then the frozen ones, which the kernels read from there too."""
        if not self._fixed:
            return self.flat.buffer
        return torch.cat([self.flat.buffer, *(p.detach().flatten() for p in self._fixed)])

    def _masks(self, shape: tuple[int, int], dropout: float) -> Tensor:
        """(L, B, T, d_model) bool: what each block's dropout keeps, as a forward pass draws it."""
        device = self.flat.buffer.device
        ones = torch.ones(*shape, self.model.token_embedding.embedding_dim, device=device)
        with seeded(self.seed, device):
            return torch.stack([F.dropout(ones, dropout) != 0 for _ in self.model.blocks])


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.float32:
        return f"the model must be in float32, got {dtype}"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the model must be on a CUDA device, got {device}"
    return None


def _chip(device: torch.device) -> tuple[int, int]:
    """The major compute capability, and how many bytes of shared memory a program may have; the
    interpreter behaves like an H100."""
    if device.type == "cpu":
        return 9, 232_448
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(device.index)
    return torch.cuda.get_device_capability(device)[0], properties["max_shared_mem"]
