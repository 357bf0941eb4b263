"""Captures, with a stand-in for what of torch.cuda they call."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from psfast import capture


class Cuda:
    """Notes where each step runs: in which stream, capturing or not, with host syncs or not."""

    def __init__(self):
        self.current, self.sync, self.captures = "caller", "default", False
        self.ran, self.waits = [], []
        self.random_state = "free"

    def step(self):
        self.ran.append((self.current, self.sync, self.captures))

    def Stream(self, device):
        return SimpleNamespace(name="side", wait_stream=lambda other: self.waits.append("side"))

    def current_stream(self, device=None):
        waits = self.waits
        return SimpleNamespace(name="caller", wait_stream=lambda other: waits.append("caller"))

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, *, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.current, self.captures, self.random_state = stream.name, True, "captured"
        yield  # on an exception torch's own leaves everything as it is now, too
        self.current, self.captures, self.random_state = "caller", False, "free"

    @contextmanager
    def device(self, device):
        yield

    def set_stream(self, stream):
        self.current = stream.name

    def get_sync_debug_mode(self):
        return self.sync

    def set_sync_debug_mode(self, mode):
        self.sync = mode

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.ran.append("replay"))


@pytest.fixture
def cuda(monkeypatch):
    stand_in = Cuda()
    monkeypatch.setattr(capture.torch, "cuda", stand_in)
    capture._side_stream.cache_clear()
    yield stand_in
    capture._side_stream.cache_clear()


DEVICE = torch.device("cuda", 0)


def test_a_step_runs_some_times_and_once_without_host_syncs_before(cuda):
    capture.captured(cuda.step, DEVICE)
    warm = [("side", "default", False)] * 3 + [("side", "error", False)]
    assert cuda.ran == [*warm, ("side", "default", True)]
    assert cuda.waits == ["side", "caller"]
    assert (cuda.current, cuda.sync) == ("caller", "default")


def test_a_host_sync_is_found_before_anything_is_captured(cuda):
    def step():
        cuda.step()
        if cuda.sync == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        capture.captured(step, DEVICE)
    assert not any(captures for *_, captures in cuda.ran)
    assert (cuda.sync, cuda.waits) == ("default", ["side", "caller"])


@pytest.mark.parametrize("version, state", [("2.11.0", "free"), ("2.13.0+cpu", "captured")])
def test_a_failed_capture_leaves_nothing_behind(cuda, monkeypatch, version, state):
    monkeypatch.setattr(capture.torch, "__version__", torch.torch_version.TorchVersion(version))

    def step():
        cuda.step()
        if cuda.captures:
            raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture.captured(step, DEVICE)
    # From 2.13 on a capture that fails has a state of its own.
    assert (cuda.current, cuda.random_state) == ("caller", state)


def test_what_repeats_is_launched_once_then_recorded_and_replayed(cuda):
    repeated = capture.Repeated(DEVICE)
    for _ in range(3):
        repeated(cuda.step)
    launched, recorded = ("caller", "default", False), ("side", "default", True)
    assert cuda.ran == [launched, recorded, "replay", "replay"]


def test_what_repeats_on_the_cpu_runs_each_time():
    ran, repeated = [], capture.Repeated(torch.device("cpu"))
    for k in range(3):
        repeated(lambda k=k: ran.append(k))
    assert ran == [0, 1, 2]


def test_work_beside_waits_for_what_was_before_and_is_waited_for(cuda):
    beside = capture.Beside(DEVICE)
    with pytest.raises(ZeroDivisionError), beside:
        cuda.step()
        1 / 0  # noqa: B018
    cuda.step()
    beside.join()
    assert [where for where, *_ in cuda.ran] == ["side", "caller"]
    assert cuda.waits == ["side", "caller"]
    with capture.Beside(torch.device("cpu")) as nothing:
        assert nothing is None
