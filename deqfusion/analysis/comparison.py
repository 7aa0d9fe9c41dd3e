"""What comparisons by test metrics share: rows per name, means over seeds, paired differences."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from .records import Record, mean_of, succeeded
from .statistics import compare, summary

# Metrics that a table shows, in this order, of those that a task has; the first is compared.
_SHOWN = (
    *("accuracy", "f1", "f1_macro", "f1_micro", "f1_weighted", "auc", "auc_macro"),
    *("mae", "acc2_non0", "acc7", "pearson", "map_25", "map_50"),
)
_MOST_SHOWN = 3
_LESS_IS_BETTER = ("mae", "loss")


def by_task(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by their task, without tasks of which no run has succeeded."""
    tasks = sorted({record["task"] for record in succeeded(records)})
    return {task: [r for r in records if r["task"] == task] for task in tasks}


def by_name(records: Sequence[Record], *keys: str) -> dict[str, dict[int, float]]:
    """A number of the records that succeeded, by name and seed; names in the records' order."""
    values: dict[str, dict[int, float]] = {}
    for record in succeeded(records):
        values.setdefault(record["name"], {})[record["seed"]] = mean_of(record, *keys)
    return values


def in_order(records: Sequence[Record], names: Iterable[str]) -> list[Record]:
    """Records sorted by name as `names` has them, other names last."""
    place = {name: number for number, name in enumerate(names)}
    return sorted(records, key=lambda record: place.get(record["name"], len(place)))


def headline(records: Sequence[Record]) -> str:
    """The test metric of a task that is compared."""
    return shown_metrics(records)[0]


def shown_metrics(records: Sequence[Record]) -> list[str]:
    """The test metrics of a task that a table shows, the one that is compared first."""
    record = succeeded(records)[0]
    return first_shown(record["splits"][0]["test"], record["selection"][0])


def first_shown(metrics: Collection[str], selection: str) -> list[str]:
    """Those of a task's metrics that a table shows; where none is known, that which selects."""
    return [name for name in _SHOWN if name in metrics][:_MOST_SHOWN] or [selection]


def less_is_better(metric: str) -> bool:
    """Whether a metric is an error."""
    return metric in _LESS_IS_BETTER


def readable(metric: str) -> str:
    """A metric's name for a heading: which way is better is said of those that are errors."""
    text = metric.replace("_", " ")
    return f"{text} (less is better)" if less_is_better(metric) else text


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
    shown |= {"p_t": ("p (t)", ".2g"), "p_holm": ("p (Holm)", ".2g")}
    shown |= {"p_wilcoxon": ("p (Wilcoxon)", ".2g")}
    return rows, shown


def comparison_notes(records: Sequence[Record]) -> list[str]:
    """What figures of a table of test metrics are, as sentences."""
    splits = len(succeeded(records)[0]["splits"])
    each = f", each the mean of {splits} splits" if splits > 1 else ""
    notes = [
        f"Mean ± standard error over seeds{each}; differences are paired by seed: p of Student's "
        "t test, the same with Holm's correction for all rows, and of Wilcoxon's signed-rank test "
        "(0.0625 at least with 5 seeds)."
    ]
    failed = sum(not record["splits"] for record in records)
    if failed:
        notes.append(f"{failed} runs diverged and are left out.")
    return notes
