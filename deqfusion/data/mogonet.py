"""MOGONET's folder of CSV files: one matrix per omics modality, and labels.

`N_tr.csv` and `N_te.csv` hold modality N of the training and test rows, without header;
`labels_tr.csv` and `labels_te.csv` one class per line, written as a number. ROSMAP and BRCA are
published in this layout (T. Wang et al., MOGONET, Nature Communications 2021).

The readers are strict, since a damaged file that reads as numbers would only show as a poor figure:
every fault is a `DataError` with file, line and expectation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

_LABELS_TRAIN = "labels_tr.csv"
_LABELS_TEST = "labels_te.csv"


@dataclass(frozen=True)
class LabelledModalities:
    """Rows of several modalities with their classes.

    Attributes:
        modalities: float64 arrays (rows, features), one per modality.
        labels: int64 (rows,).
    """

    modalities: tuple[NDArray[np.float64], ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> LabelledModalities:
        """Return the given rows, in the given order."""
        return LabelledModalities(tuple(view[rows] for view in self.modalities), self.labels[rows])


@dataclass(frozen=True)
class MogonetData:
    """A MOGONET folder: a training and a test part with classes 0 to `num_classes` - 1."""

    train: LabelledModalities
    test: LabelledModalities
    num_classes: int

    def pooled(self) -> LabelledModalities:
        """Return training and test rows together, training first."""
        pairs = zip(self.train.modalities, self.test.modalities, strict=True)
        return LabelledModalities(
            tuple(np.concatenate(pair) for pair in pairs),
            np.concatenate([self.train.labels, self.test.labels]),
        )


def load_mogonet(folder: str | Path, modalities: Sequence[int] = (1, 2, 3)) -> MogonetData:
    """Read a folder in MOGONET's layout.

    Args:
        folder: holds `N_tr.csv`, `N_te.csv` for each N in `modalities`, `labels_tr.csv` and
            `labels_te.csv`.
        modalities: numbers of the modalities to read, in the order wanted.

    Returns:
        MogonetData in the folder's own split, unscaled.

    Raises:
        DataError: a missing folder or file, or a file that does not hold what it should.
        ValueError: `modalities` is empty or names one twice.
    """
    if not modalities or len(set(modalities)) != len(modalities):
        raise ValueError(f"modalities: got {list(modalities)}, expected distinct numbers")
    folder = Path(folder)
    names = [f"{number}_{part}.csv" for number in modalities for part in ("tr", "te")]
    names += [_LABELS_TRAIN, _LABELS_TEST]
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with {', '.join(names)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        also = f", nor {', '.join(missing[1:])}" if missing[1:] else ""
        raise DataError(
            f"{folder / missing[0]}: no such file{also}; expected N_tr.csv and N_te.csv for each N "
            f"of {', '.join(map(str, modalities))}, {_LABELS_TRAIN} and {_LABELS_TEST}"
        )

    train_labels = read_labels(folder / _LABELS_TRAIN)
    num_classes = len(np.unique(train_labels))
    if num_classes < 2:
        raise DataError(f"{folder / _LABELS_TRAIN}: one class only, expected at least two")
    _check_range(folder / _LABELS_TRAIN, train_labels, num_classes)
    test_labels = read_labels(folder / _LABELS_TEST)
    _check_range(folder / _LABELS_TEST, test_labels, num_classes)

    train, test = [], []
    for number in modalities:
        train_path, test_path = folder / f"{number}_tr.csv", folder / f"{number}_te.csv"
        train.append(read_matrix(train_path))
        _check_rows(train_path, train[-1], len(train_labels), _LABELS_TRAIN)
        test.append(read_matrix(test_path, train[-1].shape[1]))
        _check_rows(test_path, test[-1], len(test_labels), _LABELS_TEST)
    return MogonetData(
        LabelledModalities(tuple(train), train_labels),
        LabelledModalities(tuple(test), test_labels),
        num_classes,
    )


def read_matrix(path: str | Path, columns: int | None = None) -> NDArray[np.float64]:
    """Read a CSV file of finite numbers without header.

    Args:
        path: the file.
        columns: how many numbers each line must hold; None: as many as the first line.

    Returns:
        float64 (rows, columns).

    Raises:
        DataError: unreadable, empty or truncated file, ragged row, non-number, non-finite value.
    """
    path = Path(path)
    rows = []
    origin = "as in its training file" if columns is not None else "as in line 1"
    for number, line in enumerate(_lines(path), start=1):
        fields = line.split(",")
        columns = len(fields) if columns is None else columns
        if len(fields) != columns:
            raise DataError(
                f"{path}, line {number}: got {len(fields)} values, expected {columns} {origin}"
            )
        rows.append(_numbers(path, number, fields))
    return np.stack(rows)


def read_labels(path: str | Path) -> NDArray[np.int64]:
    """Read one class per line, written as a whole number >= 0 in any notation (`1` or `1.0e+00`).

    Raises:
        DataError: unreadable, empty or truncated file, or a line that holds something else.
    """
    path = Path(path)
    labels = []
    for number, line in enumerate(_lines(path), start=1):
        value = float(_numbers(path, number, [line])[0])
        # Beyond 2**53 neighbouring whole numbers are one and the same float.
        if not 0 <= value < 2**53 or value != math.floor(value):
            raise DataError(f"{path}, line {number}: got label {value:g}, expected 0, 1, 2, ...")
        labels.append(int(value))
    return np.asarray(labels, dtype=np.int64)


def stratified_holdout(
    labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide rows into a kept and a held-out part with the classes in proportion.

    Returns:
        Row indices (kept, held out), int64.

    Raises:
        DataError: a class, or `fraction`, is too small or large for both parts to have each class.
        ValueError: `fraction` is not between 0 and 1.
    """
    from sklearn.model_selection import train_test_split

    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction: got {fraction}, expected a number between 0 and 1")
    try:
        kept, held = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed
        )
    except ValueError as error:
        counts = np.unique(labels, return_counts=True)[1]
        raise DataError(
            f"cannot hold out {fraction:g} of {len(labels)} rows, expected both parts to have at "
            f"least {len(counts)} rows, one for each class, and every class at least 2 rows "
            f"(the smallest has {counts.min()})"
        ) from error
    return kept, held


