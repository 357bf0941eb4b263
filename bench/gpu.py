"""Measures psfast on a GPU: the correctness gate, then every backend in one run.

``python bench/gpu.py [--out DIR] [--seconds S] [--sizes small ...] [--dry-run]`` writes
``gpu.json`` and ``gpu.txt``. Every stage that fails is recorded with its error and the rest
goes on: in a new process, where it left the device unusable or did not end. A mode that fails
the gate is not timed. ``--dry-run`` runs every stage on the CPU, on a tiny model, in Triton's
interpreter: it checks this program, and its numbers mean nothing.
"""

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_gate import eager_losses, gate, gate_descent, passed
from gpu_profile import profile
from gpu_run import (  # first: it sets Triton
    DEVICE,
    DRY,
    Case,
    Run,
    build,
    build_all,
    problem,
    synchronize,
)
from harness import (
    RESULTS,
    ForcedOutcomes,
    Interrupted,
    poll_block,
    set_values,
    values_of,
    with_backward,
)

import psfast
from psfast.flat import FlatParameters

BUDGET = 0.2 if DRY else 0.8  # seconds that one measurement aims at, with all its rounds
ROUNDS = 1 if DRY else 3
COMPILE_SECONDS = 180
MODES = ("fp16x3", "tf32x3", "fp32")
DEFAULTS = ("fused fp16x3", "batched", "graph")  # measured at every size
BACKENDS = (*DEFAULTS, *(f"fused {mode}" for mode in MODES[1:]))


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


# -- the clean eager loop, and the reference ----------------------------------------------


def eager_loop(run: Run, size: str, batch: int) -> None:
    model, criterion, inputs, targets = problem(size, batch)
    flat = FlatParameters(list(model.parameters()))
    closure = lambda: criterion(model(inputs), targets)  # noqa: E731
    count = 5 if DRY else 500
    points = poll_block(flat, 0, count)
    seconds = seconds_of(lambda: eager_losses(closure, flat, *points)) / count
    run.row(size, batch, "any", "serial loop", seconds, accept_costs="nothing more")


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
            raise Interrupted
        loss = with_backward(model, lambda: criterion(model(inputs), targets))
        synchronize()
        return loss * 0.0 + 1.0

    optimizer = psfast.ReferencePatternSearch(model.parameters(), radius=0.1)
    started = time.perf_counter()
    with contextlib.suppress(Interrupted):
        optimizer.step(closure)
    # The first call is the incumbent's; what comes before the second is a part of a whole poll.
    ends = times[1::part]
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ends[1:])) / part
    run.row(size, batch, "any", "reference", seconds, step_entry_ms=(times[1] - started) * 1e3)


# -- the backends ---------------------------------------------------------------------------


class Synchronized(ForcedOutcomes):
    """Forced outcomes that still wait for the losses, as a search has to."""

    def losses(self, index, delta, *, stop_below=None):
        outcomes = super().losses(index, delta, stop_below=stop_below)
        synchronize()
        return outcomes


def complete_poll(
    run: Run, objective, size: str, batch: int, backend: str, regime: str = "complete poll"
) -> None:
    """Nothing improves; all 2N trial points, or as many as the budget allows."""
    total = 2 * objective.flat.size
    optimizer = where_polls_fail(objective.params)  # goes on where it was
    count = affordable(lambda count: seconds_of(lambda: decide(optimizer, objective, count)), total)
    if count == total:
        optimizer.max_evaluations = None
        optimizer.step(objective)  # to the end of the poll that has begun: then a step is one
        seconds = seconds_of(lambda: optimizer.step(objective)) / count
    else:
        seconds = seconds_of(lambda: decide(optimizer, objective, count)) / count
    run.row(
        size,
        batch,
        regime,
        backend,
        seconds,
        points=count,
        whole_poll_ms=seconds * total * 1e3,
    )


def one_block_at_a_time(run: Run, objective, *about) -> None:
    """The complete poll without the next block under way while one is decided."""
    objective.is_asynchronous = False
    try:
        complete_poll(run, objective, *about, regime="block by block")
    finally:
        objective.is_asynchronous = True


def where_polls_fail(params) -> psfast.PatternSearch:
    """An optimizer for which no loss is low enough, and which has seen that: its blocks are as
    large as they are going to be. The radius hardly shrinks: changes that are rounded away would
    cost nothing."""
    optimizer = psfast.PatternSearch(params, radius=0.1, decrease=1e12, shrink=0.999)
    state = optimizer.state_dict()
    state["search"]["mean_gap"] = 2.0 * state["search"]["size"]
    optimizer.load_state_dict(state)
    return optimizer


def decide(optimizer, objective, count: int) -> None:
    """So many trial points more, over the ends of polls."""
    stop = optimizer.evaluations + count
    while optimizer.evaluations < stop:
        optimizer.max_evaluations = stop - optimizer.evaluations
        optimizer.step(objective)


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


