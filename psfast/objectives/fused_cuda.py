"""A decoder-only transformer's loss on a GPU, from trial point to loss in one Triton kernel."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psfast.flat import trainable
from psfast.models import DecoderOnlyTransformer, MaskedCrossEntropy
from psfast.objectives.base import Objective, check_block

_INT32 = 2**31 - 1


class FusedCudaObjective(Objective):
    """``MaskedCrossEntropy(model(inputs), targets)``, whole blocks of trial points at a time.

    model: a ``DecoderOnlyTransformer`` in float32 on a CUDA device, d_model <= 256
    criterion: a ``MaskedCrossEntropy``
    inputs, targets: (B, T) int64, T <= 128
    params: those that ``index`` counts through, in order; default: all trainable ones
    seed: of the dropout mask, the same one that a forward pass under this seed would draw
    precision: "fp16x3" (three tensor-core passes over fp16 halves; what leaves fp16's range
        is evaluated again with "tf32x3"), "tf32x3" or "fp32"

    Losses are float64: the incumbent's plus a difference that the kernel computes, so that
    they are finer than the float32 loss itself. A trial point that cannot change the loss has
    the incumbent's, bitwise. No method waits for the device, but for ``set_batch``. An index
    outside [0, N) gives NaN.

    Under ``TRITON_INTERPRET=1`` it runs, slowly, on the CPU.

    Raises ValueError with the reason where it cannot serve.
    """

    backend = "fused"

    def __init__(
        self, model, criterion, inputs, targets, *, params=None, seed=0, precision="fp16x3"
    ):
        params = trainable(model.parameters()) if params is None else list(params)
        _check_model(model, criterion, params)
        super().__init__(params)
        try:
            from triton.errors import TritonError

            from psfast.kernels import plan
        except ImportError as error:
            raise ValueError(f"the fused backend on a GPU needs triton: {error}") from error
        if precision not in plan.MODES:
            raise ValueError(f"precision must be one of {plan.MODES}, got {precision!r}")
        self.model, self.criterion = model, criterion
        self.precision, self.seed = precision, seed
        self._kernels, self._errors = plan, TritonError
        self._fixed = [p for p in model.parameters() if not any(p is q for q in self.params)]
        self._plan = self._cache = self._trial_cache = None
        self.set_batch(inputs, targets)

    def __call__(self) -> Tensor:
        self._follow()
        return self._loss[0].clone()

    def losses(self, index: Tensor, delta: Tensor, *, stop_below: float | None = None) -> Tensor:
        check_block(index, delta, self.flat.size)
        self._follow()
        device = self.flat.buffer.device
        index = index.to(device, non_blocking=True).contiguous()
        delta = delta.to(device, torch.float32, non_blocking=True).contiguous()
        if not len(index):
            return self._loss[:0].clone()
        return self._plan.losses(self._cache, self._values, self._rows, index, delta)

    def loss_at(self, index: Tensor, delta: Tensor) -> Tensor:
        check_block(index, delta, self.flat.size)
        self._follow()
        if self._trial_cache is None:
            self._trial_cache = self._plan.new_cache(self._rows)
        values = self._all_values().clone()
        device = values.device
        values[index.to(device, non_blocking=True)] += delta.to(device, torch.float32)
        return self._plan.refresh(self._trial_cache, values, self._rows)[0]

    def accept(self, index: Tensor, delta: Tensor) -> None:
        check_block(index, delta, self.flat.size)
        self._follow()
        device = self.flat.buffer.device
        self.flat.add(index.to(device, non_blocking=True), delta.to(device, non_blocking=True))
        self._refresh()

    def set_batch(self, inputs: Tensor, targets: Tensor, *, seed: int | None = None) -> None:
        _check_batch(self.model, inputs, targets, self.criterion)
        self.seed = self.seed if seed is None else seed
        self.inputs, self.targets = inputs, targets
        block = self.model.blocks[0]
        dropout = block.ff[3].p if block.ff[3].training else 0.0
        sizes = self._kernels.Sizes(
            d_model=self.model.token_embedding.embedding_dim,
            n_heads=block.attention.n_heads,
            d_ff=block.ff[0].out_features,
            vocab_size=self.model.vocab_size,
            n_layers=len(self.model.blocks),
            positions=self._kernels.padded_positions(inputs.shape[1]),
            dropout=dropout > 0,
        )
        new = self._plan is None or self._plan.sizes != sizes
        if new:
            capability = _capability(inputs.device)
            config = self._kernels.choose_config(sizes, capability, self.precision)
            if config is None:
                raise ValueError(
                    f"no kernel configuration for d_model = {sizes.d_model} and T = "
                    f"{inputs.shape[1]} on this device"
                )
            self._plan = self._kernels.TransformerPlan(
                self.model, self.params, sizes, config, self.precision
            )
            self._cache = None
        masks = self._masks(inputs.shape, dropout) if dropout > 0 else None
        scored = torch.where(targets == self.criterion.ignore_index, -1, targets)
        rows = self._plan.rows(inputs, scored, masks, dropout)
        largest = max(self._plan.cache_sizes(rows.groups).values())
        if largest > _INT32:
            raise ValueError(f"the cache of this batch needs {largest} > {_INT32} elements")
        if self._cache is None or rows.groups != self._rows.groups:
            self._cache, self._trial_cache = self._plan.new_cache(rows), None
        self._rows = rows
        self.flat.changed()
        try:
            self._refresh()
            if new:  # compile what evaluates blocks now, not in the middle of a poll
                zero = torch.zeros(1, dtype=torch.int64, device=inputs.device)
                self._plan.losses(self._cache, self._values, rows, zero, zero.float())
        except self._errors as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"the kernels do not run on this device: {reason}") from error

    def _follow(self) -> None:
        if self.flat.changed():
            self._refresh()

    def _refresh(self) -> None:
        self._values = self._all_values()
        self._loss = self._plan.refresh(self._cache, self._values, self._rows)

    def _all_values(self) -> Tensor:
        """The flat parameters, then the frozen ones, which the kernels read from there too."""
        if not self._fixed:
            return self.flat.buffer
        return torch.cat([self.flat.buffer, *(p.detach().flatten() for p in self._fixed)])

    def _masks(self, shape: tuple[int, int], dropout: float) -> Tensor:
        """(L, B, T, d_model) bool: what each block's dropout keeps, as a forward pass draws it."""
        device = self.flat.buffer.device
        ones = torch.ones(*shape, self.model.token_embedding.embedding_dim, device=device)
        generator = torch.default_generator
        if device.type == "cuda":
            generator = torch.cuda.default_generators[device.index]
        saved = generator.get_state()
        try:
            generator.manual_seed(self.seed)
            return torch.stack([F.dropout(ones, dropout) != 0 for _ in self.model.blocks])
        finally:
            generator.set_state(saved)


