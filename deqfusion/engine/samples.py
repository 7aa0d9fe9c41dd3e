"""Samples that lie in memory, and what data is known by."""

from __future__ import annotations

import copy
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

    Attributes:
        shared: the tensors, of which `take` chooses rows.
    """

    _chosen: Tensor | None = None

    def __init__(self, data: Any) -> None:
        counts = {len(tensor) for tensor in pytree.tree_leaves(data)}
        if len(counts) != 1:
            raise ValueError(f"data: got tensors of {sorted(counts)} rows, expected one number")
        self.shared = data
        (self._rows,) = counts

    @property
    def data(self) -> Any:
        """The tensors, of these samples alone."""
        return self.shared if self._chosen is None else self.batch(torch.arange(len(self)))

    def __len__(self) -> int:
        return self._rows if self._chosen is None else len(self._chosen)

    def batch(self, indices: Tensor) -> Any:
        """Return the rows `indices` of every tensor."""
        rows = indices if self._chosen is None else self._chosen[indices]
        return pytree.tree_map(lambda tensor: tensor[rows], self.shared)

    def take(self, rows: NDArray[np.int64]) -> TensorSamples:
        """Return some samples, in the given order, of the same tensors: nothing is copied."""
        taken = copy.copy(self)
        chosen = torch.from_numpy(rows)
        taken._chosen = chosen if self._chosen is None else self._chosen[chosen]
        return taken


def data_sha256(arrays: Iterable[NDArray[Any] | Tensor]) -> str:
    """SHA-256 of the bytes of arrays, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        values = array.numpy() if isinstance(array, torch.Tensor) else array
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
