"""`deqfusion.autotune`: search, keep, and say what was found."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from deqfusion import ops
from deqfusion import validation as check
from deqfusion.kernels import tuning
from deqfusion.kernels.cost import DEVICES
from deqfusion.module import DEQFusion, Features
from deqfusion.tuning import search
from deqfusion.tuning.example import Example
from deqfusion.tuning.result import Trial, Tuned, entry_of, provenance, ratio

__all__ = ["autotune"]

logger = logging.getLogger(__name__)


def autotune(
    module: DEQFusion,
    example_features: Features,
    *,
    budget: float = 120.0,
    backward: bool | None = None,
    target: str | None = None,
    apply: bool = False,
    save: bool = True,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Tuned:
    """Finds what solves a layer fastest on the device at hand, and keeps it for every later run.

    On a GPU: schedule, rows and depth of tiles, warps and stages of the Triton programs, and the
    memory m of `Anderson`, from 0 to 8. On a CPU: m, the precision ladder, and when rows that
    ended leave the work; threads are left alone. What counts is the time to a residual that was
    verified in float64, not the time of a step. An answer that misses the tolerance never wins.

    Configurations are stored by device, shape and dtype, with rows in buckets of powers of two,
    and the operators look them up, for rows fewer or more by a factor of 4 at most. Memory and
    ladder are the solver's, hence yours: they are in `.solver` of the result, and the layer gets
    that with `apply=True`. (Not by default: times decide, so that answers, within the tolerance,
    would differ from run to run.) What is stored was timed with the solver that the layer has in
    the end: its own, or the best one if that is applied.

    Args:
        module: a layer on its device; its parameters and solver are what is timed.
        example_features: as the layer takes them, of the number of rows to tune for.
        budget: seconds, about: what has begun is ended. Most go into compiling; compiled programs
            are kept, so that a second call gets further.
        backward: whether to tune the adjoint solves as well; None: if the module is in training
            mode.
        target: None, or "h200", "h100", "a100", "mi300x": ranks by the cost model for a device
            that is not there. Nothing is timed, stored or applied.
        apply: whether to give the module the best solver.
        save: whether to store what was found.
        folder: where to store it, in a file with the device's name; None: where it is looked up, in
            the platform's folder for caches or that of `DEQFUSION_CACHE`.
        progress: whether to show a progress bar on standard error.

    Returns:
        `Tuned`. After an interruption (KeyboardInterrupt) what was found up to then, stored too.
        With `file` None and a warning of `logging` if in the end it could not be stored.

    Raises:
        ValueError, TypeError: naming the argument, what was got and what was expected.
        OSError: if it is known beforehand that the file cannot be written.
    """
    check.positive("budget", budget)
    for name, value in (("apply", apply), ("save", save), ("progress", progress)):
        check.boolean(name, value)
    if not isinstance(module, DEQFusion):
        raise TypeError(f"module: got {type(module).__name__}, expected a DEQFusion")
    backward = module.training if backward is None else backward
    check.boolean("backward", backward)
    if target is not None:
        check.choice("target", target, tuple(DEVICES))
        return _predict(Example(module, example_features, backward), target)
    programs = _runs_programs(module.modality_weight1.device)
    begin = search.clock()
    example = Example(module, example_features, backward)
    name = _device_name(example.device, programs)
    file = None
    if save:
        whole = f"{tuning.slug(name)}.json"
        file = tuning.user_file(name) if folder is None else Path(folder) / whole
        tuning.prepare(file)
    with _bar(budget, progress) as report:
        run = search.Search(example, budget, begin, report, _stored(example, programs, name))
        interrupted = False
        try:
            run.programs() if programs else run.host()
        except KeyboardInterrupt:
            interrupted = True
    memory, ladder = run.best_solver()
    solves = example.solves if programs else ("host",)
    trials, entries = _conclude(run, solves, (memory, ladder), apply, name)
    solver = example.solver_of(memory, ladder)
    if apply:
        module.solver = solver
    speedup, solver_speedup = _gains(run, solves, (memory, ladder))
    return Tuned(
        name, solver, tuple(entries), tuple(trials), _saved(entries, file),
        interrupted=interrupted, without_answer=example.without_answer,
        speedup=speedup, solver_speedup=solver_speedup,
    )  # fmt: skip


def _saved(entries: list[tuning.Entry], file: Path | None) -> Path | None:
    """The file, once the entries are there; None, and a warning, if it cannot be written."""
    if file is None or not entries:
        return None
    try:
        tuning.save(entries, file)
    except OSError as error:
        # Minutes of measuring are no less true for it.
        reason = error.strerror or str(error)
        logger.warning("%s: cannot be saved (%s): what was found is not kept", file, reason)
        return None
    return file


def _predict(example: Example, target: str) -> Tuned:
    from deqfusion.tuning.predict import predicted

    trials, memory = predicted(example, target)
    return Tuned(
        target, example.solver_of(memory, example.own[1]), (), tuple(trials), predicted=True,
        without_answer=example.without_answer,
    )  # fmt: skip


def _runs_programs(device: torch.device) -> bool:
    """Whether the Triton programs solve on a device.

    Raises:
        ValueError: if the reference does, and on a GPU.
    """
    programs = ops.checked_implementation(device) == "triton"
    if not programs and device.type != "cpu":
        raise ValueError(
            f"DEQFUSION_BACKEND=reference: got a module on {device}, expected one on a CPU: the "
            "reference has nothing to tune on a GPU"
        )
    return programs


def _device_name(device: torch.device, programs: bool) -> str:
    if not programs:
        return tuning.host_name()
    from deqfusion.kernels.launch import device_name

    return device_name(device)


def _stored(example: Example, programs: bool, name: str) -> dict[str, tuning.Choice]:
    """What was found before, by solve."""
    found = {}
    for solve in example.solves if programs else ("host",):
        choice = tuning.lookup(name, *astuple(example.problem(solve)))
        if choice is not None:
            found[solve] = choice
    return found


def _conclude(
    run: search.Search, solves: tuple[str, ...], solver: tuple[int, bool], applied: bool, name: str
) -> tuple[list[Trial], list[tuning.Entry]]:
    """All trials, the fastest of every solve first, and the entries of those solved.

    solver: memory and ladder of the best.
    """
    example, source = run.example, provenance(run.example.device)
    trials, entries = [], []
    for solve in solves:
        counted, best = run.of(solve), run.by(solve, *solver)
        # For the solver that the layer has from now on: with another one, others may be faster. If
        # with its own nothing is right, it cannot keep that.
        kept = best if applied else run.own(solve) or best
        if kept:
            default = next((t for t in counted if t.default), None)
            problem, tolerance = example.problem(solve), example.tolerance_of(solve)
            entries.append(entry_of(problem, kept, default, tolerance, name, source))
        trials += counted
        trials += [t for t in run.trials if t.way.solve == solve and t not in counted]
    return trials, entries


def _gains(
    run: search.Search, solves: tuple[str, ...], solver: tuple[int, bool]
) -> tuple[float | None, float | None]:
    """How many times as fast the best configurations are with the layer's own solver, and that
    with the best solver."""
    configs, solvers = [], []
    for solve in solves:
        own, best = run.own(solve), run.by(solve, *solver)
        if own:
            configs += [(t, own[0]) for t in own if t.default]
            solvers += [(own[0], t) for t in best[:1] if "adjoint" not in solve]
    return ratio(configs), ratio(solvers)


@contextmanager
def _bar(budget: float, shown: bool) -> Iterator[Any]:
    """A function that shows the seconds passed and what is being done."""
    from tqdm import tqdm

    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(
        total=budget, desc="autotune", disable=not shown, bar_format=layout, dynamic_ncols=True
    ) as bar:

        def report(passed: float, text: str) -> None:
            bar.n = min(passed, budget)
            bar.set_postfix_str(text)

        yield report
