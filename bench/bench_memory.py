"""The memory that a poll of ``batched`` takes beside the model, against its workspace."""

import subprocess
import sys
from pathlib import Path

import pytest
from harness import append_rows

WORKSPACES = [16, 64, 256]  # MiB
CASES = [("small", 64), ("medium", 4)]

PROGRAMS = 4  # MiB that the programs recorded for the chunks' sizes take

# In a process of its own, for the peak never falls. The same block comes first in a workspace
# of 1 MiB: whatever code is used at all takes memory, too.
_RUN = """
import resource, sys
import psfast
from harness import poll_block, state_tracking
size, batch, workspace = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) << 20
def build(workspace):
    return psfast.objective(*state_tracking(size, batch), backend="batched", workspace=workspace)

first, f = build(1 << 20), build(workspace)
index, delta = poll_block(f.flat, 0, 2048, 1e-3)
first.losses(index, delta)
f.losses(index[:64], delta[:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
f.losses(index, delta)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("size, batch", CASES)
def test_peak(benchmark, request, size, batch, workspace):
    quick = request.config.getoption("benchmark_disable")
    if quick and (size, batch, workspace) != ("medium", 4, 64):
        pytest.skip("one case is enough without timing")
    peaks = []

    def run():
        done = subprocess.run(
            [sys.executable, "-c", _RUN, size, str(batch), str(workspace)],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout) / 1024)

    benchmark.pedantic(run, rounds=1, iterations=1)
    assert peaks[0] <= workspace + PROGRAMS
    if not quick:
        case = f"{size}, B = {batch}, T = 16, a block of 2048"
        row = {"case": case, "workspace_mib": workspace, "peak_mib": f"{peaks[0]:.1f}"}
        append_rows("memory", [row])
