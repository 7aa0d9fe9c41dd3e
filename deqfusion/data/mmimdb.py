"""MM-IMDB: plots and posters of films with their genres, from `multimodal_imdb.hdf5`.

    features      (25959, 300)   mean word2vec of the plot
    vgg_features  (25959, 4096)  VGG's last hidden layer of the poster
    genres        (25959, 23)    1 where the genre applies, 0 elsewhere

These are the keys of the published file (Arevalo et al., Gated Multimodal Units, 2017), which has
more; its rows are 15552 to train on, 2608 for validation and 7799 for test, in this order. Files
of the same keys with other widths or numbers of rows are read too, given the sizes of their split.

The file is large, for it has the posters' pixels too: rows are read when they are asked for.
Reading needs h5py (`pip install deqfusion[hdf5]`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

MMIMDB_FILE = "multimodal_imdb.hdf5"
#: Rows to train on, for validation and for test, in the file's order.
MMIMDB_SPLIT = (15552, 2608, 7799)

_TEXT, _IMAGE, _LABELS = "features", "vgg_features", "genres"
_KEYS = (_TEXT, _IMAGE, _LABELS)
# Rows read at a time when the whole file is checked: 16 MiB of VGG's features.
_CHUNK = 1024


class MMIMDBFile:
    """The three published arrays of an MM-IMDB file, read as they are needed.

    Args:
        folder: holds `multimodal_imdb.hdf5`; or the file itself.

    Attributes:
        path: the file.
        widths: of text features, image features and genres.

    Raises:
        DataError: a missing, damaged or half-downloaded file, a missing key, a key that is no
            matrix of numbers, keys of different numbers of rows; or h5py is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.path = folder / MMIMDB_FILE if folder.is_dir() else folder
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file, expected MM-IMDB's {MMIMDB_FILE}")
        self._file: Any = None
        self._process: int | None = None
        shapes = {key: self._array(key).shape for key in _KEYS}
        self._rows = shapes[_TEXT][0]
        self.widths = (shapes[_TEXT][1], shapes[_IMAGE][1], shapes[_LABELS][1])
        for key in (_IMAGE, _LABELS):
            if shapes[key][0] != self._rows:
                raise DataError(
                    f"{self.path}: key {key!r} has {shapes[key][0]} rows, "
                    f"expected {self._rows} as key {_TEXT!r}"
                )

    def __len__(self) -> int:
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_process": None}

    def rows(
        self, indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Read text features, image features and genres of some rows.

        Args:
            indices: int64 (B,), in any order.

        Returns:
            float32 (B, text width), (B, image width), (B, genres).

        Raises:
            DataError: the file cannot be read there.
        """
        # The library reads rows in ascending order only, and each once.
        ascending, places = np.unique(indices, return_inverse=True)
        text, image, genres = (self._read(key, ascending)[places] for key in _KEYS)
        return text, image, genres

    def check(self) -> str:
        """Read everything once: every value is finite, and every genre 0 or 1.

        Returns:
            SHA-256 of the three arrays, in hexadecimal.

        Raises:
            DataError: a value that is not, or a part of the file that cannot be read.
        """
        digest = hashlib.sha256()
        for key in _KEYS:
            for start, values in self._chunks(key):
                with np.errstate(over="ignore"):
                    # As they will be read, in which a large number may be infinite.
                    narrow = values.astype(np.float32)
                good = np.isin(narrow, (0, 1)) if key == _LABELS else np.isfinite(narrow)
                if not good.all():
                    row, column = np.argwhere(~good)[0]
                    kind = "0 or 1" if key == _LABELS else "a finite number"
                    raise DataError(
                        f"{self.path}: key {key!r}, row {start + row}, column {column}: got "
                        f"{values[row, column]}, expected {kind}"
                    )
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def _chunks(self, key: str) -> Iterator[tuple[int, NDArray[Any]]]:
        for start in range(0, self._rows, _CHUNK):
            yield start, self._read(key, slice(start, start + _CHUNK), None)

    def _read(self, key: str, rows: Any, dtype: Any = np.float32) -> NDArray[Any]:
        try:
            values = self._array(key)[rows]
        except OSError as error:
            raise DataError(f"{self.path}: key {key!r} cannot be read ({error})") from error
        return values if dtype is None else values.astype(dtype)

    def _array(self, key: str) -> Any:
        file = self._open()
        if key not in file:
            has = ", ".join(sorted(file)) or "none"
            raise DataError(
                f"{self.path}: no key {key!r}, expected {', '.join(_KEYS)}; it has {has}"
            )
        array = file[key]
        shape = getattr(array, "shape", None)
        if not shape or len(shape) != 2 or array.dtype.kind not in "fiub" or 0 in shape:
            got = "a group" if shape is None else f"{array.dtype} {tuple(shape)}"
            raise DataError(
                f"{self.path}: key {key!r} is {got}, expected numbers (rows, columns), not empty"
            )
        return array

    def _open(self) -> Any:
        try:
            import h5py
        except ImportError as error:
            raise DataError(
                f"{self.path}: needs h5py, which is not installed: pip install deqfusion[hdf5]"
            ) from error
        # A handle is not usable on both sides of a fork, which loaders in processes do.
        if self._process != os.getpid():
            try:
                self._file = h5py.File(self.path, "r")
            except OSError as error:
                raise DataError(
                    f"{self.path}: is no complete HDF5 file ({error}), expected MM-IMDB's "
                    f"{MMIMDB_FILE}; is it half-downloaded?"
                ) from error
            self._process = os.getpid()
        return self._file


def mmimdb_split(
    file: MMIMDBFile, sizes: Sequence[int] = MMIMDB_SPLIT
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows to train on, for validation and for test: the file's, divided by position.

    Args:
        file: the file.
        sizes: of the three parts.

    Returns:
        Row indices, int64, three times.

    Raises:
        DataError: a part is empty, or the sizes do not add up to the file's rows.
    """
    if len(sizes) != 3 or min(sizes) < 1:
        raise DataError(
            f"{file.path}: got a split into {list(sizes)} rows, expected three parts, none empty"
        )
    if sum(sizes) != len(file):
        raise DataError(
            f"{file.path}: has {len(file)} rows, expected {sum(sizes)}: "
            f"{sizes[0]} to train on, {sizes[1]} for validation, {sizes[2]} for test"
        )
    train, validation, test = np.split(np.arange(len(file)), np.cumsum(sizes)[:2])
    return train, validation, test
