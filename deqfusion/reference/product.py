"""Matrix products of a block, in two precisions, and rows taken from tensors."""

from __future__ import annotations

import torch
from torch import Tensor


class Weight:
    """A stacked weight (K, out, in) applied to rows: (K, R, in) -> (K, R, out).

    The low-precision products take bfloat16 inputs and accumulate in fp32; their copy of the
    weight is made at first use, once per solve.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._low: Tensor | None = None

    @property
    def low(self) -> Tensor:
        """The weight in bfloat16."""
        if self._low is None:
            self._low = self.weight.to(torch.bfloat16)
        return self._low

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x W^T + add: (K, R, in) and (K, R or 1, out) -> (K, R, out), in the dtype of x."""
        if add is None:
            return torch.bmm(x, self.weight.transpose(1, 2))
        return torch.baddbmm(add, x, self.weight.transpose(1, 2))

    def forward_low(self, x: Tensor) -> Tensor:
        """x W^T with bfloat16 inputs, in the dtype of x."""
        return torch.bmm(x.to(torch.bfloat16), self.low.transpose(1, 2)).to(x.dtype)

    def transposed(self, x: Tensor, low: bool = False) -> Tensor:
        """x W: (K, R, out) -> (K, R, in), in the dtype of x; low: with bfloat16 inputs."""
        if low:
            return torch.bmm(x.to(torch.bfloat16), self.low).to(x.dtype)
        return torch.bmm(x, self.weight)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows index (K, S) of x (K, R, d), or of x (N, R, d) with one index row for all: (., S, d)."""
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    flat = _flat(index, x.shape[1])
    return x.reshape(-1, x.shape[-1]).index_select(0, flat).reshape(*index.shape, x.shape[-1])


def _flat(index: Tensor, rows: int) -> Tensor:
    if index.shape[0] == 1:
        return index[0]
    return (index + torch.arange(index.shape[0], device=index.device).unsqueeze(1) * rows).flatten()
