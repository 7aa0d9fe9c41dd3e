"""Headers of `.npy` files, read without the numbers that follow."""

from __future__ import annotations

from typing import IO, Any

import numpy as np

_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of an array in a `.npy` file, or a member of an `.npz` file.

    Args:
        stream: at its beginning.

    Raises:
        ValueError: the file does not begin as a `.npy` file does, or is of another version.
    """
    version = np.lib.format.read_magic(stream)
    if version not in _READERS:
        raise ValueError(f"version {version} of the .npy format, expected 1.0 or 2.0")
    shape, _, dtype = _READERS[version](stream)
    return shape, dtype
