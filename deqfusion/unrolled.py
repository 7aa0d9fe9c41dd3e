"""K steps of the joint map, differentiated one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from deqfusion.functional import BlockSolution
from deqfusion.reference import cell as equations
from deqfusion.reference.cell import CellOptions, FusionParameters, ModalityParameters
from deqfusion.solution import Status
from deqfusion.solvers import Solver

__all__ = ["unrolled_equilibrium"]


def unrolled_equilibrium(
    x: Tensor,
    injection: Tensor,
    modality_parameters: ModalityParameters,
    fusion_parameters: FusionParameters,
    *,
    cell: CellOptions,
    solver: Solver,
    steps: int,
    init: Tensor | None = None,
    present: Tensor | None = None,
    gate_mask: Tensor | None = None,
    fusion_mask: Tensor | None = None,
) -> BlockSolution:
    """The state after `steps` steps; the statistics are those of the last one.

    Arguments as in `deqfusion.functional.joint_equilibrium`; of `solver`, the tolerances that the
    status is judged by.

    Returns:
        `BlockSolution` with state (N+1, R, d) and every step in its trace.
    """
    # As in the solves, rows that are not finite get state 0 and pass no gradient on.
    unknown = ~x.isfinite().all(-1)
    unknown_fused = unknown.any(0) | ~injection.isfinite().all(-1)
    x = torch.where(unknown.unsqueeze(-1), 0.0, x)
    injection = torch.where(unknown_fused.unsqueeze(-1), 0.0, injection)
    unknown = torch.cat((unknown, unknown_fused.unsqueeze(0)))
    state = x.new_zeros(x.shape[0] + 1, *x.shape[1:]) if init is None else init
    state = torch.where(unknown.unsqueeze(-1), 0.0, state)
    norms = []
    with equations.full_precision(x):
        for _ in range(steps):
            new = equations.joint_cell(
                state, x, injection, modality_parameters, fusion_parameters, cell, gate_mask,
                fusion_mask,
            )  # fmt: skip
            if present is not None:
                new = equations.clear_absent(new, present)
            change, size = (new - state).detach().norm(dim=-1), new.detach().norm(dim=-1)
            norms.append(torch.stack((change, size), -1))
            state = new
    change, size = norms[-1].unbind(-1)
    residual = torch.where(change == 0, 0.0, change / size).float()
    residual = torch.where(unknown, torch.inf, residual)
    state = torch.where(unknown.unsqueeze(-1), 0.0, state)
    met = change <= solver.atol + solver.final_tol * size
    status = torch.where(met, int(Status.CONVERGED), int(Status.MAX_STEPS))
    known = ~unknown & change.isfinite() & size.isfinite()
    status = torch.where(known, status, int(Status.NON_FINITE)).int()
    taken = torch.full_like(status, steps)
    return BlockSolution(state, status, taken, residual, torch.stack(norms, 2).float())