def stratified_folds(
    labels: NDArray[np.int64], folds: int, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Divide rows into folds with the classes in proportion.

    Returns:
        For each fold the row indices (of all others, of the fold), int64.

    Raises:
        DataError: a class has fewer rows than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold

    smallest = np.unique(labels, return_counts=True)[1].min()
    if smallest < folds:
        raise DataError(
            f"labels: the smallest class has {smallest} rows, expected at least {folds}, one for "
            "each fold"
        )
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return list(splitter.split(labels, labels))


def stratified_shuffles(
    labels: NDArray[np.int64], repeats: int, test: float, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Split rows at random, several times, with the classes in proportion.

    Args:
        labels: (rows,).
        repeats: how many times, >= 1.
        test: rows of the second part: a share below 1, or a number of them.
        seed: the k-th split is the same whatever `repeats`.

    Returns:
        For each split the row indices (train, test), int64.

    Raises:
        DataError: a class is too small for both parts.
    """
    from sklearn.model_selection import StratifiedShuffleSplit

    splitter = StratifiedShuffleSplit(repeats, test_size=test, random_state=seed)
    try:
        return list(splitter.split(labels, labels))
    except ValueError as error:
        raise DataError(f"labels: cannot split them {repeats} times: {error}") from error


def repeated_splits(data: MogonetData, repeats: int, seed: int) -> Iterator[MogonetData]:
    """Yield `repeats` random splits of all rows, stratified, with test parts of the given size.

    Raises:
        DataError: a class is too small for both parts.
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected a number >= 1")
    pooled = data.pooled()
    for train, test in stratified_shuffles(pooled.labels, repeats, len(data.test), seed):
        yield MogonetData(pooled.take(train), pooled.take(test), data.num_classes)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not text, expected a CSV file") from error
    if not text:
        raise DataError(f"{path}: is empty, expected one row per line")
    lines = text.split("\n")
    # A number cut short is still a number: only the missing line end gives a truncation away.
    if lines[-1]:
        raise DataError(
            f"{path}, line {len(lines)}: no line end, expected a complete last line: "
            "the file looks truncated"
        )
    return lines[:-1]


def _numbers(path: Path, number: int, fields: list[str]) -> NDArray[np.float64]:
    try:
        values = np.array([float(field) for field in fields])
        plain = not any("_" in field for field in fields)
    except ValueError:
        plain = False
    if not plain:
        column, field = next(
            (place, field) for place, field in enumerate(fields, 1) if not _is_number(field)
        )
        raise DataError(
            f"{path}, line {number}, column {column}: got {field.strip()[:40]!r}, expected a number"
        )
    finite = np.isfinite(values)
    if not finite.all():
        column = int(np.argmin(finite))
        raise DataError(
            f"{path}, line {number}, column {column + 1}: got {fields[column].strip()}, "
            "expected a finite number"
        )
    return values


def _is_number(field: str) -> bool:
    # float() accepts 1_000, which no CSV file means.
    try:
        float(field)
    except ValueError:
        return False
    return "_" not in field


def _check_range(path: Path, labels: NDArray[np.int64], num_classes: int) -> None:
    outside = np.flatnonzero(labels >= num_classes)
    if outside.size:
        line = int(outside[0])
        raise DataError(
            f"{path}, line {line + 1}: got label {labels[line]}, expected 0 to {num_classes - 1} "
            f"({_LABELS_TRAIN} has {num_classes} classes)"
        )


def _check_rows(path: Path, matrix: NDArray[np.float64], expected: int, labels: str) -> None:
    if len(matrix) != expected:
        raise DataError(
            f"{path}, line {len(matrix)}: the file ends after {len(matrix)} rows, "
            f"expected {expected}, one for each line of {labels}"
        )
