"""Checks of arguments that several constructors share."""

import math
import sys


def check_number(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise TypeError unless ``value`` is a real number, ValueError unless it is in range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (above < value < below and value >= at_least) or abs(value) > sys.float_info.max:
        bounds = [f"> {above}"] * (above > -math.inf) + [f">= {at_least}"] * (at_least > -math.inf)
        bounds += [f"< {below}"] if below < math.inf else ["finite"]
        raise ValueError(f"{name} must be {' and '.join(bounds)}, got {value!r}")


def check_count(
    name: str,
    value: int | None,
    *,
    least: int = 1,
    below: int | None = None,
    optional: bool = False,
) -> None:
    """Raise TypeError unless ``value`` is an integer, ValueError unless it is in range.

    optional: None is right too
    """
    if value is None and optional:
        return
    expected = "an integer or None" if optional else "an integer"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    if below is not None and value >= below:
        raise ValueError(f"{name} must be < {below}, got {value}")
