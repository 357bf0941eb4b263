"""Gradient-free peers for ``bench_solve``: each proposes points, sees losses, moves.

A peer is a generator function ``peer(x, population_losses, generator)``: ``x`` (N,) is the
start, ``population_losses(points (P, N)) -> (P,)`` evaluates on the current batch, and each
``yield`` gives the present x, after which the batch changes. The settings come
from the sources, adapted to this size of model; nobody tuned them further.
"""

import math

import numpy as np
import torch
from torch import Tensor

SETTINGS = {
    "MeZO (SPSA)": {"scale": 1e-2, "rate": 3e-4},
    "OpenAI-ES": {"scale": 2e-2, "rate": 1e-2, "pairs": 64},
    "random greedy": {"scale": 2e-2},
    "sep-CMA-ES (pycma)": {"scale": 2e-2, "popsize": 64},
}


def mezo(x: Tensor, population_losses, generator, scale: float, rate: float):
    """Two-point SPSA with a Gaussian direction (Malladi et al. 2023, "Fine-tuning language
    models with just forward passes"): x -= rate * (f(x + s z) - f(x - s z)) / 2s * z."""
    x = x.clone()
    while True:
        z = torch.randn(x.shape, generator=generator)
        up, down = population_losses(torch.stack([x + scale * z, x - scale * z])).tolist()
        x -= rate * (up - down) / (2 * scale) * z
        yield x


def openai_es(x: Tensor, population_losses, generator, scale: float, rate: float, pairs: int):
    """Mirrored sampling, centred ranks, Adam (Salimans et al. 2017)."""
    x = torch.nn.Parameter(x.clone())
    adam = torch.optim.Adam([x], lr=rate)
    while True:
        z = torch.randn(pairs, len(x), generator=generator)
        points = x.detach() + scale * torch.cat([z, -z])
        ranks = population_losses(points).argsort().argsort().float()
        ranks = ranks / (2 * pairs - 1) - 0.5
        x.grad = (ranks[:pairs] - ranks[pairs:]) @ z / (2 * pairs * scale)
        adam.step()
        yield x.detach()


def random_greedy(x: Tensor, population_losses, generator, scale: float):
    """One Gaussian step a batch, kept if the loss fell; the step doubles on success and
    shrinks on failure so that one in five succeeds (Rechenberg 1973)."""
    x = x.clone()
    while True:
        point = x + scale * torch.randn(x.shape, generator=generator)
        here, there = population_losses(torch.stack([x, point])).tolist()
        if there < here:
            x = point
        scale *= math.exp(0.8 if there < here else -0.2)
        yield x


def sep_cma(x: Tensor, population_losses, generator, scale: float, popsize: int):
    """Separable CMA-ES (Ros & Hansen 2008), as pycma has it."""
    import cma

    options = {"CMA_diagonal": True, "popsize": popsize, "verbose": -9, "seed": 1}
    strategy = cma.CMAEvolutionStrategy(x.double().numpy(), scale, options)
    while True:
        points = strategy.ask()
        losses = population_losses(torch.from_numpy(np.stack(points)).float())
        strategy.tell(points, losses.double().tolist())
        yield torch.from_numpy(strategy.mean).float()


PEERS = {
    "MeZO (SPSA)": mezo,
    "OpenAI-ES": openai_es,
    "random greedy": random_greedy,
    "sep-CMA-ES (pycma)": sep_cma,
}
