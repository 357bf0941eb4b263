"""Trial points and seconds to learn parity: psfast's rules, the reference, peers, Adam.

    python bench/bench_solve.py --size tiny --seeds 0 1 2 --budget 600000
    python bench/bench_solve.py --report

Every method gets the same start, training set, batches and dropout, and is scored on the same
validation set in eval mode. A trial point is one evaluation of the batch's loss; an Adam step
counts as three (forward and backward). The seconds are those of training alone, and of the
machine as it was; peers evaluate their populations in batches (``population.py``). The curves
are appended to ``results/solve.csv``; ``--report`` makes the table and the plot of them.
"""

import argparse
import csv
import itertools
import time
from collections import defaultdict

import torch
from harness import RESULTS, SIZES, append_rows
from peers import PEERS, SETTINGS
from population import Population
from torch import Tensor

import psfast
from psfast.flat import FlatParameters, trainable
from psfast.search import derive_seed
from psfast.search_simplex import SimplexGradient

SIZES = {"tiny": {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64}, **SIZES}
DEFAULT = "psfast: simplex gradient"
BLOCK = 256
# Options of PatternSearch; one step is one block. The first are the defaults of psfast-train; the
# radii were not tuned for the plain rules.
RULES = {
    DEFAULT: {"radius": 0.06, "acceptance": "best", "search": SimplexGradient(decay=0.2)},
    "psfast: with the trail": {
        "radius": 0.06,
        "acceptance": "best",
        "search": SimplexGradient(decay=0.2, fade=0.5),
        "block_size": 128,
    },
    "psfast: best of block": {"radius": 0.1, "acceptance": "best"},
    "psfast: first": {"radius": 0.1},
}
GRADIENT, REFERENCE = "Adam (gradient)", "reference"
METHODS = [*RULES, REFERENCE, *PEERS, GRADIENT]
TARGETS = [0.69, 0.65, 0.6, 0.5, 0.3]
POINTS_A_CURVE = 60


class Problem:
    """Model, batches and scores of one (size, seed)."""

    def __init__(self, size: str, seed: int, batch_size: int = 16):
        torch.manual_seed(seed)
        self.model = psfast.DecoderOnlyTransformer(**SIZES[size], dropout=0.1)
        self.criterion = psfast.MaskedCrossEntropy()
        self.flat = FlatParameters(trainable(self.model.parameters()))
        self.train = psfast.StateTrackingDataset(200, 8, seed=seed, split="train")
        self.val = psfast.StateTrackingDataset(50, 8, seed=seed, split="val")
        self.seed, self.batch_size = seed, batch_size

    def batches(self):
        """(number, inputs, targets), epoch after epoch in shuffled order, without end."""
        generator = torch.Generator().manual_seed(self.seed)
        number = itertools.count()
        while True:
            order = torch.randperm(len(self.train), generator=generator)
            for rows in order.split(self.batch_size):
                yield next(number), self.train.x[rows], self.train.y[rows]

    @torch.no_grad()
    def scores(self) -> tuple[float, float]:
        """(val_loss, val_accuracy)"""
        self.model.eval()
        logits = self.model(self.val.x)
        self.model.train()
        supervised = self.val.y != self.criterion.ignore_index
        right = logits.argmax(-1)[supervised] == self.val.y[supervised]
        return self.criterion(logits, self.val.y).item(), right.float().mean().item()


def steps(method: str, problem: Problem):
    """Train; yields the trial points of each step."""
    if method in RULES:
        yield from _pattern_search_steps(RULES[method], problem)
    elif method == REFERENCE:
        yield from _closure_steps(
            psfast.ReferencePatternSearch(problem.model.parameters(), radius=0.1), problem
        )
    elif method == GRADIENT:
        yield from _gradient_steps(problem)
    else:
        yield from _peer_steps(method, problem)


def _pattern_search_steps(rule: dict, problem: Problem):
    block = rule.get("block_size", BLOCK)
    optimizer = psfast.PatternSearch(
        problem.flat.params,
        **{**rule, "block_size": block, "max_evaluations": block, "seed": problem.seed},
    )
    objective = None
    for number, inputs, targets in problem.batches():
        mask = derive_seed(problem.seed, number)
        if objective is None:
            objective = psfast.objective(
                problem.model, problem.criterion, inputs, targets, seed=mask
            )
        objective.set_batch(inputs, targets, seed=mask)
        optimizer.step(objective)
        yield optimizer.last_poll.evaluations


def _closure_steps(optimizer, problem: Problem):
    for _, inputs, targets in problem.batches():
        before = optimizer.evaluations
        optimizer.step(lambda x=inputs, y=targets: problem.criterion(problem.model(x), y))
        yield optimizer.evaluations - before


def _gradient_steps(problem: Problem):
    adam = torch.optim.Adam(problem.model.parameters(), lr=3e-3)
    for _, inputs, targets in problem.batches():
        adam.zero_grad()
        problem.criterion(problem.model(inputs), targets).backward()
        adam.step()
        yield 3


