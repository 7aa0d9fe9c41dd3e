"""One function per operator: a whole solve, or a whole backward pass, on (N, R, d) tensors.

Features and parameters may be fp64, fp32, bf16 or fp16; 16-bit ones are computed in fp32 and the
results rounded at the end. On a CPU rows are taken in chunks whose history stays in the cache;
chunks do not see each other, and neither do rows.
"""

from __future__ import annotations

import functools
import json
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deqfusion.reference.accelerate import Accelerator, Anderson, Broyden, Picard
from deqfusion.reference.cell import (
    CellOptions,
    FusionParameters,
    ModalityParameters,
    gate_constants,
    gate_weights,
)
from deqfusion.reference.fusion import FusionBlock, FusionLinearization
from deqfusion.reference.host import fixed_point
from deqfusion.reference.iterate import (
    AT_MAX_STEPS,
    CONVERGED,
    NON_FINITE,
    Anchor,
    Block,
    Outcome,
    Settings,
    fixed_point_masked,
)
from deqfusion.reference.modality import ModalityBlock, ModalityLinearization
from deqfusion.reference.product import take_rows

# Elements of one tensor (K, rows, d) of a chunk: more than so many, and blocks are solved one after
# the other; a block of more, in chunks of rows. A history of ten tensors should stay in L3.
CHUNK_ELEMENTS = 1 << 19
# Below this width the products are too small a part of a step for cheaper ones to pay.
LADDER_WIDTH = 256


class SolverOptions(NamedTuple):
    """A solver in plain values, as an operator's schema takes it.

    `method` is "anderson", "picard" or "broyden"; for an adjoint also "truncated": `max_steps`
    steps damped by `mixing`. `mixing` is Picard's damping as well.
    """

    method: str
    rtol: float
    atol: float
    max_steps: int
    memory: int
    ridge: float | None
    relative_ridge: bool
    mixing: float
    ladder: bool

    def encode(self) -> str:
        """One string, as the operators' schemas take it.

        A string is a constant to a tracing compiler, whereas floats become inputs of the graph,
        which nested autograd functions of torch 2.13 cannot share.
        """
        return json.dumps(self._asdict())

    @staticmethod
    @functools.cache
    def decode(text: str) -> SolverOptions:
        """The inverse of `encode`."""
        return SolverOptions(**json.loads(text))


class Solution(NamedTuple):
    """Outputs of a solve: state (K, R, d), status, steps int32 and residual fp32 (K, R), and trace
    fp32 (K, R, max_steps or 0, 2) of ||f - z|| and ||f||, NaN where nothing was evaluated."""

    state: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    trace: Tensor


class SplitBlock(Block, Protocol):
    """Stacked blocks that can be cut into fewer blocks, and into chunks of rows."""

    def blocks(self, start: int, stop: int) -> SplitBlock: ...

    def rows(self, start: int, stop: int) -> SplitBlock: ...


