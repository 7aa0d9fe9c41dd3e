"""Runs a suite: tolerances at equal verified residual, verification, interleaved timing.

Every contender starts from the tolerance that is the target. Stopping rules differ: a contender
that measures a row's whole state as one vector can stop while one block is still above the target.
So whoever misses the target in fp64 has its tolerance tightened, in proportion to the miss, until
every row and every block meets it, forward first, then the backward at that forward tolerance.
One whose steps do not suffice is failed and gets no time. The answer of the last timed run is
verified again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from . import contenders, environment, timing
from .contenders import Answer
from .problem import Problem, Shape
from .suites import MODES, Suite
from .verification import AdjointSystem, gradient_error, verify_state

FORMAT = 1
REFERENCE = "ours"
"""Ratios are the time of a contender over the time of this one."""

TIGHTEN = (0.5, 0.95)
"""Bounds of the factor by which a tolerance is tightened; between them, target over residual."""

GRADIENT_SLACK = 10
"""Allowed error over the target of the gradients against what the adjoint gives in fp64: a ReLU's
input within rounding of 0 may go either way in some row (`AdjointSystem`)."""

TIGHTEST = 1e-3
"""The smallest fraction of the target tried as a tolerance."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets torch's intra-operator threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Trial:
    """One contender on one problem: its tolerances, and what verification said of its answers.

    Args:
        name: of the contender.
        problem: the case.
        target: relative residual to be met.

    Attributes:
        status: "ok", "failed" or "unavailable".
        reason: why it is not "ok"; empty if it is.
        found: by mode, the verified residuals and the steps of the last verified answer.
    """

    def __init__(self, name: str, problem: Problem, target: float) -> None:
        self.name, self.problem, self.target = name, problem, target
        self.status, self.reason = "ok", ""
        self.found: dict[str, dict[str, Any]] = {mode: {} for mode in MODES}
        self.tolerances = dict.fromkeys(MODES, target)
        kind = contenders.get(name)
        unavailable = kind.unavailable()
        if unavailable is not None:
            self.status, self.reason = "unavailable", unavailable
            return
        self.contender = kind(problem)
        for mode in MODES:
            if self.status == "ok":
                self._tighten(mode)

    def function(self, mode: str) -> Callable[[], Answer]:
        """What is timed."""
        return getattr(self.contender, mode)

    def verify(self, mode: str, answer: Answer) -> bool:
        """Checks an answer in fp64 and records the outcome; False where it misses the target."""
        found: dict[str, Any] = {"residual": verify_state(self.problem, answer.state)}
        if mode == "forward_backward":
            found |= _verify_backward(self.problem, answer)
        self.found[mode] = {**found, "steps": dict(answer.steps)}
        return self._miss(mode) <= 1

    def fail(self, mode: str) -> None:
        """Takes the contender out of the comparison for what `found` says of this mode."""
        figures = ", ".join(
            f"{key} {value:.2e}" for key, value in self.found[mode].items() if key != "steps"
        )
        self.status = "failed"
        steps = ", ".join(f"{key} {count}" for key, count in self.found[mode]["steps"].items())
        self.reason = f"{mode}: {figures} after {steps} steps, expected at most {self.target:.0e}"

    def _miss(self, mode: str) -> float:
        """The worst figure of the last verification over what is allowed for it."""
        return max(
            value / (self.target * (GRADIENT_SLACK if key == "gradient_error" else 1))
            for key, value in self.found[mode].items()
            if key != "steps"
        )

    def _tighten(self, mode: str) -> None:
        while True:
            self.contender.set_tolerances(*(self.tolerances[name] for name in MODES))
            if self.verify(mode, self.function(mode)()):
                return
            self.tolerances[mode] *= min(max(1 / self._miss(mode), TIGHTEN[0]), TIGHTEN[1])
            if self.tolerances[mode] < self.target * TIGHTEST:
                self.fail(mode)
                return


def _verify_backward(problem: Problem, answer: Answer) -> dict[str, float]:
    """Residual of the adjoint, and error of the gradients against what it gives in fp64."""
    if answer.linearised_at is None or answer.adjoint is None or answer.gradients is None:
        raise ValueError("a forward_backward answer needs linearised_at, adjoint and gradients")
    system = AdjointSystem(problem, answer.linearised_at, answer.split)
    # Before the adjoint, which may take another run: these are the gradients that were timed.
    gradients = answer.gradients()
    adjoint = answer.adjoint()
    residual = system.residual(adjoint)
    if answer.gradients_at is not None:
        system = AdjointSystem(problem, answer.gradients_at, answer.split)
    return {
        "adjoint_residual": residual,
        "gradient_error": gradient_error(gradients, system.gradients(adjoint)),
    }