def _peer_steps(method: str, problem: Problem):
    population = Population(problem.model, problem.criterion)
    batches, evaluated = problem.batches(), 0
    number, inputs, targets = next(batches)

    def population_losses(points: Tensor) -> Tensor:
        nonlocal evaluated
        evaluated += len(points)
        return population.losses(points, inputs, targets, derive_seed(problem.seed, number))

    start = problem.flat.buffer.clone()
    torch.manual_seed(derive_seed(problem.seed, number))
    expected = problem.criterion(problem.model(inputs), targets).detach()
    torch.testing.assert_close(population_losses(start[None])[0], expected)
    evaluated = 0
    generator = torch.Generator().manual_seed(problem.seed)
    for x in PEERS[method](start, population_losses, generator, **SETTINGS[method]):
        problem.flat.buffer.copy_(x)
        before, evaluated = evaluated, 0
        yield before
        number, inputs, targets = next(batches)


def run(method: str, size: str, seed: int, budget: int, most_seconds: float) -> list[dict]:
    """The curve of one run: until val_accuracy 1.0, the budget or the time is reached."""
    problem = Problem(size, seed)
    row = {"method": method, "size": size, "seed": seed, "budget": budget}
    curve, evaluations, seconds, due = [], 0, 0.0, 0.0
    training = steps(method, problem)
    while True:
        if evaluations >= due or evaluations >= budget or seconds >= most_seconds:
            val_loss, val_accuracy = problem.scores()
            values = {"evaluations": evaluations, "seconds": round(seconds, 2)}
            values |= {"val_loss": round(val_loss, 5), "val_accuracy": round(val_accuracy, 4)}
            curve.append({**row, **values})
            if val_accuracy == 1.0 or evaluations >= budget or seconds >= most_seconds:
                return curve
            # Dense at first, as the peers and the psfast rules differ by orders of magnitude.
            due = max(evaluations * 1.1, evaluations + budget / POINTS_A_CURVE / 20)
        started = time.perf_counter()
        evaluations += next(training)
        seconds += time.perf_counter() - started


def read_curves() -> dict[tuple[str, str, str], list[dict]]:
    """(size, method, seed) -> rows, in the order of the file; a later run replaces an earlier."""
    curves = {}
    with (RESULTS / "solve.csv").open() as file:
        for row in csv.DictReader(file):
            key = row["size"], row["method"], row["seed"]
            if int(row["evaluations"]) == 0:
                curves[key] = []
            curves[key].append(row)
    return curves


def first_at(curve: list[dict], reached) -> dict | None:
    return next((row for row in curve if reached(row)), None)


def table(size: str) -> str:
    """Markdown: the median over seeds of the trial points (and seconds) to each target."""
    by_method = defaultdict(list)
    for (of_size, method, _), curve in read_curves().items():
        if of_size == size:
            by_method[method].append(curve)
    goals = {f"val_loss {t}": lambda row, t=t: float(row["val_loss"]) <= t for t in TARGETS}
    goals["val_accuracy 1.0"] = lambda row: float(row["val_accuracy"]) == 1.0
    lines = ["| method | seeds | " + " | ".join(goals) + " | best val_loss | trial points |"]
    lines.append("|---" * (len(goals) + 4) + "|")
    for method in (m for m in METHODS if m in by_method):
        curves = by_method[method]
        cells = [_cell([first_at(curve, goal) for curve in curves]) for goal in goals.values()]
        lowest = min(float(row["val_loss"]) for curve in curves for row in curve)
        most = max(int(curve[-1]["evaluations"]) for curve in curves)
        cells = [method, str(len(curves)), *cells, f"{lowest:.3f}", f"{most:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: list[dict | None]) -> str:
    there = sorted((row for row in rows if row), key=lambda row: int(row["evaluations"]))
    if not there:
        return "-"
    middle = there[(len(there) - 1) // 2]
    text = f"{int(middle['evaluations']):,} ({float(middle['seconds']):.0f} s)"
    return text if len(there) == len(rows) else f"{text}, {len(there)} of {len(rows)}"


def plot(size: str):
    """val_loss over trial points, one line a run, to ``results/solve_SIZE.png``."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    colours = {method: f"C{k}" for k, method in enumerate(METHODS)}
    labelled = set()
    for (of_size, method, _), curve in read_curves().items():
        if of_size == size:
            points = [max(1, int(row["evaluations"])) for row in curve]
            losses = [float(row["val_loss"]) for row in curve]
            label = None if method in labelled else method
            labelled.add(method)
            axes.plot(points, losses, color=colours[method], label=label, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="trial points", ylabel="val_loss", title=size)
    axes.legend(fontsize=7)
    path = RESULTS / f"solve_{size}.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=600_000, help="trial points a run")
    parser.add_argument("--seconds", type=float, default=600.0, help="most seconds a run")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--report", action="store_true", help="only print the table and plot")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not arguments.report:
        for method, seed in itertools.product(arguments.methods, arguments.seeds):
            curve = run(method, arguments.size, seed, arguments.budget, arguments.seconds)
            append_rows("solve", curve)
            last = {k: curve[-1][k] for k in ("evaluations", "seconds", "val_loss", "val_accuracy")}
            print(method, seed, last, flush=True)
    print(table(arguments.size))
    print(plot(arguments.size))


if __name__ == "__main__":
    main()
