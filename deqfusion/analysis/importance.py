"""What a trained model makes of each modality: its weight, alone, noisy, and missing.

    all      fusion deq of every modality: weights on held-out rows, and its answers where one
             modality is noisy or missing, without being trained for either
    only M   the same model of one modality, trained and chosen alike

Noise is Gaussian, of so many standard deviations of each input feature over training rows. A
missing modality is masked in the fusion. Weights are `DEQFusion.modality_weights`, means over rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..engine import Config, Recipe, RunDirectory, Samples, Splits, TensorSamples
from ..engine.kinds import RealNumber
from ..engine.run import json_values
from ..module import DEQFusion
from ..tasks.classification import Classification
from .base import Analysis
from .comparison import by_task, headline, readable
from .extended import extended, fusions_of
from .models import batches, held_out, load_first, modality_names, solved, trained
from .records import Record, mean_of, succeeded
from .settings import Job, Setting
from .statistics import band, summary
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..plots import Band

_ALL, _ONLY = "all", "only "
_MISSING = "missing"
_LEVELS = (0.5, 1.0, 2.0, 4.0)
# Enough to know a feature's deviation by.
_ROWS_FOR_SCALE = 4096


class Importance(Analysis):
    """Modality weights against solo performance, noise and absence."""

    name = "importance"
    help = "modality weights beside each modality's solo performance, with noise and missing ones"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--noise",
            nargs="+",
            type=RealNumber(0.0, above=True),
            default=list(_LEVELS),
            metavar="LEVEL",
            help="in standard deviations of each feature "
            f"(default {' '.join(f'{level:g}' for level in _LEVELS)})",
        )

    def arguments(self, args: argparse.Namespace) -> dict[str, Any]:
        return {"noise": sorted(set(args.noise))}

    def jobs(self, setting: Setting, args: argparse.Namespace) -> list[Job]:
        if setting.options.get("fusion", "deq") != "deq":
            raise ValueError(f"fusion: got {setting.options['fusion']!r}, expected 'deq'")
        names = [_ALL, *(_ONLY + name for name in _alone(setting))]
        return [
            Job(name, seed, _options(setting, name)) for seed in setting.seeds for name in names
        ]

    def recipe(self, setting: Setting, args: argparse.Namespace, job: Job) -> Recipe:
        if job.name == _ALL or "modalities" in setting.recipe.fields:
            return setting.recipe
        return extended(setting.recipe, _only(int(job.name.removeprefix(_ONLY))))

    def inspect(
        self,
        setting: Setting,
        args: argparse.Namespace,
        recipe: Recipe,
        config: dict[str, Any],
        run: RunDirectory,
    ) -> Mapping[str, Any]:
        if len(config["input_widths"]) == 1:
            return {}
        model, splits = trained(recipe, setting, config, run)
        samples, names = held_out(splits), modality_names(config, len(config["input_widths"]))
        scales = _scales(splits.train)
        (fusion,) = fusions_of(model)

        def answers(noisy: int | None, level: float) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(config["seed"])
            given = [
                batch if noisy is None else _noisy(batch, noisy, level * scales[noisy], generator)
                for batch in batches(samples, config)
            ]
            return _answers(recipe, model, given)

        conditions: dict[str, Any] = {"": answers(None, 0.0)}
        for index, name in enumerate(names):
            for level in sorted(set(args.noise)):
                conditions[f"{name} {level:g}"] = answers(index, level)
            with _without(fusion, index):
                conditions[f"{name} {_MISSING}"] = answers(None, 0.0)
        return {"modalities": names, **self.arguments(args), "conditions": conditions}

    def tables(self, records: Sequence[Record]) -> list[Table]:
        tables = []
        for task, of_task in by_task(records).items():
            if any(record["name"] == _ALL for record in succeeded(of_task)):
                tables += [_weights_table(task, of_task), _response_table(task, of_task)]
        return tables

    def picture(self, records: Sequence[Record]) -> Figure:
        from ..plots import importance_panels

        tasks = {}
        for task, of_task in by_task(records).items():
            found = _inspected(of_task)
            if not found:
                continue
            metric = headline(of_task)
            rows = {row["name"]: row for row in _weight_rows(task, of_task)}
            points, response, weights = {}, {}, {}
            for place, name in enumerate(found[0]["modalities"]):
                keys = ("solo", "solo_error", "weight", "weight_error")
                points[name] = [rows[name][key] for key in keys]
                response[name] = _band(found, name, "metrics", metric)
                weights[name] = _band(found, name, "weights", place)
            levels = [level or "none" for level in _levels(found)]
            tasks[task, readable(metric)] = (levels, points, response, weights)
        return importance_panels(tasks)


ANALYSIS = Importance()


def _alone(setting: Setting) -> list[str]:
    """Names of the modalities that can be trained alone.

    Raises:
        ValueError: the task's samples are not one row of numbers per modality.
    """
    config = setting.configs(Job(_ALL, setting.seeds[0], {"fusion": "deq"}))[0]
    splits, facts = load_first(setting, config)
    _scales(splits.train, setting.recipe.name)
    if "modalities" in config or isinstance(setting.recipe, Classification):
        return modality_names(config, len(facts["input_widths"]))
    return []


def _options(setting: Setting, name: str) -> dict[str, Any]:
    options: dict[str, Any] = {"fusion": "deq"}
    field = setting.recipe.fields.get("modalities")
    if name != _ALL and field is not None:
        only = name.removeprefix(_ONLY)
        options["modalities"] = [only if isinstance(field.default[0], str) else int(only)]
    return options


def _only(index: int) -> type[Recipe]:
    """The task on one of its modalities, where no option says so."""

    class Only(Recipe):
        def load(self, data_dir: Path, config: Config) -> tuple[Splits, dict[str, Any]]:
            splits, facts = super().load(data_dir, config)  # type: ignore[safe-super]
            parts = [cast(TensorSamples, part).data for part in splits]
            one = [TensorSamples(((inputs[index],), labels)) for inputs, labels in parts]
            return Splits(*one), {**facts, "input_widths": [facts["input_widths"][index]]}

    return Only


def _views(batch: Any, task: str = "") -> list[Tensor]:
    """The modalities of a batch, (rows, width) each."""
    inputs = batch[0] if isinstance(batch, tuple) else batch.get("inputs", ())
    if not inputs or not all(isinstance(view, Tensor) for view in inputs):
        raise ValueError(
            f"task: got {task!r} with these options, expected one whose samples have a row of "
            "numbers for every modality"
        )
    return list(inputs)


def _scales(train: Samples, task: str = "") -> list[Tensor]:
    """Standard deviation (width,) of every modality's features."""
    rows = train.batch(torch.arange(min(len(train), _ROWS_FOR_SCALE)))
    return [view.std(dim=0, correction=0) for view in _views(rows, task)]


