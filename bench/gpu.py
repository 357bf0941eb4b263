"""Measures psfast on a GPU: the correctness gate, then every backend in one run.

``python bench/gpu.py [--out DIR] [--seconds S] [--dry-run]`` writes ``gpu.json`` and
``gpu.txt``. Every stage that fails is recorded with its error and the rest goes on: in a new
process, where it left the device unusable or did not end. A mode that fails the gate is not
timed. ``--dry-run`` runs every stage on the CPU, on a tiny model, in Triton's interpreter: it
checks this program, and its numbers mean nothing.
"""

import argparse
import contextlib
import copy
import faulthandler
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch  # noqa: E402
from harness import (  # noqa: E402
    RESULTS,
    SIZES,
    ForcedOutcomes,
    machine,
    poll_block,
    run_points,
    set_values,
    values_of,
)

import psfast  # noqa: E402
from psfast.flat import FlatParameters  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
LENGTHS = {"small": 8, "medium": 12, "large": 16, "tiny": 4}
TINY = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16}
BUDGET = 0.2 if DRY else 1.2  # seconds that one measurement aims at, with all its rounds
ROUNDS = 1 if DRY else 3
STAGE_SECONDS, COMPILE_SECONDS = 90, 180  # what takes longer is ended
UNUSABLE = 75  # exit status of a process whose device is lost
MODES = ("fp16x3", "tf32x3", "fp32")
DEFAULTS = ("fused fp16x3", "batched", "graph")  # measured at every size
BACKENDS = (*DEFAULTS, *(f"fused {mode}" for mode in MODES[1:]))


class Run:
    """What has been measured, written to disk before and after every stage.

    until: of ``time.time()``: no stage begins after that
    goes_on: behind what the process before this one has done
    """

    def __init__(self, out: Path, until: float, goes_on: bool):
        self.out, self.until = out, until
        empty = {name: [] for name in ("jobs", "stages", "broken", "descends", "gate", "rows")}
        self.data = {"machine": describe(), "dry_run": DRY, **empty}
        if goes_on:
            self.data = json.loads((out / "gpu.json").read_text())

    def job(self, name: str, work, *args) -> None:
        """``work(*args)``, once: one that has ended a process is not begun again."""
        if name not in self.data["jobs"]:
            self.data["jobs"].append(name)
            work(*args)

    def stage(self, name: str, work, *args, seconds: float = STAGE_SECONDS):
        """``work(*args)``, or None after recording why there is no result."""
        record = {"stage": name, "ok": False, "seconds": 0.0, "error": "the process ended in it"}
        self.data["stages"].append(record)
        left = self.until - time.time()
        if left < 0:
            record["error"] = "skipped: out of time"
            self.save()
            return None
        self.save()
        faulthandler.dump_traceback_later(min(seconds, left + 40), exit=True)
        started, value = time.monotonic(), None
        try:
            value = work(*args)
            synchronize()
            record |= {"ok": True, "error": ""}
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            record["trace"] = traceback.format_exc()[-2000:]
        faulthandler.cancel_dump_traceback_later()
        record["seconds"] = round(time.monotonic() - started, 2)
        print(f"[{record['seconds']:7.2f} s] {name}: {record['error'] or 'ok'}", flush=True)
        self.save()
        if not record["ok"]:
            self._leave_an_unusable_device()
        return value

    @staticmethod
    def _leave_an_unusable_device() -> None:
        try:
            synchronize()
        except RuntimeError as error:  # an illegal access, say: nothing works from here on
            print(f"    the device is lost to this process: {str(error)[:200]}", flush=True)
            sys.exit(UNUSABLE)

    def build(self, case: "Case", parts=None):
        """Its objective, on its own problem or on another of these sizes."""
        if case.label in self.data["broken"]:
            raise ValueError("it could not be built in a process of its own")
        return build(case.backend, parts or problem(case.size, case.batch, case.dropout))

    def row(self, size: str, batch: int, regime: str, backend: str, seconds: float, **more) -> None:
        row = {
            "size": size,
            "batch": batch,
            "regime": regime,
            "backend": backend,
            "us_per_point": seconds * 1e6,
            "points_per_second": 1 / seconds,
            **more,
        }
        self.data["rows"].append(row)
        print(f"    {size} B={batch} {regime}, {backend}: {seconds * 1e6:.3f} us a trial point")

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu.json").write_text(json.dumps(self.data, indent=1) + "\n")
        (self.out / "gpu.txt").write_text(table(self.data))


