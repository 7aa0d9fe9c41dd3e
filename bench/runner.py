"""Runs a suite: verification at equal residual, interleaved timing, and what else a run takes.

Correctness comes first: what a contender answers is held against fp64 in this run
(`deqfusion.bench.trial`), and one that misses the target has no time. After the timing every one
runs once more and is verified again. Memory and launches are taken from runs of their own as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from deqfusion.tuning.result import told

from . import contenders, environment, fits, floor, limits, peaks, resources, timing, work
from .limits import Budget, Limit, OutOfTime, stopped
from .problem import Problem, Shape
from .results import FORMAT
from .suites import MODES, Case, Suite, cases
from .trial import Trial, Truth

REFERENCE = "ours"
"""Ratios are the time of a contender over the time of this one."""

Record = dict[str, Any]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets torch's intra-operator threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(suite: Suite) -> torch.device:
    """Where a suite runs.

    Raises:
        ValueError: if it asks for a GPU and torch can use none.
    """
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, expected cpu: torch can use no GPU here")
    if suite.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(suite.device)


def names_of(suite: Suite, device: torch.device) -> tuple[str, ...]:
    """The suite's contenders on a device."""
    return suite.on_gpu if device.type == "cuda" and suite.on_gpu else suite.contenders


@dataclass
class Setting:
    """What the cases of one thread count share.

    Attributes:
        suite, device, threads: as named.
        gpu: its name, or None.
        limit: who would take too long.
        budget: which case would.
        progress: called with a line on what is happening.
        place: of the case among all.
        cases: how many are left, that one included.
    """

    suite: Suite
    device: torch.device
    threads: int
    gpu: str | None
    limit: Limit
    budget: Budget
    progress: Callable[[str], object]
    place: str = ""
    cases: int = 1


def run_case(case: Case, setting: Setting) -> list[Record]:
    """Measures one case.

    Returns:
        One record per mode, as in the JSON files.
    """
    suite, target = setting.suite, case.target or setting.suite.target
    names, modes = names_of(suite, setting.device), case.modes or suite.modes
    refusal = setting.budget.refuse(case, setting.device.type == "cuda")
    absent = {
        name: _absent("skipped", reason)
        for name in names
        if (reason := refusal or setting.limit.refuse(name, case))
    }
    trials: list[Trial] = []
    if len(absent) < len(names):
        if "torch._dynamo" in sys.modules:
            # Code of earlier cases would be looked through at every call.
            torch.compiler.reset()
        try:
            problem = Problem(case.shape, seed=suite.seed, loss=suite.loss).to(setting.device)
        except Exception as error:
            # Of memory for the largest there may not be enough; the others' times are not lost.
            absent = {n: _absent("failed", f"problem: {told(error)}") for n in names} | absent
        else:
            truth = Truth(problem, target)
            found = _verified([n for n in names if n not in absent], case, setting, problem, truth)
            trials = [trial for trial in found.values() if isinstance(trial, Trial)]
            absent |= {
                name: _absent("skipped", reason)
                for name, reason in found.items()
                if isinstance(reason, str)
            }
    records = []
    for mode in modes:
        entries = dict(absent)
        if trials:
            setting.progress(f"{_where(case, setting)}: timing {mode}")
            entries |= _time(trials, mode, case, setting)
        records.append(
            {
                "shape": [case.shape.batch, case.shape.dim, case.shape.num_modalities],
                "label": case.label,
                "factors": list(case.factors),
                "target": target,
                "threads": setting.threads,
                "mode": mode,
                "contenders": {name: entries[name] for name in names},
            }
        )
    return records


def _verified(
    names: Sequence[str], case: Case, setting: Setting, problem: Problem, truth: Truth
) -> dict[str, Trial | str]:
    """Trials by contender, in this order; of those for which there was no time, why."""
    budget, modes = setting.budget, case.modes or setting.suite.modes
    most = budget.to_verify(setting.cases, setting.device.type == "cuda")
    begun = budget.clock()
    found: dict[str, Trial | str] = {}
    for name in names:
        if reason := budget.short():
            found[name] = reason
            continue
        left = None if most is None else most - (budget.clock() - begun)
        if left is not None and left <= 0:
            found[name] = (
                f"not measured: the {most:.0f} s to verify this case's contenders are over"
            )
            continue
        setting.progress(f"{_where(case, setting)}: verifying {name}")
        try:
            with stopped(left) as late:
                trial = Trial(name, problem, truth.target, modes, truth)
        except OutOfTime as error:
            found[name] = str(error)
            continue
        found[name] = trial
        for mode in modes:
            if late and trial.status[mode] == "failed":
                trial.status[mode], trial.reason[mode] = "skipped", str(late[0])
    return found


