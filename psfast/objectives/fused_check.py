"""Whether a GPU's kernels compute the model's loss: one trial point of each tensor, in float64.

A compiler, or a chip that nobody has tried, may get a kernel wrong without an error; the search
would then go on, by losses that are none.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from psfast.ops import FusedPlan
from psfast.reference_fused import fused_loss

_DELTA = 1.0  # moves the loss by far more than rounding does
_TOLERANCE = 1e-4  # of the loss, or of 1 where that is more
_ROUNDING = 10.0  # times the largest error of plain float32, where the model makes that larger


def wrong_tensors(
    model: nn.Module,
    params: Sequence[nn.Parameter],
    batch: FusedPlan,
    losses: Callable[[Tensor, Tensor], Tensor],
) -> list[str]:
    """The names of those ``params`` at whose trial points ``losses`` is not the model's loss.

    params: of the model, distinct, those that ``index`` counts through
    batch: on what; its workspace is not read
    losses: index (K,) int64, delta (K,) float32 -> (K,) float64

    A trial point whose loss is not finite in float64 tells nothing.
    """
    device = batch.tokens.device
    token = batch.tokens[0, 0].item()
    read = {model.token_embedding.weight: token * batch.sizes.d_model, model.position_embedding: 0}
    index, exact, single = [], [], []
    start = 0
    for i, p in enumerate(params):
        # Elsewhere not only first rows, nor only queries.
        element = read.get(p, (2 * (i % 3) + 1) * p.numel() // 6)
        index.append(start + element)
        start += p.numel()
        exact.append(_loss_at(model, p, element, batch, torch.float64))
        single.append(_loss_at(model, p, element, batch, torch.float32))
    index = torch.tensor(index, device=device)
    found = losses(index, torch.full(index.shape, _DELTA, device=device)).cpu()
    exact, single = torch.stack(exact).cpu(), torch.stack(single).cpu()
    finite = exact.isfinite()
    rounding = (single - exact)[finite].abs().max() if finite.any() else 0.0
    bound = (_TOLERANCE * exact.abs().clamp(min=1.0)).clamp(min=_ROUNDING * rounding)
    wrong = finite & ~((found - exact).abs() <= bound)  # so NaN is wrong
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for p, is_wrong in zip(params, wrong.tolist(), strict=True) if is_wrong]


def _loss_at(
    model: nn.Module, changed: nn.Parameter, element: int, batch: FusedPlan, dtype: torch.dtype
) -> Tensor:
    """The loss, computed in ``dtype``, where one element has moved as far as float32 lets it."""
    values = []
    for p in model.parameters():
        value = p.detach().flatten().clone()
        if p is changed:
            value[element] += _DELTA
        values.append(value)
    return fused_loss(torch.cat(values).to(dtype), batch)
