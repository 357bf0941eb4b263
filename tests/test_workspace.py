"""The memory of `batched`: bounded by the workspace, freed as soon as a block is done with it."""

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import build, some_points
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from psfast.objectives.batched import BatchedObjective


def test_out_of_memory_halves_the_chunk_and_says_so_once(monkeypatch):
    f = BatchedObjective(*build("mlp"))
    index, delta = some_points(f, 64)
    expected = f.losses(index, delta)
    compute = f._evaluator.losses

    def limited(plan, env, K, check=False):
        if K > 16:
            raise torch.OutOfMemoryError("not that many")
        return compute(plan, env, K, check)

    monkeypatch.setattr(f._evaluator, "losses", limited)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        losses = f.losses(index, delta)
    assert len(caught) == 1
    assert torch.equal(losses, expected)


@pytest.mark.parametrize("most", [16, 4, 2])
@pytest.mark.parametrize("size", [200, 30, 16, 5])
@pytest.mark.filterwarnings("ignore:out of memory")
def test_out_of_memory_is_survived_in_blocks_of_any_size(monkeypatch, most, size):
    f = BatchedObjective(*build("mlp"))
    index, delta = some_points(f, 20)
    expected = f.losses(index, delta)
    f._evaluator.forget()
    f._forget_sizes()
    compute = f._evaluator._run

    def limited(plan, env, K, check=False):
        losses = compute(plan, env, K, check)
        if most < K:
            raise torch.OutOfMemoryError("not that many")
        return losses

    monkeypatch.setattr(f._evaluator, "_run", limited)
    for _ in range(3):
        parts = zip(index.split(size), delta.split(size), strict=True)
        assert torch.equal(torch.cat([f.losses(i, d) for i, d in parts]), expected)


def test_objectives_in_several_threads():
    def make(seed):
        torch.manual_seed(seed)
        return BatchedObjective(*build("mlp", seed=seed))

    objectives = [make(seed) for seed in range(3)]
    blocks = [some_points(f, 6, seed=k) for k, f in enumerate(objectives)]
    expected = [f.losses(*block) for f, block in zip(objectives, blocks, strict=True)]
    for f in objectives:
        f._evaluator.forget()

    def work(k):
        with torch.no_grad():
            for size in (1, 2, 3, 5, 40) * 4:
                parts = zip(*(part.split(size) for part in blocks[k]), strict=True)
                found = torch.cat([objectives[k].losses(i, d) for i, d in parts])
                assert torch.equal(found, expected[k])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, range(3)))
    finally:
        sys.setswitchinterval(interval)


def test_the_workspace_bounds_the_chunk():
    arguments = build("decoder")
    f = BatchedObjective(*arguments)
    index, delta = some_points(f, 20)
    expected = f.losses(index, delta)
    small = BatchedObjective(*arguments, workspace=100_000)
    assert torch.equal(small.losses(index, delta), expected)
    for plan in small._evaluator.plans:
        alive, _ = plan.footprint(small._evaluator.graph.nodes)
        assert small._most(plan) * alive <= 100_000 or small._most(plan) == 2


class LiveBytes(TorchDispatchMode):
    """peak: the most bytes that results of operations within were alive at once."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[int, int]] = {}  # address -> (views, bytes)
        self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        known = {
            a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if is_tensor(a)
        }
        for tensor in filter(is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address in known and address not in self.live:
                continue  # a view of what was there before
            views, _ = self.live.get(address, (0, 0))
            self.live[address] = views + 1, storage.nbytes()
            weakref.finalize(tensor, self.end, address)
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out

    def end(self, address):
        views, size = self.live.pop(address, (0, 0))
        if views > 1:
            self.live[address] = views - 1, size


@pytest.mark.parametrize("name", ["mlp", "decoder", "gru", "cnn"])
def test_memory_stays_within_the_workspace(name):
    f = BatchedObjective(*build(name), workspace=200_000)
    index, delta = some_points(f, 1000)
    expected = f.losses(index, delta)
    gc.collect()
    gc.disable()  # memory must not wait for the collector
    try:
        with LiveBytes() as memory:
            assert torch.equal(f.losses(index, delta), expected)
    finally:
        gc.enable()
    assert sum(size for _, size in memory.live.values()) < 1000
    own = 8 * (8 * len(index) + 2 * f.flat.size)  # the block's own index, order, steps, losses
    assert 0 < memory.peak <= 200_000 + own
