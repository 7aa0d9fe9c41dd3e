"""Every fusion on a task: test metrics, and what their training takes.

All fusions have the same encoders, data, epochs and seeds; the epoch, and with `--choose` other
options, are chosen on validation samples for every fusion and seed alike. A seed draws parameters,
the validation part and, where the task has them, splits or folds, of which the mean is taken; on a
task's own test samples the seeds share these.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..engine.options import ENGINE_FIELDS
from .base import Analysis
from .records import Record, mean_of, succeeded
from .settings import Job, Setting
from .statistics import compare, summary
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FUSIONS = (
    "deq",
    "concat",
    "sum",
    "gated",
    "tensor",
    "attention",
    "weight_tied:1",
    "weight_tied:10",
)
_BASE = "deq"
# Metrics that a table shows, in this order, of those that a task has; the first is compared.
_SHOWN = (
    *("accuracy", "f1", "f1_macro", "f1_micro", "f1_weighted", "auc", "auc_macro"),
    *("mae", "acc2_non0", "acc7", "pearson", "map_25", "map_50"),
)
_MOST_SHOWN = 3
_LESS_IS_BETTER = ("mae", "loss")


class Fusions(Analysis):
    """Test metrics and training time of every fusion."""

    name = "fusions"
    help = "train every fusion on a task, and compare test metrics and training time"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        kind = ENGINE_FIELDS["fusion"].kind
        parser.add_argument(
            "--fusions",
            nargs="+",
            type=kind,
            default=list(FUSIONS),
            metavar="FUSION",
            help=f"default {' '.join(FUSIONS)}",
        )

    def jobs(self, setting: Setting, args: argparse.Namespace) -> list[Job]:
        if "fusion" in setting.options:
            raise ValueError(f"fusion: got {setting.options['fusion']!r}, expected --fusions")
        names = dict.fromkeys(args.fusions)
        return [Job(name, seed, {"fusion": name}) for seed in setting.seeds for name in names]

    def tables(self, records: Sequence[Record]) -> list[Table]:
        return [_table(task, of_task) for task, of_task in by_task(records).items()]

    def picture(self, records: Sequence[Record]) -> Figure:
        from ..plots import score_panels

        panels = {}
        for task, of_task in by_task(records).items():
            metric = headline(of_task)
            values = by_name(of_task, "test", metric)
            title = f"{task}: test {readable(metric)}"
            panels[title] = {name: list(found.values()) for name, found in values.items()}
        return score_panels(panels, highlight=_BASE)


ANALYSIS = Fusions()


def by_task(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by their task, without tasks of which no run has succeeded."""
    tasks = sorted({record["task"] for record in succeeded(records)})
    return {task: [r for r in records if r["task"] == task] for task in tasks}


def by_name(records: Sequence[Record], *keys: str) -> dict[str, dict[int, float]]:
    """A number of the records that succeeded, by name and seed: names in the order of `FUSIONS`."""
    order = {name: place for place, name in enumerate(FUSIONS)}
    values: dict[str, dict[int, float]] = {}
    for record in sorted(succeeded(records), key=lambda r: order.get(r["name"], len(order))):
        values.setdefault(record["name"], {})[record["seed"]] = mean_of(record, *keys)
    return values


def headline(records: Sequence[Record]) -> str:
    """The test metric of a task that is compared."""
    return shown_metrics(records)[0]


def shown_metrics(records: Sequence[Record]) -> list[str]:
    """The test metrics of a task that a table shows, the one that is compared first."""
    record = succeeded(records)[0]
    test = record["splits"][0]["test"]
    known = [name for name in _SHOWN if name in test]
    return known[:_MOST_SHOWN] or [record["selection"][0]]


def readable(metric: str) -> str:
    """A metric's name for a heading: which way is better is said of those that are errors."""
    text = metric.replace("_", " ")
    return f"{text} (less is better)" if metric in _LESS_IS_BETTER else text


def metric_rows(
    task: str, records: Sequence[Record], base: str
) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """Rows of a table of test metrics, a row per name, and its columns.

    Args:
        task: of all records.
        records: of one task, at least one of which succeeded.
        base: the name that the others are compared with.
    """
    metric = headline(records)
    values = by_name(records, "test", metric)
    compared = compare(values, base)
    rows = []
    for name, by_seed in values.items():
        own = [record for record in succeeded(records) if record["name"] == name]
        row: dict[str, Any] = {"task": task, "name": name, "seeds": len(by_seed)}
        row["failed"] = sum(r["name"] == name for r in records) - len(by_seed)
        for test in own[0]["splits"][0]["test"]:
            row |= summary(test, [mean_of(record, "test", test) for record in own])
        row["compared"] = metric
        row |= compared[name]
        chosen, _ = own[0]["selection"]
        row |= summary("validation", [mean_of(r, "validation", chosen) for r in own])
        for key in ("training_seconds", "epochs", "best_epoch", "steps", "converged"):
            row |= summary(key, [mean_of(record, key) for record in own])
        row["parameters"] = own[0]["splits"][0]["parameters"]
        rows.append(row)
    shown = {"seeds": ("seeds", "")}
    shown |= {test: (readable(test), ".3f") for test in shown_metrics(records)}
    shown |= {"difference": (f"{metric.replace('_', ' ')} - {base}'s", "+.3f")}
    shown |= {"p_t": ("p", ".2g"), "p_holm": ("p (Holm)", ".2g")}
    return rows, shown


def comparison_notes(records: Sequence[Record]) -> list[str]:
    """What figures of a table of test metrics are, as sentences."""
    splits = len(succeeded(records)[0]["splits"])
    each = f", each the mean of {splits} splits" if splits > 1 else ""
    notes = [
        f"Mean ± standard error over seeds{each}; p of Student's paired t test over seeds, and "
        "with Holm's correction for all tests of the table."
    ]
    failed = sum(not record["splits"] for record in records)
    if failed:
        notes.append(f"{failed} runs diverged and are left out.")
    return notes


def _table(task: str, records: Sequence[Record]) -> Table:
    rows, shown = metric_rows(task, records, _BASE)
    shown |= {"training_seconds": ("training, s", ".1f"), "steps": ("steps", ".1f")}
    return Table(task, rows, {"name": ("fusion", ""), **shown}, comparison_notes(records))
