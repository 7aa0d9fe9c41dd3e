"""Types of command-line arguments that say what they expect."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def whole_number(minimum: int) -> Callable[[str], int]:
    """Return a converter to a whole number >= minimum."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number >= {minimum}")
        return value

    return convert


def real_number(
    minimum: float, *, above: bool = False, below: float = math.inf
) -> Callable[[str], float]:
    """Return a converter to a number >= minimum (or > minimum with `above`) and < `below`."""
    bounds = f"{'>' if above else '>='} {minimum:g}"
    if below < math.inf:
        bounds += f" and < {below:g}"

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (value > minimum if above else value >= minimum) or not value < below:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a number {bounds}")
        return value

    return convert


def whole_numbers(text: str) -> list[int]:
    """Convert `1,2,3` to distinct whole numbers >= 0."""
    fields = text.split(",")
    if not all(field.isascii() and field.isdigit() for field in fields):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers such as 1,2,3")
    values = [int(field) for field in fields]
    if len(set(values)) != len(values):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected each number once")
    return values
