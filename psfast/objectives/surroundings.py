"""What a search has to ask of torch while it evaluates."""

import functools
from contextlib import contextmanager

import torch

from psfast.notices import warn_caller


@contextmanager
def full_float32(device: torch.device):
    """cuDNN's convolutions and recurrences in float32, not in TF32 as torch has them by default:
    with 11 bits of each factor, one decision in ten is wrong at a radius of a hundredth.

    Products are as the user asked for them, which by default is in float32.
    """
    if device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        _say_once(
            "torch rounds the factors of every product to 11 bits, so many trial points are "
            'accepted or rejected wrongly: torch.set_float32_matmul_precision("highest") ends that'
        )
    try:
        before = torch.backends.cudnn.allow_tf32 if device.type == "cuda" else False
    except RuntimeError:  # set for each kind of layer apart, by someone who means it
        before = False
    if not before:
        yield
        return
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = True


@functools.cache
def _say_once(message: str) -> None:
    warn_caller(message)


@contextmanager
def uncached_autocast():
    """Under autocast, weights are cast anew: torch keeps what it has cast, and looks no more at a
    weight that changes."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
