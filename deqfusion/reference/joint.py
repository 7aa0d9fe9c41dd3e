"""The whole state (z_1, ..., z_N, z_f) of a row as one problem, as the paper's code solves it.

For comparison with its traces: every row has one stopping test and one history over all blocks, and
a step costs the products of every block until the slowest has converged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deqfusion.reference.cell import CellOptions, FusionParameters, ModalityParameters, joint_cell
from deqfusion.reference.product import take_rows
from deqfusion.reference.solve import Solution, SolverOptions, compute_dtype, solve_rows


class JointBlock:
    """f of the joint map on rows (1, R, (N + 1) d).

    Args:
        x: (N, R, d); injection: (R, d).
        present: (N, R) or None; the state of an absent modality is 0.
        gate_mask, fusion_mask: as in `deqfusion.reference.fusion.FusionBlock`.
        pm, pf, o: parameters and cell options.
    """

    def __init__(
        self,
        x: Tensor,
        injection: Tensor,
        present: Tensor | None,
        gate_mask: Tensor | None,
        fusion_mask: Tensor | None,
        pm: ModalityParameters,
        pf: FusionParameters,
        o: CellOptions,
    ) -> None:
        self.x = x
        self.injection = torch.where(injection.isfinite(), injection, torch.nan)
        self.present, self.gate_mask, self.fusion_mask = present, gate_mask, fusion_mask
        self.pm, self.pf, self.o = pm, pf, o
        self.shape = torch.Size((1, x.shape[1], (x.shape[0] + 1) * x.shape[2]))

    def __call__(self, z: Tensor | None) -> Tensor:
        modalities, rows, dim = self.x.shape
        if z is None:
            state = self.x.new_zeros(modalities + 1, rows, dim)
        else:
            state = z.reshape(rows, modalities + 1, dim).transpose(0, 1)
        new = joint_cell(
            state, self.x, self.injection, self.pm, self.pf, self.o, self.gate_mask,
            self.fusion_mask,
        )  # fmt: skip
        if self.present is not None:
            new[:-1].mul_(self.present)
        return new.transpose(0, 1).reshape(1, rows, (modalities + 1) * dim)

    def take(self, index: Tensor) -> JointBlock:
        """The same block for the rows index (1, S)."""

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else take_rows(t, index)

        flat = index[0]
        fusion_mask = None if self.fusion_mask is None else self.fusion_mask[flat]
        return JointBlock(
            take_rows(self.x, index), self.injection[flat], rows(self.present),
            rows(self.gate_mask), fusion_mask, self.pm, self.pf, self.o,
        )  # fmt: skip

    def blocks(self, start: int, stop: int) -> JointBlock:
        """The block itself, of which there is one."""
        return self

    def rows(self, start: int, stop: int) -> JointBlock:
        """The same block for the rows start to stop."""
        return self.take(torch.arange(start, stop, device=self.x.device).unsqueeze(0))


def solve_joint(
    x: Tensor,
    injection: Tensor,
    init: Tensor | None,
    present: Tensor | None,
    gate_mask: Tensor | None,
    fusion_mask: Tensor | None,
    pm: ModalityParameters,
    pf: FusionParameters,
    cell: CellOptions,
    o: SolverOptions,
    tolerance: Tensor | None,
    record: bool,
) -> Solution:
    """Solves the joint map; arguments as in `solve_modality` and `solve_fusion`.

    Returns:
        State (N+1, R, d); status, steps, residual and trace of the whole state, repeated for each
        of the N+1 blocks.
    """
    dtype = compute_dtype(x.dtype)
    blocks, rows, dim = x.shape[0] + 1, x.shape[1], x.shape[2]

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype)

    block = JointBlock(
        x.to(dtype),
        injection.to(dtype),
        None if present is None else present.unsqueeze(-1).to(dtype),
        cast(gate_mask),
        cast(fusion_mask),
        ModalityParameters(*(t.to(dtype) for t in pm)),
        FusionParameters(*(t.to(dtype) for t in pf)),
        cell,
    )
    if init is not None:
        init = init.transpose(0, 1).reshape(1, rows, blocks * dim)
    example = x.new_empty(0, dtype=dtype)
    # The joint map is compared, not shipped fast: full precision throughout.
    o = o._replace(ladder=False)
    solution = solve_rows(block, init, o, tolerance, record, None, example, x.dtype)
    state = solution.state.reshape(rows, blocks, dim).transpose(0, 1).contiguous()
    return Solution(state, *(t.expand(blocks, *t.shape[1:]).clone() for t in solution[1:]))