@functools.cache
def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware."""
    machine = torch.backends.cpu.get_cpu_capability()
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    if any(getattr(torch.cpu, probe, bool)() for probe in probes):
        return True
    return "SVE" in machine


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _accelerator(o: SolverOptions) -> Accelerator:
    if o.method == "broyden":
        return Broyden(o.memory)
    if o.method == "picard" or o.memory == 0:
        return Picard(o.mixing)
    return Anderson(o.memory, o.ridge, o.relative_ridge, o.mixing)


def _settings(o: SolverOptions, tolerance: Tensor | None, example: Tensor, width: int) -> Settings:
    ladder = o.ladder and example.dtype == torch.float32 and width >= LADDER_WIDTH
    ladder = ladder and fast_bfloat16()
    rtol = o.rtol if tolerance is None else tolerance
    return Settings(rtol, o.atol, o.max_steps, o.relative_ridge, ladder)


def _chunks(shape: torch.Size, device: torch.device) -> list[tuple[slice, list[slice]]]:
    """Which blocks are solved together, each with its chunks of rows."""
    blocks, rows, width = shape
    if device.type != "cpu" or blocks * rows * width <= CHUNK_ELEMENTS:
        return [(slice(0, blocks), [slice(0, rows)])]
    # Equal chunks, so that none is too small to be worth its steps.
    count = -(-rows * width // CHUNK_ELEMENTS)
    size = -(-rows // count)
    chunks = [slice(at, min(at + size, rows)) for at in range(0, rows, size)]
    return [(slice(k, k + 1), chunks) for k in range(blocks)]


def _merge(parts: list[list[Outcome]]) -> Outcome:
    """Chunks of rows (inner) and of blocks (outer) put together."""
    rows = [
        part[0] if len(part) == 1 else Outcome(*(torch.cat(column, 1) for column in zip(*part)))  # noqa: B905
        for part in parts
    ]
    return rows[0] if len(rows) == 1 else Outcome(*(torch.cat(column) for column in zip(*rows)))  # noqa: B905


def _fixed_point(
    block: Block,
    start: Tensor | None,
    o: SolverOptions,
    settings: Settings,
    active: Tensor | None,
    trace: Tensor | None,
    example: Tensor,
) -> Outcome:
    loop = fixed_point if example.device.type == "cpu" else fixed_point_masked
    return loop(block, start, _accelerator(o), settings, active, trace, example)


def _new_trace(shape: torch.Size, steps: int, wanted: bool, like: Tensor) -> Tensor:
    size = (*shape[:2], steps if wanted else 0, 2)
    return torch.full(size, torch.nan, dtype=torch.float32, device=like.device)


def solve_rows(
    block: SplitBlock,
    init: Tensor | None,
    o: SolverOptions,
    tolerance: Tensor | None,
    record: bool,
    active: Tensor | None,
    example: Tensor,
    dtype: torch.dtype,
) -> Solution:
    """Solves a block chunk by chunk; the state is returned in `dtype`."""
    settings = _settings(o, tolerance, example, block.shape[-1])
    trace = _new_trace(block.shape, o.max_steps, record, example)
    parts = []
    for k, chunks in _chunks(block.shape, example.device):
        some = block.blocks(k.start, k.stop)
        parts.append(
            [
                _fixed_point(
                    some.rows(r.start, r.stop),
                    None if init is None else init[k, r].to(example.dtype),
                    o,
                    settings,
                    None if active is None else active[k, r],
                    trace[k, r] if record else None,
                    example,
                )
                for r in chunks
            ]
        )
    merged = _merge(parts)
    return Solution(merged.state.to(dtype), merged.status, merged.steps, merged.residual, trace)


def solve_modality(
    x: Tensor,
    init: Tensor | None,
    present: Tensor | None,
    p: ModalityParameters,
    cell: CellOptions,
    o: SolverOptions,
    tolerance: Tensor | None,
    record: bool,
) -> Solution:
    """The N modality equilibria of every row.

    Args:
        x: (N, R, d) features.
        init: (N, R, d) or None (zeros), where to start.
        present: bool (N, R) or None; absent modalities are left out (state 0).
        p: parameters in the dtype of x.
        cell, o: options.
        tolerance: () float tensor that takes the place of `o.rtol`, or None.
        record: whether to return the trace.
    """
    dtype = compute_dtype(x.dtype)
    block = ModalityBlock(x.to(dtype), ModalityParameters(*(t.to(dtype) for t in p)), cell)
    example = x.new_empty(0, dtype=dtype)
    return solve_rows(block, init, o, tolerance, record, present, example, x.dtype)


def solve_fusion(
    modalities: Tensor,
    injection: Tensor,
    init: Tensor | None,
    gate_mask: Tensor | None,
    fusion_mask: Tensor | None,
    p: FusionParameters,
    cell: CellOptions,
    o: SolverOptions,
    tolerance: Tensor | None,
    record: bool,
) -> Solution:
    """The fusion equilibrium of every row, as one block (K = 1).

    Args:
        modalities: (N, R, d), z_i*.
        injection: (R, d), x_f.
        init: (R, d) or None.
        gate_mask: (N, R, 1 or d) or None, factor on the gates.
        fusion_mask: (R, d) or None, factor on W_f u + b_f.
        p, cell, o, tolerance, record: as in `solve_modality`.
    """
    dtype = compute_dtype(injection.dtype)
    block = _fusion_block(modalities, injection, gate_mask, fusion_mask, p, cell, dtype)
    example = injection.new_empty(0, dtype=dtype)
    init = None if init is None else init.unsqueeze(0)
    return solve_rows(block, init, o, tolerance, record, None, example, injection.dtype)


def _fusion_block(
    modalities: Tensor,
    injection: Tensor,
    gate_mask: Tensor | None,
    fusion_mask: Tensor | None,
    p: FusionParameters,
    cell: CellOptions,
    dtype: torch.dtype,
) -> FusionBlock:
    p = FusionParameters(*(t.to(dtype) for t in p))
    masks = (None if m is None else m.to(dtype) for m in (gate_mask, fusion_mask))
    constants = gate_constants(modalities.to(dtype), p, cell)
    return FusionBlock(constants, injection.to(dtype), p, cell, *masks)


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
    """lambda = g + J^T lambda per row; rows with g = 0, or not active, get lambda = 0."""
    if o.method == "truncated":
        return _truncated_adjoint(linear, gradient, o)
    scale = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    active = active & (scale.squeeze(-1) > 0)
    unit = gradient / torch.where(scale > 0, scale, 1.0)
    settings = _settings(o, None, gradient, gradient.shape[-1])
    block = _LinearBlock(linear, unit)
    outcome = _fixed_point(block, None, o, settings, active, None, gradient.new_empty(0))
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
    for k, chunks in _chunks(x.shape, x.device):
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
    return dx, grads, _merge(parts)


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
    dtype = compute_dtype(injection.dtype)
    active = (status != NON_FINITE).unsqueeze(0)
    keep = active.squeeze(0).unsqueeze(-1)
    safe_z, safe_x, g = (torch.where(keep, t.to(dtype), 0.0) for t in (z, injection, gradient))
    safe_m = torch.where(keep, modalities.to(dtype), 0.0)
    block = _fusion_block(safe_m, safe_x, gate_mask, fusion_mask, p, cell, dtype)
    compute = FusionParameters(*(t.to(dtype) for t in p))
    wm = gate_weights(compute, cell)[1]
    parts = []
    sums: FusionParameters | None = None
    for r in _chunks(block.shape, injection.device)[0][1]:
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
    outcome = _merge([[part[2] for part in parts]])
    grads = FusionParameters(*(g.to(t.dtype) for g, t in zip(sums, p, strict=True)))
    return dm, dx, grads, outcome
