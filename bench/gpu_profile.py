"""Where the time goes on a GPU: the device's time by kernel, and how long it waits."""

import time

import torch
from gpu_run import DRY, Run, synchronize
from torch.profiler import ProfilerActivity

MOST = 12  # kernels of a profile that are listed


def spent_by(work) -> list[tuple[float, int, str]]:
    """Microseconds, launches and name of each kernel that ``work()`` runs, the longest first; in
    a dry run of each operation."""
    activity = ProfilerActivity.CPU if DRY else ProfilerActivity.CUDA
    synchronize()
    with torch.profiler.profile(activities=[activity]) as found:
        work()
        synchronize()
    field = "self_cpu_time_total" if DRY else "self_device_time_total"
    spent = [(getattr(event, field), event.count, event.key) for event in found.key_averages()]
    # "Optimizer.step#..." is a range around others, not work.
    return sorted((s for s in spent if s[0] > 0 and "step#" not in s[2]), reverse=True)


def profile(run: Run, size: str, batch: int, what: str, work) -> None:
    """Note what ``work()`` spends the device's time on; it has run before."""
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        started = time.perf_counter()
        work()
        synchronize()
        seconds = time.perf_counter() - started

    spent = spent_by(timed)
    kernels = [{"us": us, "count": count, "name": name} for us, count, name in spent[:MOST]]
    record = {"size": size, "batch": batch, "what": what, "wall_us": seconds * 1e6}
    record |= {"busy_us": sum(row[0] for row in spent), "kernels": kernels}
    run.data["profiles"].append(record)
