"""What the benchmarks share: the task, the baselines, forced outcomes, rows of results."""

import csv
import datetime
import platform
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

import psfast
from psfast.objectives.base import Objective
from psfast.objectives.batched.objective import _FEW
from psfast.objectives.graph import _ROUND
from psfast.optimizer import _LARGEST_BLOCK
from psfast.search import coordinates, poll_order

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "small": {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 256},
    "medium": {"d_model": 128, "n_layers": 4, "n_heads": 8, "d_ff": 512},
    "large": {"d_model": 256, "n_layers": 6, "n_heads": 8, "d_ff": 1024},
}


def state_tracking(size: str = "small", batch: int = 4, dtype=torch.float32, device="cpu"):
    """The default job: model, criterion, inputs (B, 16), targets (B, 16); dropout off."""
    torch.manual_seed(0)
    model = psfast.DecoderOnlyTransformer(**SIZES[size], dropout=0.0).to(device, dtype)
    data = psfast.StateTrackingDataset(n_samples=batch, seq_len=8, seed=0)
    items = [data[i] for i in range(batch)]
    inputs = torch.stack([item["x"] for item in items]).to(device)
    targets = torch.stack([item["y"] for item in items]).to(device)
    return model, psfast.MaskedCrossEntropy(), inputs, targets


def poll_block(flat, start: int, count: int, radius: float = 0.1) -> tuple[Tensor, Tensor]:
    """Trial points of a poll in poll order: index (count,), delta (count,)."""
    entries = poll_order(0, 0, start, count, 2 * flat.size)
    index, sign = coordinates(entries)
    device = flat.buffer.device
    return index.to(device), (sign * radius).to(device, flat.buffer.dtype)


def serial_loop(closure, flat, index: Tensor, delta: Tensor) -> None:
    """The clean serial loop where nothing is accepted: nothing is lower than the bar of 0."""
    if serial_search(closure, flat, index, delta, bar=0.0):
        raise AssertionError("a cross-entropy below 0")


def serial_accepts(closure, flat, points, accepted) -> None:
    """The clean serial loop where ``accepted`` (bool per point) says what to keep."""
    buffer = flat.buffer
    index, delta = points
    with torch.no_grad():
        for i, d, keep in zip(index.tolist(), delta.tolist(), accepted, strict=True):
            saved = buffer[i].item()
            buffer[i] = saved + d
            closure().item()
            if not keep:
                buffer[i] = saved


def serial_search(closure, flat, index: Tensor, delta: Tensor, bar: float) -> int:
    """The clean serial loop: no_grad, change in place, evaluate, compare, keep or restore it.

    bar: a loss below it is kept and becomes the bar. Returns how many were kept.
    """
    buffer, accepted = flat.buffer, 0
    with torch.no_grad():
        for i, d in zip(index.tolist(), delta.tolist(), strict=True):
            saved = buffer[i].item()
            buffer[i] = saved + d
            loss = closure().item()
            if loss < bar:
                bar, accepted = loss, accepted + 1
            else:
                buffer[i] = saved
    return accepted


def search_from_start(objective, values, points) -> float:
    """Seconds of a real search's first trial points."""
    set_values(objective.params, values)
    optimizer = psfast.PatternSearch(objective.params, radius=0.1, max_accepts=100)
    objective()
    started, accepted = time.perf_counter(), 0
    while optimizer.evaluations < points:
        optimizer.max_evaluations = points - optimizer.evaluations
        optimizer.step(objective)
        accepted += len(optimizer.last_poll.accepted)
    seconds = time.perf_counter() - started
    assert 0.3 < accepted / points < 0.6
    return seconds


def serial_search_from_start(closure, flat, values, block) -> float:
    """The same trial points in the clean serial loop."""
    set_values(flat.params, values)
    started = time.perf_counter()
    with torch.no_grad():
        bar = closure().item()
    accepted = serial_search(closure, flat, *block, bar)
    seconds = time.perf_counter() - started
    assert 0.3 < accepted / len(block[0]) < 0.6
    return seconds


def search_on_batches(objective, batches, values, points) -> float:
    """Seconds of a real search's first trial points where each step has a batch of its own."""
    set_values(objective.params, values)
    optimizer = psfast.PatternSearch(objective.params, radius=0.1)
    started, steps = time.perf_counter(), 0
    while optimizer.evaluations < points:
        objective.set_batch(*batches[steps % len(batches)])
        optimizer.max_evaluations = points - optimizer.evaluations
        optimizer.step(objective)
        steps += 1
    seconds = time.perf_counter() - started
    assert 0.3 < steps / points < 0.6
    return seconds


def serial_search_on_batches(loss, batches, flat, values, block) -> float:
    """The same in the clean serial loop. loss: of a batch"""
    set_values(flat.params, values)
    index, delta = (part.tolist() for part in block)
    started, buffer, done, steps = time.perf_counter(), flat.buffer, 0, 0
    points = iter(zip(index, delta, strict=True))
    with torch.no_grad():
        while done < len(index):
            inputs, targets = batches[steps % len(batches)]
            bar = loss(inputs, targets).item()
            for i, d in points:
                done += 1
                saved = buffer[i].item()
                buffer[i] = saved + d
                if loss(inputs, targets).item() < bar:
                    break
                buffer[i] = saved
            steps += 1
    seconds = time.perf_counter() - started
    assert 0.3 < steps / len(index) < 0.6
    return seconds


