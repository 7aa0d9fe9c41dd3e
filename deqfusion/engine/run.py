"""A task trained from its folder of data into a folder of results, and evaluated from there."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..metrics import mean_and_error
from .config import checked, fields_of
from .distributed import Process, processes, whole_state
from .recipe import Config, Recipe, Splits
from .runs import (
    CheckpointError,
    RunDirectory,
    check_tensors,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)
from .seeds import seed_of
from .training import FitResult, Trainer


@dataclass(frozen=True)
class Loaded:
    """A configuration with facts, and the data of each model that it trains.

    Attributes:
        config: complete, without `split`.
        parts: the configuration and splits of each model; one, or one for each of the repeats.
    """

    config: dict[str, Any]
    parts: list[tuple[dict[str, Any], Splits]]

    @property
    def repeated(self) -> bool:
        """Whether each part has a folder of its own."""
        return "split" in self.parts[0][0]


def load(recipe: Recipe, data_dir: Path, options: Config) -> Loaded:
    """Read the data of a run, of all its splits or folds.

    Args:
        recipe: the task.
        data_dir: the folder.
        options: complete, without facts.

    Raises:
        DataError: from the recipe.
    """
    if not recipe.repeats(options):
        splits, facts = recipe.load(data_dir, options)
        return Loaded({**options, **facts}, [({**options, **facts}, splits)])
    loaded = enumerate(recipe.load_repeats(data_dir, options))
    parts = [({**options, **facts, "split": i}, splits) for i, (splits, facts) in loaded]
    config = {key: value for key, value in parts[0][0].items() if key != "split"}
    return Loaded(config, parts)


def train(
    recipe: Recipe,
    data_dir: str | Path,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Train a task in this process, or in those that torchrun started, as `deqfusion train` does.

    Under torchrun a program's last call should be `leave`, as it says why.

    Args:
        recipe: the task.
        data_dir: folder of the data.
        out: folder of the run; empty, unless `resume`.
        options: what differs from the defaults.
        resume: continue the run in `out`, or start one where there is none.
        progress: show a bar.

    Returns:
        What `metrics.json` has: see `train_loaded`.

    Raises:
        ValueError: an option that is unknown, of another kind, or does not fit the others or,
            as `strategy`, the processes that there are.
        DataError, CheckpointError, TrainingDivergedError: from reading and training.
        LostProcessError: another process of the run ended.
    """
    config = checked(recipe, options or {})
    with processes(config) as process:
        loaded = load(recipe, Path(data_dir), config)
        model = first_model(recipe, loaded, out, process)
        run = process.of_first(lambda: open_run(recipe, out, loaded.config, resume=resume))
        return train_loaded(recipe, loaded, model, run, process, progress=progress)


def first_model(recipe: Recipe, loaded: Loaded, out: str | Path, process: Process) -> nn.Module:
    """Return the model of a run's first part, to be called before the run's folder is made.

    Pretrained weights are read here, and where they are missing nothing must be left behind.

    Raises:
        OptionError, OSError: from the recipe.
    """
    config, splits = loaded.parts[0]
    folder = _part_folder(out, 0) if loaded.repeated else out
    return _model(recipe, config, splits, RunDirectory(folder), process)


def open_run(
    recipe: Recipe,
    out: str | Path,
    config: Config,
    *,
    resume: bool,
    part_of: RunDirectory | None = None,
) -> RunDirectory:
    """Open a run's folder; see `RunDirectory.open`."""
    free = {name for name, field in fields_of(recipe).items() if not field.fixed}
    if config["schedule"] == "cosine":
        # The number of epochs decides the rate of each: with another it is another run.
        free.remove("epochs")
    return RunDirectory.open(out, config, resume=resume, free=free, part_of=part_of)


