"""``python -m psfast.plots RUN``: losses, accuracy, radius and acceptance of a run, as a PNG.

RUN is the folder of a ``psfast-train`` run, or its ``metrics.csv``, which every logger but none
writes.
"""

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

PANELS = {
    "loss": ("train_loss", "val_loss"),
    "accuracy": ("val_accuracy",),
    "radius": ("radius",),
    "accepted changes a batch": ("accepted",),
}
BY_TENSOR = "accepted/"


class Curve(NamedTuple):
    """One logged value over the run: lists of the same length.

    seconds: of search, from the logged speeds: without validation and the rest
    """

    evaluations: list[float]
    seconds: list[float]
    values: list[float]


def find_metrics(run: Path) -> Path:
    """The one ``metrics.csv`` of a run. Raises FileNotFoundError, or ValueError for several."""
    if not run.exists():
        raise FileNotFoundError(f"there is no {run}")
    if run.is_file():
        return run
    found = sorted(run.rglob("metrics.csv"))
    if not found:
        raise FileNotFoundError(f"{run} holds no metrics.csv: logger=none writes none")
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise ValueError(f"RUN must be one run, {run} holds several: {names}")
    return found[0]


def read_curves(metrics: Path) -> dict[str, Curve]:
    """The curves that a run logged; values at the same step share its trial points.

    Raises ValueError if the file is not of a psfast run.
    """
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "evaluations" not in rows[0]:
        raise ValueError(f"{metrics} must have a column 'evaluations', as pattern search logs it")
    names = [name for panel in PANELS.values() for name in panel]
    names += [name for name in rows[0] if name.startswith(BY_TENSOR)]
    curves = {name: Curve([], [], []) for name in names}
    evaluations = seconds = 0.0
    for row in rows:
        if row["evaluations"]:
            done, speed = float(row["evaluations"]), float(row["evaluations_per_second"])
            seconds += (done - evaluations) / max(speed, 1e-9)
            evaluations = done
        for name in names:
            if row.get(name) and math.isfinite(float(row[name])):
                curves[name].evaluations.append(evaluations)
                curves[name].seconds.append(seconds)
                curves[name].values.append(float(row[name]))
    return {name: curve for name, curve in curves.items() if curve.values}


def draw(curves: dict[str, Curve], title: str = ""):
    """A matplotlib figure: a row a panel, over trial points (left) and seconds (right)."""
    from matplotlib.figure import Figure

    panels = {label: [n for n in names if n in curves] for label, names in PANELS.items()}
    panels["accepted changes by tensor"] = [name for name in curves if name.startswith(BY_TENSOR)]
    panels = {label: names for label, names in panels.items() if names}
    figure = Figure(figsize=(10, 2.3 * len(panels) + 0.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(panels), 2, sharex="col", sharey="row", squeeze=False)
    for (left, right), (label, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            curve = curves[name]
            style = {"marker": ".", "markersize": 3} if name.startswith("val") else {}
            label_of = name.removeprefix(BY_TENSOR)
            left.plot(curve.evaluations, curve.values, linewidth=0.8, label=label_of, **style)
            right.plot(curve.seconds, curve.values, linewidth=0.8, **style)
        left.set_ylabel(label)
        if label in ("loss", "radius"):
            left.set_yscale("log")
        if label == "accepted changes by tensor":  # some thirty names
            place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
            right.legend(*left.get_legend_handles_labels(), fontsize=4, ncols=2, **place)
        elif len(names) > 1:
            left.legend()
    axes[-1, 0].set_xlabel("trial points")
    axes[-1, 1].set_xlabel("seconds of search")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m psfast.plots", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder, or its metrics.csv")
    parser.add_argument("--out", type=Path, help="the PNG; default: RUN/plot.png")
    options = parser.parse_args(arguments)
    try:
        metrics = find_metrics(options.run)
        figure = draw(read_curves(metrics), title=str(options.run))
        folder = options.run if options.run.is_dir() else options.run.parent
        path = options.out or folder / "plot.png"
        figure.savefig(path, dpi=120)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        hint = '; pip install "psfast[train]"' if isinstance(error, ModuleNotFoundError) else ""
        sys.exit(f"psfast.plots: error: {error}{hint}")
    print(path)


if __name__ == "__main__":
    main()
