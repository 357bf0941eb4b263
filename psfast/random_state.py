"""The global random state: drawing from a seed, and leaving the state as it was."""

from collections.abc import Callable
from contextlib import contextmanager

import torch


def generators(device: torch.device) -> list[torch.Generator]:
    """The global generators that a forward pass on ``device`` may draw from."""
    if device.type == "cuda":
        return [torch.default_generator, torch.cuda.default_generators[device.index]]
    return [torch.default_generator]


@contextmanager
def kept(device: torch.device):
    """The global random state is put back at the end."""
    saved = [(generator, generator.get_state()) for generator in generators(device)]
    try:
        yield
    finally:
        for generator, state in saved:
            generator.set_state(state)


def draws(function: Callable, device: torch.device) -> bool:
    """Whether the function draws random numbers; the global random state is put back."""
    with kept(device):
        before = [generator.get_state() for generator in generators(device)]
        function()
        after = [generator.get_state() for generator in generators(device)]
    return not all(map(torch.equal, before, after))


@contextmanager
def seeded(seed: int, device: torch.device):
    """Inside, random numbers start from ``seed``; the global random state is put back."""
    with kept(device):
        seed_all(seed, device)
        yield


def seed_all(seed: int, device: torch.device) -> None:
    # Not torch.manual_seed: it takes 2 ms to note who seeded a GPU that is not there.
    for generator in generators(device):
        generator.manual_seed(seed)