def _noisy(batch: Any, index: int, scale: Tensor, generator: torch.Generator) -> Any:
    views = _views(batch)
    noise = torch.randn(views[index].shape, generator=generator, dtype=torch.float64)
    views[index] = views[index] + (scale * noise).to(views[index].dtype)
    if isinstance(batch, tuple):
        return (tuple(views), *batch[1:])
    return {**batch, "inputs": tuple(views)}


@contextmanager
def _without(fusion: DEQFusion, index: int) -> Iterator[None]:
    """Let a layer take a modality as missing in every row."""
    solve = fusion.equilibrium

    def equilibrium(features: Sequence[Tensor], **options: Any) -> Any:
        missing = torch.zeros(*features[0].shape[:-1], fusion.num_modalities, dtype=torch.bool)
        missing[..., index] = True
        return solve(features, mask=missing, **options)

    fusion.equilibrium = equilibrium  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del fusion.equilibrium


@torch.no_grad()
def _answers(recipe: Recipe, model: nn.Module, given: Sequence[Any]) -> dict[str, Any]:
    """Metrics, and mean weight of each modality, of a model on batches."""
    metrics = recipe.metrics([recipe.predict(model, batch) for batch in given])
    parts = [solved(recipe, model, batch) for batch in given]
    weights = torch.cat([p.fusion.modality_weights(p.equilibrium).flatten(1) for p in parts], 1)
    converged = torch.cat([p.equilibrium.stats.converged.flatten(1) for p in parts], 1)
    return {
        "metrics": json_values(metrics),
        "weights": [float(f"{value:.6g}") for value in weights.double().nanmean(1)],
        "converged": float(converged.double().mean()),
    }


