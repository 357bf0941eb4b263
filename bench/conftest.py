"""Collect what each benchmark measured, then print ratios of one run and keep the rows."""

import statistics
import time
from collections import defaultdict
from types import SimpleNamespace

import harness
import pytest
import torch
from work import matrix_product_rate


class Measurements:
    """Seconds per trial point, by (table, case, backend), of this one run.

    flops: useful work per trial point, by (table, case), where it is known
    """

    def __init__(self):
        self.tables: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        self.threads: dict[tuple[str, str, str], int] = {}
        self.flops: dict[tuple[str, str], float] = {}
        self.large_product: float | None = None  # FLOP/s, on all threads

    def add(self, table: str, case: str, backend: str, seconds: float) -> None:
        self.tables[table][case][backend] = seconds
        self.threads[table, case, backend] = torch.get_num_threads()

    def rows(self, table: str) -> list[dict]:
        rows = []
        for case, seconds in self.tables[table].items():
            for backend, value in seconds.items():
                row = {"threads": str(self.threads[table, case, backend]), "case": case}
                row |= {"backend": backend, "us_per_point": f"{value * 1e6:.3f}"}
                row["points_per_second"] = f"{1 / value:.0f}"
                for base in ("reference", "serial loop", "batched"):
                    ratio = f"{seconds[base] / value:.2f}" if base in seconds else ""
                    row["x_" + base.replace(" ", "_")] = ratio
                flops = self.flops.get((table, case), 0.0) / value
                row["useful_gflops"] = f"{flops / 1e9:.1f}" if flops else ""
                row["of_large_product"] = f"{flops / self.large_product:.2f}" if flops else ""
                rows.append(row)
        return rows


_measured = Measurements()


# Runs before those that count: what is prepared for a number of threads, for each tensor and for
# the sizes of blocks (`batched` records a program at the second use of each), as in a long search.
_WARM_UP = 4
_NO_CASE = SimpleNamespace(params={})


@pytest.fixture
def quick(request):
    """Whether nothing is timed: then a few trial points are enough."""
    return request.config.getoption("benchmark_disable")


@pytest.fixture
def measure(benchmark, quick):
    """``measure(table, case, backend, run, points)`` times ``run()`` of ``points`` trial points.

    With one thread or all, whichever is faster: small operations, as of the serial loop, lose
    more by waking a thread than it takes off them. Median of several rounds after as many as
    a backend may prepare things in; once, untimed, when timing is disabled.
    ``run`` may return the seconds (a float) that count, where a part of it does not.
    flops: useful ones of a trial point of this case, on the CPU.
    """

    def measure(table, case, backend, run, points, rounds=3, flops=None):
        returned = []
        benchmark.extra_info.update(table=table, case=case, backend=backend, points=points)
        threads = torch.get_num_threads()
        if not quick:
            torch.set_num_threads(_faster_threads(run))
        benchmark.pedantic(
            lambda: returned.append(run()), rounds=rounds, iterations=1, warmup_rounds=_WARM_UP
        )
        if quick:
            return
        seconds = benchmark.stats.stats.median
        if isinstance(returned[-1], float):
            seconds = statistics.median(returned[-rounds:])
        _measured.add(table, case, backend, seconds / points)
        if flops:
            _measured.flops[table, case] = flops
            _measured.large_product = _measured.large_product or matrix_product_rate(threads)

    return measure


def _faster_threads(run) -> int:
    """By the shorter of two runs after the warm-up: a single one may meet a busy moment."""
    seconds = {}
    for threads in {1, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        seconds[threads] = min([_seconds(run) for _ in range(_WARM_UP + 2)][_WARM_UP:])
    return min(seconds, key=seconds.get)


def _seconds(run) -> float:
    started = time.perf_counter()
    returned = run()
    return returned if isinstance(returned, float) else time.perf_counter() - started


def pytest_collection_modifyitems(items):
    """What is compared runs one after the other: a machine's speed drifts within minutes."""
    places: dict[tuple, int] = {}

    def place(item) -> int:
        values = {"regime": "complete poll", **getattr(item, "callspec", _NO_CASE).params}
        case = item.path, *(values.get(name) for name in ("regime", "size", "batch", "name"))
        return places.setdefault(case, len(places))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _all_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter):
    for table in _measured.tables:
        rows = _measured.rows(table)
        terminalreporter.section(f"{table}: ratios of this run ({harness.machine()['device']})")
        columns = list(rows[0])
        widths = [max(len(c), *(len(row[c]) for row in rows)) for c in columns]
        for row in [dict(zip(columns, columns, strict=True)), *rows]:
            cells = [row[c].ljust(w) for c, w in zip(columns, widths, strict=True)]
            terminalreporter.write_line("  ".join(cells))
        path = harness.append_rows(table, rows)
        terminalreporter.write_line(f"rows appended to {path}")
