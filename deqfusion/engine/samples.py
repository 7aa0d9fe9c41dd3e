"""Samples that lie in memory, and what data is known by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree


class TensorSamples:
    """Samples that are rows of tensors.

    Args:
        data: nested tuples, lists and dicts of tensors (rows, ...).

    Raises:
        ValueError: no tensor, or different numbers of rows.
    """

    def __init__(self, data: Any) -> None:
        counts = {len(tensor) for tensor in pytree.tree_leaves(data)}
        if len(counts) != 1:
            raise ValueError(f"data: got tensors of {sorted(counts)} rows, expected one number")
        self.data = data
        (self._rows,) = counts

    def __len__(self) -> int:
        return self._rows

    def batch(self, indices: Tensor) -> Any:
        """Return the rows `indices` of every tensor."""
        return pytree.tree_map(lambda tensor: tensor[indices], self.data)


def data_sha256(arrays: Iterable[NDArray[Any] | Tensor]) -> str:
    """SHA-256 of the bytes of arrays, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        values = array.numpy() if isinstance(array, torch.Tensor) else array
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