def values_of(params) -> list[Tensor]:
    return [p.detach().clone() for p in params]


@torch.no_grad()
def set_values(params, values: list[Tensor]) -> None:
    """Go back to ``values_of`` these parameters."""
    for p, value in zip(params, values, strict=True):
        p.copy_(value)


class Interrupted(Exception):
    """Ends a poll that would take minutes."""


def with_backward(model, loss) -> Tensor:
    """What the reference's closure does in Lightning: zero_grad, forward, backward."""
    with torch.enable_grad():
        model.zero_grad()
        value = loss()
        value.backward()
    return value.detach()


def failing_reference_poll(model, loss, count: int):
    """A function that runs ``count`` trial points of the reference's failing poll.

    It returns their seconds; the poll's one shuffle, small beside the whole, is left out.
    """
    started, calls = 0.0, 0

    def closure():
        nonlocal started, calls
        calls += 1
        if calls == 2:
            started = time.perf_counter()
        if calls == count + 2:
            raise Interrupted
        return with_backward(model, loss) * 0.0 + 1.0

    def run() -> float:
        nonlocal calls
        calls = 0
        try:
            psfast.ReferencePatternSearch(model.parameters(), radius=0.1).step(closure)
        except Interrupted:
            return time.perf_counter() - started
        raise AssertionError("the poll ended before it was interrupted")

    return run


_PERIOD = 1 << 16
_UNIFORM = torch.rand(_PERIOD, generator=torch.Generator().manual_seed(1)).tolist()


def forced(position: int, probability: float) -> bool:
    """Whether trial point ``position`` of a run improves: fixed, and with ``probability``."""
    return _UNIFORM[position % _PERIOD] < probability


def evaluated(backend: str, decided: int, count: int) -> int:
    """How many of a block's trial points a backend evaluates that may stop behind ``decided``."""
    if backend == "serial" or (backend == "batched" and count <= _FEW):
        return decided
    if backend == "graph":
        return min(count, -(-decided // _ROUND) * _ROUND)
    return count


class ForcedOutcomes(Objective):
    """An objective whose trial points cost what they cost and improve as ``forced`` says.

    So every backend and baseline runs the same accepts at the same places, whatever the
    model does; the losses are computed, and thrown away.
    """

    backend = "forced"

    def __init__(self, inner: Objective, probability: float):
        super().__init__(inner.params)
        self.inner, self.probability = inner, probability
        self.overhead, self.at_once = inner.overhead, inner.at_once
        self.position, self.level = 0, 0.0
        self._improves = [forced(k, probability) for k in range(_PERIOD + _LARGEST_BLOCK)]
        self._changes = 1.0 - 2.0 * torch.tensor(self._improves, dtype=torch.float64)

    def __call__(self) -> Tensor:
        return torch.tensor(self.level, dtype=torch.float64)

    def losses(self, index, delta, *, stop_below=None) -> Tensor:
        start, count = self.position % _PERIOD, len(index)
        outcomes = self._improves[start : start + count]
        decided = outcomes.index(True) + 1 if True in outcomes else count
        if stop_below is not None:
            count = evaluated(self.inner.backend, decided, count)
        self.inner.losses(index[:count], delta[:count])
        self.position += decided
        return self.level + self._changes[start : start + count]

    def undisturbed(self):
        return self.inner.undisturbed()

    def accept(self, index, delta) -> None:
        self.level -= 1.0
        self.inner.accept(index, delta)


def run_points(optimizer, outcomes: ForcedOutcomes, points: int) -> None:
    """Steps until this many more trial points are decided, over the ends of polls.

    The radius stays: changes that shrink until they are rounded away would cost nothing.
    """
    stop, radius = outcomes.position + points, optimizer.radius
    while outcomes.position < stop:
        optimizer.max_evaluations = stop - outcomes.position
        optimizer.step(outcomes)
        optimizer.radius = radius


def agreement(objective: Objective, exact: Objective, count: int = 96) -> float:
    """The largest relative error of ``count`` losses against the float64 serial ones."""
    index, delta = poll_block(objective.flat, 0, count)
    losses = objective.losses(index, delta).double().cpu()
    expected = exact.losses(index.cpu(), delta.double().cpu())
    return ((losses - expected) / expected).abs().max().item()


def machine() -> dict[str, str]:
    """What a row says of where it was measured."""
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": (_git("describe", "--always") or "unknown") + ("-dirty" if changed else ""),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "psfast": psfast.__version__,
    }


def _git(*arguments: str) -> str:
    where = Path(__file__).parents[1]
    return subprocess.run(
        ["git", *arguments], cwd=where, capture_output=True, text=True
    ).stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def append_rows(name: str, rows: list[dict]) -> Path:
    """Append rows to ``results/NAME.csv``; every row carries the machine's columns."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    rows = [{**machine(), **row} for row in rows]
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    return path
