"""torchmetrics at trial points: they count nothing, and give what the code around them expects."""

import copy
import math
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchmetrics import Metric, MetricCollection

_CALLS = ("forward", "update", "compute", "reset")


@contextmanager
def uncounted(module: nn.Module):
    """Inside, the states of the module's metrics stay as they are.

    The first call of each method of each metric is made on a copy. From then on its result
    comes back without work, of the same form but with NaN for its numbers: what takes it apart
    or logs it runs, and a loss that was made of it is not taken for one.
    """
    stand_ins = _StandIns(module)
    stand_ins.put_up()
    try:
        yield
    finally:
        stand_ins.take_down()


class _StandIns:
    """What stands for the methods of the module's metrics, as attributes of the instances."""

    def __init__(self, module: nn.Module):
        kinds = (Metric, MetricCollection)
        self._metrics = [metric for metric in module.modules() if isinstance(metric, kinds)]
        self._copies: list[nn.Module] | None = None
        self._stand_ins = [
            {name: self._stand_in(place, name) for name in _CALLS}
            for place in range(len(self._metrics))
        ]

    def put_up(self) -> None:
        attributes = [metric.__dict__ for metric in self._metrics]
        # A metric wraps two of them, as attributes of the instance.
        self._own = [{n: a[n] for n in _CALLS if n in a} for a in attributes]
        for attribute, stand_in in zip(attributes, self._stand_ins, strict=True):
            attribute.update(stand_in)

    def take_down(self) -> None:
        for metric, own in zip(self._metrics, self._own, strict=True):
            for name in _CALLS:
                del metric.__dict__[name]
            metric.__dict__.update(own)

    def _stand_in(self, place: int, name: str) -> Callable:
        known = []

        def call(*args, **kwargs):
            if not known:
                value = getattr(self._copy(place), name)(*args, **kwargs)
                known.append(tree_map(_no_number, value))
                return value
            return known[0]

        return call

    def _copy(self, place: int) -> nn.Module:
        if self._copies is None:
            self.take_down()
            try:
                self._copies = copy.deepcopy(self._metrics)  # at once: some hold others
            finally:
                self.put_up()
        return self._copies[place]


def _no_number(value):
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.full_like(value, math.nan)
    return math.nan if isinstance(value, float) else value
