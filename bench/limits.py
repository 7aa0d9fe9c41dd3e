"""Who would take too long: known before a case runs, from the nearest one that did.

Time grows at most with the operations of a step, B d^2 (3 N + 1), so that a case that is k times
the size of the nearest smaller one takes at most k times as long. What is refused is reported as
skipped, with the estimate and where it comes from.
"""

from __future__ import annotations

from collections.abc import Callable

from .suites import Case
from .timing import Stopwatch


def size(case: Case) -> float:
    """Operations of a step, but for a constant."""
    shape = case.shape
    return float(shape.batch * shape.dim**2 * (3 * shape.num_modalities + 1))


class Limit:
    """A limit on the seconds that a contender's samples may take in one mode of a case.

    Args:
        seconds: the limit; None: no limit, and nothing is measured for it.
        rounds: samples.
    """

    def __init__(self, seconds: float | None, rounds: int) -> None:
        self.seconds, self.rounds = seconds, rounds
        self._known: dict[str, list[tuple[float, float, Case]]] = {}

    def once(self, function: Callable[[], object], stopwatch: Stopwatch) -> float | None:
        """Seconds of one run, which has run before; None without a limit."""
        return None if self.seconds is None else stopwatch(function, 1)[0]

    def note(self, name: str, case: Case, seconds: float | None) -> str | None:
        """Keeps what a run took; says why its samples would be too many, or None."""
        if self.seconds is None or seconds is None:
            return None
        self._known.setdefault(name, []).append((size(case), seconds, case))
        if seconds * self.rounds <= self.seconds:
            return None
        return (
            f"{self.rounds} runs of {seconds:.1f} s would exceed the limit of {self.seconds:g} s "
            "per contender and mode"
        )

    def refuse(self, name: str, case: Case) -> str | None:
        """Why a case is not run at all, or None."""
        if self.seconds is None:
            return None
        smaller = [known for known in self._known.get(name, []) if known[0] < size(case)]
        if not smaller:
            return None
        # The dearest run of the nearest size.
        nearest, seconds, where = max(smaller, key=lambda known: known[:2])
        expected = seconds * size(case) / nearest
        if expected * self.rounds <= self.seconds:
            return None
        return (
            f"{self.rounds} runs of some {expected:.0f} s ({seconds:.1f} s at {where.shape}) would "
            f"exceed the limit of {self.seconds:g} s per contender and mode"
        )
