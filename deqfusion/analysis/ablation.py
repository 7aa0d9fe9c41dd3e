"""Equilibrium fusion with one thing changed at a time, on any task.

    base            fusion deq with the task's options
    1, 2, 10 steps  without recursion to the equilibrium: as many weight-tied steps. The first step
                    starts from z = 0, so that its fused state has seen the modalities by x_f only
    no gate         gates held at 1/2
    no projection   modality blocks without weights: z_i = GN(ReLU(GN(x_i)))
    NAME=VALUE      one option changed; with `--change` any option of the task, such as its dropout

A change that a task has as its default is left out, and so is a number of groups that does not
divide the width.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..engine import Recipe, checked
from .base import Analysis
from .comparison import (
    by_name,
    by_task,
    comparison_notes,
    headline,
    in_order,
    metric_rows,
    readable,
    verdict,
)
from .extended import WithoutGate, WithoutProjection, extended
from .records import Record, succeeded
from .settings import Job, Setting, option_of
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BASE = "base"
_NO_GATE, _NO_PROJECTION = "no gate", "no projection"
_OPTIONS: dict[str, Sequence[Any]] = {
    "gate": ("identity",),
    "gate_input": ("concat",),
    "skip": (True,),
    "tail": ("norm_relu",),
    "jacobian_weight": (0.0, 1.0, 10.0, 100.0, 1000.0),
    "tol": (1e-1, 1e-2, 1e-3, 1e-4),
    "solver": ("picard", "broyden"),
    # With 0 or 1, Anderson's steps are Picard's.
    "memory": (2, 3, 5, 8),
    "num_groups": (1, 2, 4, 8),
    "adjoint": ("phantom", "one_step"),
}
_RECIPES: dict[str, Any] = {
    _NO_GATE: WithoutGate,
    _NO_PROJECTION: WithoutProjection,
}


def _variants() -> dict[str, dict[str, Any]]:
    steps = {f"{k} step{'s' if k > 1 else ''}": {"fusion": f"weight_tied:{k}"} for k in (1, 2, 10)}
    held = {_NO_GATE: {"gate": "sigmoid"}, _NO_PROJECTION: {}}
    changed = {
        f"{name}={_text(value)}": {name: value}
        for name, values in _OPTIONS.items()
        for value in values
    }
    return {_BASE: {}, **steps, **held, **changed}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}".removesuffix(".0")


# What is compared, and what an analysis sets by itself.
_NOT_CHANGED = ("fusion", "seed", "strategy")


#: Every change, by name: options.
VARIANTS: Mapping[str, Mapping[str, Any]] = _variants()


class Ablation(Analysis):
    """Test metrics of variants of deq, and their differences from it."""

    name = "ablation"
    help = "train equilibrium fusion with one thing changed at a time"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--variants",
            nargs="+",
            choices=[name for name in VARIANTS if name != _BASE],
            metavar="VARIANT",
            help=f"default all: {', '.join(VARIANTS)}",
        )
        parser.add_argument(
            "--change",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="one more variant: an option of the task, as train has it; may be repeated",
        )

    def jobs(self, setting: Setting, args: argparse.Namespace) -> list[Job]:
        if setting.options.get("fusion", "deq") != "deq":
            raise ValueError(f"fusion: got {setting.options['fusion']!r}, expected 'deq'")
        base = checked(setting.recipe, setting.options)
        variants: dict[str, Mapping[str, Any]] = {_BASE: {}}
        for name in VARIANTS if args.variants is None else args.variants:
            if _changes(base, name, VARIANTS[name]):
                variants[name] = VARIANTS[name]
            elif args.variants is not None:
                raise _no_change("--variants", name)
        for text in args.change:
            key, value = option_of(setting.recipe, "--change", text)
            name = f"{key}={_text(value)}"
            if key in _NOT_CHANGED or not _changes(base, name, {key: value}):
                raise _no_change("--change", text)
            variants[name] = {key: value}
        return [
            Job(name, seed, {"fusion": "deq", **options})
            for seed in setting.seeds
            for name, options in variants.items()
        ]

    def recipe(self, setting: Setting, args: argparse.Namespace, job: Job) -> Recipe:
        extension = _RECIPES.get(job.name)
        return setting.recipe if extension is None else extended(setting.recipe, extension)

    def tables(self, records: Sequence[Record]) -> list[Table]:
        tables = []
        for task, of_task in by_task(in_order(records, VARIANTS)).items():
            rows, shown = metric_rows(task, of_task, _BASE)
            chosen = succeeded(of_task)[0]["selection"][0]
            shown |= {"validation": (f"validation {readable(chosen)}", ".3f")}
            shown |= {"steps": ("steps", ".1f"), "converged": ("converged", ".1%")}
            shown |= {"training_seconds": ("training, s", ".1f")}
            columns = {"name": ("variant", ""), **shown}
            notes = verdict(rows, _BASE) + comparison_notes(task, of_task, _BASE)
            tables.append(Table(task, rows, columns, notes))
        return tables

    def picture(self, records: Sequence[Record]) -> Figure:
        from ..plots import score_panels

        panels: dict[str, dict[str, list[float]]] = {}
        for task, of_task in by_task(in_order(records, VARIANTS)).items():
            metric = headline(of_task)
            values = by_name(of_task, "test", metric)
            base = values.pop(_BASE, {})
            differences = {
                name: [found[seed] - base[seed] for seed in sorted(found.keys() & base.keys())]
                for name, found in values.items()
            }
            differences = {name: found for name, found in differences.items() if found}
            if differences:
                panels[f"{task}: test {readable(metric)}, minus base's"] = differences
        return score_panels(panels, highlight="", zero=True)


def _changes(base: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> bool:
    """Whether a variant is another run than the base, and one that can be."""
    if base["dim"] % options.get("num_groups", 1):
        return False
    held = not options or name in _RECIPES
    return held or any(base[key] != value for key, value in options.items())


def _no_change(argument: str, name: str) -> ValueError:
    return ValueError(
        f"{argument}: got {name!r}, which the options have already or do not allow, expected a "
        "change"
    )


ANALYSIS = Ablation()
