"""A measuring run on a GPU: its problems, and its record, which outlives a lost process."""

import faulthandler
import json
import os
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
from harness import SIZES, machine  # noqa: E402

import psfast  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
LENGTHS = {"small": 8, "medium": 12, "large": 16, "tiny": 4}
TINY = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16}
STAGE_SECONDS = 90  # what takes longer is ended
UNUSABLE = 75  # exit status of a process whose device is lost


class Case(NamedTuple):
    """An objective to build: of a backend, on a problem."""

    backend: str
    size: str
    batch: int
    dropout: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.backend} {self.size} B={self.batch}" + (" dropout" if self.dropout else "")


def problem(size: str, batch: int, dropout: float = 0.0):
    """Model, criterion, inputs and targets on the device."""
    torch.manual_seed(0)
    sizes = TINY if size == "tiny" else SIZES[size]
    model = psfast.DecoderOnlyTransformer(**sizes, dropout=dropout).to(DEVICE)
    data = psfast.StateTrackingDataset(n_samples=batch, seq_len=LENGTHS[size], seed=0)
    items = [data[i] for i in range(batch)]
    inputs, targets = (torch.stack([item[k] for item in items]).to(DEVICE) for k in "xy")
    return model, psfast.MaskedCrossEntropy(), inputs, targets


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


class Run:
    """What has been measured, written to disk before and after every stage.

    until: of ``time.time()``: no stage begins after that
    goes_on: behind what the process before this one has done
    """

    def __init__(self, out: Path, until: float, goes_on: bool):
        self.out, self.until = out, until
        names = ("jobs", "stages", "broken", "descends", "gate", "rows", "profiles")
        empty = {name: [] for name in names}
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


def build_all(program: str, cases: list, seconds: float) -> list[int]:
    """Run ``program --only-build CASE`` for all cases at once, which fills Triton's cache by as
    many processes; returns their exit statuses."""
    command = [sys.executable, program, *(["--dry-run"] if DRY else []), "--only-build"]
    running = [subprocess.Popen([*command, json.dumps(case)]) for case in cases]
    until, codes = time.monotonic() + seconds, []
    for process in running:
        try:
            process.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
        codes.append(process.wait())
    return codes


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


def table(data: dict) -> str:
    """Rows with ratios to this run's baselines, then the gate, the profiles and the failures."""
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
    lines += _profile_lines(data["profiles"])
    failed = [s for s in data["stages"] if not s["ok"]]
    lines += ["", f"{len(failed)} of {len(data['stages'])} stages failed or were skipped"]
    lines += [f"  {s['stage']}: {s['error']}" for s in failed]
    return "\n".join(lines) + "\n"


def _cell(row: dict, key: str, width: int) -> str:
    return f"{row[key]:{width}.1f}" if key in row else " " * (width - 1) + "-"


def _profile_lines(profiles: list[dict]) -> list[str]:
    """The profiles as text: each kernel's share of the wall-clock time."""
    found = []
    for p in profiles:
        wall = p["wall_us"]
        busy = p["busy_us"] / wall
        head = f"{p['size']} B={p['batch']} {p['what']}: {wall / 1e3:.1f} ms, busy {busy:.0%}"
        found += ["", f"where the time goes, {head} (profiled, so slower)"]
        for kernel in p["kernels"]:
            share, us = kernel["us"] / wall, kernel["us"] / kernel["count"]
            times = f"{share:6.1%} {kernel['count']:6} x {us:9.1f} us"
            found.append(f"  {times}  {kernel['name'][:70]}")
    return found
