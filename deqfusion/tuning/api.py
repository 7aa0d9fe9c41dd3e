"""`deqfusion.autotune`: search, keep, and say what was found."""

from __future__ import annotations

import itertools
import logging
import os
import sys
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
from deqfusion.tuning.result import Gain, Trial, Tuned, entry_of, gain, provenance

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

    Nothing replaces a default that is not faster beyond the noise of interleaved rounds: in nearly
    all of them, and in the median by 2 % (`deqfusion.tuning.result.Gain`).

    What is found goes two ways. Configurations (on a CPU the share of rows below which those that
    ended leave the work) are stored by device, shape, dtype, the solver's memory and on a CPU
    torch's threads, with rows in buckets of powers of two, and the operators look them up, for
    rows fewer or more by a factor of 4 at most: there is nothing to do for them. Memory and ladder
    are the solver's, hence yours, and nobody looks them up: take `.solver` of the result, as in
    `DEQFusion(dim, n, solver=found.solver)`, or `apply=True`. (Not by default: times decide, so
    that answers, within the tolerance, would differ from run to run.) An adjoint's solver stays as
    it is. Configurations are stored for the layer's own solver and for that one.

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
        `deqfusion.tuning.Tuned`. After an interruption (KeyboardInterrupt) what was found up to
        then, stored too. With `file` None and a warning of `logging` if in the end it could not be
        stored.

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
    best, solver_speedup = _best_solver(run)
    solves = example.solves if programs else ("host",)
    trials, entries = _conclude(run, solves, best, apply, name)
    solver = example.solver_of(*best)
    if apply:
        module.solver = solver
    speedup = _gain(run, solves)
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
    run: search.Search, solves: tuple[str, ...], best: tuple[int, bool], applied: bool, name: str
) -> tuple[list[Trial], list[tuning.Entry]]:
    """All trials, the fastest of every solve first, and the entries of those solved.

    best: memory and ladder of the best solver.
    """
    example, source = run.example, provenance(run.example.device)
    solvers = [best, example.own] if applied else [example.own, best]
    found: dict[tuning.Problem, tuning.Entry] = {}
    # First for the solver that the layer has from now on; then for the other, with which other
    # configurations may be faster, for when it has that.
    for solver, solve in itertools.product(solvers, solves):
        kept = run.kept(solve, *solver)
        # An adjoint has a solver of its own.
        problem = example.problem(solve, None if "adjoint" in solve else solver[0])
        if kept and problem not in found:
            default = next((t for t in run.of(solve) if t.default), None)
            tolerance = example.tolerance_of(solve)
            found[problem] = entry_of(problem, kept, default, tolerance, name, source)
    trials = []
    for solve in solves:
        counted = run.of(solve)
        trials += counted
        trials += [t for t in run.trials if t.way.solve == solve and t not in counted]
    return trials, list(found.values())


def _best_solver(run: search.Search) -> tuple[tuple[int, bool], Gain | None]:
    """Memory and ladder of the best solver, and what it gains: the layer's own, and None, if no
    other is faster by more than the noise."""
    own, best = run.example.own, run.best_solver()
    faster = None if best == own else run.solver_gain(best)
    return (own, None) if faster is not None and not faster.sure else (best, faster)


def _gain(run: search.Search, solves: tuple[str, ...]) -> Gain | None:
    """Of what is kept for the layer's own solver over the defaults; None if that is they."""
    pairs = []
    for solve in solves:
        kept = run.kept(solve, *run.example.own)
        pairs += [(t, kept[0]) for t in kept if t.default]
    return gain(pairs) if any(before is not after for before, after in pairs) else None


@contextmanager
def _bar(budget: float, shown: bool) -> Iterator[Any]:
    """A function that shows the seconds passed and what is being done."""
    from tqdm import tqdm

    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(
        total=budget, desc="autotune", disable=not shown, bar_format=layout, dynamic_ncols=True,
        # A log file needs fewer lines than a terminal.
        mininterval=0.1 if sys.stderr.isatty() else 10, miniters=0,
    ) as bar:  # fmt: skip

        def report(passed: float, text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(min(passed, budget) - bar.n)

        yield report
