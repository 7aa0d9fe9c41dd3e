"""Multi-view data sets in MATLAB files: a cell array `X` of matrices, and labels `Y` or `gt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError
from .mogonet import LabelledModalities

_LABELS = ("Y", "gt", "y", "label", "labels")


def load_multiview(path: str | Path) -> LabelledModalities:
    """Read a multi-view `.mat` file.

    Args:
        path: has `X`, a cell array of matrices (rows, width_i), and one of the labels' names.

    Returns:
        All rows; classes numbered from 0 in the order of their labels.

    Raises:
        DataError: no such file, not one of MATLAB's, or not with these contents.
    """
    # scipy takes a while to import: not while arguments are parsed.
    from scipy.io import loadmat

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a MATLAB file")
    try:
        content = loadmat(path)
    except Exception as error:  # whatever a damaged file makes of the reader
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}: {error}), expected a MATLAB file "
            "of version 7.2 or earlier"
        ) from error
    name = next((name for name in _LABELS if name in content), None)
    if "X" not in content or name is None:
        found = ", ".join(key for key in content if not key.startswith("__")) or "nothing"
        raise DataError(f"{path}: has {found}, expected X and one of {', '.join(_LABELS)}")
    labels = np.unique(_numbers(path, name, content[name]).ravel(), return_inverse=True)
    cells = content["X"]
    if cells.dtype != object or not cells.size:
        raise DataError(f"{path}: X: got an array of {cells.dtype}, expected cells, one per view")
    views = [_numbers(path, f"X{{{i}}}", cell) for i, cell in enumerate(cells.ravel(), 1)]
    for index, view in enumerate(views, 1):
        if view.ndim != 2 or len(view) != len(labels[1]) or not view.size:
            raise DataError(
                f"{path}: X{{{index}}}: got shape {view.shape}, expected ({len(labels[1])}, width)"
                f", a row for each label of {name}"
            )
    if len(labels[0]) < 2:
        raise DataError(f"{path}: {name}: one class only, expected at least two")
    return LabelledModalities(tuple(views), labels[1].astype(np.int64))


def _numbers(path: Path, name: str, array: Any) -> Any:
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise DataError(f"{path}: {name}: got {array.dtype}, expected real numbers")
    values = np.asarray(array)
    if np.iscomplexobj(values) or not np.isfinite(values).all():
        raise DataError(f"{path}: {name}: got NaN, inf or complex numbers, expected finite ones")
    return values.astype(np.float64)
