"""Times other cuts of the kernels on a GPU, each compared with the usual one's losses first.

``python bench/gpu_tiles.py [--out DIR] [--sizes small ...] [--seconds S] [--dry-run]`` writes
``gpu_tiles.json`` and prints a line for each: nanoseconds a trial point that the kernel takes,
by the profiler. How a cut's tables are to be changed is for a reader to decide
(``kernels/configs.py``): some of these spill registers, and here is where it shows whether that
matters.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import torch
from gpu_profile import spent_by
from gpu_run import DRY, LENGTHS, build, build_all, describe, problem  # first: it sets Triton
from harness import RESULTS, SIZES, poll_block
from psfast.kernels.configs import BLOCKS, TAILS, Cut, padded_positions

BATCHES = (2,) if DRY else (64, 4)
POINTS = {"tiny": 4, "small": 16384, "medium": 4096, "large": 1024}  # at B = 4


def candidates() -> list[tuple[str, str, Cut]]:
    """size, kernel ("blocks" or "tail") and cut."""
    if DRY:
        return [("tiny", "blocks", Cut(32, 4, 16)), ("tiny", "tail", Cut(32, 4, 16))]
    blocks = {
        "small": [
            Cut(64, 4, 32, queries=32),
            Cut(64, 4, 32, queries=32, registers=168),
            Cut(64, 4, 16, queries=32, registers=168),
            Cut(64, 4, 32, queries=32, registers=168, stages=1),
        ],
        "medium": [
            Cut(64, 4, 32, queries=16, staged=32),
            Cut(64, 4, 32, queries=32, staged=64),
            Cut(64, 4, 64, queries=32, staged=64),
            Cut(64, 4, 32, queries=32),
            Cut(64, 4, 32, queries=64, staged=64),
            Cut(64, 4, 32, queries=32, staged=64, stages=3),
        ],
        "large": [
            Cut(32, 8, 64, queries=64, staged=64),
            Cut(32, 4, 64, queries=64, staged=64),
            Cut(32, 4, 32, queries=64, staged=64),
            Cut(32, 4, 64, queries=32, staged=64),
            Cut(32, 4, 64, queries=64, staged=128),
            Cut(32, 4, 64, queries=64, staged=64, stages=3),
        ],
    }
    tails = {
        "small": [
            Cut(64, 4, 64, vocabulary=128),
            Cut(64, 4, 32, vocabulary=64, registers=168),
            Cut(64, 4, 16, vocabulary=64, registers=168),
            Cut(64, 4, 32, vocabulary=64, registers=168, stages=3),
            Cut(64, 4, 16, vocabulary=32, registers=128),
        ],
        "medium": [
            Cut(32, 4, 64, vocabulary=64, staged=64),
            Cut(128, 8, 32, vocabulary=128),
            Cut(128, 8, 32, vocabulary=64),
            Cut(64, 4, 32, vocabulary=64),
            Cut(128, 8, 32, vocabulary=128, stages=1),
        ],
        "large": [
            Cut(32, 8, 64, vocabulary=128, staged=64),
            Cut(32, 4, 64, vocabulary=64, staged=64),
            Cut(32, 4, 32, vocabulary=64, staged=64),
            Cut(32, 4, 64, vocabulary=128, staged=64),
            Cut(32, 4, 64, vocabulary=64),
        ],
    }
    return [
        (size, kernel, cut)
        for kernel, table in (("blocks", blocks), ("tail", tails))
        for size, cuts in table.items()
        for cut in cuts
    ]


@contextlib.contextmanager
def instead(size: str, kernel: str, cut: Cut):
    """Inside, plans for this size are made with this cut."""
    chip = 9 if DRY or torch.cuda.get_device_capability()[0] == 9 else 8
    width = max(64, 16 if size == "tiny" else SIZES[size]["d_model"])
    positions = padded_positions(2 * LENGTHS[size])
    table, key = (
        (BLOCKS, (chip, width, positions)) if kernel == "blocks" else (TAILS, (chip, width))
    )
    usual, table[key] = table[key], cut
    try:
        yield
    finally:
        table[key] = usual


def measure(size: str, batch: int, kernel: str, objective) -> tuple[float, torch.Tensor]:
    """Seconds that the kernel takes a trial point, and the losses."""
    count = max(4, POINTS[size] * min(BATCHES) // batch)
    points = poll_block(objective.flat, 0, count)
    for _ in range(3):  # compiles, captures, and once more
        losses = objective.losses(*points)
    spent = spent_by(lambda: objective.losses(*points))
    return sum(us for us, _, name in spent if name == f"run_{kernel}") / count / 1e6, losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    sizes = ["tiny"] if DRY else ["small", "medium", "large"]
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes)
    parser.add_argument("--seconds", type=float, default=420.0, help="start none after these")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only-build", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        print("no CUDA device; --dry-run checks this program on the CPU", file=sys.stderr)
        return 2
    if args.only_build:
        size, kernel, cut = args.only_build
        with instead(size, kernel, Cut(*cut)):
            for batch in BATCHES:
                build("fused fp16x3", problem(size, batch))
        return 0
    until = time.monotonic() + args.seconds
    todo = [case for case in candidates() if case[0] in args.sizes]
    if not DRY:
        build_all(__file__, todo, args.seconds / 2)
    found = {"machine": describe(), "cuts": []}
    usual = {}
    for size, kernel, cut in todo:
        for batch in BATCHES:
            if time.monotonic() > until:
                print("out of time: the rest is left out")
                break
            parts = problem(size, batch)
            if (size, batch) not in usual:
                objective = build("fused fp16x3", parts)
                usual[size, batch] = measure(size, batch, kernel, objective)[1]
            with instead(size, kernel, cut):
                seconds, losses = measure(size, batch, kernel, build("fused fp16x3", parts))
            error = (losses - usual[size, batch]).abs().max().item()
            if not error < 1e-5:
                raise ValueError(f"{kernel} {cut} is off by {error}")
            row = {"size": size, "batch": batch, "kernel": kernel, "cut": cut._asdict()}
            found["cuts"].append(row | {"ns_per_point": seconds * 1e9})
            print(f"{size:7} {batch:3} {kernel:6} {seconds * 1e9:10.1f} ns  {cut}", flush=True)
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "gpu_tiles.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
