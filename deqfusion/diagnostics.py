r"""Looking at an equilibrium: spectral radius and modality weights.

The joint Jacobian is block-triangular, so its eigenvalues are those of the N modality blocks and of
the fusion block, and each block is examined on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deqfusion.reference.cell import (
    CellOptions,
    FusionParameters,
    ModalityParameters,
    gate_constants,
    gates,
)
from deqfusion.reference.fusion import FusionBlock, FusionLinearization
from deqfusion.reference.modality import ModalityBlock, ModalityLinearization
from deqfusion.reference.solve import compute_dtype

__all__ = ["modality_weights", "spectral_radius"]


@torch.no_grad()
def modality_weights(
    modalities: Tensor,
    fused: Tensor,
    parameters: FusionParameters,
    cell: CellOptions,
    gate_mask: Tensor | None = None,
) -> Tensor:
    """Mean |a_i| over channels, normalised over modalities to sum 1.

    Args:
        modalities: (N, R, d); fused: (R, d), an equilibrium.
        parameters, cell: of the layer.
        gate_mask: (N, R, 1) or None.

    Returns:
        (N, R). Where every gate is 0, each modality present weighs the same; NaN where none is.
    """
    constants = gate_constants(modalities, parameters, cell)
    size = gates(fused, constants, parameters, cell, gate_mask).abs().mean(-1)
    shares = torch.ones_like(size) if gate_mask is None else gate_mask.squeeze(-1)
    size = torch.where(size.sum(0) > 0, size, shares)
    return size / size.sum(0)


@torch.no_grad()
def spectral_radius(
    state: Tensor,
    x: Tensor,
    injection: Tensor,
    modality_parameters: ModalityParameters,
    fusion_parameters: FusionParameters,
    cell: CellOptions,
    gate_mask: Tensor | None = None,
    present: Tensor | None = None,
    steps: int = 50,
) -> Tensor:
    """Largest |eigenvalue| of the joint map's Jacobian at `state`, per row.

    Arnoldi's method on J^T of every block and row. A plain power iteration does not settle where
    the largest eigenvalues are a complex pair, which is the usual case here.

    Args:
        state: (N+1, R, d); x: (N, R, d); injection: (R, d).
        modality_parameters, fusion_parameters, cell, gate_mask, present: of the layer and rows.
        steps: dimension of the Krylov space; from d on the result is exact to rounding.

    Returns:
        (R,). NaN for rows whose state or features are not finite.
    """
    dtype = compute_dtype(x.dtype)
    pm = ModalityParameters(*(t.to(dtype) for t in modality_parameters))
    pf = FusionParameters(*(t.to(dtype) for t in fusion_parameters))
    state, x, injection = (t.to(dtype) for t in (state, x, injection))
    finite = state.isfinite().all(-1).all(0)
    finite &= x.isfinite().all(-1).all(0) & injection.isfinite().all(-1)
    state, x, injection = (torch.where(finite.unsqueeze(-1), t, 0.0) for t in (state, x, injection))
    if x.shape[1] == 0:
        return x.new_zeros(0)
    z = state[:-1].contiguous()
    modality = _arnoldi_radius(ModalityBlock(x, pm, cell).linearize(z), z, steps)
    if present is not None:
        modality = torch.where(present, modality, 0.0)
    fused = state[-1:].contiguous()
    block = FusionBlock(gate_constants(z, pf, cell), injection, pf, cell, gate_mask)
    fusion = _arnoldi_radius(block.linearize(fused), fused, steps)
    radius = torch.cat((modality, fusion)).amax(0)
    return torch.where(finite, radius, torch.nan)


def _arnoldi_radius(
    linear: ModalityLinearization | FusionLinearization, like: Tensor, steps: int
) -> Tensor:
    """Spectral radius (K, R) of the rows' linear maps, from a Krylov space of `steps` vectors."""
    dim = like.shape[-1]
    steps = min(steps, dim)
    # One fixed start for every row: the same row gives the same answer in any batch.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(dim, generator=generator, dtype=torch.float64).to(like)
    basis = [(start / start.norm()).expand_as(like)]
    hessenberg = like.new_zeros(*like.shape[:2], steps, steps)
    tiny = torch.finfo(like.dtype).eps
    for k in range(steps):
        w = linear.vjp(basis[k].contiguous())
        scale = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        # Twice is enough: the second pass removes what rounding left of the earlier directions.
        for _ in range(2):
            for j, q in enumerate(basis):
                h = torch.linalg.vecdot(q, w)
                hessenberg[..., j, k] += h
                w = w - h.unsqueeze(-1) * q
        norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        # An exhausted space (zero map, or invariant subspace) ends here with a zero vector.
        usable = norm > 10 * tiny * scale
        if k + 1 < steps:
            hessenberg[..., k + 1, k] = torch.where(usable, norm, 0.0).squeeze(-1)
        basis.append(torch.where(usable, w / torch.where(usable, norm, 1.0), 0.0))
    known = hessenberg.isfinite().flatten(2).all(-1)
    matrix = torch.where(known[..., None, None], hessenberg, 0.0)
    radius = torch.linalg.eigvals(matrix.cpu().to(torch.float64)).abs().amax(-1).to(like)
    return torch.where(known, radius, torch.nan)