def run_case(
    shape: Shape, thread_count: int, suite: Suite, progress: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Measures one shape with one thread count.

    Args:
        shape: rows, width, modalities.
        thread_count: of torch, within operators.
        suite: contenders, rounds, loss, target and seed.
        progress: called with a line on what is happening.

    Returns:
        One record per mode, as in the JSON files.
    """
    with threads(thread_count):
        problem = Problem(shape, seed=suite.seed, loss=suite.loss)
        trials = []
        for name in suite.contenders:
            progress(f"{shape} {thread_count}t: verifying {name}")
            trials.append(Trial(name, problem, suite.target))
        records = []
        for mode in MODES:
            progress(f"{shape} {thread_count}t: timing {mode}")
            records.append(_time(trials, mode, shape, thread_count, suite))
    return records


def _time(
    trials: list[Trial], mode: str, shape: Shape, thread_count: int, suite: Suite
) -> dict[str, Any]:
    last: dict[str, Answer] = {}

    def keeping(trial: Trial) -> Callable[[], None]:
        function = trial.function(mode)

        def run() -> None:
            last[trial.name] = function()

        return run

    running = {trial.name: keeping(trial) for trial in trials if trial.status == "ok"}
    samples = timing.interleaved(running, suite.rounds)
    for trial in trials:
        if trial.status == "ok" and not trial.verify(mode, last[trial.name]):
            trial.fail(mode)
    passed = {trial.name: samples[trial.name] for trial in trials if trial.status == "ok"}
    return {
        "shape": [shape.batch, shape.dim, shape.num_modalities],
        "threads": thread_count,
        "mode": mode,
        "contenders": {trial.name: _record(trial, mode, passed) for trial in trials},
    }


def _record(trial: Trial, mode: str, passed: dict[str, list[float]]) -> dict[str, Any]:
    seconds = passed.get(trial.name)
    reference = passed.get(REFERENCE)
    ratio = None
    if seconds is not None and reference is not None and trial.name != REFERENCE:
        ratio = timing.ratios(seconds, reference)
    return {
        "status": trial.status,
        "reason": trial.reason,
        "tolerances": dict(trial.tolerances) if trial.status != "unavailable" else None,
        "verified": trial.found[mode] or None,
        "seconds": None if seconds is None else {**timing.summary(seconds), "samples": seconds},
        "ratio": ratio,
    }


def run(
    suite: Suite,
    *,
    progress: Callable[[str], object] = lambda message: None,
    save: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Runs a suite.

    Args:
        suite: what to measure.
        progress: called with a line on what is happening.
        save: called with the result so far after every case, so that an interrupted run keeps
            what it has measured.

    Returns:
        Format number, suite, environment and one record per shape, thread count and mode.

    Raises:
        ValueError: if a contender is unknown.
    """
    for name in suite.contenders:
        contenders.get(name)
    options = asdict(suite)
    options["shapes"] = [str(shape) for shape in suite.shapes]
    result: dict[str, Any] = {
        "format": FORMAT,
        "suite": json.loads(json.dumps(options)),
        "environment": environment.record(),
        "reference": REFERENCE,
        "cases": [],
    }
    for thread_count in suite.threads:
        for shape in suite.shapes:
            result["cases"] += run_case(shape, thread_count, suite, progress)
            save(result)
    return result


def best_baseline(case: dict[str, Any]) -> str | None:
    """Name of the fastest baseline of a case that met the target, None if none did."""
    timed = {
        name: entry["seconds"]["median"]
        for name, entry in case["contenders"].items()
        if entry["seconds"] is not None and contenders.get(name).baseline
    }
    return min(timed, key=lambda name: timed[name], default=None)


def quick_comparison(
    batch: int = 256, dim: int = 512, num_modalities: int = 2, threads: int = 1, rounds: int = 5
) -> dict[str, Any]:
    """Times equilibrium fusion against eager PyTorch on this machine.

    Args:
        batch: rows.
        dim: width, a multiple of 4.
        num_modalities: at least 1.
        threads: of torch, within operators; set back afterwards.
        rounds: samples of each.

    Returns:
        "shape", "threads", "rounds", "tol" as given; "contenders" with "textbook" and "ours", each
        with "ok", "reason", "residual" (worst row and block, verified in fp64; None if it did not
        run), "forward" and "forward_backward" (median, p20, p80 in seconds; None if it failed);
        "ratios" by mode: textbook seconds over ours, round by round (None if either failed).

    Raises:
        ValueError: if a size is below 1 or the width does not divide.
    """
    shape = Shape(batch, dim, num_modalities)
    names = ("textbook", REFERENCE)
    suite = Suite("quick_comparison", (shape,), names, threads=(threads,), rounds=rounds)
    cases = {case["mode"]: case for case in run(suite)["cases"]}
    found: dict[str, Any] = {}
    for name in names:
        entries = {mode: cases[mode]["contenders"][name] for mode in MODES}
        failed = [entry for entry in entries.values() if entry["status"] != "ok"]
        residuals = [e["verified"]["residual"] for e in entries.values() if e["verified"]]
        found[name] = {
            "ok": not failed,
            "reason": failed[0]["reason"] if failed else "",
            "residual": max(residuals, default=None),
            **{mode: _without_samples(entry["seconds"]) for mode, entry in entries.items()},
        }
    return {
        "shape": {"batch": batch, "dim": dim, "num_modalities": num_modalities},
        "threads": threads,
        "rounds": rounds,
        "tol": suite.target,
        "contenders": found,
        "ratios": {mode: cases[mode]["contenders"]["textbook"]["ratio"] for mode in MODES},
    }


def _without_samples(seconds: dict[str, Any] | None) -> dict[str, float] | None:
    if seconds is None:
        return None
    return {key: value for key, value in seconds.items() if key != "samples"}
