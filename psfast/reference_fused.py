"""The fused ops in plain torch: what they compute, without what makes them fast."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from psfast.ops import FusedPlan
from psfast.search import acceptance_bar


def fused_refresh(
    weights: Tensor, plan: FusedPlan, changed: Tensor | None = None, same_batch: bool = True
) -> Tensor:
    """The incumbent's loss, a float64 scalar. Nothing is kept, so the rest says nothing new."""
    return fused_loss(weights, plan)


def fused_losses(weights: Tensor, plan: FusedPlan, index: Tensor, delta: Tensor) -> Tensor:
    """The losses of K trial points, each ``weights`` plus ``delta[k]`` at ``index[k]``.

    weights: (N,); index: (K,) int64; delta: (K,) -> (K,) float64
    """
    losses = weights.new_empty(index.shape, dtype=torch.float64)
    for k, (i, change) in enumerate(zip(index, delta, strict=True)):
        trial = weights.clone()
        trial[i] += change
        losses[k] = fused_loss(trial, plan)
    return losses


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
    """The serial loop over K trial points, accepting in ``weights``; see ``ops.fused_descend``."""
    losses, places, incumbents = [], [], []
    for k, (i, change) in enumerate(zip(index, delta, strict=True)):
        if len(places) == most:
            break
        losses.append(fused_losses(weights, plan, index[k : k + 1], delta[k : k + 1]).item())
        if -math.inf < losses[-1] < acceptance_bar(incumbent, margin):
            weights[i] += change
            incumbent = fused_loss(weights, plan).item()
            places.append(k)
            incumbents.append(incumbent)
    found = weights.new_empty((2, len(index)), dtype=torch.float64)
    found[0, : len(losses)] = found.new_tensor(losses)
    found[1, : len(places)] = found.new_tensor(incumbents)
    where = torch.empty_like(index)
    where[: len(places)] = index.new_tensor(places)
    counts = index.new_tensor([len(losses), len(places), len(losses)])
    return found[0], where, found[1], counts


def fused_loss(weights: Tensor, plan: FusedPlan) -> Tensor:
    """Mean masked cross-entropy of the transformer whose parameters, in order, are ``weights``.

    weights: (N,) -> float64 scalar
    """
    sizes = plan.sizes
    d, ff, V = sizes.d_model, sizes.d_ff, sizes.vocab_size
    take = _cut(weights)

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (d,), take(d), take(d), plan.eps)

    def linear(x: Tensor, rows: int, columns: int) -> Tensor:
        return F.linear(x, take(rows, columns), take(rows))

    B, T = plan.tokens.shape
    positions, tokens = take(sizes.max_len, d), take(V, d)
    x = tokens[plan.tokens] + positions[:T]
    for layer in range(sizes.n_layers):
        heads = linear(norm(x), 3 * d, d).view(B, T, sizes.n_heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(*heads.chunk(3, dim=-1), is_causal=True)
        x = x + linear(mixed.transpose(1, 2).reshape(B, T, d), d, d)
        change = linear(linear(norm(x), ff, d).relu(), d, ff)
        x = x + (change if plan.mask is None else change * plan.mask[layer])
    logits = linear(norm(x), V, d)
    targets = plan.targets.flatten()
    loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=sizes.ignore_index)
    return loss.double()


def _cut(weights: Tensor):
    """A function that cuts the next tensor of a given shape off ``weights``."""
    start = 0

    def take(*shape: int) -> Tensor:
        nonlocal start
        size = torch.Size(shape).numel()
        start += size
        return weights[start - size : start].view(shape)

    return take