def describe() -> dict:
    try:
        found = machine()
    except OSError as error:  # no git there
        found = {"machine": f"unknown: {error}", "torch": torch.__version__}
        if torch.cuda.is_available():
            found["device"] = torch.cuda.get_device_name()
    found["python_executable"] = Path(sys.executable).name
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError as error:
        found["triton"] = f"none: {error}"
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["capability"] = list(torch.cuda.get_device_capability())
        found["gpus"] = torch.cuda.device_count()
    return found


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds_of(work) -> float:
    """Median wall-clock seconds of ``work()`` with everything it launched; the first is warm-up."""
    times = []
    for _ in range(ROUNDS + 1):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def problem(size: str, batch: int, dropout: float = 0.0):
    """Model, criterion, inputs and targets on the device."""
    torch.manual_seed(0)
    sizes = TINY if size == "tiny" else SIZES[size]
    model = psfast.DecoderOnlyTransformer(**sizes, dropout=dropout).to(DEVICE)
    data = psfast.StateTrackingDataset(n_samples=batch, seq_len=LENGTHS[size], seed=0)
    items = [data[i] for i in range(batch)]
    inputs, targets = (torch.stack([item[k] for item in items]).to(DEVICE) for k in "xy")
    return model, psfast.MaskedCrossEntropy(), inputs, targets


# -- the clean eager loop, and the reference ----------------------------------------------


def eager_losses(closure, flat, index, delta) -> list[float]:
    """no_grad, change in place, evaluate, restore the saved value; one host sync a trial point."""
    buffer, losses = flat.buffer, []
    with torch.no_grad():
        for i, d in zip(index.tolist(), delta.tolist(), strict=True):
            cell = buffer[i : i + 1]
            saved = cell.clone()
            cell.add_(d)
            losses.append(closure().item())
            cell.copy_(saved)
    return losses


def eager_loop(run: Run, size: str, batch: int) -> None:
    model, criterion, inputs, targets = problem(size, batch)
    flat = FlatParameters(list(model.parameters()))
    closure = lambda: criterion(model(inputs), targets)  # noqa: E731
    count = 5 if DRY else 500
    points = poll_block(flat, 0, count)
    seconds = seconds_of(lambda: eager_losses(closure, flat, *points)) / count
    run.row(size, batch, "any", "serial loop", seconds, accept_costs="nothing more")


class Enough(Exception):
    """Ends a poll of the reference that would take minutes."""


def reference_step(run: Run, size: str, batch: int) -> None:
    """The reference's failing poll up to some closure calls: forward, backward, restore.

    All from one step, whose shuffle alone takes seconds where the model is large.
    """
    model, criterion, inputs, targets = problem(size, batch)
    part = 2 if DRY else 60  # trial points; the first part is warm-up
    times = []

    def closure():
        times.append(time.perf_counter())
        if len(times) == 2 + (ROUNDS + 1) * part:
            raise Enough
        with torch.enable_grad():
            model.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
        synchronize()
        return loss.detach() * 0.0 + 1.0

    optimizer = psfast.ReferencePatternSearch(model.parameters(), radius=0.1)
    started = time.perf_counter()
    with contextlib.suppress(Enough):
        optimizer.step(closure)
    # The first call is the incumbent's; what comes before the second is a part of a whole poll.
    ends = times[1::part]
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ends[1:])) / part
    run.row(size, batch, "any", "reference", seconds, step_entry_ms=(times[1] - started) * 1e3)


