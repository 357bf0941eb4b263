"""The poll order on a GPU: ``search.poll_order`` and ``search.coordinates`` in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit
def _feistel(value, a, b, keys_ptr, ROUNDS: tl.constexpr):
    left, right = value // b, value % b
    for i in tl.static_range(ROUNDS):
        mixed = ((right ^ tl.load(keys_ptr + i)) * 0x7FEB352D) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 0x46A7C56B) & 0xFFFFFFFF
        left, right = right, (left + (mixed ^ (mixed >> 16))) % (a if i % 2 == 0 else b)
    return left * (b if ROUNDS % 2 == 0 else a) + right


@triton.jit(do_not_specialize=["start", "count", "total", "a", "b"])
def draw_kernel(
    index_ptr,  # (count,) int64
    sign_ptr,  # (count,) floating-point
    keys_ptr,  # (ROUNDS,) int64
    start,
    count,
    total,
    a,
    b,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Places ``start`` to ``start + count`` of a permutation of [0, total), as coordinates."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    wide = tl.zeros((1,), tl.int64)
    a, b = wide + a, wide + b
    value = _feistel(place + start, a, b, keys_ptr, ROUNDS)
    outside = inside & (value >= total)
    while tl.max(outside.to(tl.int32), 0) > 0:
        value = tl.where(outside, _feistel(value, a, b, keys_ptr, ROUNDS), value)
        outside = inside & (value >= total)
    tl.store(index_ptr + place, value >> 1, mask=inside)
    tl.store(sign_ptr + place, 1 - 2 * (value & 1), mask=inside)


def draw(
    keys: list[int], sides: tuple[int, int], start: int, count: int, total: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """index (count,) int64 and sign (count,), of the dtype and on the device of ``like``.

    keys, sides: as of ``search.permutation``
    """
    index = torch.empty(count, dtype=torch.int64, device=like.device)
    sign = torch.empty(count, dtype=like.dtype, device=like.device)
    with torch.cuda.device_of(like):
        draw_kernel[(-(-count // BLOCK),)](
            index,
            sign,
            torch.tensor(keys, device=like.device),
            start,
            count,
            total,
            *sides,
            ROUNDS=len(keys),
            BLOCK=BLOCK,
        )
    return index, sign
