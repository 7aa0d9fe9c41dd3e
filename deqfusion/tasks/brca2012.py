"""Subtypes of breast cancer from three to five omics, by cross-validation.

The 345 tumours of The Cancer Genome Atlas (Nature 490, 2012) in index-column CSV files, see
`data.indexed`; PAM50 subtypes, of which Normal has 5 patients and is left out unless asked for.
Scaling, hosts and schedule are those of the other omics (see `omics`). Every fold is once the test
part; the epoch is chosen on a stratified part of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..data import DataError, load_indexed, stratified_folds
from ..engine import Config, Field, OptionError, Recipe, data_sha256
from ..engine.kinds import Kind, Sha256s, SomeOf, Switch, WholeNumber
from .classification import Classification, Division, Known, RowFiles, Source, listed, names_sha256
from .omics import Omics

_OMICS = ("mrna", "meth", "mirna", "protein", "cnv")


class Brca2012(RowFiles):
    """TCGA's breast cancers of 2012."""

    name = "brca2012"
    help = "TCGA breast cancer subtypes from three to five omics, in folds"
    fields: ClassVar[Mapping[str, Field]] = {
        "modalities": Field(SomeOf(_OMICS), ["mrna", "meth", "mirna"], "files to read"),
        "normal": Field(Switch(), False, "keep the class Normal, of 5 patients"),
        "folds": Field(WholeNumber(2, 1000), 5, "of which each is once the test part"),
        **Classification.fields,
    }
    defaults: ClassVar[Mapping[str, Any]] = Omics.defaults
    facts: ClassVar[Mapping[str, Kind]] = {**RowFiles.facts, "columns_sha256": Sha256s()}

    def repeats(self, config: Config) -> int:
        return int(config["folds"])

    def read(self, data_dir: Path, config: Config) -> Source:
        without = () if config["normal"] else ("Normal",)
        rows, classes, files, columns = load_indexed(
            data_dir, config["modalities"], "pam50", without=without
        )
        known = [
            Known(str(file), f"columns {listed(names)}", names_sha256(names))
            for file, names in zip(files, columns, strict=True)
        ]
        labels = str(data_dir / "labels.csv")
        known.append(Known(labels, f"classes {listed(classes)}", names_sha256(classes)))
        facts = {
            "input_widths": [view.shape[1] for view in rows.modalities],
            "num_classes": len(classes),
            "columns_sha256": [each.sha256 for each in known],
            "data_sha256": data_sha256([*rows.modalities, rows.labels]),
        }

        def place(index: int, row: int, column: int) -> str:
            where = f"row {row + 1} of those in labels.csv, column {columns[index][column]!r}"
            return f"{files[index]}, {where}"

        return Source(rows, facts, place, known=known)

    def divisions(self, source: Source, config: Config) -> Sequence[Division]:
        try:
            return stratified_folds(source.rows.labels, config["folds"], config["seed"])
        except DataError as error:
            raise OptionError("folds", str(error)) from error


RECIPES: dict[str, Recipe] = {Brca2012.name: Brca2012()}
