"""What tuning found: every way that was tried, and the entries to keep."""

from __future__ import annotations

import datetime
import math
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from deqfusion import kernels
from deqfusion.kernels.tuning import Entry, Host, Problem, Timed
from deqfusion.solvers import Solver
from deqfusion.tuning.example import Way

__all__ = ["Gain", "Trial", "Tuned", "entry_of", "gain", "provenance", "settled", "told", "written"]

FEWEST = 8
"""Rounds from which on they can say who is faster: fewer fall as they like more often than
`CHANCE`, even if all agree."""

CHANCE = 1 / 200
"""How often rounds of two ways that are alike may fall so: many ways are held against the default,
and the one that looks best is picked."""

LEAST = 0.02
"""Gain that is worth another choice than the default."""


@dataclass
class Trial:
    """One way that was tried.

    Attributes:
        way: what was run.
        default: whether it is what would have run untuned.
        residual: largest error in float64, None where it was not got that far.
        fault: why its time does not count, or None.
        seconds, warm: median times of a solve, with a cold and a warm L2 cache; None: not timed.
            Of a prediction, `seconds` is predicted.
        samples: of which `seconds` is the median, in the order of the rounds.
        final: whether those are of the finals, which alone compare with one another.
    """

    way: Way
    default: bool = False
    residual: float | None = None
    fault: str | None = None
    seconds: float | None = None
    warm: float | None = None
    final: bool = False
    samples: tuple[float, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether it was verified and timed."""
        return self.fault is None and self.seconds is not None

    @property
    def sample_seconds(self) -> float:
        """What a sample takes: on a GPU it is timed with a cold and with a warm cache."""
        on_gpu = not isinstance(self.way.config, Host)
        return (self.seconds or 0.0) + ((self.warm or 0.0) if on_gpu else 0.0)

    def timed(self) -> Timed:
        """As an entry has it."""
        if self.seconds is None:
            raise ValueError("got a trial without a time, expected one that counts")
        warm = self.seconds if self.warm is None else self.warm
        way, spread = self.way, np.percentile(self.samples or [self.seconds], (20, 80))
        return Timed(way.config, way.memory, way.ladder, self.seconds, *map(float, spread), warm)

    def numbers(self, scale: float, default: Trial | None, warm: bool) -> tuple[str, ...]:
        """Its cells in `Tuned.table`: residual, times by a scale, and what it gains."""
        spread = compared = ""
        if self.counts and self.samples:
            timed = self.timed()
            spread = f"{scale * timed.p20:.1f}..{scale * timed.p80:.1f}"
        if self.counts and default is not None and not self.default:
            faster = gain([(default, self)])
            if faster is not None:
                compared = f"{faster.median:.2f} ({faster.low:.2f}..{faster.high:.2f})"
        return (
            "" if self.residual is None else f"{self.residual:.1e}",
            "" if self.seconds is None else f"{scale * self.seconds:.1f}",
            spread,
            f"{scale * self.warm:.1f}" if warm and self.warm is not None else "",
            "default" if self.default else compared,
        )


@dataclass(frozen=True)
class Gain:
    """How many times as fast one way is as another.

    Attributes:
        median: of the rounds' ratios of times.
        low, high: their 20th and 80th percentile; of fewer than `FEWEST` rounds, or times that were
            not taken in turn, what the extremes of both allow.
        won, rounds: rounds in which it was the faster one, of how many; 0 of times that were not
            taken in turn.
    """

    median: float
    low: float
    high: float
    won: int = 0
    rounds: int = 0

    @property
    def sure(self) -> bool:
        """Whether it is more than `LEAST`, and beyond the noise: a coin would give as many rounds
        to it with a probability of at most `CHANCE`."""
        likely = sum(math.comb(self.rounds, k) for k in range(self.won, self.rounds + 1))
        return self.median > 1 + LEAST and likely <= CHANCE * 2**self.rounds

    def __str__(self) -> str:
        return f"{self.median:.2f} times as fast ({self.low:.2f} to {self.high:.2f})"


def gain(pairs: Sequence[tuple[Trial, Trial]]) -> Gain | None:
    """That of the second of all pairs together over the first; None of no pairs."""
    if not pairs:
        return None
    rounds = min(len(t.samples) for pair in pairs for t in pair)
    if rounds >= FEWEST and all(t.final for pair in pairs for t in pair):
        before, after = (np.sum([pair[i].samples[:rounds] for pair in pairs], 0) for i in (0, 1))
        low, median, high = np.percentile(before / np.maximum(after, 1e-12), (20, 50, 80))
        won = int((before > after).sum())
        return Gain(float(median), float(low), float(high), won, rounds)

    def total(which: int, of: Callable[[Sequence[float]], float]) -> float:
        return max(
            sum(of(pair[which].samples or [pair[which].seconds or 0.0]) for pair in pairs), 1e-12
        )

    return Gain(
        total(0, statistics.median) / total(1, statistics.median),
        total(0, min) / total(1, max), total(0, max) / total(1, min),
    )  # fmt: skip


def settled(found: Sequence[Trial], default: Trial | None) -> list[Trial]:
    """Trials that count, what is to be kept first: the first of `found` only if that is faster than
    the default by more than the noise, else the default."""
    if not found or default is None or not default.counts or found[0] is default:
        return list(found)
    faster = gain([(default, found[0])])
    if faster is not None and faster.sure:
        return list(found)
    return [default, *(t for t in found if t is not default)]


@dataclass(frozen=True)
class Tuned:
    """What `deqfusion.autotune` found.

    Attributes:
        device: what it is for.
        solver: the layer's solver with the best memory (and on a CPU ladder), to be passed on as
            `DEQFusion(..., solver=found.solver)`; its own where no other is faster by more than the
            noise. The layer has it only if `apply` asked for that.
        entries: the best configurations, one per solve (on a CPU one for all): those with the
            solver that the layer has now, then those with the other of its own and `solver`, where
            they have different memories. Empty if nothing met the tolerance, or if it is only
            predicted.
        trials: every way that was tried, the best first by solve.
        file: where the entries are stored, or None.
        speedup: of the configurations kept for the layer's own solver over the defaults, of all
            solves that have both; None: the defaults are kept, or none met the tolerance.
        solver_speedup: of `solver` over the layer's own, each with what is kept for it, in the
            forward solves; None: the layer's own is kept, or did not meet the tolerance.
        predicted: whether times are the cost model's, and nothing was measured.
        interrupted: whether the search was cut short by the user.
        without_answer: rows of some block that the layer as it is does not solve: left out.
    """

    device: str
    solver: Solver
    entries: tuple[Entry, ...]
    trials: tuple[Trial, ...]
    file: Path | None = None
    predicted: bool = False
    interrupted: bool = False
    without_answer: int = 0
    speedup: Gain | None = None
    solver_speedup: Gain | None = None

    @property
    def rounds(self) -> int:
        """In which the fastest ways of every solve were timed in turn: fewer than `FEWEST` cannot
        tell them from noise, so that defaults are kept."""
        taken: dict[str, int] = {}
        for t in self.trials:
            if t.counts:
                taken[t.way.solve] = max(taken.get(t.way.solve, 0), t.final * len(t.samples))
        return min(taken.values(), default=0)

    def table(self, most: int = 8) -> str:
        """The trials as text, `most` of each solve; * marks what is kept, and "default/this" is how
        many times as fast a way is as the default, with the spread."""
        kept = {(e.problem.solve, e.best) for e in self.entries}
        times = [t.seconds for t in self.trials if t.seconds is not None]
        unit, scale = ("ms", 1e3) if times and min(times) > 1e-3 else ("us", 1e6)
        on_gpu = not all(isinstance(t.way.config, Host) for t in self.trials)
        time = "predicted " if self.predicted else "cold " if on_gpu else ""
        times_of = f"{time}{unit}", "20..80%", f"warm {unit}"
        lines: list[tuple[str, ...]]
        lines = [("", "solve", "choice", "residual", *times_of, "default/this", "")]
        defaults = {t.way.solve: t for t in self.trials if t.default and t.counts}
        shown: dict[str, int] = {}
        for trial in self.trials:
            solve = trial.way.solve
            shown[solve] = shown.get(solve, 0) + 1
            won = trial.counts and (solve, trial.timed()) in kept
            if shown[solve] <= most or trial.default or won:
                numbers = trial.numbers(scale, defaults.get(solve), on_gpu)
                lines.append(
                    ("*" if won else "", solve, words(trial.way), *numbers, trial.fault or "")
                )
        return aligned(lines, left=(0, 1, 2, 8))


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Lines of cells in columns, the first with their heads; without columns that are empty, and
    right-aligned but for those of `left`."""
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:]) or not i]
    widths = {i: max(len(line[i]) for line in lines) for i in kept}
    rows = (
        "  ".join(line[i].ljust(widths[i]) if i in left else line[i].rjust(widths[i]) for i in kept)
        for line in lines
    )
    return "\n".join(row.rstrip() for row in rows)