# -- the backends ---------------------------------------------------------------------------


def build(backend: str, parts):
    """The objective of a backend: "fused fp16x3", "graph", "batched"."""
    name, _, mode = backend.partition(" ")
    if name == "fused":
        from psfast.objectives.fused_cuda import FusedCudaObjective

        return FusedCudaObjective(*parts, precision=mode)
    if name == "graph":
        from psfast.objectives.graph import GraphModelObjective

        return GraphModelObjective(*parts, capture=not DRY)
    return psfast.objective(*parts, backend=name)


class Synchronized(ForcedOutcomes):
    """Forced outcomes that still wait for the losses, as a search has to."""

    def losses(self, index, delta, *, stop_below=None):
        outcomes = super().losses(index, delta, stop_below=stop_below)
        synchronize()
        return outcomes


def complete_poll(run: Run, objective, size: str, batch: int, backend: str) -> None:
    """Nothing improves; all 2N trial points, or as many as the budget allows."""
    total = 2 * objective.flat.size
    forced = Synchronized(objective, 0.0)
    optimizer = psfast.PatternSearch(objective.params, radius=0.1)  # goes on where it was

    def piece(count: int) -> float:
        return seconds_of(lambda: run_points(optimizer, forced, count))

    count = affordable(piece, total)
    seconds = piece(count) / count
    run.row(
        size,
        batch,
        "complete poll",
        backend,
        seconds,
        points=count,
        whole_poll_ms=seconds * total * 1e3,
    )


def affordable(piece, most: int) -> int:
    """How many trial points ``piece`` evaluates in the budget, at most ``most``; in two steps."""
    count = min(most, 8 if DRY else 64)
    for _ in range(0 if DRY else 2):
        seconds = BUDGET / (ROUNDS + 1)
        count = max(count, min(most, 64 * count, int(count * seconds / piece(count))))
    return count


def device_time(run: Run, objective, size: str, batch: int, backend: str) -> None:
    """The losses of large blocks alone, without search, order or host syncs."""

    def piece(count: int) -> float:
        points = poll_block(objective.flat, 0, count)
        return seconds_of(lambda: objective.losses(*points))

    count = affordable(piece, min(2 * objective.flat.size, 16_384))
    seconds = piece(count) / count
    run.row(size, batch, "losses alone", backend, seconds, block=count)


def with_accepts(run: Run, objective, size, batch, backend, probability: float) -> None:
    """Forced accepts at a tiny radius, as many steps as the budget allows."""
    optimizer = psfast.PatternSearch(objective.params, radius=1e-5)
    forced = Synchronized(objective, probability)
    least = 1 if DRY else 10
    for _ in range(least):
        optimizer.step(forced)
    first, accepts = optimizer.evaluations, 0
    synchronize()
    started = time.perf_counter()
    while accepts < least or time.perf_counter() - started < BUDGET:
        optimizer.step(forced)
        accepts += 1
        if DRY and accepts > 1:
            break
    synchronize()
    seconds = time.perf_counter() - started
    points = optimizer.evaluations - first
    run.row(
        size,
        batch,
        f"p = {probability:g}",
        backend,
        seconds / points,
        us_per_accept=seconds / accepts * 1e6,
        accepts=accepts,
    )


def start_of_training(run: Run, objective, size: str, batch: int, backend: str) -> None:
    """Real decisions from a fresh model on, 100 changes a step; about 0.4 are lower."""
    values = values_of(objective.params)
    optimizer = psfast.PatternSearch(objective.params, radius=0.1, max_accepts=4 if DRY else 100)
    optimizer.step(objective)  # compiles and captures what only this needs
    first, accepts = optimizer.evaluations, 0
    synchronize()
    started = time.perf_counter()
    while not accepts or time.perf_counter() - started < BUDGET:
        optimizer.step(objective)
        accepts += len(optimizer.last_poll.accepted)
        if accepts > 2000:
            break
    synchronize()
    seconds = time.perf_counter() - started
    points = optimizer.evaluations - first
    set_values(objective.params, values)  # as the other measurements expect them
    run.row(
        size,
        batch,
        "start",
        backend,
        seconds / points,
        us_per_accept=seconds / accepts * 1e6,
        accepts=accepts,
    )


