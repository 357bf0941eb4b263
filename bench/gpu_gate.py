"""What must hold on a GPU before anything is timed: losses against float64, and descents."""

import copy

import torch
from gpu_run import DRY, Case, Run, problem
from harness import poll_block

from psfast.flat import FlatParameters


def eager_losses(closure, flat, index, delta) -> list[float]:
    """no_grad, change in place, evaluate, restore the saved value; one host sync a trial point."""
    buffer, losses = flat.buffer, []
    with torch.no_grad():
        for i, d in zip(index.tolist(), delta.tolist(), strict=True):
            cell = buffer[i : i + 1]
            saved = cell.clone()
            cell.add_(d)
            losses.append(closure().item())
            cell.copy_(saved)
    return losses


def trained(size: str, batch: int):
    """The problem after some steps of Adam: its weights are not those of a fresh model."""
    model, criterion, inputs, targets = problem(size, batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(2 if DRY else 150):
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
    return model, criterion, inputs, targets


def exact_changes(parts, index, delta) -> torch.Tensor:
    """Loss changes in float64: the trial value is rounded as the float32 parameters round it."""
    model, criterion, inputs, targets = parts
    single = FlatParameters(list(model.parameters())).buffer
    twin = copy.deepcopy(model).double()
    flat = FlatParameters(list(twin.parameters()))
    exact = (single[index] + delta).double() - single[index].double()
    closure = lambda: criterion(twin(inputs), targets)  # noqa: E731
    with torch.no_grad():
        base = closure().item()
    return torch.tensor(eager_losses(closure, flat, index, exact), dtype=torch.float64) - base


def gate(
    run: Run, size: str, batch: int, weights: str, radius: float, count: int, chosen: list[str]
) -> None:
    """Errors and accept/reject flips of every mode against float64, beside eager fp32's."""
    parts = (trained if weights == "trained" else problem)(size, batch)
    model, criterion, inputs, targets = parts
    flat = FlatParameters(list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    index, delta = poll_block(flat, 0, count, radius)
    exact = exact_changes(parts, index, delta)

    def compare(backend: str, losses: torch.Tensor, base: float) -> None:
        changes = losses.double().cpu() - base
        matters = exact.abs() > 1e-13  # float64 has rounding errors too
        flips = ((changes < 0) != (exact < 0))[matters].sum().item()
        errors = (changes - exact).abs()
        error, worst = errors.max().item(), int(errors.argmax())  # NaN, where there is one
        bound = 1e-5 * max(1.0, abs(base))
        record = {
            "size": size,
            "batch": batch,
            "weights": weights,
            "radius": radius,
            "backend": backend,
            "points": count,
            "largest_error": error,
            "at": names[flat.locate(int(index[worst]))[0]],
            "flips": flips,
            "loss": base,
            "ok": error < bound,  # False for NaN
        }
        run.data["gate"].append(record)
        print(f"    {size} {weights} radius {radius:g} {backend}: error {error:.2e}, flips {flips}")

    closure = lambda: criterion(model(inputs), targets)  # noqa: E731
    with torch.no_grad():
        base = closure().item()
    compare("serial loop", torch.tensor(eager_losses(closure, flat, index, delta)), base)
    for backend in chosen:

        def one(backend=backend):
            twin = run.build(Case(backend, size, batch), parts)
            compare(backend, twin.losses(index, delta), twin().item())

        run.stage(f"gate {size} {weights} {radius:g} {backend}", one)


def gate_descent(run: Run, case: Case, count: int) -> None:
    """Whether descents, with blocks of several sizes, have the serial loop's losses and decisions,
    bit for bit.

    In the interpreter nearly so: it computes by NumPy, where a row's bits depend on its place.
    """
    serial = run.build(case)
    index, delta = poll_block(serial.flat, 0, count)
    bar, losses, places = serial().item(), [], []
    for k in range(count):
        point = index[k : k + 1], delta[k : k + 1]
        losses.append(serial.losses(*point).item())
        if losses[-1] < bar:
            serial.accept(*point)
            bar = serial().item()
            places.append(k)
    exact = torch.tensor(losses, dtype=torch.float64)
    same = torch.allclose if DRY else torch.equal
    for gap in (2.5, 60.0, 1000.0):
        loop = run.build(case)
        incumbent = loop().item()
        found = loop.descend(index, delta, incumbent=incumbent, margin=0.0, most=count, gap=gap)
        if found.places != places or not same(found.losses.double(), exact):
            other = f"accepted {found.places}, not {places}; losses {found.losses.tolist()}"
            raise ValueError(f"gap {gap}: {other}")
        if not torch.equal(loop.flat.buffer, serial.flat.buffer):
            raise ValueError(f"gap {gap}: the same decisions, but other parameters")
    run.data["descends"].append(case.backend)
    print(f"    {case.backend}: {len(places)} of {count} accepted, as the serial loop does")


def passed(run: Run, backend: str) -> bool:
    """Whether every gate that ran for it passed, and at least one did."""
    found = [record["ok"] for record in run.data["gate"] if record["backend"] == backend]
    return bool(found) and all(found)
