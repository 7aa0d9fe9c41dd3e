"""Training of deq epoch by epoch: spectral radius, steps and share of converged rows.

    penalty       the task's weight of the Jacobian penalty
    no penalty    weight 0
    tol A to B    with the penalty, and a tolerance that tightens from A to the task's over the
                  first half of the training steps

Radii are those of up to 32 validation rows of a batch, after each epoch; steps, converged rows and
loss are means over the training rows of an epoch, as `log.csv` has them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..engine import Recipe, RunDirectory
from ..engine.kinds import RealNumber
from .base import Analysis
from .comparison import by_task, headline, in_order, readable
from .extended import extended
from .models import load_first, short, solved
from .records import Record, mean_of, read_history, succeeded
from .settings import Job, Setting
from .statistics import band, summary
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..plots import Band

_PENALTY, _NO_PENALTY = "penalty", "no penalty"
_ROWS, _KRYLOV = 32, 30
_LAST_SHARE = 0.1
#: Column of the log: its heading in the picture.
_DRAWN = {
    "validation_radius_mean": "mean spectral radius",
    "converged": "share of converged rows",
    "steps": "steps",
    "train_loss": "training loss",
}
_KEPT = (*_DRAWN, "validation_radius_max", "validation_radius_above_1")


class Stability(Analysis):
    """What the penalty and a tolerance schedule do to training."""

    name = "stability"
    help = "spectral radius, steps and converged rows over training, with and without the penalty"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--tol-start",
            nargs="*",
            type=RealNumber(0.0, above=True),
            default=[0.1, 0.01],
            metavar="TOL",
            help="where schedules of the tolerance begin (default 0.1 0.01)",
        )

    def jobs(self, setting: Setting, args: argparse.Namespace) -> list[Job]:
        for name in ("fusion", "tol_start", "tol_steps"):
            if name in setting.options:
                raise ValueError(f"{name}: got {setting.options[name]!r}, expected none")
        base = setting.configs(Job(_PENALTY, setting.seeds[0], {"fusion": "deq"}))[0]
        if not base["jacobian_weight"]:
            raise ValueError("jacobian_weight: got 0, expected a penalty to compare none with")
        variants: dict[str, dict[str, Any]] = {_PENALTY: {}, _NO_PENALTY: {"jacobian_weight": 0.0}}
        splits, _ = load_first(setting, base)
        size = base["batch_size"] or len(splits.train)
        steps = base["epochs"] * math.ceil(len(splits.train) / size)
        for start in args.tol_start:
            schedule = {"tol_start": start, "tol_steps": max(1, steps // 2)}
            variants[f"tol {start:g} to {base['tol']:g}"] = schedule
        return [
            Job(name, seed, {"fusion": "deq", **options})
            for seed in setting.seeds
            for name, options in variants.items()
        ]

    def recipe(self, setting: Setting, args: argparse.Namespace, job: Job) -> Recipe:
        return extended(setting.recipe, Watched)

    def inspect(
        self,
        setting: Setting,
        args: argparse.Namespace,
        recipe: Recipe,
        config: dict[str, Any],
        run: RunDirectory,
    ) -> Mapping[str, Any]:
        history = read_history(run)
        return {"history": {name: short(np.array(history[name])) for name in _KEPT}}

    def tables(self, records: Sequence[Record]) -> list[Table]:
        tables = []
        for task, of_task in by_task(in_order(records, (_PENALTY, _NO_PENALTY))).items():
            metric = headline(of_task)
            shown = {
                "name": ("training", ""),
                "models": ("models", ""),
                "radius_first": ("radius, first epoch", ".3f"),
                "radius": ("at the end", ".3f"),
                "radius_max": ("largest", ".2f"),
                "above": ("rows above 1, at most", ".1%"),
                "converged": ("converged", ".1%"),
                "converged_least": ("at least", ".1%"),
                "steps": ("steps", ".1f"),
                "steps_last": ("at the end", ".1f"),
                "rise": ("largest rise of the loss", ".3f"),
                "metric": (f"test {readable(metric)}", ".3f"),
                "training_seconds": ("training, s", ".1f"),
            }
            notes = [
                "Mean ± standard error over models, of each seed and split; the end is the last "
                "tenth of the epochs; a rise is of the training loss above its least before."
            ]
            tables.append(Table(task, _rows(task, of_task, metric), shown, notes))
        return tables

    def picture(self, records: Sequence[Record]) -> Figure:
        from ..plots import band_panels

        panels: dict[str, dict[str, Band]] = {}
        for task, of_task in by_task(in_order(records, (_PENALTY, _NO_PENALTY))).items():
            for column, heading in _DRAWN.items():
                panels[f"{task}: {heading}"] = {
                    name: _band([one[column] for one in found])
                    for name, found in _histories(of_task).items()
                }
        return band_panels(panels, xlabel="epoch", ylabel="", columns=len(_DRAWN))


ANALYSIS = Stability()


class Watched(Recipe):
    """A task that also measures spectral radii where it is evaluated."""

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """Predict as the task does, with the radii of the batch's first rows."""
        prediction = super().predict(model, batch)  # type: ignore[safe-super]
        found = solved(self, model, batch)
        fusion = found.fusion
        features = [x.reshape(-1, fusion.dim)[:_ROWS] for x in found.features]
        equilibrium = fusion.equilibrium(features)
        return prediction, fusion.spectral_radius(equilibrium, features, steps=_KRYLOV)

    def metrics(self, outputs: Sequence[Any]) -> dict[str, float]:
        """Return the task's metrics, and mean, largest and share above 1 of the radii."""
        predictions, parts = zip(*outputs, strict=True)
        radii = torch.cat(parts).double()
        radii = radii[radii.isfinite()]
        known = len(radii) > 0
        return {
            **super().metrics(predictions),  # type: ignore[safe-super]
            "radius_mean": float(radii.mean()),
            "radius_max": float(radii.max()) if known else math.nan,
            "radius_above_1": float((radii > 1).double().mean()),
        }