def _check_model(model: nn.Module, criterion: nn.Module, params: list[nn.Parameter]) -> None:
    if type(model) is not DecoderOnlyTransformer:
        raise ValueError(f"the model must be a DecoderOnlyTransformer, got {type(model).__name__}")
    if type(criterion) is not MaskedCrossEntropy:
        raise ValueError(
            f"the criterion must be a MaskedCrossEntropy, got {type(criterion).__name__}"
        )
    kinds = {(p.dtype, p.device) for p in model.parameters()}
    if len(kinds) > 1 or next(iter(kinds))[0] != torch.float32:
        names = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"the model must be in float32 on one device, got {names}")
    device = next(iter(kinds))[1]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        raise ValueError(f"the model must be on a CUDA device, got {device}")
    twin = _twin(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if shapes != twin or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        raise ValueError(
            "the model must be as DecoderOnlyTransformer builds it: no tied, replaced or "
            "missing parameters, no forward hooks"
        )
    if len({norm.eps for norm in _modules(model, nn.LayerNorm)}) > 1:
        raise ValueError("all LayerNorms must have the same eps")
    if len({(drop.p, drop.training) for drop in _modules(model, nn.Dropout)}) > 1:
        raise ValueError("all Dropouts must have the same p and the same mode")
    known = set(model.parameters())
    foreign = sum(p not in known for p in params)
    if foreign:
        raise ValueError(f"params must be the model's, got {foreign} others")


def _capability(device: torch.device) -> int:
    """The major compute capability; the interpreter behaves like the newest."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _twin(model: DecoderOnlyTransformer) -> dict[str, torch.Size]:
    """The names and shapes of the parameters that a model of these sizes has."""
    block = model.blocks[0]
    with torch.device("meta"):
        twin = DecoderOnlyTransformer(
            model.vocab_size,
            model.token_embedding.embedding_dim,
            len(model.blocks),
            block.attention.n_heads,
            block.ff[0].out_features,
            model.max_len,
        )
    return {name: p.shape for name, p in twin.named_parameters()}


def _modules(model: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


def _check_batch(model, inputs: Tensor, targets: Tensor, criterion) -> None:
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor) or value.ndim != 2 or value.is_floating_point():
            raise ValueError(f"{name} must be an integer tensor (B, T)")
    if inputs.shape != targets.shape:
        raise ValueError(
            "inputs and targets must have the same shape, "
            f"got {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    device = next(model.parameters()).device
    if inputs.device != device or targets.device != device:
        raise ValueError(
            f"inputs and targets must be on {device}, got {inputs.device} and {targets.device}"
        )
    if not inputs.numel():
        raise ValueError(f"the batch must not be empty, got {tuple(inputs.shape)}")
    T = inputs.shape[1]
    if model.max_len < T:
        raise ValueError(f"T must be <= max_len = {model.max_len}, got {T}")
    V = model.vocab_size
    scored = torch.where(targets == criterion.ignore_index, 0, targets)
    for name, value in (("inputs", inputs), ("targets", scored)):
        low, high = value.min().item(), value.max().item()
        if low < 0 or high >= V:
            raise ValueError(f"{name} must lie in [0, {V}), got values from {low} to {high}")
