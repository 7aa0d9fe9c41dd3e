"""What comparisons by test metrics share: rows per name, means over seeds, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..engine.config import complete
from ..tasks import get_recipe
from .records import Record, mean_of, succeeded
from .statistics import compare, summary

# Metrics that a table shows, in this order, of those that a task has; the first is compared.
_SHOWN = (
    *("accuracy", "f1", "f1_macro", "f1_micro", "f1_weighted", "auc", "auc_macro"),
    *("mae", "acc2_non0", "acc7", "pearson", "map_25", "map_50"),
)
_MOST_SHOWN = 3
_LESS_IS_BETTER = ("mae", "loss")
# A difference is called one where Holm's p is below this.
_LEVEL = 0.05
# What an analysis sets by itself.
_NOT_ASKED = ("fusion", "seed")


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


def verdict(rows: Sequence[Mapping[str, Any]], base: str) -> list[str]:
    """Say, from rows of `metric_rows`, what is best, and what differs from the base.

    Names that lack seeds which others have are left out.

    Returns:
        Sentences; none where the base, or everything else, is missing.
    """
    rows = _scored(rows)
    place = next((row for row in rows if row["name"] == base), None)
    if place is None or len(rows) < 2:
        return []
    metric = place["compared"]
    sign = -1.0 if less_is_better(metric) else 1.0
    name, heading = metric.replace("_", " "), f"{base}'s mean {metric.replace('_', ' ')}"
    best = max(rows, key=lambda row: sign * row[metric])
    if _alike(best[metric], place[metric]):
        also = [r["name"] for r in rows if r is not place and _alike(r[metric], place[metric])]
        with_others = f", with {', '.join(also)}" if also else ""
        sentences = [f"{heading}, {place[metric]:.3f}, is the best{with_others}."]
    else:
        sentences = [
            f"{heading}, {place[metric]:.3f}, is not the best: that of {best['name']} is "
            f"{best[metric]:.3f}{_with_p(best)}."
        ]
    for way, word in ((1.0, "worse"), (-1.0, "better")):
        names = [
            row["name"] for row in rows if _differs(row) and way * sign * row["difference"] < 0
        ]
        if names:
            sentences.append(
                f"By p (Holm) below {_LEVEL:g}, {word} {name} than {base}: {', '.join(names)}."
            )
    tested = [row for row in rows if not math.isnan(row.get("p_holm", math.nan))]
    if tested and not any(map(_differs, tested)):
        sentences.append(f"No difference from {base} has a p (Holm) below {_LEVEL:g}.")
    return sentences


def agreement(records: Sequence[Record], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say how far the validation metric that chooses epochs tells which name tests better.

    Args:
        records, rows: of one task, and its rows of `metric_rows`.

    Returns:
        A sentence; none of fewer than three names, or where the metric is not of the test as well.
    """
    chosen, _ = succeeded(records)[0]["selection"]
    pairs = [(row["validation"], row[chosen]) for row in _scored(rows) if chosen in row]
    columns = [set(column) for column in zip(*pairs, strict=True)]
    if len(pairs) < 3 or any(len(column) < 2 for column in columns):
        return []
    found = statistics.correlation(*zip(*pairs, strict=True))
    name = chosen.replace("_", " ")
    return [
        f"Over these {len(pairs)}, mean {name} on validation samples, which chose epochs, and on "
        f"test samples correlate with {found:.2f}."
    ]


