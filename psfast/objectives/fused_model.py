"""What the fused objectives share on whatever device: what they ask of a model and a batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from psfast.models import DecoderOnlyTransformer, MaskedCrossEntropy
from psfast.objectives.base import Objective
from psfast.ops import FusedSizes

# What may differ from a module as it was built: its tensors and submodules, that are compared
# for themselves, its mode, and two numbers that only must be the same everywhere.
_FREE = {"_parameters", "_buffers", "_modules", "training", "eps", "p"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class FusedModelObjective(Objective):
    """A fused objective's model and batch.

    One of them has ``_prepare``, which takes up both as they are, calling ``_take_up``.
    ``_fresh_of`` is the ``flat.changes`` that it is of, None until all of it is done.
    """

    backend = "fused"
    is_pure = True  # of a model as it was built

    def set_batch(self, inputs: Tensor, targets: Tensor, *, seed: int | None = None) -> None:
        self._fresh_of = None
        with self._on_batch(inputs, targets, seed):
            self._prepare()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Inside, what is kept of the parameters changes: if an error ends it, how far that came is
        unknown, and all of it is made anew at the next look."""
        self._fresh_of = None
        yield
        self._fresh_of = self.flat.changes

    def _take_up(self) -> bool:
        """Note model and batch as they are; whether the model has other parts than before.

        Raises ValueError if they cannot be served.
        """
        has_other_parts = self._watch.has_other_parts()
        if has_other_parts:
            reason = why_not_fused_model(self.model, self.criterion)
            if reason:
                raise ValueError(reason)
        check_batch(self.model, self.criterion, self.inputs, self.targets)
        self._watch.look((self.inputs, self.targets))
        return has_other_parts


def why_not_fused_model(model, criterion) -> str | None:
    """Why a fused objective cannot stand for this model, None if it can."""
    if type(model) is not DecoderOnlyTransformer:
        return f"the model must be a DecoderOnlyTransformer, got {type(model).__name__}"
    if type(criterion) is not MaskedCrossEntropy:
        return f"the criterion must be a MaskedCrossEntropy, got {type(criterion).__name__}"
    kinds = {(p.dtype, p.device) for p in model.parameters()}
    if len(kinds) > 1:
        names = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        return f"the model must have one dtype and one device, got {names}"
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        return "a forward hook is on all modules"
    twin = _twin(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    as_built = dict(twin.named_modules()) if twin is not None else {}
    if list(modules) != list(as_built):
        return "the model must be as built: no replaced, missing or further modules"
    own_criterion = MaskedCrossEntropy(criterion.ignore_index)
    pairs = [(name, module, as_built[name]) for name, module in modules.items()]
    for name, module, built in [*pairs, ("criterion", criterion, own_criterion)]:
        reason = _why_not_as_built(module, built)
        if reason:
            return f"the model must be as built, got {reason} at {name!r}"
    if _shapes(model) != _shapes(twin):
        return "the model must be as built: no tied, replaced, missing or further parameters"
    if len({norm.eps for norm in _modules(model, nn.LayerNorm)}) > 1:
        return "all LayerNorms must have the same eps"
    if len({(drop.p, drop.training) for drop in _modules(model, nn.Dropout)}) > 1:
        return "all Dropouts must have the same p and the same mode"
    return None


def _why_not_as_built(module: nn.Module, built: nn.Module) -> str | None:
    if type(module) is not type(built):
        return type(module).__name__
    own, expected = vars(module), vars(built)
    if any(own[name] for name in _HOOKS):
        return "a forward hook"
    for name in expected.keys() - _FREE:
        if own.get(name) != expected[name]:
            return f"{name}={own.get(name)!r}"
    # In place of what the class has, `forward` say; but compiled it is the same function.
    over = {n for n in own.keys() - expected.keys() if hasattr(type(module), n)}
    over.discard("_compiled_call_impl")
    return f"another {min(over)}, as by a hook," if over else None


def check_batch(model, criterion, inputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError for a batch that the model cannot be evaluated on. Reads the values."""
    device = model.head.weight.device
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor) or value.ndim != 2 or value.is_floating_point():
            raise ValueError(f"{name} must be an integer tensor of shape (B, T)")
        if value.device != device:
            raise ValueError(f"{name} must be on {device}, as the model is, got {value.device}")
    if inputs.shape != targets.shape:
        raise ValueError(
            "inputs and targets must have the same shape, "
            f"got {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    if not inputs.numel() or inputs.shape[1] > model.max_len:
        raise ValueError(
            f"inputs must have B >= 1 and 1 <= T <= max_len = {model.max_len}, "
            f"got {tuple(inputs.shape)}"
        )
    scored = torch.where(targets == criterion.ignore_index, 0, targets)
    # One wait for a GPU, not four.
    least, most, lowest, highest = torch.stack([*inputs.aminmax(), *scored.aminmax()]).tolist()
    for name, low, high, limit in (
        ("inputs", least, most, model.vocab_size),
        ("targets", lowest, highest, model.head.out_features),
    ):
        if low < 0 or high >= limit:
            raise ValueError(f"{name} must lie in [0, {limit}), got values from {low} to {high}")


def sizes_of(model: DecoderOnlyTransformer, criterion: MaskedCrossEntropy) -> FusedSizes:
    block = model.blocks[0]
    return FusedSizes(
        vocab_size=model.head.out_features,
        d_model=model.head.in_features,
        n_layers=len(model.blocks),
        n_heads=block.attention.n_heads,
        d_ff=block.ff[0].out_features,
        max_len=model.max_len,
        ignore_index=criterion.ignore_index,
    )


def _modules(model: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def _twin(model: DecoderOnlyTransformer) -> DecoderOnlyTransformer | None:
    """A model of the same sizes as it was built, without memory; None if it has no such sizes."""
    try:
        block = model.blocks[0]
        with torch.device("meta"):
            return DecoderOnlyTransformer(
                vocab_size=model.vocab_size,
                d_model=model.head.in_features,
                n_layers=len(model.blocks),
                n_heads=block.attention.n_heads,
                d_ff=block.ff[0].out_features,
                max_len=model.max_len,
            )
    except (AttributeError, IndexError, TypeError, ValueError):  # other modules are there
        return None