def _where(case: Case, setting: Setting) -> str:
    target = f" to {case.target:g}" if case.target else ""
    return f"{setting.place}: {case.shape}{target} {setting.threads}t"


def _time(trials: list[Trial], mode: str, case: Case, setting: Setting) -> dict[str, Record]:
    """Times the trials that passed, and verifies what they answer after it once more."""
    stopwatch = timing.Stopwatch(setting.device)
    passed = {trial.name: trial for trial in trials if trial.status[mode] == "ok"}
    skipped: dict[str, str] = {}
    extra: dict[str, dict[str, Any]] = {}
    bounded, round_seconds = (setting.limit.seconds, setting.budget.seconds) != (None, None), 0.0
    for name, trial in passed.items():
        contender = trial.contender
        function = contender.function(mode)
        if reason := setting.budget.short():
            skipped[name] = reason
            continue
        with trial.guard(mode), contender.context():
            seconds = limits.once(function, stopwatch) if bounded else None
            if reason := setting.limit.note(name, case, seconds):
                skipped[name] = reason
                continue
            # Gradients that a run before left would be released in this one.
            contender.release()
            extra[name] = resources.measure(function, setting.device)
            round_seconds += seconds or 0.0
    if reason := setting.budget.short(setting.suite.rounds * round_seconds):
        skipped |= dict.fromkeys(extra, reason)
        extra = {}
    timed = {name: passed[name].contender for name in extra}
    wall, on_device = timing.interleaved(
        {name: contender.function(mode) for name, contender in timed.items()},
        setting.suite.rounds,
        contexts={name: contender.context for name, contender in timed.items()},
        stopwatch=stopwatch,
        failed=lambda name, error: passed[name].raised(mode, error),
    )
    for name in wall:
        trial, contender = passed[name], timed[name]
        with trial.guard(mode):
            # Of one more run: a compiler's graph writes over what it returned when another runs.
            if not trial.verify(mode, contender.run(mode)):
                trial.missed(mode)
    times = {name: wall[name] for name in wall if passed[name].status[mode] == "ok"}
    entries = {}
    for trial in trials:
        if trial.name in skipped:
            entries[trial.name] = _absent("skipped", skipped[trial.name])
        else:
            entries[trial.name] = _record(trial, mode, times, on_device, extra, setting)
    return entries


def _absent(status: str, reason: str) -> Record:
    """The record of what was not measured."""
    missing = ("tolerances", "verified", "seconds", "device_seconds", "ratio", "memory")
    empty = dict.fromkeys((*missing, "launches", "work", "floor"))
    return {"status": status, "reason": reason, **empty}


def _record(
    trial: Trial, mode: str, wall: dict[str, list[float]], on_device: dict[str, list[float]],
    extra: dict[str, dict[str, Any]], setting: Setting,
) -> Record:  # fmt: skip
    found = _absent(trial.status[mode], trial.reason[mode])
    if found["status"] != "unavailable":
        found |= {"tolerances": dict(trial.tolerances), "verified": trial.found[mode] or None}
    if trial.name not in wall:
        return found
    seconds, ours = wall[trial.name], wall.get(REFERENCE)
    summary = timing.summary(seconds)
    found["seconds"] = {**summary, "samples": seconds}
    best = summary["median"]
    if trial.name in on_device:
        measured = on_device[trial.name]
        found["device_seconds"] = {**timing.summary(measured), "samples": measured}
        best = found["device_seconds"]["median"]
    if ours is not None and trial.name != REFERENCE:
        found["ratio"] = timing.ratios(seconds, ours)
    found |= extra[trial.name]
    steps, contender = trial.found[mode]["steps"], trial.contender
    shape = trial.problem.shape
    counted = work.count(shape, mode, trial.evaluations[mode], steps, contender.memory)
    found["work"] = work.achieved(counted, best, contender.rate_of(mode))
    least = floor.seconds(contender, mode, steps, setting.gpu)
    if least is not None:
        found["floor"] = {"seconds": least, "fraction": least / best}
    return found


