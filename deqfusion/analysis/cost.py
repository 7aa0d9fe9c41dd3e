"""Time and memory of training with every fusion, per epoch and to equal accuracy.

Time is that of the training steps, without evaluation. Accuracy is the headline metric on
validation samples, its best so far; "equal" is what every fusion reaches with a seed and split, the
worst of their best values, and "deq's" the best that deq reaches. Memory is at its peak in an epoch
of one step, see `bench.resources`: what is computed, gradients, the optimiser's moments and the
copy of the best parameters, without parameters and data.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deqfusion.bench import resources

from ..engine import Recipe, RunDirectory, Samples, Splits, Trainer
from ..engine.distributed import device_of
from .base import Analysis
from .comparison import by_task, first_shown, headline, in_order, less_is_better, readable
from .fusions import BASE, FUSIONS, add_fusions, fusion_jobs
from .models import short
from .records import Record, read_history, succeeded
from .settings import Job, Setting
from .statistics import summary
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEASURES = {
    "epoch_seconds": "seconds per epoch",
    "megabytes": "MB at the peak of a step",
    "equal_seconds": "seconds to equal accuracy",
}


class Cost(Analysis):
    """Time and memory of every fusion."""

    name = "cost"
    help = "time and memory of training with every fusion, per epoch and to equal accuracy"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_fusions(parser)

    def jobs(self, setting: Setting, args: argparse.Namespace) -> list[Job]:
        return fusion_jobs(setting, args)

    def inspect(
        self,
        setting: Setting,
        args: argparse.Namespace,
        recipe: Recipe,
        config: dict[str, Any],
        run: RunDirectory,
    ) -> Mapping[str, Any]:
        splits, _ = recipe.load(setting.data, config)
        history = read_history(run)
        names = [n.removeprefix("validation_") for n in history if n.startswith("validation_")]
        metric = first_shown(names, recipe.selection[0])[0]
        return {
            "seconds": short(np.array(history["seconds"])),
            "validation": short(np.array(history[f"validation_{metric}"])),
            "memory": step_memory(recipe, config, splits),
        }

    def tables(self, records: Sequence[Record]) -> list[Table]:
        tables = []
        for task, of_task in by_task(in_order(records, FUSIONS)).items():
            metric = readable(headline(of_task))
            shown = {
                "name": ("fusion", ""),
                "models": ("models", ""),
                "epoch_seconds": ("an epoch, s", ".3g"),
                "relative": (f"of {BASE}'s", ".2f"),
                "megabytes": ("memory, MB", ".2f"),
                "best": (f"best validation {metric}", ".3f"),
                "equal_seconds": ("to equal, s", ".2f"),
                "base_seconds": (f"to {BASE}'s, s", ".2f"),
                "reached": (f"reach {BASE}'s", ".0%"),
            }
            loads = [record["environment"].get("load_average") or 0.0 for record in of_task]
            notes = [
                "Mean ± standard error over models, of each seed and split; to deq's: of those "
                f"that reach it. The machine's load average was up to {max(loads):.1f}."
            ]
            tables.append(Table(task, _rows(task, of_task), shown, notes))
        return tables

    def picture(self, records: Sequence[Record]) -> Figure:
        from ..plots import score_panels

        panels: dict[str, dict[str, list[float]]] = {}
        for task, of_task in by_task(in_order(records, FUSIONS)).items():
            found = _measured(of_task)
            for key, heading in _MEASURES.items():
                panels[f"{task}: {heading}"] = {
                    name: [one[key] for one in models] for name, models in found.items()
                }
        return score_panels(panels, highlight=BASE)


ANALYSIS = Cost()


class _First:
    """The first samples of some."""

    def __init__(self, samples: Samples, count: int | None) -> None:
        self.samples = samples
        self.count = len(samples) if count is None else min(count, len(samples))

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor) -> Any:
        """Collate samples."""
        return self.samples.batch(indices)


def step_memory(recipe: Recipe, config: Mapping[str, Any], splits: Splits) -> dict[str, Any]:
    """Return the peak of memory, `bytes` and `how`, of an epoch of one step and its evaluation."""
    one = Splits(*(_First(part, config["batch_size"]) for part in splits[:2]))
    with torch.random.fork_rng(devices=[]):
        model = recipe.build(config)
        recipe.prepare(model, splits, config)
    trainer = Trainer(recipe, model, {**config, "epochs": 1})
    trainer.fit(one)
    # What was allocated before is unknown to the profiler where it is freed.
    model.zero_grad()
    memory = resources.measure(lambda: trainer.fit(one), device_of(config))["memory"]
    return dict(memory)


def _measured(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """What is known of every model, by fusion; of seeds and splits that all fusions have."""
    curves: dict[tuple[int, int], dict[str, tuple[NDArray[Any], NDArray[Any], int]]] = {}
    worse = less_is_better(headline(records))
    for record in succeeded(records):
        for number, split in enumerate(record["splits"]):
            more = split["more"]
            value = np.array(more["validation"], dtype=float) * (-1.0 if worse else 1.0)
            best = np.maximum.accumulate(value)
            curve = (np.cumsum(more["seconds"]), best, more["memory"]["bytes"])
            curves.setdefault((record["seed"], number), {})[record["name"]] = curve
    names = dict.fromkeys(record["name"] for record in succeeded(records))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for of_seed in curves.values():
        equal = min(best[-1] for _, best, _ in of_seed.values())
        base = of_seed[BASE][1][-1] if BASE in of_seed else np.inf
        for name, (seconds, best, memory) in of_seed.items():
            found[name].append(
                {
                    "epoch_seconds": float(np.median(np.diff(seconds, prepend=0.0))),
                    "megabytes": memory / 1e6,
                    "best": abs(float(best[-1])),
                    "equal_seconds": float(seconds[np.argmax(best >= equal)]),
                    "base_seconds": float(seconds[np.argmax(best >= base)])
                    if best[-1] >= base
                    else np.nan,
                }
            )
    return found


def _rows(task: str, records: Sequence[Record]) -> list[dict[str, Any]]:
    found = _measured(records)
    base = np.mean([one["epoch_seconds"] for one in found.get(BASE, [])] or [np.nan])
    rows = []
    for name, models in found.items():
        row: dict[str, Any] = {"task": task, "name": name, "models": len(models)}
        for key in ("epoch_seconds", "megabytes", "best", "equal_seconds"):
            row |= summary(key, [one[key] for one in models])
        to_base = [one["base_seconds"] for one in models]
        row |= summary("base_seconds", [value for value in to_base if value == value])
        row["reached"] = float(np.isfinite(to_base).mean()) if BASE in found else np.nan
        row["relative"] = float(row["epoch_seconds"] / base)
        row["failed"] = sum(not r["splits"] for r in records if r["name"] == name)
        rows.append(row)
    return rows
