"""What tuning found: every way that was tried, and the entries to keep."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deqfusion import kernels
from deqfusion.kernels.tuning import Entry, Host, Problem, Timed
from deqfusion.solvers import Solver
from deqfusion.tuning.example import Way

__all__ = ["Trial", "Tuned", "entry_of", "provenance", "ratio"]


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
        final: whether those are of the finals, which alone compare with one another.
    """

    way: Way
    default: bool = False
    residual: float | None = None
    fault: str | None = None
    seconds: float | None = None
    warm: float | None = None
    final: bool = False

    @property
    def counts(self) -> bool:
        """Whether it was verified and timed."""
        return self.fault is None and self.seconds is not None

    def timed(self) -> Timed:
        """As an entry has it."""
        if self.seconds is None:
            raise ValueError("got a trial without a time, expected one that counts")
        warm = self.seconds if self.warm is None else self.warm
        way = self.way
        return Timed(way.config, way.memory, way.ladder, self.seconds, warm)


@dataclass(frozen=True)
class Tuned:
    """What `deqfusion.autotune` found.

    Attributes:
        device: what it is for.
        solver: the layer's solver with the best memory (and on a CPU ladder). The layer has it
            only if `apply` asked for that.
        entries: the best configurations, one per solve (on a CPU one for all), with the solver
            that the layer has now: its own, or the best one if `apply` asked for that (or if with
            its own nothing met the tolerance). Empty if nothing did, or if it is only predicted.
        trials: every way that was tried, the best first by solve.
        file: where the entries are stored, or None.
        speedup: time of the defaults over that of the best configurations with the layer's own
            solver, of all solves that have both; None: none has.
        solver_speedup: time of the best configurations with the layer's own solver over that with
            `solver`, of the forward solves.
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
    speedup: float | None = None
    solver_speedup: float | None = None

    def table(self, most: int = 8) -> str:
        """The trials as text, `most` of each solve; * marks the best."""
        best = {(e.problem.solve, e.best) for e in self.entries}
        times = [t.seconds for t in self.trials if t.seconds is not None]
        unit, scale = ("ms", 1e3) if times and min(times) > 1e-3 else ("us", 1e6)
        heads = f"predicted {unit}" if self.predicted else f"cold {unit}"
        lines = [f"  {'solve':<17}{'choice':<44}{'residual':>9}{heads:>13}{f'warm {unit}':>10}"]
        shown: dict[str, int] = {}
        for trial in self.trials:
            solve = trial.way.solve
            shown[solve] = shown.get(solve, 0) + 1
            won = trial.counts and (solve, trial.timed()) in best
            if shown[solve] > most and not (trial.default or won):
                continue
            residual = "" if trial.residual is None else f"{trial.residual:.1e}"
            columns = "".join(
                f"{'' if t is None else f'{scale * t:.1f}':>{width}}"
                for t, width in ((trial.seconds, 13), (trial.warm, 10))
            )
            note = ("  default" if trial.default else "") + (
                f"  {trial.fault}" if trial.fault else ""
            )
            mark = "*" if won else " "
            lines.append(f"{mark} {solve:<17}{words(trial.way):<44}{residual:>9}{columns}{note}")
        return "\n".join(lines)


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
    """The entry of a solve, from trials that count, the fastest first, and the default's."""
    best, *others = trials
    return Entry(
        problem, best.timed(), others[0].timed() if others else None,
        None if default is None else default.timed(),
        0.0 if best.residual is None else best.residual, tolerance, device, **source,
    )  # fmt: skip


def ratio(pairs: Sequence[tuple[Trial, Trial]]) -> float | None:
    """Time of the first of all pairs over that of the second; None of no pairs."""
    before, after = (sum(pair[i].seconds or 0.0 for pair in pairs) for i in (0, 1))
    return before / max(after, 1e-12) if pairs else None
