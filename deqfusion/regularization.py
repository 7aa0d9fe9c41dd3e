r"""The Jacobian penalty: E ||J v||^2 / numel over Gaussian v, an estimate of ||J||_F^2 / numel.

J is the Jacobian of the joint map at the equilibrium. The authors use v^T J, after S. Bai et al.,
"Stabilizing equilibrium models by Jacobian regularization", ICML 2021; the estimator with J v has
the same mean, and for Gaussian v the same variance (2 ||J J^T||_F^2 = 2 ||J^T J||_F^2), while its
gradient is a single backward pass, which compiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deqfusion.reference.cell import CellOptions, FusionParameters, ModalityParameters, joint_jvp
from deqfusion.reference.iterate import NON_FINITE

__all__ = ["jacobian_penalty"]


def jacobian_penalty(
    state: Tensor,
    x: Tensor,
    injection: Tensor,
    modality_parameters: ModalityParameters,
    fusion_parameters: FusionParameters,
    cell: CellOptions,
    gate_mask: Tensor | None = None,
    present: Tensor | None = None,
    probes: int = 1,
    status: Tensor | None = None,
) -> Tensor:
    """Estimates ||J||_F^2 / numel(state), averaged over `probes`.

    Args:
        state: (N+1, R, d), held fixed.
        x: (N, R, d); injection: (R, d).
        modality_parameters, fusion_parameters, cell: of the layer.
        gate_mask: (N, R, 1) presence, or None.
        present: bool (N, R) or None; absent modalities have no rows or columns in J.
        probes: >= 1.
        status: (N+1, R) of the solves, or None; a row with a NON_FINITE block has no equilibrium.

    Returns:
        (), differentiable with respect to x, injection and the parameters. Rows that are
        NON_FINITE, or whose state or features are not finite, count as 0. An empty batch gives 0.
    """
    finite = x.isfinite().all(-1).all(0) & injection.isfinite().all(-1)
    finite = finite & state.isfinite().all(-1).all(0)
    if status is not None:
        finite = finite & (status != NON_FINITE).all(0)
    rows = finite.unsqueeze(-1)
    state, x, injection = (torch.where(rows, t, 0.0) for t in (state, x, injection))
    total = state.new_zeros(())
    for _ in range(probes):
        v = torch.randn_like(state)
        if present is not None:
            v = torch.cat((v[:-1] * present.unsqueeze(-1), v[-1:]))
        jv = joint_jvp(
            state, v, x, injection, modality_parameters, fusion_parameters, cell, gate_mask
        )
        if present is not None:
            jv = torch.cat((torch.where(present.unsqueeze(-1), jv[:-1], 0.0), jv[-1:]))
        # Row by row first: compilers guard on the size of a whole sum, and compile it again.
        total = total + torch.where(finite.unsqueeze(-1), jv, 0.0).square().sum(-1).sum()
    return total / (probes * max(state.numel(), 1))
