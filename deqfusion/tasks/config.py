"""What a run of task "rosmap" is asked to do: every key of `config.json`, and what it may be.

Upper bounds keep a damaged or mistyped number from asking for terabytes or for years.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.kinds import (
    FusionName,
    Kind,
    OneOf,
    OrNull,
    RealNumber,
    Sha256,
    WholeNumber,
    WholeNumbers,
)
from ..engine.runs import CheckpointError, read_config
from ..functional import CellOptions

#: What each key may be, in the order in which they are checked.
FIELDS: dict[str, Kind] = {
    "task": OneOf(("rosmap",)),
    "modalities": WholeNumbers(0, 9999, distinct=True),
    "input_widths": WholeNumbers(1, 10_000_000),
    "num_classes": WholeNumber(2, 100_000),
    "data_sha256": Sha256(),
    "fusion": FusionName(),
    "dim": WholeNumber(1, 8192),
    "tol": RealNumber(0.0, above=True),
    "dropout": RealNumber(0.0, below=1.0),
    "epochs": WholeNumber(1, 1_000_000),
    # What scikit-learn takes.
    "seed": WholeNumber(0, 2**32 - 1),
    "learning_rate": RealNumber(0.0, above=True),
    "weight_decay": RealNumber(0.0),
    "batch_size": OrNull(WholeNumber(1)),
    "jacobian_weight": RealNumber(0.0),
    "validation_fraction": RealNumber(0.0, above=True, below=1.0),
    "splits": WholeNumber(0, 10_000),
    "split": WholeNumber(0, 9999),
}
# Only the folder of one of several splits has it.
_OPTIONAL = {"split"}


def read_run(folder: str | Path) -> dict[str, Any]:
    """Read the `config.json` of a run of task "rosmap", with every value of its type and range.

    Raises:
        CheckpointError: there is none, or it is not one of this project's, or of another task, or
            it names a value that no run has.
    """
    config = read_config(folder)
    found = fault({key: value for key, value in config.items() if key not in ("format", "version")})
    if found is not None:
        key, what = found
        raise CheckpointError(f"{Path(folder) / 'config.json'}: {key}: {what}")
    return config


def fault(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first key that is not as it should be, and what was got and expected; or None."""
    for key, kind in FIELDS.items():
        if key not in config:
            if key not in _OPTIONAL:
                return key, f"is missing, expected {kind.expected}"
        elif not kind.accepts(config[key]):
            return key, f"got {reprlib.repr(config[key])}, expected {kind.expected}"
    unknown = sorted(config.keys() - FIELDS.keys())
    if unknown:
        return reprlib.repr(unknown[0]), f"is unknown, expected only {', '.join(FIELDS)}"
    widths, modalities = len(config["input_widths"]), len(config["modalities"])
    if widths != modalities:
        return "input_widths", f"got {widths} numbers, expected one for each of {modalities} files"
    groups = CellOptions().num_groups
    if config["fusion"].startswith(("deq", "weight_tied")) and config["dim"] % groups:
        return "dim", (
            f"got {config['dim']}, expected a multiple of {groups} for fusion "
            f"{config['fusion']!r}, whose normalisations have {groups} groups"
        )
    return None