def descents(
    run: Run, objective, size: str, batch: int, backend: str, regime: str, share: float | None
) -> None:
    """Real decisions from a fresh model on, 100 changes a step; about 0.4 are lower.

    share: of the trial points, about, are low enough: a margin sees to that; None: all that are
    lower
    """
    values, radius, margin = values_of(objective.params), 0.1, 0.0
    if share is not None:
        changes = objective.losses(*poll_block(objective.flat, 0, 64 if DRY else 8192, radius))
        margin = max(0.0, -changes.sub(objective()).double().quantile(share).item())
    accepts_a_step = 4 if DRY else 100
    optimizer = psfast.PatternSearch(
        objective.params, radius, max_accepts=accepts_a_step, decrease=margin / radius**2
    )
    optimizer.max_evaluations = 16 if DRY else 20_000
    for _ in range(3):  # compiles and captures what only this needs
        optimizer.step(objective)
    first, accepts = optimizer.evaluations, 0
    synchronize()
    started = time.perf_counter()
    while not accepts or time.perf_counter() - started < BUDGET:
        optimizer.step(objective)
        accepts += len(optimizer.last_poll.accepted)
        if accepts > 2000 or DRY:
            break
    synchronize()
    seconds = time.perf_counter() - started
    points = optimizer.evaluations - first
    set_values(objective.params, values)  # as the other measurements expect them
    run.row(
        size,
        batch,
        regime,
        backend,
        seconds / points,
        us_per_accept=seconds / max(1, accepts) * 1e6,
        accepts=accepts,
    )


def where_the_time_goes(run: Run, objective, size: str, batch: int, backend: str) -> None:
    """Profiles of what was measured: the complete poll and, where it descends, three steps."""
    key = (size, batch, backend, "complete poll")
    names = ("size", "batch", "backend", "regime")
    count = next(r["points"] for r in run.data["rows"] if tuple(map(r.get, names)) == key)
    work = functools.partial(decide, where_polls_fail(objective.params), objective, count)
    work()
    profile(run, size, batch, "complete poll", work)
    if backend in run.data["descends"]:
        values = values_of(objective.params)
        optimizer = psfast.PatternSearch(objective.params, max_accepts=4 if DRY else 100)
        optimizer.step(objective)
        profile(run, size, batch, "start", lambda: [optimizer.step(objective) for _ in range(3)])
        set_values(objective.params, values)


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
    if objective.is_asynchronous:
        run.stage(f"{case.label}: block by block", one_block_at_a_time, *about, backend)
    for p in regimes:
        run.stage(f"{case.label}: p = {p:g}", with_accepts, *about, backend, p)
    if backend in run.data["descends"] or not objective.descends:
        run.stage(f"{case.label}: start", descents, *about, backend, "start", None)
    if backend in run.data["descends"] and objective.largest_gap > 1000:
        run.stage(f"{case.label}: rare", descents, *about, backend, "rare", 1e-3)
    if backend == DEFAULTS[0]:
        run.stage(f"{case.label}: profile", where_the_time_goes, *about, backend)
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        for row in run.data["rows"]:
            if (row["size"], row["batch"], row["backend"]) == (size, batch, backend):
                row.update(peak_MiB=round(peak, 1), build_s=round(built, 2))


def compile_all(run: Run, cases: list[Case]) -> None:
    """Note which cases cannot be built, and have the kernels of the others compiled.

    The kernel of the supervised rows depends on how many there are, hence all batches.
    """
    codes = build_all(__file__, cases, COMPILE_SECONDS)
    run.data["broken"] += [case.label for case, code in zip(cases, codes, strict=True) if code]
    if run.data["broken"]:
        raise RuntimeError(f"could not be built: {run.data['broken']}")


# -- all of it -------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=420.0, help="start no stage after these")
    sizes = ["tiny"] if DRY else ["small", "medium", "large"]
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of those it starts itself
    parser.add_argument("--goes-on", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only-build", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        print("no CUDA device; --dry-run checks this program on the CPU", file=sys.stderr)
        return 2
    if args.only_build:
        case = Case(*args.only_build)
        build(case.backend, problem(case.size, case.batch, case.dropout))
    elif args.until:
        run_jobs(Run(args.out, args.until, args.goes_on), args.sizes)
    else:
        return supervise(args.out, time.time() + args.seconds, args.sizes)
    return 0


def supervise(out: Path, until: float, sizes: list[str]) -> int:
    """All jobs in one process; the rest of them in another, where one has ended it."""
    command = [sys.executable, __file__, "--out", str(out), "--until", str(until)]
    command += ["--sizes", *sizes]
    command += ["--dry-run"] if DRY else []
    status, started = subprocess.run(command).returncode, 1
    while status and started < 10 and (out / "gpu.json").exists():
        print(f"exit status {status}: going on in a new process", flush=True)
        status, started = subprocess.run([*command, "--goes-on"]).returncode, started + 1
    return status


def run_jobs(run: Run, sizes: list[str]) -> None:
    """What matters most first: the time may not be enough for all."""
    small = sizes[0]
    batches = (2, 3) if DRY else (4, 64)
    few = batches[0]
    job, fused = run.job, DEFAULTS[0]
    dropped = [Case(fused, size, few, 0.1) for size in sizes[:2]]
    other_modes = [Case(f"fused {mode}", small, few) for mode in MODES[1:]]
    usual = [Case(fused, size, batch) for size in sizes for batch in batches]
    cases = [*usual, *dropped, *other_modes]
    if DRY:  # nothing to compile: one of each kind shows that they start
        cases = [usual[0], dropped[0]]

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
    if fused in usable:
        for case in (*dropped, *other_modes):
            measured(case)
    for size in sizes:
        for backend in DEFAULTS[1:]:
            for batch in batches:
                measured(Case(backend, size, batch))
    run.save()
    print((run.out / "gpu.txt").read_text())


if __name__ == "__main__":
    sys.exit(main())
