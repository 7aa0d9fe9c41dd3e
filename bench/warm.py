"""Fills the compilers' caches of a suite's contenders, in parts that run side by side.

With the rows that are measured: the schedule, what was tuned, and what Triton specialises a program
on (whether a number divides by 16) depend on them. What fails here fails in the measurement as
well, and is reported there.
"""

from __future__ import annotations

from contextlib import suppress

from . import contenders
from .problem import Problem
from .runner import device_of, names_of
from .suites import Suite


def parse(text: str) -> tuple[int, int]:
    """Reads `"K/OF"`, 0 <= K < OF.

    Raises:
        ValueError: if it is not that.
    """
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"--warm must be K/OF with K from 0 below OF, got {text!r}")
    return int(part), int(parts)


def warm(suite: Suite, part: int, parts: int) -> int:
    """Runs every parts-th pair of a shape and a contender once, from the part-th on.

    Returns:
        How many ran.

    Raises:
        ValueError: if a contender is unknown, or the device is not there.
    """
    device = device_of(suite)
    shapes = dict.fromkeys(case.shape for case in suite.cases)
    pairs = [(shape, name) for shape in shapes for name in names_of(suite, device)]
    ran = 0
    for shape, name in pairs[part::parts]:
        kind = contenders.get(name)
        if kind.unavailable(device) is not None:
            continue
        with suppress(Exception):
            contender = kind(Problem(shape, seed=suite.seed).to(device))
            contender.set_tolerances(suite.target, suite.target)
            for mode in suite.modes:
                with suppress(Exception):
                    contender.run(mode)
        ran += 1
    return ran
