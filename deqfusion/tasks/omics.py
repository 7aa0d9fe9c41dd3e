"""Classification of omics data in MOGONET's layout: ROSMAP, BRCA and others.

Per modality min-max scaling (fitted on the rows that are trained on), then the plain host or that
of Multimodal Dynamics around the fusion, on all rows at once. The epoch is chosen on a stratified
part of the training rows, never on test rows (the authors of DEQ fusion report the best epoch on
the test rows, so that their figures are above what a chosen epoch gives).

`train` runs on the folder's own split, or on repeated stratified splits of all its rows, for which
mean and standard error are reported. `evaluate` applies a finished run to the test rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..data import load_mogonet, stratified_shuffles
from ..engine import Config, Field, Recipe, data_sha256
from ..engine.kinds import WholeNumber, WholeNumbers
from .classification import Classification, Division, RowFiles, Source


class Omics(RowFiles):
    """A folder in MOGONET's layout."""

    fields: ClassVar[Mapping[str, Field]] = {
        "modalities": Field(WholeNumbers(0, 9999, distinct=True), [1, 2, 3], "files to read"),
        "splits": Field(
            WholeNumber(0, 10_000),
            0,
            "repeated stratified splits of all rows instead of the given split",
        ),
        **Classification.fields,
    }
    # Features of omics are all positive, so that a step of the encoders moves every row the same
    # way, and the equilibrium passes that on multiplied by up to 1 / (1 - spectral radius): with
    # penalty 1 the radius reached 0.9 to 1.0 and the training loss rose again by 1.3 to 1.8 (exact
    # gradients, rows converged; a third of each step would have been best). Chosen on six hold-outs
    # of ROSMAP's training rows: such a rise is below 0.2 with penalty 100, and validation loss no
    # worse; a rate of 1e-3 alone leaves it (1.8). Concatenation at 3e-3 rises by 1.0 too.
    defaults: ClassVar[Mapping[str, Any]] = {
        "dim": 32,
        "epochs": 240,
        "learning_rate": 1e-3,
        "jacobian_weight": 100.0,
    }

    def repeats(self, config: Config) -> int:
        return int(config["splits"])

    def fault(self, config: Config) -> tuple[str, str] | None:
        widths, modalities = config.get("input_widths"), len(config["modalities"])
        if widths is not None and len(widths) != modalities:
            return "input_widths", (
                f"got {len(widths)} numbers, expected one for each of {modalities} files"
            )
        return None

    def read(self, data_dir: Path, config: Config) -> Source:
        data = load_mogonet(data_dir, config["modalities"])
        parts = [*data.train.modalities, data.train.labels]
        facts = {
            "input_widths": [view.shape[1] for view in data.train.modalities],
            "num_classes": data.num_classes,
            "data_sha256": data_sha256([*parts, *data.test.modalities, data.test.labels]),
        }
        rows = np.arange(len(data.train) + len(data.test))
        given = rows[: len(data.train)], rows[len(data.train) :]

        def place(index: int, row: int, column: int) -> str:
            part, line = ("tr", row) if row < len(data.train) else ("te", row - len(data.train))
            name = f"{config['modalities'][index]}_{part}.csv"
            return f"{data_dir / name}, line {line + 1}, column {column + 1}"

        return Source(data.pooled(), facts, place, given)

    def divisions(self, source: Source, config: Config) -> Sequence[Division]:
        given, sha256 = source.given, source.facts["data_sha256"]
        assert given is not None
        # A model of one split is evaluated on that split's rows; of other data, on its test part.
        if not config["splits"] or config.get("data_sha256", sha256) != sha256:
            return [given] * max(1, config["splits"])
        return stratified_shuffles(
            source.rows.labels, config["splits"], len(given[1]), config["seed"]
        )


class Rosmap(Omics):
    """ROSMAP."""

    name = "rosmap"
    help = "ROSMAP, or any omics data in MOGONET's layout"


class Brca(Omics):
    """BRCA."""

    name = "brca"
    help = "BRCA in MOGONET's layout"


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (Rosmap(), Brca())}
