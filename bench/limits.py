"""Who would take too long: known before a case runs, from the nearest smaller ones that did.

Time is taken to grow in a line with the operations of a step, B d^2 (3 N + 1), through the two
nearest smaller sizes: what is the same at every size is not scaled. With fewer than two nothing is
refused. What is refused is reported as skipped, with the estimate and where it comes from. A bound
on the whole run goes by cases in the same way, and stops what is verified beyond it: how long a
compiler takes nobody knows before.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from .suites import Case
from .timing import Stopwatch


def size(case: Case) -> float:
    """Operations of a step, but for a constant."""
    shape = case.shape
    return float(shape.batch * shape.dim**2 * (3 * shape.num_modalities + 1))


def once(function: Callable[[], object], stopwatch: Stopwatch) -> float:
    """Seconds of one run of what has run before."""
    return stopwatch(function, 1)[0]


class Limit:
    """A limit on the seconds that a contender's samples may take in one mode of a case.

    Args:
        seconds: the limit; None: no limit.
        rounds: samples.
    """

    def __init__(self, seconds: float | None, rounds: int) -> None:
        self.seconds, self.rounds = seconds, rounds
        self._known: dict[str, dict[float, tuple[float, Case]]] = {}

    def note(self, name: str, case: Case, seconds: float | None) -> str | None:
        """Keeps what a run took; says why its samples would be too many, or None."""
        if self.seconds is None or seconds is None:
            return None
        known = self._known.setdefault(name, {})
        # The dearest mode of a size decides.
        known[size(case)] = max(known.get(size(case), (0.0, case)), (seconds, case), key=_seconds)
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
        known = self._known.get(name, {})
        expected = _beyond({at: seconds for at, (seconds, _) in known.items()}, size(case))
        if expected is None or expected * self.rounds <= self.seconds:
            return None
        most, nearest = known[max(at for at in known if at < size(case))]
        return (
            f"{self.rounds} runs of some {expected:.1f} s ({most:.1f} s at {nearest.shape}) would "
            f"exceed the limit of {self.seconds:g} s per contender and mode"
        )


class OutOfTime(RuntimeError):
    """Raised by `stopped` in what takes too long."""


@contextmanager
def stopped(seconds: float | None) -> Iterator[list[OutOfTime]]:
    """Raises `OutOfTime` in the body after so many seconds, and lists it: others may have wrapped
    it. Not for None, and outside of the main thread, which alone can be interrupted, not at all.
    """
    raised: list[OutOfTime] = []
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if seconds is None or not usable:
        yield raised
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raised.append(OutOfTime(f"not measured: verifying it took more than {seconds:.0f} s"))
        raise raised[0]

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield raised
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


TO_VERIFY = 0.8
"""Of a case's share of the time; the rest is for the timing."""


class Budget:
    """A bound on the seconds of a run, about: a case's rounds that have begun are ended.

    A case is expected to take what is on the line through the two nearest smaller ones, but no more
    than grows with the root of the size, as small ones are mostly fixed costs; or with fewer of
    them what the nearest took. Until one has ended nothing is known. So the runner begins with the
    smallest, and asks again before every contender and before the rounds.

    Args:
        seconds: the bound; None: no bound.
        clock: seconds.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.begin = seconds, clock, clock()
        self._known: dict[float, float] = {}

    def to_verify(self, cases: int, compiling: bool) -> float | None:
        """Seconds that may go into verifying a case's contenders; None without a bound.

        cases: how many are left, this one included; compiling: whether that is what takes long, so
        that each has an equal share. Else one case may take what there is.
        """
        if self.seconds is None:
            return None
        left = max(0.0, self.seconds - (self.clock() - self.begin))
        return left * TO_VERIFY / (cases if compiling else 1)

    def refuse(self, case: Case, compiling: bool = False) -> str | None:
        """Why a case is not run, or None; compiling: as of `to_verify`, which then bounds it."""
        if self.seconds is None:
            return None
        if compiling:
            return self.short()
        at = size(case)
        expected = self._known.get(at) or _beyond(self._known, at)
        if expected is not None and at not in self._known:
            most = max(known for known in self._known if known < at)
            expected = min(expected, self._known[most] * math.sqrt(at / most))
        if expected is None:
            nearest = min(self._known, key=lambda known: abs(known - at), default=None)
            expected = 0.0 if nearest is None else self._known[nearest]
        return self.short(expected)

    def short(self, expected: float = 0.0) -> str | None:
        """Why there is no time for what should take so many seconds, or None."""
        if self.seconds is None:
            return None
        left = self.seconds - (self.clock() - self.begin)
        if left > 0 and expected <= left:
            return None
        if left <= 0:
            return f"the budget of {self.seconds:g} s is spent"
        return f"some {expected:.0f} s, {left:.0f} are left of the budget of {self.seconds:g} s"

    def note(self, case: Case, seconds: float) -> None:
        """Keeps what a case took in which something was timed."""
        self._known[size(case)] = max(seconds, self._known.get(size(case), 0.0))


def _beyond(known: Mapping[float, float], at: float) -> float | None:
    """Seconds at a size, on the line through the two nearest smaller ones; None of fewer."""
    smaller = sorted(size for size in known if size < at)
    if len(smaller) < 2:
        return None
    least, most = (known[size] for size in smaller[-2:])
    slope = max(0.0, most - least) / (smaller[-1] - smaller[-2])
    return most + slope * (at - smaller[-1])


def _seconds(known: tuple[float, Case]) -> float:
    return known[0]
