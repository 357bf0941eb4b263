"""The memory that a block of ``batched`` takes beside the model, against its workspace.

Counted are torch's own allocations, all of them and to the byte.
"""

import pytest
import torch
from harness import append_rows, poll_block, state_tracking

import psfast

WORKSPACES = [16, 64, 256]  # MiB
CASES = [("small", 64), ("medium", 4)]


def allocated(run) -> tuple[float, float]:
    """MiB that ``run()`` holds beyond what it found: at most, and at its end."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20, now / 2**20


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("size, batch", CASES)
def test_peak(benchmark, quick, size, batch, workspace):
    if quick and (size, batch, workspace) != ("medium", 4, 64):
        pytest.skip("one case is enough without timing")
    objective = psfast.objective(
        *state_tracking(size, batch), backend="batched", workspace=workspace << 20
    )
    block = poll_block(objective.flat, 0, 2048, 1e-3)
    first, kept = allocated(lambda: objective.losses(*block))
    found = []
    benchmark.pedantic(
        lambda: found.append(allocated(lambda: objective.losses(*block))), rounds=1, iterations=1
    )
    peak = found[0][0]
    assert 0 < peak <= workspace
    assert first <= workspace + kept
    if not quick:
        row = {"case": f"{size}, B = {batch}, T = 16, a block of 2048"}
        row |= {"workspace_mib": workspace, "peak_mib": f"{peak:.1f}"}
        append_rows("memory", [row | {"kept_mib": f"{max(kept, 0.0):.1f}"}])