class Case(NamedTuple):
    """An objective to build: of a backend, on a problem.

    tile: the place in ``tile_cases`` of the configuration to take; None: the usual one
    """

    backend: str
    size: str
    batch: int
    dropout: float = 0.0
    tile: int | None = None

    @property
    def label(self) -> str:
        name = f"{self.backend} {self.size} B={self.batch}"
        name += " dropout" if self.dropout else ""
        return name if self.tile is None else f"{name} tile {self.tile}"


def measure(run: Run, case: Case, regimes: tuple[float, ...] = ()) -> None:
    """One backend, one size: construction, all regimes, peak memory."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    backend, size, batch = case[:3]
    started = time.perf_counter()
    objective = run.stage(f"{case.label}: build", run.build, case)
    if objective is None:
        return
    built = time.perf_counter() - started
    about = run, objective, size, batch
    if case.dropout:
        run.stage(f"{case.label}: losses", device_time, *about, "fused, dropout")
        return
    run.stage(f"{case.label}: losses", device_time, *about, backend)
    run.stage(f"{case.label}: complete poll", complete_poll, *about, backend)
    for p in regimes:
        run.stage(f"{case.label}: p = {p:g}", with_accepts, *about, backend, p)
    if backend in run.data["descends"] or not objective.descends:
        run.stage(f"{case.label}: start", start_of_training, *about, backend)
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        for row in run.data["rows"]:
            if (row["size"], row["batch"], row["backend"]) == (size, batch, backend):
                row.update(peak_MiB=round(peak, 1), build_s=round(built, 2))


def compile_all(run: Run, cases: list[Case]) -> None:
    """Fill Triton's cache, all cases in processes of their own: they compile at the same time.

    The kernel of the supervised rows depends on how many there are, hence all batches.
    """
    flags = ["--dry-run"] if DRY else []
    running = [
        subprocess.Popen([sys.executable, __file__, "--only-build", json.dumps(case), *flags])
        for case in cases
    ]
    until = time.monotonic() + COMPILE_SECONDS
    for case, process in zip(cases, running, strict=True):
        try:
            code = process.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code:
            run.data["broken"].append(case.label)
    if run.data["broken"]:
        raise RuntimeError(f"could not be built: {run.data['broken']}")


# -- the gate -------------------------------------------------------------------------------


def trained(size: str, batch: int):
    """The problem after some steps of Adam: its weights are not those of a fresh model."""
    model, criterion, inputs, targets = problem(size, batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(2 if DRY else 150):
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
    return model, criterion, inputs, targets


def exact_changes(parts, index, delta) -> torch.Tensor:
    """Loss changes in float64: the trial value is rounded as the float32 parameters round it."""
    model, criterion, inputs, targets = parts
    single = FlatParameters(list(model.parameters())).buffer
    twin = copy.deepcopy(model).double()
    flat = FlatParameters(list(twin.parameters()))
    exact = (single[index] + delta).double() - single[index].double()
    closure = lambda: criterion(twin(inputs), targets)  # noqa: E731
    with torch.no_grad():
        base = closure().item()
    return torch.tensor(eager_losses(closure, flat, index, exact), dtype=torch.float64) - base


def gate(
    run: Run, size: str, batch: int, weights: str, radius: float, count: int, chosen: list[str]
) -> None:
    """Errors and accept/reject flips of every mode against float64, beside eager fp32's."""
    parts = (trained if weights == "trained" else problem)(size, batch)
    model, criterion, inputs, targets = parts
    flat = FlatParameters(list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    index, delta = poll_block(flat, 0, count, radius)
    exact = exact_changes(parts, index, delta)

    def compare(backend: str, losses: torch.Tensor, base: float) -> None:
        changes = losses.double().cpu() - base
        matters = exact.abs() > 1e-13  # float64 has rounding errors too
        flips = ((changes < 0) != (exact < 0))[matters].sum().item()
        errors = (changes - exact).abs()
        error, worst = errors.max().item(), int(errors.argmax())  # NaN, where there is one
        bound = 1e-5 * max(1.0, abs(base))
        record = {
            "size": size,
            "batch": batch,
            "weights": weights,
            "radius": radius,
            "backend": backend,
            "points": count,
            "largest_error": error,
            "at": names[flat.locate(int(index[worst]))[0]],
            "flips": flips,
            "loss": base,
            "ok": error < bound,  # False for NaN
        }
        run.data["gate"].append(record)
        print(f"    {size} {weights} radius {radius:g} {backend}: error {error:.2e}, flips {flips}")

    closure = lambda: criterion(model(inputs), targets)  # noqa: E731
    with torch.no_grad():
        base = closure().item()
    compare("serial loop", torch.tensor(eager_losses(closure, flat, index, delta)), base)
    for backend in chosen:

        def one(backend=backend):
            twin = run.build(Case(backend, size, batch), parts)
            compare(backend, twin.losses(index, delta), twin().item())

        run.stage(f"gate {size} {weights} {radius:g} {backend}", one)


def gate_descent(run: Run, case: Case, count: int) -> None:
    """Whether a descent has the serial loop's losses and decisions, bit for bit.

    In the interpreter nearly so: it computes by NumPy, where a row's bits depend on its place.
    """
    loop, serial = (run.build(case) for _ in range(2))
    index, delta = poll_block(loop.flat, 0, count)
    bar, losses, places = serial().item(), [], []
    for k in range(count):
        point = index[k : k + 1], delta[k : k + 1]
        losses.append(serial.losses(*point).item())
        if losses[-1] < bar:
            serial.accept(*point)
            bar = serial().item()
            places.append(k)
    incumbent = loop().item()
    found = loop.descend(index, delta, incumbent=incumbent, margin=0.0, most=count, gap=2.5)
    exact = torch.tensor(losses, dtype=torch.float64)
    same = torch.allclose if DRY else torch.equal
    if found.places != places or not same(found.losses.double(), exact):
        raise ValueError(f"accepted {found.places}, not {places}; losses {found.losses.tolist()}")
    if not torch.equal(loop.flat.buffer, serial.flat.buffer):
        raise ValueError("the same decisions, but other parameters")
    run.data["descends"].append(case.backend)
    print(f"    {case.backend}: {len(places)} of {count} accepted, as the serial loop does")


def passed(run: Run, backend: str) -> bool:
    """Whether every gate that ran for it passed, and at least one did."""
    found = [record["ok"] for record in run.data["gate"] if record["backend"] == backend]
    return bool(found) and all(found)


def tile_cases() -> list[tuple[str, str, tuple, dict]]:
    """Other configurations: size, kernel, key, and what they have instead of the usual ones.

    kernel: "blocks" or "tail"; key: in ``plan.BLOCKS`` or ``plan.TAILS``. Some of them spill
    registers: here is where it shows whether that matters.
    """
    chip = 9 if DRY or torch.cuda.get_device_capability()[0] == 9 else 8
    small, wide = "tiny" if DRY else "small", {"rows": 128, "warps": 8}
    found = [(small, "blocks", (chip, 64, 16), c) for c in (wide, {"hidden": 64}, {"stages": 3})]
    found.append((small, "tail", (chip, 64), wide))
    if not DRY:
        twice = {"warps": 8, "hidden": 64, "queries": 32, "staged": 64}  # some products twice
        low = {"rows": 32, "hidden": 64, "queries": 64, "staged": 64}
        found += [("medium", "blocks", (chip, 128, 32), c) for c in (wide, twice, low)]
    return found


@contextlib.contextmanager
def other_tiles(place: int):
    """Inside, plans are made with this one of ``tile_cases``."""
    from psfast.kernels import plan

    _, kernel, key, change = tile_cases()[place]
    configs = {"blocks": plan.BLOCKS, "tail": plan.TAILS}[kernel]
    usual = configs[key]
    configs[key] = usual._replace(**change)
    try:
        yield configs[key]
    finally:
        configs[key] = usual


def tiles(run: Run, case: Case) -> None:
    """Another configuration of a kernel, compared with the usual one before it is timed."""
    usual = run.build(case._replace(tile=None))
    points = poll_block(usual.flat, 0, 4 if DRY else 256)
    expected = usual.losses(*points)
    with other_tiles(case.tile) as config:
        objective = run.build(case)
    error = (objective.losses(*points) - expected).abs().max().item()
    if not error < 1e-5:
        raise ValueError(f"{config} is off by {error}")
    kernel = tile_cases()[case.tile][1]
    device_time(run, objective, case.size, case.batch, f"{kernel} {tuple(config)}")


def table(data: dict) -> str:
    """Rows with ratios to the baselines of this run, then the gate, then the failures."""
    base = {(r["size"], r["batch"], r["backend"]): r for r in data["rows"] if r["regime"] == "any"}
    batched = {
        (r["size"], r["batch"], r["regime"]): r for r in data["rows"] if r["backend"] == "batched"
    }
    lines = ["; ".join(f"{key} {value}" for key, value in data["machine"].items()), ""]
    if data["dry_run"]:
        lines.insert(0, "DRY RUN on the CPU, a tiny model, interpreted: these numbers mean nothing")
    lines.append(
        f"{'size':7} {'B':>3} {'regime':14} {'backend':14} {'us/point':>10} {'points/s':>12} "
        f"{'poll ms':>9} {'us/accept':>10} {'/ref':>8} {'/serial':>8} {'/batched':>8} {'MiB':>8}"
    )
    for row in data["rows"]:
        key = (row["size"], row["batch"])
        ratios = []
        for other in (
            base.get((*key, "reference")),
            base.get((*key, "serial loop")),
            batched.get((*key, row["regime"])),
        ):
            ratio = other["us_per_point"] / row["us_per_point"] if other else None
            ratios.append(f"{ratio:.1f}" if ratio else "-")
        lines.append(
            f"{row['size']:7} {row['batch']:3} {row['regime']:14} {row['backend']:14} "
            f"{row['us_per_point']:10.3f} {row['points_per_second']:12.0f} "
            f"{_cell(row, 'whole_poll_ms', 9)} {_cell(row, 'us_per_accept', 10)} "
            + " ".join(f"{ratio:>8}" for ratio in ratios)
            + f" {_cell(row, 'peak_MiB', 8)}"
        )
    lines += ["", "against float64 (largest error of a loss change; accept/reject flips)"]
    for g in data["gate"]:
        lines.append(
            f"{g['size']:7} {g['batch']:3} {g['weights']:8} radius {g['radius']:<6g} "
            f"{g['backend']:14} {g['largest_error']:.2e}  {g['flips']:4} of {g['points']} flips"
            + ("" if g["ok"] else f"  FAILED at {g['at']}")
        )
    failed = [s for s in data["stages"] if not s["ok"]]
    lines += ["", f"{len(failed)} of {len(data['stages'])} stages failed or were skipped"]
    lines += [f"  {s['stage']}: {s['error']}" for s in failed]
    return "\n".join(lines) + "\n"


def _cell(row: dict, key: str, width: int) -> str:
    return f"{row[key]:{width}.1f}" if key in row else " " * (width - 1) + "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=420.0, help="start no stage after these")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of those it starts itself
    parser.add_argument("--goes-on", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only-build", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        print("no CUDA device; --dry-run checks this program on the CPU", file=sys.stderr)
        return 2
    if args.only_build:
        only_build(Case(*args.only_build))
    elif args.until:
        run_jobs(Run(args.out, args.until, args.goes_on))
    else:
        return supervise(args.out, time.time() + args.seconds)
    return 0


def supervise(out: Path, until: float) -> int:
    """All jobs in one process; the rest of them in another, where one has ended it."""
    command = [sys.executable, __file__, "--out", str(out), "--until", str(until)]
    command += ["--dry-run"] if DRY else []
    status, started = subprocess.run(command).returncode, 1
    while status and started < 10 and (out / "gpu.json").exists():
        print(f"exit status {status}: going on in a new process", flush=True)
        status, started = subprocess.run([*command, "--goes-on"]).returncode, started + 1
    return status


def only_build(case: Case) -> None:
    with contextlib.nullcontext() if case.tile is None else other_tiles(case.tile):
        build(case.backend, problem(case.size, case.batch, case.dropout))


def run_jobs(run: Run) -> None:
    """What matters most first: the time may not be enough for all."""
    small, sizes = ("tiny", ["tiny"]) if DRY else ("small", ["small", "medium", "large"])
    few, many = batches = (2, 3) if DRY else (4, 64)
    job, fused = run.job, DEFAULTS[0]
    variants = [Case(fused, size, many, tile=k) for k, (size, *_) in enumerate(tile_cases())]
    dropped = [Case(fused, size, few, 0.1) for size in sizes[:2]]
    other_modes = [Case(f"fused {mode}", small, few) for mode in MODES[1:]]
    usual = [Case(fused, size, batch) for size in sizes for batch in batches]
    cases = [*usual, *variants, *dropped, *other_modes]
    if DRY:  # nothing to compile: one of each kind shows that they start
        cases = [usual[0], variants[0], dropped[0]]

    name = "the first number: clean eager loop"
    job(name, run.stage, name, eager_loop, run, small, few)
    compiles = functools.partial(run.stage, seconds=COMPILE_SECONDS + 20)
    job("compile", compiles, "compile", compile_all, run, cases)
    count = 6 if DRY else 400
    for weights in ("fresh", "trained"):
        for radius in (0.1,) if DRY else (0.1, 0.01, 0.001):
            name = f"gate {small} {weights} {radius:g}"
            job(name, run.stage, name, gate, run, small, few, weights, radius, count, BACKENDS)
    for size in sizes[1:]:
        name = f"gate {size}"
        job(name, run.stage, name, gate, run, size, few, "fresh", 0.1, 100, DEFAULTS)
    usable = [backend for backend in BACKENDS if passed(run, backend)]
    for backend in usable:
        if backend != "batched":
            name, case = f"gate descent {small} {backend}", Case(backend, small, few)
            job(name, run.stage, name, gate_descent, run, case, 6 if DRY else 200)
    print(f"passed the gate: {usable}")

    def measured(case: Case) -> None:
        regimes = (
            () if case.size != small or case in other_modes else (0.4,) if DRY else (1e-3, 0.4)
        )
        if case.backend in usable:
            job(f"measure {case.label}", measure, run, case, regimes)

    for size in sizes:
        for batch in batches:
            for work in (eager_loop, reference_step):
                name = f"{work.__name__} {size} B={batch}"
                if (work, size, batch) != (eager_loop, small, few):  # the first number
                    job(name, run.stage, name, work, run, size, batch)
            measured(Case(fused, size, batch))
    for size in sizes:
        for backend in DEFAULTS[1:]:
            for batch in batches:
                measured(Case(backend, size, batch))
        if size == small and fused in usable:
            for case in variants:
                name = f"{case.label}: {tile_cases()[case.tile]}"
                job(name, run.stage, name, tiles, run, case)
            for case in (*dropped, *other_modes):
                measured(case)
    run.save()
    print((run.out / "gpu.txt").read_text())


if __name__ == "__main__":
    sys.exit(main())
