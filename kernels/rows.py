"""What a launch of schedule *row* allocates: packed state, history, and results of every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import RowConfig, SolveOptions
from .layout import Layout


class RowSolution(NamedTuple):
    """State (K, R, d) fp32, status and steps int32 and residual fp32 (K, R)."""

    state: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Workspace:
    """Tensors of a solve of K blocks, R rows rounded up to whole programs (R'), width D.

    Attributes:
        layout, rows, size: of the packed rows; R and R'.
        programs: along the rows.
        weight_dtype: of packed weights.
        z: (K, R', D), where to start.
        outputs: state, best_g (K, R', D), history f and g (M, K, R', D), gram (K, R', M, M),
            status, steps, residual (K, R'), as the kernels take them.
        present: int32 (K, R').
    """

    layout: Layout
    rows: int
    size: int
    programs: int
    weight_dtype: torch.dtype
    z: Tensor
    outputs: tuple[Tensor, ...]
    present: Tensor

    @staticmethod
    def new(
        like: Tensor, blocks: int, rows: int, layout: Layout, options: SolveOptions,
        config: RowConfig, init: Tensor | None = None, present: Tensor | None = None,
    ) -> Workspace:  # fmt: skip
        """Allocates on the device of `like`; init (K, R, d), present bool (K, R), or None."""
        size = -(-rows // config.rows) * config.rows
        state = like.new_zeros(blocks, size, layout.width, dtype=torch.float32)
        z = torch.zeros_like(state)
        if init is not None:
            z[:, :rows] = layout.pack(init.float())
            state[:, :rows] = layout.pack(torch.where(init.isfinite(), init, 0.0).float())
        status = like.new_zeros(blocks, size, dtype=torch.int32)
        residual = like.new_full((blocks, size), torch.inf, dtype=torch.float32)
        there = torch.zeros_like(status)
        if present is not None:
            there[:, :rows] = present
            state[:, :rows] *= present.unsqueeze(-1)
            residual[:, :rows].masked_fill_(~present, 0.0)
        slots = max(options.memory, 1)
        history = like.new_empty(2, slots, blocks, size, layout.width, dtype=torch.float32)
        gram = like.new_empty(blocks, size, slots, slots, dtype=torch.float32)
        outputs = (
            state, torch.zeros_like(state), history[0], history[1], gram, status,
            torch.zeros_like(status), residual,
        )  # fmt: skip
        low = options.precision == "low"
        return Workspace(
            layout, rows, size, size // config.rows, torch.bfloat16 if low else torch.float32, z,
            outputs, there,
        )  # fmt: skip

    def packed(self, t: Tensor | None = None) -> Tensor:
        """t (K', R, d), or zeros like the state, as (K', R', D) fp32."""
        if t is None:
            return torch.zeros_like(self.z)
        out = self.z.new_zeros(t.shape[0], *self.z.shape[1:])
        out[:, : self.rows] = self.layout.pack(t.float())
        return out

    def vector(self, t: Tensor) -> Tensor:
        """t (..., d) as (..., D) fp32."""
        return self.layout.pack(t.float())

    def solution(self) -> RowSolution:
        """The results of the rows that there are."""
        state, *_, status, steps, residual = self.outputs
        known = (t[:, : self.rows].clone() for t in (status, steps, residual))
        return RowSolution(self.layout.unpack(state[:, : self.rows]), *known)
