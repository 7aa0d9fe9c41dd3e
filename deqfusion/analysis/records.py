"""What a training run of an analysis gave: one JSON file per job, written as soon as it is done.

    OUT/ANALYSIS/TASK/NAME/seed_K.json    options, environment, metrics of every split
    OUT/ANALYSIS/TASK/NAME/seed_K.run     the run's folder while it trains, to continue it

A record that is there is not made again; one of other options or data is refused before anything
is trained.
"""

from __future__ import annotations

import csv
import json
import math
import re
import reprlib
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from deqfusion.bench import environment

from ..engine import Recipe, RunDirectory, TrainingDivergedError, train
from ..engine.config import fields_of
from ..engine.runs import write_json
from .models import load_first
from .settings import Job, Setting

FORMAT = "deqfusion-analysis"
VERSION = 1
_REQUIRED = {
    "analysis": str,
    "task": str,
    "name": str,
    "seed": int,
    "candidates": list,
    "chosen": int,
    "data_sha256": str,
    "selection": list,
    "environment": dict,
    "splits": list,
}

Record = dict[str, Any]
#: Looks into a finished model: recipe, configuration with facts and its folder -> JSON values.
Inspect = Callable[[Recipe, dict[str, Any], RunDirectory], Mapping[str, Any]]


class RecordError(ValueError):
    """A record is damaged, somebody else's, or of other options or data; names its file."""


