"""What a search has to ask of torch while it evaluates."""

from contextlib import contextmanager

import torch


@contextmanager
def full_float32(device: torch.device):
    """cuDNN's convolutions and recurrences in float32, not in TF32 as torch has them by default:
    with 11 bits of each factor, one decision in ten is wrong at a radius of a hundredth."""
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
