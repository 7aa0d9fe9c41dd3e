"""Folders of CSV files with an index column: one matrix per modality, one row per patient.

    mrna.csv.gz    ,gene_1,gene_2,...      a header, then lines of id and numbers
    labels.csv     ,label,pam50,...        the class of each id

The layout in which the breast cancers of The Cancer Genome Atlas (Nature 490, 2012) come with the R
package r.jive. Rows are matched by id, whatever their order. As with MOGONET's files, every fault
is a `DataError` with file, line and expectation.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import DataError
from .mogonet import LabelledModalities

_LABELS = "labels.csv"


class IndexedData(NamedTuple):
    """What a folder of index-column CSV files holds.

    Attributes:
        rows: all of them, in the order of `labels.csv`.
        classes: their names, sorted; labels are their places.
        files: of each modality.
        columns: of each modality, their names.
    """

    rows: LabelledModalities
    classes: list[str]
    files: list[Path]
    columns: list[list[str]]


def load_indexed(
    folder: str | Path, names: Sequence[str], label: str, *, without: Collection[str] = ()
) -> IndexedData:
    """Read a folder of index-column CSV files.

    Args:
        folder: holds `NAME.csv.gz` or `NAME.csv` for each name, and `labels.csv`.
        names: modalities to read, in the order wanted.
        label: column of `labels.csv` that holds the class.
        without: classes whose rows are left out.

    Returns:
        IndexedData.

    Raises:
        DataError: a file is missing or not what it should be, or has no row for an id.
    """
    folder = Path(folder)
    if not folder.is_dir():
        wanted = ", ".join(f"{name}.csv.gz" for name in names)
        raise DataError(f"{folder}: no such folder, expected one with {wanted} and {_LABELS}")
    path = folder / _LABELS
    header, table = _read(path)
    if label not in header:
        raise DataError(f"{path}: got columns {', '.join(header)}, expected {label!r} among them")
    place = header.index(label)
    classes = {key: row[place] for key, (_, row) in table.items() if row[place] not in without}
    known = sorted(set(classes.values()))
    if len(known) < 2:
        raise DataError(f"{path}: column {label!r} has {len(known)} classes, expected at least 2")
    files = [_file(folder, name) for name in names]
    columns, views = zip(*(_matrix(file, list(classes)) for file in files), strict=True)
    labels = np.array([known.index(value) for value in classes.values()], dtype=np.int64)
    return IndexedData(LabelledModalities(views, labels), known, files, list(columns))


def _file(folder: Path, name: str) -> Path:
    for suffix in (".csv.gz", ".csv"):
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    raise DataError(f"{folder / name}.csv.gz: no such file, nor {name}.csv")


def _read(path: Path) -> tuple[list[str], dict[str, tuple[int, list[str]]]]:
    """Column names, and of each id its line and cells."""
    table: dict[str, tuple[int, list[str]]] = {}
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            text = file.read().decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}), expected a whole file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not text, expected a CSV file") from error
    # A number cut short is still a number: only the missing line end gives a truncation away.
    if not text.endswith("\n"):
        raise DataError(f"{path}: no line end, expected a complete last line: looks truncated")
    lines = csv.reader(text.splitlines())
    try:
        header = next(lines)[1:]
        for number, (key, *cells) in enumerate((line or [""] for line in lines), start=2):
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {number}: got {len(cells)} values, expected {len(header)} as in "
                    "its header"
                )
            if key in table:
                raise DataError(f"{path}, line {number}: got {key!r} again, expected every id once")
            table[key] = number, cells
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: {error}, expected CSV") from error
    if not header or not table:
        raise DataError(f"{path}: is empty, expected a header and a line per row")
    return header, table


def _matrix(path: Path, keys: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    header, table = _read(path)
    rows = []
    for key in keys:
        if key not in table:
            raise DataError(f"{path}: no row {key!r}, expected one for each of {_LABELS}")
        number, cells = table[key]
        values = np.array([_number(cell) for cell in cells])
        if not np.isfinite(values).all():
            column = int(np.argmin(np.isfinite(values)))
            raise DataError(
                f"{path}, line {number}, column {header[column]!r}: got {cells[column]!r}, "
                "expected a finite number"
            )
        rows.append(values)
    return header, np.stack(rows)


def _number(cell: str) -> float:
    try:
        # float() accepts 1_000, which no CSV file means.
        return float("_" if "_" in cell else cell)
    except ValueError:
        return np.nan
