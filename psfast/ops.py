"""One typed function an op of the C++ extension, which checks their arguments.

The fused ops evaluate trial points of a decoder-only transformer under masked cross-entropy.
Their C++ side is ``csrc/ops.cpp``; the twins in ``psfast/reference_fused.py`` say in plain
torch what they compute.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from psfast import extension


class FusedSizes(NamedTuple):
    """The sizes of the model that the fused ops need, in the order of the ops' ``sizes``."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    max_len: int
    ignore_index: int


class FusedPlan(NamedTuple):
    """What the fused ops read: one batch, one dropout mask, and the work space kept for them.

    sizes, eps: of the model
    tokens, targets: (B, T) int64, contiguous
    mask: (n_layers, B, T, d_model), what dropout multiplies each layer's ff output by, or None
    workspace: prepared weights and the incumbent's activations, as ``fused_refresh`` left them
    """

    sizes: FusedSizes
    eps: float
    tokens: Tensor
    targets: Tensor
    mask: Tensor | None
    workspace: Tensor

    def arguments(self):
        batch = (self.tokens, self.targets, self.mask, self.workspace)
        return *batch, list(self.sizes), self.eps


def why_not_fused(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the fused ops do not serve there, None if they do. Builds the extension if it must."""
    if device.type != "cpu":
        return f"the fused CPU ops serve the CPU only, got {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"the fused ops serve float32 and float64 only, got {dtype}"
    return _loaded()


def fused_plan(
    sizes: FusedSizes,
    eps: float,
    tokens: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    like: Tensor,
) -> FusedPlan:
    """A plan with work space of ``like``'s dtype, for ``fused_refresh`` to fill.

    Raises ValueError where the fused ops do not serve.
    """
    reason = why_not_fused(like.device, like.dtype)
    if reason:
        raise ValueError(reason)
    size = torch.ops.psfast.fused_workspace_size(list(sizes), *tokens.shape, like.element_size())
    workspace = torch.zeros(size, dtype=like.dtype, device=like.device)
    return FusedPlan(sizes, eps, tokens, targets, mask, workspace)


def fused_refresh(
    weights: Tensor, plan: FusedPlan, changed: Tensor | None = None, same_batch: bool = True
) -> Tensor:
    """The incumbent's loss, a float64 scalar; brings ``plan.workspace`` up to date.

    weights: (N,), all of the model's parameters in the order of ``model.parameters()``
    changed: (M,) int64, the elements written since the last refresh; None for any of them, or
        where that was with a mask and this is without, or the other way round
    same_batch: whether tokens, targets and mask are those of the last refresh
    """
    return torch.ops.psfast.fused_refresh(weights, *plan.arguments(), changed, same_batch)


def fused_loss(weights: Tensor, plan: FusedPlan) -> Tensor:
    """The loss at ``weights`` (N,), a float64 scalar with the bits of a whole ``fused_refresh``.

    ``plan.workspace`` is worked in: it holds no incumbent afterwards.
    """
    return torch.ops.psfast.fused_loss(weights, *plan.arguments())


def fused_losses(weights: Tensor, plan: FusedPlan, index: Tensor, delta: Tensor) -> Tensor:
    """The losses of K trial points, each ``weights`` plus ``delta[k]`` at ``index[k]``.

    index: (K,) int64 in [0, N); delta: (K,) of the weights' dtype -> (K,) float64
    """
    return torch.ops.psfast.fused_losses(weights, *plan.arguments(), index, delta)


def fused_descend(
    weights: Tensor,
    plan: FusedPlan,
    index: Tensor,
    delta: Tensor,
    incumbent: float,
    margin: float,
    most: int,
    gap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The serial loop over K trial points: each one lower by more than ``margin`` is accepted.

    Changes ``weights`` at the accepted ones and keeps ``plan.workspace`` up to date.

    index: (K,) int64 in [0, N); delta: (K,) of the weights' dtype; incumbent: the loss now
    most: accepted trial points to end behind; gap: trial points between two of them, about

    Returns losses (K,) float64, places (K,) int64 and incumbents (K,) float64, of which the first
    counts[0], counts[1] and counts[1] elements are the decided trial points' losses, the places of
    the accepted ones and the loss after each; and counts (3,) int64, the last of which says how
    many trial points were evaluated.
    """
    numbers = incumbent, margin, most, gap
    return torch.ops.psfast.fused_descend(weights, *plan.arguments(), index, delta, *numbers)


@functools.lru_cache(maxsize=1)
def _loaded() -> str | None:
    reason = extension.load()
    if reason is None:
        torch.library.register_fake("psfast::fused_refresh", _fake_refresh)
        torch.library.register_fake("psfast::fused_loss", _fake_loss)
        torch.library.register_fake("psfast::fused_losses", _fake_losses)
        torch.library.register_fake("psfast::fused_descend", _fake_descend)
    return reason


def _fake_refresh(weights, tokens, targets, mask, workspace, sizes, eps, changed, same_batch):
    return weights.new_empty((), dtype=torch.float64)


def _fake_loss(weights, tokens, targets, mask, workspace, sizes, eps):
    return weights.new_empty((), dtype=torch.float64)


def _fake_losses(weights, tokens, targets, mask, workspace, sizes, eps, index, delta):
    return weights.new_empty(index.shape, dtype=torch.float64)


def _fake_descend(
    weights,
    tokens,
    targets,
    mask,
    workspace,
    sizes,
    eps,
    index,
    delta,
    incumbent,
    margin,
    most,
    gap,
):
    losses = weights.new_empty(index.shape, dtype=torch.float64)
    counts = index.new_empty(3)
    return losses, torch.empty_like(index), torch.empty_like(losses), counts