def train_loaded(
    recipe: Recipe,
    loaded: Loaded,
    model: nn.Module,
    run: RunDirectory,
    process: Process,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Train every part of a run, and write models, metrics, logs and curves.

    Args:
        recipe: the task.
        loaded: its data.
        model: of `first_model`.
        run: its folder, open.
        process: this process.
        progress: show a bar.

    Returns:
        Of one model its test metrics, `validation` metrics of the chosen epoch, `epochs`,
        `best_epoch`, `parameters` and `training_seconds`; of several, `mean` and `standard_error`
        of each number.
    """
    if not loaded.repeated:
        (config, splits), *_ = loaded.parts
        label = "training" if progress else None
        return _train_part(recipe, model, config, splits, run, process, label)
    results = []
    for index, (config, splits) in enumerate(loaded.parts):
        folder = _part_folder(run.path, index)
        part = process.of_first(
            lambda folder=folder, config=config: open_run(  # type: ignore[misc]
                recipe, folder, config, resume=True, part_of=run
            )
        )
        label = f"split {index + 1}/{len(loaded.parts)}" if progress else None
        if index:
            model = _model(recipe, config, splits, part, process)
        results.append(_train_part(recipe, model, config, splits, part, process, label))
    rows = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in results]
    summary = {}
    for name in rows[0]:
        values = [math.nan if row[name] is None else row[name] for row in rows]
        mean, error = mean_and_error(np.array(values, dtype=float))
        summary[name] = json_values({"mean": mean, "standard_error": error})
    if process.first:
        write_atomically(run.path / "splits.csv", lambda path: _write_table(path, rows))
        write_json(run.metrics, summary)
    return summary


def _part_folder(out: str | Path, index: int) -> Path:
    return Path(out) / f"split_{index:03d}"


def _model(
    recipe: Recipe, config: Config, splits: Splits, run: RunDirectory, process: Process
) -> nn.Module:
    """Build a model, and prepare it unless a checkpoint will be read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config))
        model = recipe.build(config)
        if not process.of_first(run.checkpoint.exists):
            recipe.prepare(model, splits, config)
    return model


def _train_part(
    recipe: Recipe,
    model: nn.Module,
    config: Config,
    splits: Splits,
    run: RunDirectory,
    process: Process,
    label: str | None,
) -> dict[str, Any]:
    """Train one model and return its metrics."""
    # A split's parameters, order and dropout are its own.
    config = {**config, "seed": seed_of(config)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainer = Trainer(recipe, model, config, process)
    result = trainer.fit(splits, run=run, progress=label)
    test = trainer.evaluate(splits.test) if splits.test is not None else {}
    state = whole_state(model)
    metrics = {
        **json_values(test),
        "validation": json_values(result.validation),
        "epochs": len(result.history),
        "best_epoch": result.best_epoch,
        "parameters": parameters,
        "training_seconds": float(result.column("seconds").sum()),
    }
    if process.first:
        tensors = {f"model/{name}": value for name, value in state.items()}
        write_tensors(run.model, "model", tensors)
        write_json(run.metrics, metrics)
        _draw_curves(run.curves, result, recipe.selection[0])
    return metrics


def evaluate_loaded(
    recipe: Recipe, run: RunDirectory, config: Config, splits: Splits, process: Process
) -> dict[str, float]:
    """Return the test metrics of a finished run.

    Raises:
        CheckpointError: the run is unfinished or damaged.
    """
    model = read_model(recipe, run, config)
    if splits.test is None:
        raise CheckpointError(f"{run.config}: the task has no test samples, expected some")
    return Trainer(recipe, model, config, process).evaluate(splits.test)


def read_model(recipe: Recipe, run: RunDirectory, config: Config) -> nn.Module:
    """Return the model of a finished run, of the chosen epoch.

    Args:
        recipe: its task.
        run: its folder.
        config: as `config.read_run` returns it.

    Raises:
        CheckpointError: the run is unfinished or damaged.
    """
    if run.checkpoint.exists() and not run.model.exists():
        raise CheckpointError(
            f"{run.model}: no such file, expected a finished run (continue it with --resume)"
        )
    tensors = read_tensors(run.model, "model")
    # Without memory, until it is known that the file has a model of this size.
    with torch.device("meta"):
        expected = recipe.build(config).state_dict()
    check_tensors(run.model, tensors, {f"model/{name}": t for name, t in expected.items()})
    model = recipe.build(config)
    state = {name.removeprefix("model/"): tensor for name, tensor in tensors.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{run.model}: {reason}") from error
    return model


def json_values(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics with None for NaN, which is no JSON: a class without rows has no AUC."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["split", *rows[0]])
        writer.writeheader()
        writer.writerows({"split": index, **row} for index, row in enumerate(rows))


def _draw_curves(path: Path, result: FitResult, selection: str) -> None:
    # matplotlib takes a second to import: not while arguments are parsed.
    from ..plots import save_png, training_curves

    columns = {name: result.column(name).tolist() for name in result.columns}
    figure = training_curves(columns, best_epoch=result.best_epoch, selection=selection)
    write_atomically(path, lambda temporary: save_png(figure, temporary))
