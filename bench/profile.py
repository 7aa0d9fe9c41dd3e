"""Where the time of a solve goes: matrix products against everything else, by operator.

    python -m deqfusion.bench.profile --shape 612,500,3 --threads 1 [--backward]

`torch.profiler` sees through the library's operators into their CPU implementation. It costs time
per operator, so that shares of many small operators are overstated and those of products
understated; the wall time with and without it is printed for that reason.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

from . import contenders, runner
from .contenders import Contender
from .problem import LOSSES, Problem, Shape
from .suites import MODES

PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        "mm",
        "mm.out",
        "addmm",
        "addmm_",
        "_addmm_activation",
        "bmm",
        "baddbmm",
        "baddbmm_",
        "addbmm",
        "mv",
        "addmv",
        "addmv_",
    )
)
"""Operators whose own time is a matrix product; `mkldnn` linears are recognised by name."""


@dataclass(frozen=True)
class Line:
    """One operator: calls per run, its own seconds per run, and its share of all."""

    name: str
    calls: float
    seconds: float
    share: float

    @property
    def is_product(self) -> bool:
        """Whether its time counts as matrix products."""
        return self.name in PRODUCTS or ("linear" in self.name and "mkldnn" in self.name)


@dataclass(frozen=True)
class Profile:
    """What was found; seconds per run, lines by falling share."""

    wall: float
    wall_profiled: float
    lines: tuple[Line, ...]

    @property
    def products(self) -> float:
        """Share of the operators' time that went into matrix products."""
        return sum(line.share for line in self.lines if line.is_product)


def measure(contender: Contender, mode: str, runs: int = 5) -> Profile:
    """Profiles a contender.

    Args:
        contender: with its tolerances set.
        mode: "forward" or "forward_backward".
        runs: how many to average over, after one to warm up.

    Returns:
        The profile.

    Raises:
        ValueError: if the mode is unknown or `runs` is below 1.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}")
    function = contender.function(mode)
    function()
    begin = time.perf_counter()
    for _ in range(runs):
        function()
    wall = (time.perf_counter() - begin) / runs
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        begin = time.perf_counter()
        for _ in range(runs):
            function()
        profiled = (time.perf_counter() - begin) / runs
    events = [event for event in recorded.key_averages() if event.self_cpu_time_total > 0]
    total = sum(event.self_cpu_time_total for event in events)
    lines = [
        Line(
            name=event.key,
            calls=event.count / runs,
            seconds=event.self_cpu_time_total * 1e-6 / runs,
            share=event.self_cpu_time_total / total,
        )
        for event in events
    ]
    return Profile(wall, profiled, tuple(sorted(lines, key=lambda line: -line.share)))


def text(found: Profile, top: int) -> str:
    """The profile as a table of the `top` dearest operators."""
    width = max(len(line.name) for line in found.lines[:top])
    rows = [
        f"{'operator'.ljust(width)}  {'calls':>8}  {'ms':>9}  {'share':>6}",
        *(
            f"{line.name.ljust(width)}  {line.calls:8.1f}  {line.seconds * 1e3:9.2f}  "
            f"{line.share:6.1%}{'  product' if line.is_product else ''}"
            for line in found.lines[:top]
        ),
        f"wall {found.wall * 1e3:.1f} ms, {found.wall_profiled * 1e3:.1f} ms under the profiler",
        f"matrix products {found.products:.1%}, everything else {1 - found.products:.1%}",
    ]
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; exit code 0, or 2 with one line on stderr for bad options."""
    parser = argparse.ArgumentParser(prog="python -m deqfusion.bench.profile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", default="612,500,3", metavar="B,d,N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--contender", default="ours", metavar="NAME")
    parser.add_argument("--tol", type=float, default=1e-3, help="of both solves")
    parser.add_argument("--loss", default="sum", choices=LOSSES)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--top", type=int, default=15, help="operators listed")
    options = parser.parse_args(arguments)
    try:
        if options.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {options.threads}")
        kind = contenders.get(options.contender)
        if (reason := kind.unavailable()) is not None:
            raise ValueError(f"{options.contender}: {reason}")
        with runner.threads(options.threads):
            contender = kind(Problem(Shape.parse(options.shape), loss=options.loss))
            contender.set_tolerances(options.tol, options.tol)
            found = measure(contender, MODES[int(options.backward)], options.runs)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(text(found, options.top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