def _histories(records: Sequence[Record]) -> dict[str, list[dict[str, NDArray[np.float64]]]]:
    """Columns by epoch, of every model by the name of its training."""
    found: dict[str, list[dict[str, NDArray[np.float64]]]] = {}
    for record in succeeded(records):
        for split in record["splits"]:
            columns = split["more"]["history"].items()
            history = {name: np.array(values, dtype=float) for name, values in columns}
            found.setdefault(record["name"], []).append(history)
    return found


def _rows(task: str, records: Sequence[Record], metric: str) -> list[dict[str, Any]]:
    rows = []
    for name, found in _histories(records).items():
        own = [record for record in succeeded(records) if record["name"] == name]
        radius = [one["validation_radius_mean"] for one in found]
        row: dict[str, Any] = {"task": task, "name": name, "models": len(found)}
        row |= summary("radius_first", [values[0] for values in radius])
        row |= summary("radius", [_end(values) for values in radius])
        row |= summary("radius_max", [np.nanmax(one["validation_radius_max"]) for one in found])
        row |= summary("above", [np.nanmax(one["validation_radius_above_1"]) for one in found])
        row |= summary("converged", [one["converged"].mean() for one in found])
        row |= summary("converged_least", [one["converged"].min() for one in found])
        row |= summary("steps", [one["steps"].mean() for one in found])
        row |= summary("steps_last", [_end(one["steps"]) for one in found])
        row |= summary("rise", [_rise(one["train_loss"]) for one in found])
        row |= summary("metric", [mean_of(record, "test", metric) for record in own])
        row |= summary("training_seconds", [mean_of(r, "training_seconds") for r in own])
        row["failed"] = sum(not r["splits"] for r in records if r["name"] == name)
        rows.append(row)
    return rows


def _end(values: NDArray[np.float64]) -> float:
    return float(values[-max(1, round(_LAST_SHARE * len(values))) :].mean())


def _rise(loss: NDArray[np.float64]) -> float:
    """How far a curve rises above its least value before."""
    return float((loss - np.minimum.accumulate(loss)).max())


def _band(values: Sequence[NDArray[np.float64]]) -> Band:
    """Band by epoch; with early stopping, of the models that go on."""
    longest = max(map(len, values))
    padded = [np.pad(v, (0, longest - len(v)), constant_values=np.nan) for v in values]
    return (np.arange(1.0, longest + 1.0), *band(np.array(padded)))
