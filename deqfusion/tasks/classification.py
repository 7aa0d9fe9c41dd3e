"""What the tasks share whose samples are rows of several modalities with one class each."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..data import DataError, LabelledModalities, stratified_holdout
from ..engine import (
    Config,
    Field,
    Objective,
    OptionError,
    Recipe,
    Splits,
    TensorSamples,
    configured_fusion,
    seed_of,
)
from ..engine.kinds import Kind, OneOf, RealNumber, Sha256, WholeNumber, WholeNumbers
from ..metrics import classification_metrics
from ..models import (
    SCALINGS,
    ClassifierOutput,
    InputScaling,
    MultimodalClassifier,
    MultimodalDynamics,
)
from ..module import DEQFusion

#: Numbers of the rows in two parts, such as those to train on and those to test on.
Division = tuple[NDArray[np.int64], NDArray[np.int64]]

VALIDATION_FRACTION = Field(
    RealNumber(0.0, above=True, below=1.0), 0.2, "of the training rows, to choose the epoch"
)
HOST = Field(OneOf(("plain", "dynamics")), "plain", "encoders and a head, or Multimodal Dynamics'")
SCALING = Field(OneOf(SCALINGS), "minmax", "of the inputs, by the rows that are trained on")


class Classification(Recipe, ABC):
    """Rows of modalities to classes, by the plain host or Multimodal Dynamics'.

    A batch is (inputs, labels): float64 (B, width_i) of each modality, and int64 (B,).
    """

    fields: ClassVar[Mapping[str, Field]] = {
        "host": HOST,
        "scaling": SCALING,
        "validation_fraction": VALIDATION_FRACTION,
    }
    facts: ClassVar[Mapping[str, Kind]] = {
        "input_widths": WholeNumbers(1, 10_000_000),
        "num_classes": WholeNumber(2, 100_000),
        "data_sha256": Sha256(),
    }

    def build(self, config: Config) -> nn.Module:
        widths = config["input_widths"]
        host = MultimodalDynamics if config["host"] == "dynamics" else MultimodalClassifier
        return host(
            widths,
            config["num_classes"],
            dim=config["dim"],
            fusion=configured_fusion(config, len(widths)),
            dropout=config["dropout"],
            scaling=InputScaling(widths, config["scaling"]),
        )

    def prepare(self, model: nn.Module, splits: Splits, config: Config) -> None:
        inputs, _ = cast(TensorSamples, splits.train).data
        cast(InputScaling, model.scaling).fit(inputs)

    def objective(self, model: nn.Module, batch: Any) -> Objective:
        inputs, labels = batch
        if isinstance(model, MultimodalDynamics):
            loss, output = model.loss(inputs, labels)
        else:
            output = model(inputs)
            loss = nn.functional.cross_entropy(output.logits, labels)
        fusion = model.fusion
        return Objective(
            loss,
            output.equilibrium,
            output.features,
            fusion if isinstance(fusion, DEQFusion) else None,
        )

    def predict(self, model: nn.Module, batch: Any) -> Any:
        inputs, labels = batch
        output: ClassifierOutput = model(inputs)
        return output.logits.float(), labels

    def metrics(self, outputs: Sequence[Any]) -> dict[str, float]:
        logits, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        loss = nn.functional.cross_entropy(logits, labels).item()
        if not math.isfinite(loss):
            # The engine's error says what happened; there are no probabilities to judge.
            return {"loss": loss}
        probabilities = torch.softmax(logits.double(), dim=-1).numpy()
        return {"loss": loss, **classification_metrics(probabilities, labels.numpy())}


class Known(NamedTuple):
    """What columns or classes that a model was trained on are known by.

    Attributes:
        place: their file.
        text: what is said of them.
        sha256: of their names, or of their values where they have none.
    """

    place: str
    text: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """What was read of a task's files: every row once, whatever the splits.

    Attributes:
        rows: all of them.
        facts: of the data, as `Recipe.load` returns them.
        place: file, row and column of a value, given modality, row and column.
        given: the files' own division, where they have one.
        known: with which a run may be evaluated, in the fact `columns_sha256`.
    """

    rows: LabelledModalities
    facts: dict[str, Any]
    place: Callable[[int, int, int], str]
    given: Division | None = None
    known: Sequence[Known] = ()

    def refuse_others(self, config: Config) -> None:
        """Compare with a run's, in evaluation: other columns of the same number would do as well.

        Raises:
            DataError: these are others than the run was trained on.
        """
        for known, expected in zip(self.known, config.get("columns_sha256", ()), strict=False):
            if known.sha256 != expected:
                raise DataError(
                    f"{known.place}: got {known.text} (SHA-256 {known.sha256[:12]}), expected "
                    f"those that the run was trained on (SHA-256 {expected[:12]})"
                )


def listed(names: Sequence[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def names_sha256(names: Sequence[str]) -> str:
    """SHA-256 of names, in their order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


class RowFiles(Classification, ABC):
    """A task whose files hold rows that are divided by number."""

    @abstractmethod
    def read(self, data_dir: Path, config: Config) -> Source:
        """Read the files; raises DataError as `load` does."""

    @abstractmethod
    def divisions(self, source: Source, config: Config) -> Sequence[Division]:
        """Divide the rows into those to train on and those to test on, once or for each split.

        Raises:
            DataError, OptionError: they cannot be divided so.
        """

    def load(self, data_dir: Path, config: Config) -> tuple[Splits, dict[str, Any]]:
        source = self.read(data_dir, config)
        source.refuse_others(config)
        division = self.divisions(source, config)[config.get("split", 0)]
        return _splits(source, samples(source.rows), division, config), source.facts

    def load_repeats(
        self, data_dir: Path, config: Config
    ) -> Sequence[tuple[Splits, dict[str, Any]]]:
        source = self.read(data_dir, config)
        shared = samples(source.rows)
        return [
            (_splits(source, shared, division, {**config, "split": split}), source.facts)
            for split, division in enumerate(self.divisions(source, config))
        ]


def _splits(source: Source, shared: TensorSamples, division: Division, config: Config) -> Splits:
    train, test = division
    kept, held = hold_out(source.rows.labels[train], config)
    fitted = train[kept]
    views, _ = shared.shared
    scaling = InputScaling(source.facts["input_widths"], config["scaling"])
    found = scaling.fit([view[fitted] for view in views]).outlier(views)
    if found is not None:
        raise DataError(f"{source.place(found.view, found.row, found.column)}: {found}")
    return Splits(*(shared.take(rows) for rows in (fitted, train[held], test)))


def hold_out(labels: NDArray[np.int64], config: Config) -> Division:
    """Divide training rows into those to fit and those to choose the epoch by.

    Args:
        labels: of the training rows.
        config: has `validation_fraction`, `seed` and, of one of several, `split`.

    Raises:
        OptionError: `validation_fraction` leaves a part without one of the classes.
    """
    try:
        return stratified_holdout(labels, config["validation_fraction"], seed_of(config))
    except DataError as error:
        raise OptionError("validation_fraction", str(error)) from error


def samples(rows: LabelledModalities) -> TensorSamples:
    """Rows as the engine takes them."""
    inputs = tuple(torch.from_numpy(view).double() for view in rows.modalities)
    return TensorSamples((inputs, torch.from_numpy(rows.labels)))
