"""Trained models and the samples that they are looked into with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engine import Config, Recipe, RunDirectory, Samples, Splits, read_model
from ..module import DEQFusion
from ..solution import Equilibrium
from .settings import Setting


class Solved(NamedTuple):
    """What a trained model solved for a batch: `engine.Objective`, without gradients."""

    equilibrium: Equilibrium
    features: list[Tensor]
    fusion: DEQFusion


def trained(
    recipe: Recipe, setting: Setting, config: Config, run: RunDirectory
) -> tuple[nn.Module, Splits]:
    """Return the model of a finished run, in evaluation mode, and the splits that it was for."""
    splits, _ = recipe.load(setting.data, config)
    return read_model(recipe, run, config).eval(), splits


def load_first(setting: Setting, config: Config) -> tuple[Splits, dict[str, Any]]:
    """Read a task's data, of several splits the first."""
    split = {"split": 0} if setting.recipe.repeats(config) else {}
    return setting.recipe.load(setting.data, {**config, **split})


def held_out(splits: Splits) -> Samples:
    """The test samples, or where a task has none those of validation."""
    return splits.validation if splits.test is None else splits.test


def batches(samples: Samples, config: Config) -> Iterator[Any]:
    """All samples in batches of the run's size."""
    for rows in torch.arange(len(samples)).split(config["batch_size"] or max(len(samples), 1)):
        yield samples.batch(rows)


@torch.no_grad()
def solved(recipe: Recipe, model: nn.Module, batch: Any) -> Solved:
    """What the fusion was given and found for a batch.

    Raises:
        ValueError: the model's fusion solves nothing for this batch.
    """
    _, equilibrium, features, fusion = recipe.objective(model, batch)
    if equilibrium is None or features is None or fusion is None:
        raise ValueError(
            f"task: got {recipe.name!r} without an equilibrium to look into, expected one"
        )
    return Solved(equilibrium, list(features), fusion)


def modality_names(config: Config, count: int) -> list[str]:
    """Names of a task's modalities, as its option has them, or numbers from 0."""
    names = config.get("modalities")
    if isinstance(names, list) and len(names) == count:
        return [str(name) for name in names]
    return [str(number) for number in range(count)]


def short(values: NDArray[np.float64]) -> list[float | None]:
    """Numbers with five digits, which is plenty for a curve; None for NaN, which is no JSON."""
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in values]
