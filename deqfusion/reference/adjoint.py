"""One function per backward operator: the adjoint solve of a block and its final VJP.

    lambda = g + J^T lambda          dL/dtheta = (df/dtheta)^T lambda

with J the Jacobian of the block at its equilibrium, linearised once. Precision and chunks as in
`deqfusion.reference.solve`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deqfusion.reference.cell import (
    CellOptions,
    FusionParameters,
    ModalityParameters,
    gate_weights,
)
from deqfusion.reference.fusion import FusionLinearization
from deqfusion.reference.host import MIN_ROWS
from deqfusion.reference.iterate import AT_MAX_STEPS, CONVERGED, NON_FINITE, Anchor, Outcome
from deqfusion.reference.modality import ModalityBlock, ModalityLinearization
from deqfusion.reference.product import take_rows
from deqfusion.reference.solve import (
    SolverOptions,
    chunks_of,
    compute_dtype,
    filling,
    first_rows,
    fusion_block,
    merge,
    rows_at,
    run_loop,
    settings_of,
)


class _LinearBlock:
    """lambda -> g + J^T lambda on rows, each divided by its ||g||, so that nothing underflows."""

    def __init__(
        self, linear: ModalityLinearization | FusionLinearization, gradient: Tensor
    ) -> None:
        self.linear, self.gradient, self.shape = linear, gradient, gradient.shape

    def __call__(self, z: Tensor | None) -> Tensor:
        if z is None:
            return self.gradient
        return self.linear.vjp(z).add_(self.gradient)

    def anchored(self, z: Tensor) -> tuple[Tensor, Anchor]:
        f = self(z)
        return f, (z, f)

    def near(self, z: Tensor, anchor: Anchor | None) -> Tensor:
        if anchor is None:
            return self.linear.vjp(z, True).add_(self.gradient)
        z0, f0 = anchor
        return self.linear.vjp(z - z0, True).add_(f0)

    def take(self, index: Tensor) -> _LinearBlock:
        return _LinearBlock(self.linear.take(index), take_rows(self.gradient, index))


def _solve_adjoint(
    linear: ModalityLinearization | FusionLinearization,
    gradient: Tensor,
    o: SolverOptions,
    active: Tensor,
) -> Outcome:
    """lambda = g + J^T lambda per row; rows with g = 0, or not active, get lambda = 0.

    A g that is not finite ends NON_FINITE, and its lambda is not finite either.
    """
    if o.method == "truncated":
        return _truncated_adjoint(linear, gradient, o)
    # The largest element first, so that squares neither vanish nor overflow.
    largest = gradient.abs().amax(-1, keepdim=True)
    unit = gradient / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    unit, scale = unit / torch.where(norm > 0, norm, 1.0), largest * norm
    active = active & ~(largest.squeeze(-1) == 0)
    settings = settings_of(o, None, gradient, gradient.shape[-1])._replace(most=1.0)
    block = _LinearBlock(linear, unit)
    outcome = run_loop(block, None, o, settings, active, None, gradient.new_empty(0))
    return outcome._replace(state=outcome.state * scale)


def _truncated_adjoint(
    linear: ModalityLinearization | FusionLinearization, gradient: Tensor, o: SolverOptions
) -> Outcome:
    """`max_steps` damped steps of lambda <- g + J^T lambda from 0, all taken by every row."""
    state = gradient * o.mixing
    change = gradient
    for _ in range(o.max_steps - 1):
        change = linear.vjp(state).add_(gradient).sub_(state)
        state = state + o.mixing * change
    size = torch.linalg.vector_norm(state, dim=-1)
    moved = torch.linalg.vector_norm(change, dim=-1)
    relative = torch.where(size > 0, moved / size, 0.0)
    steps = torch.full_like(relative, o.max_steps, dtype=torch.int32)
    status = torch.where(moved <= o.atol + o.rtol * size, CONVERGED, AT_MAX_STEPS)
    return Outcome(state, status.to(torch.int32), steps, relative.to(torch.float32))


def adjoint_modality(
    gradient: Tensor,
    z: Tensor,
    status: Tensor,
    x: Tensor,
    present: Tensor | None,
    p: ModalityParameters,
    cell: CellOptions,
    o: SolverOptions,
) -> tuple[Tensor, ModalityParameters, Outcome]:
    """Gradients of the modality equilibria.

    Args:
        gradient: (N, R, d), dL/dz*.
        z: (N, R, d), the solution; status: (N, R), of its solve. Rows NON_FINITE, and absent ones,
            take no part: their gradients are 0.
        x, present, p, cell: as in `solve_modality`.
        o: the solver of lambda = g + J^T lambda.

    Returns:
        dL/dx (N, R, d), gradients of the parameters, and the outcome of the linear solve.
    """
    rows, index = x.shape[1], filling(x.shape[1], x.device)
    if index is not None:
        # What is filled in gets no gradient, and so adds nothing to the parameters'.
        alone = (torch.arange(MIN_ROWS) < rows).unsqueeze(-1)
        gradient = torch.where(alone, gradient.index_select(1, index), 0.0)
        z, status, x = (t.index_select(1, index) for t in (z, status, x))
        present = rows_at(present, index)
        dx, grads, outcome = adjoint_modality(gradient, z, status, x, present, p, cell, o)
        return first_rows(dx, rows), grads, Outcome(*(first_rows(t, rows) for t in outcome))
    dtype = compute_dtype(x.dtype)
    active = status != NON_FINITE
    if present is not None:
        active = active & present
    keep = active.unsqueeze(-1)
    parameters = ModalityParameters(*(t.to(dtype) for t in p))
    safe_x, safe_z, g = (torch.where(keep, t.to(dtype), 0.0) for t in (x, z, gradient))
    block = ModalityBlock(safe_x, parameters, cell)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts, totals = [], []
    for k, chunks in chunks_of(x.shape, x.device):
        some, outcomes, total = block.blocks(k.start, k.stop), [], None
        for r in chunks:
            linear = some.rows(r.start, r.stop).linearize(safe_z[k, r].contiguous())
            outcome = _solve_adjoint(linear, g[k, r].contiguous(), o, active[k, r])
            dx[k, r], grads = linear.parameter_vjp(outcome.state)
            total = grads if total is None else ModalityParameters(*map(torch.add, total, grads))
            outcomes.append(outcome)
        assert total is not None
        totals.append(total)
        parts.append(outcomes)
    columns = (c[0] if len(c) == 1 else torch.cat(c) for c in zip(*totals))  # noqa: B905
    grads = ModalityParameters(*(g.to(t.dtype) for g, t in zip(columns, p, strict=True)))
    return dx, grads, merge(parts)


def adjoint_fusion(
    gradient: Tensor,
    z: Tensor,
    status: Tensor,
    modalities: Tensor,
    injection: Tensor,
    gate_mask: Tensor | None,
    fusion_mask: Tensor | None,
    p: FusionParameters,
    cell: CellOptions,
    o: SolverOptions,
) -> tuple[Tensor, Tensor, FusionParameters, Outcome]:
    """Gradients of the fusion equilibrium.

    Args:
        gradient, z: (R, d); status: (R,), of the solve. Rows NON_FINITE take no part.
        modalities, injection, gate_mask, fusion_mask, p, cell: as in `solve_fusion`.
        o: the solver of lambda = g + J^T lambda.

    Returns:
        dL/dmodalities (N, R, d), dL/dx_f (R, d), gradients of the parameters, and the outcome of
        the linear solve (K = 1).
    """
    rows, index = injection.shape[0], filling(injection.shape[0], injection.device)
    if index is not None:
        alone = (torch.arange(MIN_ROWS) < rows).unsqueeze(-1)
        dm, dx, grads, outcome = adjoint_fusion(
            torch.where(alone, gradient[index], 0.0),
            z[index],
            status[index],
            modalities.index_select(1, index),
            injection[index],
            rows_at(gate_mask, index),
            None if fusion_mask is None else fusion_mask[index],
            p, cell, o,
        )  # fmt: skip
        outcome = Outcome(*(first_rows(t, rows) for t in outcome))
        return first_rows(dm, rows), dx[:rows].clone(), grads, outcome
    dtype = compute_dtype(injection.dtype)
    active = (status != NON_FINITE).unsqueeze(0)
    keep = active.squeeze(0).unsqueeze(-1)
    safe_z, safe_x, g = (torch.where(keep, t.to(dtype), 0.0) for t in (z, injection, gradient))
    safe_m = torch.where(keep, modalities.to(dtype), 0.0)
    block = fusion_block(safe_m, safe_x, gate_mask, fusion_mask, p, cell, dtype)
    compute = FusionParameters(*(t.to(dtype) for t in p))
    wm = gate_weights(compute, cell)[1]
    parts = []
    sums: FusionParameters | None = None
    for r in chunks_of(block.shape, injection.device)[0][1]:
        linear = block.rows(r.start, r.stop).linearize(safe_z[None, r].contiguous())
        outcome = _solve_adjoint(linear, g[None, r], o, active[:, r])
        dc, dx, grads = linear.parameter_vjp(outcome.state)
        dm = dc @ wm
        dwm = torch.einsum("nro,nri->oi", dc, safe_m[:, r])
        if cell.gate_input == "concat":
            gate_weight = torch.cat((grads.gate_weight, dwm), 1)
        else:
            gate_weight = grads.gate_weight + dwm
        grads = grads._replace(gate_weight=gate_weight, gate_bias=dc.sum((0, 1)))
        sums = grads if sums is None else FusionParameters(*map(torch.add, sums, grads))
        parts.append((dm, dx, outcome))
    assert sums is not None
    dm = torch.cat([part[0] for part in parts], 1).to(modalities.dtype)
    dx = torch.cat([part[1] for part in parts], 0).to(injection.dtype)
    outcome = merge([[part[2] for part in parts]])
    grads = FusionParameters(*(g.to(t.dtype) for g, t in zip(sums, p, strict=True)))
    return dm, dx, grads, outcome