def run_jobs(
    analysis: str,
    setting: Setting,
    jobs: Sequence[Job],
    *,
    arguments: Mapping[str, Any] | None = None,
    recipe_of: Callable[[Job], Recipe] | None = None,
    inspect: Inspect | None = None,
) -> int:
    """Train every job of this part that has no record yet, and write its record.

    Args:
        analysis: the analysis's name.
        setting: task, data, options and folder.
        jobs: all of the analysis, of every part; names and seeds are distinct.
        arguments: of the analysis, that a record depends on.
        recipe_of: what trains a job in place of the setting's recipe; of its name and options.
        inspect: what a record has of each split beside metrics, under `more`.

    Returns:
        Number of jobs, of all parts, that have no record yet.

    Raises:
        DataError: the data is not what it should be.
        RecordError: a record is there, but of other options or other data.
        CheckpointError: the folder of an interrupted run is damaged or of other options.
        ValueError: a job's options do not fit together.
    """
    recipe = setting.recipe
    planned = [(job, setting.configs(job)) for job in jobs]
    _, facts = load_first(setting, planned[0][1][0])
    sha256 = str(facts["data_sha256"])
    todo = []
    for job, configs in planned:
        path = _record_path(analysis, setting, job)
        if path.exists():
            record = read_record(path)
            _check_same(path, record, recipe, configs, sha256)
            _check_arguments(path, record.get("arguments", {}), arguments or {})
        else:
            todo.append((job, configs, path))
    number, parts = setting.part
    # Neighbours go to different parts, and so does each name from seed to seed: the names are of
    # very different cost.
    names = list(dict.fromkeys(job.name for job in jobs))
    share = {
        (job.name, job.seed)
        for job in jobs
        if (names.index(job.name) + setting.seeds.index(job.seed)) % parts == number - 1
    }
    own = [entry for entry in todo if (entry[0].name, entry[0].seed) in share]
    with _bar(analysis, len(own), setting.progress) as bar:
        for job, configs, path in own:
            bar.set_postfix_str(f"{job.name}, seed {job.seed}", refresh=False)
            trains = recipe if recipe_of is None else recipe_of(job)
            found = _train(trains, setting, configs, path.with_suffix(".run"), inspect)
            head = {"analysis": analysis, "task": recipe.name, "name": job.name, "seed": job.seed}
            record = {
                "format": FORMAT,
                "version": VERSION,
                **head,
                "data_sha256": sha256,
                "arguments": dict(arguments or {}),
                **found,
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
            shutil.rmtree(path.with_suffix(".run"), ignore_errors=True)
            bar.update()
    return sum(not path.exists() for _, _, path in todo)


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        RecordError: it is missing, damaged or not one of this project's.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is not JSON: {error}"
        raise RecordError(f"{path}: cannot be read ({reason}), expected a record") from error
    check_record(str(path), record)
    return dict(record)


def check_record(place: str, record: Any) -> None:
    """Refuse what is not a record; `place` is named."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RecordError(f'{place}: expected a JSON object with "format": "{FORMAT}"')
    if record.get("version") != VERSION:
        raise RecordError(f"{place}: got version {record.get('version')!r}, expected {VERSION}")
    for name, kind in _REQUIRED.items():
        if not isinstance(record.get(name), kind):
            raise RecordError(
                f"{place}: {name}: got {reprlib.repr(record.get(name))}, "
                f"expected a value of type {kind.__name__}"
            )


def read_records(folder: Path, analysis: str) -> list[Record]:
    """Read every record of an analysis below a folder of results, in order of their paths."""
    records = [read_record(path) for path in sorted(folder.glob(f"{analysis}/*/*/seed_*.json"))]
    return sorted(records, key=lambda record: (record["task"], record["name"], record["seed"]))


def succeeded(records: Iterable[Record]) -> list[Record]:
    """Those whose training did not diverge."""
    return [record for record in records if record["splits"]]


def mean_of(record: Record, *keys: str) -> float:
    """A number of a record, the mean over its splits; NaN where one has none.

    Args:
        record: one that succeeded.
        keys: where it is in each split, such as "test", "accuracy".
    """
    values = []
    for split in record["splits"]:
        value: Any = split
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        values.append(math.nan if value is None else float(value))
    return float(np.mean(values))


def _bar(label: str, total: int, shown: bool) -> Any:
    return tqdm(
        desc=label,
        total=total,
        unit="run",
        disable=not shown,
        dynamic_ncols=True,
        # A log file needs fewer lines than a terminal.
        mininterval=0.1 if sys.stderr.isatty() else 60,
    )


def _record_path(analysis: str, setting: Setting, job: Job) -> Path:
    name = re.sub(r"[^A-Za-z0-9.+-]+", "_", job.name)
    return setting.out / analysis / setting.recipe.name / name / f"seed_{job.seed}.json"


def _train(
    recipe: Recipe,
    setting: Setting,
    configs: Sequence[dict[str, Any]],
    place: Path,
    inspect: Inspect | None,
) -> Record:
    """Train each candidate, keep the one that is best on validation samples, and describe it."""
    name, way = recipe.selection
    candidates: list[dict[str, Any]] = []
    results: list[list[dict[str, Any]]] = []
    for number, config in enumerate(configs):
        asked = {key: value for key, value in config.items() if key != "task"}
        found: dict[str, Any] = {"options": config, "validation": None}
        splits: list[dict[str, Any]] = []
        try:
            train(recipe, setting.data, place / str(number), asked, resume=True)
        except TrainingDivergedError as error:
            found["failed"] = str(error)
        else:
            splits = [_split(run) for run in _models(place / str(number))]
            found["validation"] = float(np.mean([s["validation"][name] for s in splits]))
        candidates.append(found)
        results.append(splits)
    usable = [number for number, splits in enumerate(results) if splits]
    sign = 1.0 if way == "min" else -1.0
    best = min(usable, key=lambda number: sign * candidates[number]["validation"], default=0)
    if inspect is not None and usable:
        for split, run in zip(results[best], _models(place / str(best)), strict=True):
            split["more"] = dict(inspect(recipe, _config_of(run), run))
    return {
        "candidates": candidates,
        "chosen": best,
        "selection": [name, way],
        "environment": {**environment.record(), "threads": torch.get_num_threads()},
        "splits": results[best],
    }


def _config_of(run: RunDirectory) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(run.config.read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if key not in ("format", "version")}


def _models(folder: Path) -> list[RunDirectory]:
    """The folders of the models of a run."""
    parts = sorted(folder.glob("split_*/"))
    return [RunDirectory(part) for part in parts or [folder]]


def _split(run: RunDirectory) -> dict[str, Any]:
    """Metrics of one model, with the mean steps and share of converged rows of its training."""
    metrics = json.loads(run.metrics.read_text(encoding="utf-8"))
    named = ("validation", "epochs", "best_epoch", "parameters", "training_seconds")
    history = read_history(run)
    return {
        "test": {key: value for key, value in metrics.items() if key not in named},
        **{key: metrics[key] for key in named},
        "steps": _mean(history["steps"]),
        "converged": _mean(history["converged"]),
    }


def read_history(run: RunDirectory) -> dict[str, list[float]]:
    """The columns of a run's `log.csv`, a number per epoch."""
    with run.log.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def _mean(values: Sequence[float]) -> float | None:
    """None without a solve: NaN is no JSON."""
    mean = float(np.mean(values))
    return None if math.isnan(mean) else mean


def _check_same(
    path: Path, record: Record, recipe: Recipe, configs: Sequence[Mapping[str, Any]], sha256: str
) -> None:
    if record["data_sha256"] != sha256:
        raise RecordError(f"{path}: is of other data, expected an --out folder of this data")
    stored = [candidate.get("options", {}) for candidate in record["candidates"]]
    if len(stored) != len(configs):
        raise RecordError(
            f"{path}: got {len(stored)} choices of options, expected {len(configs)} as asked for "
            "(or another --out folder)"
        )
    # How a run is computed may differ, and the number of epochs may not.
    free = {name for name, field in fields_of(recipe).items() if not field.fixed} - {"epochs"}
    for old, config in zip(stored, configs, strict=True):
        new = json.loads(json.dumps(config))
        for key in sorted((old.keys() | new.keys()) - free):
            if old.get(key) != new.get(key):
                raise RecordError(
                    f"{path}: the run has {key} = {old.get(key)!r}, expected {new.get(key)!r} as "
                    "asked for (or another --out folder)"
                )


def _check_arguments(path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for key in sorted(stored.keys() | asked.keys()):
        if stored.get(key) != asked.get(key):
            raise RecordError(
                f"{path}: is of --{key} {stored.get(key)!r}, expected {asked.get(key)!r} as asked "
                "for (or another --out folder)"
            )
