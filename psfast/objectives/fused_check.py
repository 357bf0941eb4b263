"""Whether a GPU's kernels compute the model's loss: one trial point of each tensor, in float64.

A compiler, or a chip that nobody has tried, may get a kernel wrong without an error; the search
would then go on, by losses that are none.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from psfast.flat import starts_of
from psfast.objectives.base import sampled
from psfast.ops import FusedPlan
from psfast.reference_fused import fused_loss

_DELTA = 1.0  # moves the loss by far more than rounding does
_BEYOND = 1e7  # makes hidden units of more than float16 holds
_TOLERANCE = 1e-4  # of the loss, or of 1 where that is more
_ROUNDING = 10.0  # times the largest error of plain float32, where the model makes that larger


def wrong_tensors(
    model: nn.Module,
    params: Sequence[nn.Parameter],
    batch: FusedPlan,
    losses: Callable[[Tensor, Tensor], Tensor],
    loss_at: Callable[[Tensor, Tensor], Tensor],
) -> list[str]:
    """The names of those ``params`` at whose trial points the losses are not the model's.

    One trial point of each, and in the first and the last block one that takes the hidden units
    out of float16's range: other kernels evaluate it again.

    params: of the model, distinct, those that ``index`` counts through
    batch: on what; its workspace is not read
    losses: index (K,) int64, delta (K,) float32 -> (K,) float64
    loss_at: of one point, as an objective's; asked out of float16's range only

    A trial point whose loss is not finite in float64 tells nothing.
    """
    device = batch.tokens.device
    token = batch.tokens[0, 0].item()
    read = {model.token_embedding.weight: token * batch.sizes.d_model, model.position_embedding: 0}
    places = [(p, read.get(p, sampled(i, p.numel()))) for i, p in enumerate(params)]
    changes = [(p, element, _DELTA) for p, element in places]
    ends = {model.blocks[0].ln2.bias, model.blocks[-1].ln2.bias}
    beyond = [(p, element, _BEYOND) for p, element in places if p in ends]
    changes += beyond
    offset = dict(zip(params, starts_of(params), strict=True))
    index = torch.tensor([offset[p] + element for p, element, _ in changes], device=device)
    delta = torch.tensor([change for *_, change in changes], device=device)
    found = list(losses(index, delta))
    for k in range(len(changes) - len(beyond), len(changes)):
        changes.append(changes[k])
        found.append(loss_at(index[k : k + 1], delta[k : k + 1]))
    exact = torch.stack([_loss_at(model, change, batch, torch.float64) for change in changes])
    single = torch.stack([_loss_at(model, change, batch, torch.float32) for change in changes])
    finite = exact.isfinite()
    rounding = (single - exact)[finite].abs().max() if finite.any() else 0.0
    bound = (_TOLERANCE * exact.abs().clamp(min=1.0)).clamp(min=_ROUNDING * rounding)
    wrong = finite & ~((torch.stack(found) - exact).abs() <= bound)  # so NaN is wrong
    names = {p: name for name, p in model.named_parameters()}
    found = [
        names[p] for (p, *_), is_wrong in zip(changes, wrong.tolist(), strict=True) if is_wrong
    ]
    return list(dict.fromkeys(found))


def _loss_at(
    model: nn.Module, change: tuple[nn.Parameter, int, float], batch: FusedPlan, dtype: torch.dtype
) -> Tensor:
    """The loss, computed in ``dtype``, where one element has moved as far as float32 lets it."""
    changed, element, delta = change
    values = []
    for p in model.parameters():
        value = p.detach().flatten().clone()
        if p is changed:
            value[element] += delta
        values.append(value)
    return fused_loss(torch.cat(values).to(dtype), batch)