def written(solver: Solver) -> str:
    """A solver as one would write it: without what is the default."""
    values = [(f, getattr(solver, f.name)) for f in fields(solver) if f.init]
    given = ", ".join(f"{f.name}={value!r}" for f, value in values if value != f.default)
    return f"{type(solver).__name__}({given})"


def told(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def words(way: Way) -> str:
    """A way in a line."""
    c = way.config
    if isinstance(c, Host):
        ladder = "on" if way.ladder else "off"
        return f"memory {way.memory}, ladder {ladder}, compact below {c.compact_below:g}"
    return (
        f"{c.schedule} {c.rows} rows, depth {c.depth}, {c.warps} warps, {c.stages} stages, "
        f"m {way.memory}"
    )


def provenance(device: torch.device) -> dict[str, str]:
    """Driver, versions and date, as an entry has them."""
    return {
        "driver": _driver() if device.type == "cuda" else "none",
        "torch": torch.__version__,
        "triton": kernels.triton_version() or "none",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.splitlines()[0].strip() or "unknown"
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def entry_of(
    problem: Problem, trials: Sequence[Trial], default: Trial | None, tolerance: float,
    device: str, source: dict[str, str],
) -> Entry:  # fmt: skip
    """The entry of a solve, from trials of `settled`, and the default's."""
    best, *others = trials
    return Entry(
        problem, best.timed(), others[0].timed() if others else None,
        None if default is None else default.timed(),
        0.0 if best.residual is None else best.residual, tolerance, device, **source,
    )  # fmt: skip