def _inspected(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What was found of every model of all modalities, seed by seed and split by split."""
    return [
        split["more"]
        for record in succeeded(records)
        if record["name"] == _ALL
        for split in record["splits"]
    ]


def _weight_rows(task: str, records: Sequence[Record]) -> list[dict[str, Any]]:
    found, metric = _inspected(records), headline(records)
    rows: list[dict[str, Any]] = []
    whole = [one["conditions"][""]["metrics"][metric] for one in found]
    for place, name in enumerate(found[0]["modalities"]):
        row: dict[str, Any] = {"task": task, "name": name, "models": len(found)}
        row |= summary("weight", [one["conditions"][""]["weights"][place] for one in found])
        alone = [r for r in succeeded(records) if r["name"] == _ONLY + name]
        row |= summary("solo", [mean_of(record, "test", metric) for record in alone])
        without = [_condition(one, name, _MISSING)["metrics"][metric] for one in found]
        row |= summary("without", without)
        row |= summary("change", list(np.subtract(without, whole)))
        rows.append(row)
    row = {"task": task, "name": _ALL, "models": len(found)}
    return [*rows, row | summary("solo", whole)]


def _weights_table(task: str, records: Sequence[Record]) -> Table:
    metric = readable(headline(records))
    rows = _weight_rows(task, records)
    return Table(
        f"{task}: weights",
        rows,
        {
            "name": ("modality", ""),
            "models": ("models", ""),
            "weight": ("weight", ".4f"),
            "solo": (f"{metric} alone", ".3f"),
            "without": ("all, it missing", ".3f"),
            "change": ("change by that", "+.3f"),
        },
        [f"Mean ± standard error over models, of each seed and split.{_rank_correlation(rows)}"],
    )


def _rank_correlation(rows: Sequence[Mapping[str, Any]]) -> str:
    from scipy.stats import spearmanr

    pairs = [(row["weight"], row["solo"]) for row in rows if "weight" in row]
    if len(pairs) < 3 or not np.isfinite(pairs).all():
        return ""
    rho = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return f" Spearman's rank correlation of mean weight and metric alone: {rho:+.2f}."


def _response_table(task: str, records: Sequence[Record]) -> Table:
    found, metric = _inspected(records), headline(records)
    rows = []
    for place, name in enumerate(found[0]["modalities"]):
        for level in _levels(found):
            at = [_condition(one, name, level) for one in found]
            row: dict[str, Any] = {"task": task, "name": name, "level": level or "none"}
            row |= summary("metric", [one["metrics"][metric] for one in at])
            row |= summary("weight", [one["weights"][place] for one in at])
            row |= summary("converged", [one["converged"] for one in at])
            rows.append(row)
    shown = {
        "name": ("modality", ""),
        "level": ("noise in it", ""),
        "metric": (readable(metric), ".3f"),
        "weight": ("its weight", ".4f"),
        "converged": ("converged", ".1%"),
    }
    notes = ["Noise in standard deviations of each feature."]
    return Table(f"{task}: noise and missing modalities", rows, shown, notes)


def _levels(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return ["", *(f"{level:g}" for level in found[0]["noise"]), _MISSING]


def _condition(one: Mapping[str, Any], name: str, level: str) -> Any:
    return one["conditions"][f"{name} {level}" if level else ""]


def _band(found: Sequence[Mapping[str, Any]], name: str, kind: str, key: Any) -> Band:
    """Band of a value by the noise in a modality."""
    levels = _levels(found)
    values = np.array(
        [[_condition(one, name, level)[kind][key] for level in levels] for one in found],
        dtype=float,
    )
    if kind == "weights":
        # A missing modality's is 0, which says nothing.
        values[:, -1] = np.nan
    return (np.arange(float(len(levels))), *band(values))