def here(device: torch.device) -> Record:
    """Environment and device of a result that will be measured now."""
    return {"environment": environment.record(), "device": device.type}


def run(
    suite: Suite,
    *,
    progress: Callable[[str], object] = lambda message: None,
    save: Callable[[Record], object] = lambda result: None,
) -> Record:
    """Runs a suite.

    Args:
        suite: what to measure.
        progress: called with a line on what is happening.
        save: called with the result so far after every case, so that an interrupted run keeps
            what it has measured.

    Returns:
        Format number, suite, environment, device, peaks, fits, and one record per case, thread
        count and mode.

    Raises:
        ValueError: if a contender is unknown, or the device is not there.
    """
    device = device_of(suite)
    names = names_of(suite, device)
    for name in names:
        contenders.get(name)
    options = asdict(suite)
    options.pop("cases")
    options.pop("on_gpu")
    options["shapes"] = [str(case.shape) for case in suite.cases]
    options["contenders"] = names
    measured_on = here(device)
    found = measured_on["environment"]
    gpu = found["gpu"]["name"] if device.type == "cuda" and found["gpu"] else None
    result: Record = {
        "format": FORMAT,
        "suite": json.loads(json.dumps(options)),
        **measured_on,
        "reference": REFERENCE,
        "peaks": {},
        "fits": [],
        "cases": [],
    }
    # Of a bounded run the smallest first: most cases are measured, and tell what others take.
    ordered = suite.cases if suite.budget is None else sorted(suite.cases, key=limits.size)
    for thread_count in suite.threads:
        with threads(thread_count):
            each = None if suite.budget is None else suite.budget / len(suite.threads)
            budget = Budget(each)
            progress(f"measuring what the machine can do, {thread_count}t")
            before = result["peaks"][str(thread_count)] = peaks.measure(device)
            limit = Limit(suite.limit if device.type == "cpu" else None, suite.rounds)
            setting = Setting(suite, device, thread_count, gpu, limit, budget, progress)
            for index, case in enumerate(ordered, 1):
                setting.place = f"{index} of {len(suite.cases)}"
                setting.cases = len(suite.cases) - index + 1
                begun = setting.budget.clock()
                records = run_case(case, setting)
                if any(e["seconds"] for r in records for e in r["contenders"].values()):
                    setting.budget.note(case, setting.budget.clock() - begun)
                result["cases"] += records
                result["fits"] = fits.of_cases(result["cases"])
                save(result)
            result["peaks"][str(thread_count)] = peaks.best(before, peaks.measure(device))
            save(result)
    return result


def best_baseline(case: Record) -> str | None:
    """Name of the fastest baseline of a case that met the target, None if none did."""
    known = contenders.contenders()
    timed = {
        name: entry["seconds"]["median"]
        for name, entry in case["contenders"].items()
        if entry["seconds"] is not None and name in known and known[name].baseline
    }
    return min(timed, key=lambda name: timed[name], default=None)


def quick_comparison(
    batch: int = 256, dim: int = 512, num_modalities: int = 2, threads: int = 1, rounds: int = 5
) -> dict[str, Any]:
    """Times equilibrium fusion against eager PyTorch on this machine's CPU.

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
    problems = cases(Shape(batch, dim, num_modalities))
    names = ("textbook", REFERENCE)
    suite = Suite(
        "quick_comparison", problems, names, threads=(threads,), rounds=rounds, device="cpu"
    )
    measured = {case["mode"]: case for case in run(suite)["cases"]}
    found: dict[str, Any] = {}
    for name in names:
        entries = {mode: measured[mode]["contenders"][name] for mode in MODES}
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
        "ratios": {mode: measured[mode]["contenders"]["textbook"]["ratio"] for mode in MODES},
    }


def _without_samples(seconds: dict[str, Any] | None) -> dict[str, float] | None:
    if seconds is None:
        return None
    return {key: value for key, value in seconds.items() if key != "samples"}