def _scored(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows whose means may be held against one another."""
    # A few scenes may lack every box of a class, and so have no average precision; and a mean over
    # fewer seeds, while runs are missing or as some diverged, is of easier or harder ones.
    most = max(row["seeds"] for row in rows)
    return [
        row
        for row in rows
        if row["seeds"] == most and math.isfinite(row.get(row["compared"], math.nan))
    ]


def _alike(one: float, other: float) -> bool:
    # Sums of the same hits in another order differ in the last bits.
    return math.isclose(one, other, rel_tol=1e-9)


def _with_p(row: Mapping[str, Any]) -> str:
    p = row.get("p_holm", math.nan)
    return "" if math.isnan(p) else f" (p (Holm) {p:.2g})"


def _differs(row: Mapping[str, Any]) -> bool:
    return bool(row.get("p_holm", math.nan) < _LEVEL)


def over_tasks(rows_of: Mapping[str, Sequence[Mapping[str, Any]]], base: str) -> str:
    """Say on which tasks a name is best, or differs from others, and the names' mean ranks.

    Args:
        rows_of: task -> its rows of `metric_rows`.
        base: the name that the others are compared with.

    Returns:
        A paragraph; empty for fewer than two tasks that have the base and another name.
    """
    ranks: dict[str, list[int]] = {}
    best, better, worse = [], [], []
    tasks = {
        task: rows
        for task, rows in ((task, _scored(rows)) for task, rows in rows_of.items())
        if len(rows) > 1 and base in [row["name"] for row in rows]
    }
    if len(tasks) < 2:
        return ""
    for task, rows in tasks.items():
        metric = rows[0]["compared"]
        sign = -1.0 if less_is_better(metric) else 1.0
        scores = {row["name"]: sign * row[metric] for row in rows}
        for name, score in scores.items():
            above = sum(s > score and not _alike(s, score) for s in scores.values())
            ranks.setdefault(name, []).append(1 + above)
        if ranks[base][-1] == 1:
            best.append(task)
        differences = [sign * row["difference"] for row in rows if _differs(row)]
        if any(d < 0 for d in differences):
            better.append(task)
        if any(d > 0 for d in differences):
            worse.append(task)
    everywhere = {name: sum(of) / len(of) for name, of in ranks.items() if len(of) == len(tasks)}
    listed = ", ".join(
        f"{name} {rank:.1f}" for name, rank in sorted(everywhere.items(), key=lambda pair: pair[1])
    )
    return (
        f"{base} has the best mean, or shares it, on {_listed(best)} of {len(tasks)} tasks. By p "
        f"(Holm) below {_LEVEL:g} it is better than some other on {_listed(better)}, and worse "
        f"than some other on {_listed(worse)}. Mean rank over the tasks, 1 the best: {listed}."
    )


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "none"


def asked_options(task: str, records: Sequence[Record], base: str) -> dict[str, Any]:
    """Options of a task's runs that are not its defaults, of those that all runs have alike.

    Args:
        task: of all records.
        records: of one task.
        base: whose records are looked at, where there are any: others may lack an option.
    """
    own = [record for record in records if record["name"] == base] or records
    configs = [candidate["options"] for record in own for candidate in record["candidates"]]
    first = configs[0]
    defaults = complete(get_recipe(task), {"fusion": first["fusion"]})
    return {
        name: value
        for name, value in first.items()
        if name not in _NOT_ASKED
        and value != defaults.get(name)
        and all(config.get(name) == value for config in configs)
    }


def comparison_notes(task: str, records: Sequence[Record], base: str) -> list[str]:
    """What figures of a table of test metrics are, as sentences.

    Args:
        task: of all records.
        records: of one task, at least one of which succeeded.
        base: the name that the others are compared with.
    """
    splits = len(succeeded(records)[0]["splits"])
    each = f", each the mean of {splits} splits" if splits > 1 else ""
    asked = asked_options(task, records, base)
    if len({record["seed"] for record in succeeded(records)}) > 1:
        notes = [
            f"Mean ± standard error over seeds{each}; differences are paired by seed: p of "
            "Student's t test, the same with Holm's correction for all rows, and of Wilcoxon's "
            "signed-rank test (0.0625 at least with 5 seeds)."
        ]
    else:
        notes = [f"Of one seed{each}: without a standard error or a test."]
    if asked:
        listed = ", ".join(f"{name} {value}" for name, value in asked.items())
        notes.append(f"Not the task's defaults: {listed}.")
    failed = sum(not record["splits"] for record in records)
    if failed:
        notes.append(f"{failed} runs diverged and are left out.")
    return notes
