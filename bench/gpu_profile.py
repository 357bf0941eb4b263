"""Where the time goes on a GPU: the device's time by kernel, and how long it waits."""

import time

import torch
from gpu_run import DRY, Run, synchronize
from torch.profiler import ProfilerActivity

MOST = 12  # kernels of a profile that are listed


def profile(run: Run, size: str, batch: int, what: str, work) -> None:
    """Note what ``work()`` spends the device's time on; it has run before.

    In a dry run the CPU's, by operation.
    """
    activity = ProfilerActivity.CPU if DRY else ProfilerActivity.CUDA
    synchronize()
    with torch.profiler.profile(activities=[activity]) as found:
        started = time.perf_counter()
        work()
        synchronize()
        seconds = time.perf_counter() - started
    field = "self_cpu_time_total" if DRY else "self_device_time_total"
    spent = [(getattr(event, field), event.count, event.key) for event in found.key_averages()]
    # "Optimizer.step#..." is a range around others, not work.
    spent = sorted((s for s in spent if s[0] > 0 and "step#" not in s[2]), reverse=True)
    kernels = [{"us": us, "count": count, "name": name} for us, count, name in spent[:MOST]]
    record = {"size": size, "batch": batch, "what": what, "wall_us": seconds * 1e6}
    record |= {"busy_us": sum(row[0] for row in spent), "kernels": kernels}
    run.data["profiles"].append(record)
