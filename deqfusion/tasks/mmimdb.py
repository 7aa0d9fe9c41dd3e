"""Genres of films from plot and poster: MM-IMDB, any number of 23 genres for each film.

Maxout encoders to 512 features, the fusion, a linear head; binary cross-entropy; F1 of genres with
probability above 1/2. The epoch with the best macro F1 on the published validation rows is kept.

Defaults are those of the authors' released code (AdamW, learning rate 1e-3 and a tenth of it for
the fusion, decay 0.01, batches of 256, gradients clipped to norm 8, Jacobian weight 0.1, an end
after 8 epochs without a better one), but for these:

1. The cell is the paper's. The authors' MM-IMDB cell is `--gate identity --skip --tail norm_relu`.
2. At most 100 epochs, where theirs are 1000: early stopping ends both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..data.mmimdb import MMIMDB_SPLIT, MMIMDBFile, mmimdb_split
from ..engine import Config, Field, Objective, Recipe, Splits, configured_fusion
from ..engine.kinds import Sha256, WholeNumber, WholeNumbers
from ..metrics.multilabel import multilabel_f1
from ..models.classifier import ClassifierOutput
from ..models.mmimdb import MaxoutClassifier


class FilmSamples:
    """Some rows of an MM-IMDB file, read when they are asked for."""

    def __init__(self, file: MMIMDBFile, rows: np.ndarray) -> None:
        self.file = file
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> dict[str, Any]:
        """Return `inputs`, text and image features, and `genres`, float32 (B, genres)."""
        text, image, genres = map(torch.from_numpy, self.file.rows(self.rows[indices.numpy()]))
        return {"inputs": (text, image), "genres": genres}


class MMIMDBRecipe(Recipe):
    """Multi-label classification of MM-IMDB."""

    name = "mmimdb"
    help = "genres of films from plot and poster: MM-IMDB's multimodal_imdb.hdf5"
    fields: ClassVar = {
        "split_sizes": Field(
            WholeNumbers(0, 10_000_000),
            list(MMIMDB_SPLIT),
            "rows to train on, for validation and for test, in the file's order",
        ),
        "hidden": Field(
            WholeNumbers(1, 65536), [512, 1024], "first layer of the text and image encoder"
        ),
    }
    defaults: ClassVar = {
        "dim": 512,
        "dropout": 0.3,
        "epochs": 100,
        "batch_size": 256,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
        "fusion_rate": 0.1,
        "clip_norm": 8.0,
        "early_stopping": 8,
        "jacobian_weight": 0.1,
    }
    facts: ClassVar = {
        "input_widths": WholeNumbers(1, 10_000_000),
        "num_labels": WholeNumber(2, 100_000),
        "data_sha256": Sha256(),
    }
    selection = ("f1_macro", "max")
    # Of one film batch normalisation has no deviation.
    least_samples = 2

    def fault(self, config: Config) -> tuple[str, str] | None:
        """Return what does not fit together: numbers of sizes, a last batch of one film."""
        for key, count in (("split_sizes", 3), ("hidden", 2)):
            if len(config[key]) != count:
                return key, f"got {len(config[key])} numbers, expected {count}"
        rows, size = config["split_sizes"][0], config["batch_size"]
        last = rows if size is None else rows % size or min(rows, size)
        if last == 1:
            return "batch_size", (
                f"got {size}, which leaves one of {rows} films for the last batch, expected two "
                "or more, which batch normalisation needs"
            )
        return None

    def load(self, data_dir: Path, config: Config) -> tuple[Splits, dict[str, Any]]:
        """Open `multimodal_imdb.hdf5` in the folder and check it as a whole."""
        file = MMIMDBFile(data_dir)
        train, validation, test = (
            FilmSamples(file, rows) for rows in mmimdb_split(file, config["split_sizes"])
        )
        *widths, labels = file.widths
        facts = {"input_widths": widths, "num_labels": labels, "data_sha256": file.check()}
        return Splits(train, validation, test), facts

    def build(self, config: Config) -> nn.Module:
        """Make a `MaxoutClassifier`."""
        return MaxoutClassifier(
            config["input_widths"],
            config["num_labels"],
            configured_fusion(config, len(config["input_widths"])),
            dim=config["dim"],
            hidden=config["hidden"],
            dropout=config["dropout"],
        )

    def objective(self, model: nn.Module, batch: Any) -> Objective:
        """Binary cross-entropy, mean over films and genres."""
        output = cast(ClassifierOutput, model(batch["inputs"]))
        loss = nn.functional.binary_cross_entropy_with_logits(
            output.logits.float(), batch["genres"]
        )
        solved = cast(Any, model.fusion) if output.equilibrium is not None else None
        return Objective(loss, output.equilibrium, output.features, solved)

    def predict(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return probabilities and genres, (B, genres) each."""
        return torch.sigmoid(model(batch["inputs"]).logits.float()), batch["genres"]

    def metrics(self, outputs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Return F1 over genres: micro, macro, weighted, samples."""
        probabilities, genres = (torch.cat(parts).numpy() for parts in zip(*outputs, strict=True))
        return multilabel_f1(probabilities, genres.astype(np.int64))


RECIPES = {"mmimdb": MMIMDBRecipe()}
