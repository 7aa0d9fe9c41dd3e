"""The solves and their adjoints as functions of tensors: one launch each, and products and one for
parameters.

Shapes: K modalities, R rows, d channels. Features, states and gradients are contiguous and of any
float dtype up to fp32; results have the features' dtype, gradients of parameters the parameters'.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import Constants, Part
from .config import GRADIENT_TILES, GRADIENTS, Config, SolveOptions
from .fusion import PHASES as FUSION_PHASES
from .fusion import fusion_solve_kernel
from .fusion_adjoint import PHASES as FUSION_ADJOINT_PHASES
from .fusion_adjoint import fusion_adjoint_kernel
from .gradients import parameter_gradients_kernel, weight_products
from .launch import Plan, launch, solved
from .layout import Layout, layout_of
from .modality import PHASES as MODALITY_PHASES
from .modality import modality_solve_kernel
from .modality_adjoint import PHASES as MODALITY_ADJOINT_PHASES
from .modality_adjoint import modality_adjoint_kernel
from .packing import Packed, Parameters, packed


class Solved(NamedTuple):
    """State (K, R, d), status, steps int32 and residual fp32 (K, R), trace fp32 (K, R, T, 2)."""

    state: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    trace: Tensor


class Linear(NamedTuple):
    """Outcome of an adjoint solve: status, steps int32 and residual fp32 (K, R)."""

    status: Tensor
    steps: Tensor
    residual: Tensor


def _outcome(like: Tensor, *shape: int) -> Linear:
    status = like.new_empty(shape, dtype=torch.int32)
    return Linear(status, torch.empty_like(status), like.new_empty(shape, dtype=torch.float32))


def _trace(residual: Tensor, options: SolveOptions, record: bool) -> Tensor:
    if not record:
        return residual.new_empty((*residual.shape, 0, 2))
    return residual.new_full((*residual.shape, options.max_steps, 2), torch.nan)


def _bytes(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask.contiguous().view(torch.int8)


def _modality_block(parameters: Sequence[Tensor]) -> Parameters:
    return Parameters((parameters[0], parameters[4]), (*parameters[1:4], *parameters[5:]))


def _fusion_block(parameters: Sequence[Tensor], gate_input: str) -> Parameters:
    """Weights (d, d): the gate's of z_f, fusion, and where it is another the gate's of z_i; and
    vectors (d,)."""
    gate_weight, gate_bias, weight, bias, norm_weight, norm_bias = parameters
    vectors = gate_bias, bias, norm_weight, norm_bias
    if gate_input != "concat":
        return Parameters((gate_weight, weight), vectors)
    dim = weight.shape[0]
    return Parameters((gate_weight[:, :dim], weight, gate_weight[:, dim:]), vectors)


def pack(
    modality: Sequence[Tensor], fusion: Sequence[Tensor], groups: int, gate_input: str, low: str
) -> list[Tensor]:
    """Both blocks' parameters for `solve_modality` and `solve_fusion`, in one launch.

    Args:
        modality, fusion, groups, gate_input: as those take them.
        low: `SolveOptions.low` of the solves.

    Returns:
        One fp32 tensor for each block.
    """
    layout = layout_of(modality[0].shape[-1], groups)
    return packed(
        _modality_block(modality), layout, other=_fusion_block(fusion, gate_input), low=low
    )


def _views(
    block: Parameters, flat: Tensor | None, layout: Layout, options: SolveOptions,
    backward: bool = False,
) -> tuple[Tensor, Packed]:  # fmt: skip
    """A block's packed parameters, of `pack` or packed here, and their parts."""
    found = Packed.of(
        layout, len(block.weights), block.modalities, len(block.vectors), options.low, backward
    )
    if flat is None or flat.numel() == 0:
        (flat,) = packed(block, layout, low=options.low, backward=backward)
    if flat.numel() != found.numel:
        raise ValueError(
            f"packed: got {flat.numel()} elements, expected {found.numel}: of `pack` with the same "
            "parameters, cell and solver"
        )
    return flat, found


def solve_modality(
    x: Tensor,
    parameters: Sequence[Tensor],
    groups: int,
    skip: bool,
    options: SolveOptions,
    *,
    init: Tensor | None = None,
    present: Tensor | None = None,
    tolerance: Tensor | None = None,
    record: bool = False,
    weights: Tensor | None = None,
    config: Config | None = None,
) -> Solved:
    """The K modality equilibria of every row.

    Args:
        x: (K, R, d) features.
        parameters: weight1, bias1, norm1_weight, norm1_bias, weight2, bias2, norm2_weight,
            norm2_bias, norm3_weight, norm3_bias; weights (K, d, d), the others (K, d).
        groups: G of the normalisations; skip: adds z to t.
        options: of the solve.
        init: (K, R, d) or None (zeros), where to start.
        present: bool (K, R) or None; absent modalities keep state 0, CONVERGED, 0 steps.
        tolerance: () float tensor in place of `options.rtol`.
        record: whether to return the trace.
        weights: of `pack`; None packs the parameters.
        config: schedule and tiles; None: as `kernels.launch.Plan.new` chooses.

    Raises:
        ValueError: for a width that no schedule supports; as `launch` does.
    """
    count, rows, dim = x.shape
    layout = layout_of(dim, groups)
    plan = Plan.new(layout, count, rows, options, config, x.device, "modality", count)

    def run(plan: Plan) -> Solved:
        out, outcome = torch.empty_like(x), _outcome(x, count, rows)
        trace = _trace(outcome.residual, options, record)
        if rows == 0 or count == 0:
            return Solved(out, *outcome, trace)
        flat, given = _views(_modality_block(parameters), weights, layout, options)
        full, low = given.pair(bool(options.cheap))
        plan.run(
            modality_solve_kernel,
            (
                x, x if init is None else init.contiguous(), _bytes(present, x), out, *outcome,
                trace, outcome.residual if tolerance is None else tolerance, *full, *low,
                given.vectors, plan.scratch(5), *plan.meetings(given.counters),
            ),
            {
                "SKIP": skip, "INIT": init is not None, "PRESENT": present is not None,
                "TOLERANCE": tolerance is not None, "TRACE": record,
            },
            MODALITY_PHASES,
            flat,
        )  # fmt: skip
        return Solved(out, *outcome, trace)

    return solved(plan, run)


def adjoint_modality(
    gradient: Tensor,
    state: Tensor,
    status: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    groups: int,
    skip: bool,
    options: SolveOptions,
    *,
    present: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, list[Tensor], Linear]:
    """Gradients of the modality equilibria.

    Args:
        gradient, state: (K, R, d), dL/dz* and z*; status: int32 (K, R) of the solve.
        x, parameters, groups, skip, present: as in `solve_modality`.
        options: of the solve of lambda = g + J^T lambda.

    Returns:
        dL/dx (K, R, d), the parameters' gradients in their order, and the linear solve's outcome.
    """
    count, rows, dim = x.shape
    layout = layout_of(dim, groups)
    plan = Plan.new(layout, count, rows, options, config, x.device, "modality adjoint", count)

    def run(plan: Plan) -> tuple[Tensor, list[Tensor], Linear]:
        dx, outcome = torch.empty_like(x), _outcome(x, count, rows)
        if rows == 0 or count == 0:
            return (
                dx,
                [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters],
                outcome,
            )
        flat, weights = _views(_modality_block(parameters), None, layout, options, True)
        full, low = weights.pair(bool(options.cheap), backward=True)
        left, right = plan.rows_of(2, count), plan.rows_of(2, count)
        sums = plan.empty(plan.programs, 8, count, layout.width)
        buffers = plan.run(
            modality_adjoint_kernel,
            (
                gradient.contiguous(), state.contiguous(), status.contiguous(), x,
                _bytes(present, x), dx, *outcome, *weights.forward.rows(),
                *full, *low, weights.vectors, plan.scratch(8),
                plan.empty(count, plan.size, groups, 4), left, right, sums,
                *plan.meetings(weights.counters),
            ),
            {"SKIP": skip, "PRESENT": present is not None, "TRUNCATED": options.truncated},
            MODALITY_ADJOINT_PHASES,
            flat,
        )  # fmt: skip
        found = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]
        vectors = (*found[1:4], *found[5:])
        _parameter_gradients(
            plan, buffers, left, right, sums, found[0], found[4], vectors, count, False, False
        )
        return dx, found, outcome

    return solved(plan, run)


def _fusion_flags(gate: str, tail: str, gate_mask: Tensor | None, fusion_mask: Tensor | None,
                  count: int) -> dict[str, Any]:  # fmt: skip
    return {
        "N": count, "SIGMOID": gate == "sigmoid", "RELU_LAST": tail == "norm_relu",
        "GATE_MASK": 0 if gate_mask is None else gate_mask.shape[-1],
        "FUSION_MASK": fusion_mask is not None,
    }  # fmt: skip


def _or(t: Tensor | None, other: Tensor) -> Tensor:
    return other if t is None else t.contiguous()


def solve_fusion(
    modalities: Tensor,
    injection: Tensor,
    parameters: Sequence[Tensor],
    groups: int,
    gate: str,
    gate_input: str,
    tail: str,
    options: SolveOptions,
    *,
    modality_status: Tensor | None = None,
    init: Tensor | None = None,
    gate_mask: Tensor | None = None,
    fusion_mask: Tensor | None = None,
    tolerance: Tensor | None = None,
    record: bool = False,
    weights: Tensor | None = None,
    config: Config | None = None,
) -> Solved:
    """The fusion equilibrium of every row; results are without a leading K.

    Args:
        modalities: (N, R, d), z_i*; injection: (R, d), x_f.
        parameters: gate_weight (d, d) or (d, 2 d), gate_bias, weight (d, d), bias, norm_weight,
            norm_bias (d,).
        groups, gate, gate_input, tail: as in the cell.
        modality_status: int32 (N, R) or None; a row with a NON_FINITE one has no answer.
        init: (R, d) or None (zeros), where to start.
        gate_mask: (N, R, 1 or d) or None, M_i; fusion_mask: (R, d) or None, F.
        options, tolerance, record, weights, config: as in `solve_modality`.
    """
    count, rows, dim = modalities.shape
    layout = layout_of(dim, groups)
    plan = Plan.new(layout, 1, rows, options, config, injection.device, "fusion", count)

    def run(plan: Plan) -> Solved:
        out, outcome = torch.empty_like(injection), _outcome(injection, rows)
        trace = _trace(outcome.residual, options, record)
        if rows == 0:
            return Solved(out, *outcome, trace)
        flat, given = _views(_fusion_block(parameters, gate_input), weights, layout, options)
        (wg, wf, *wm), low = given.pair(bool(options.cheap))
        plan.run(
            fusion_solve_kernel,
            (
                modalities.contiguous(), injection, _or(modality_status, outcome.status),
                _or(init, injection), _or(gate_mask, injection), _or(fusion_mask, injection), out,
                *outcome, trace,
                outcome.residual if tolerance is None else tolerance, wg, wf, low[0], low[1],
                wm[0] if wm else wg, given.vectors, plan.scratch(5 + 2 * count),
                *plan.meetings(given.counters),
            ),
            {
                **_fusion_flags(gate, tail, gate_mask, fusion_mask, count),
                "STATUS": modality_status is not None, "INIT": init is not None,
                "TOLERANCE": tolerance is not None, "TRACE": record,
            },
            FUSION_PHASES,
            flat,
        )  # fmt: skip
        return Solved(out, *outcome, trace)

    return solved(plan, run)


def adjoint_fusion(
    gradient: Tensor,
    state: Tensor,
    status: Tensor,
    modalities: Tensor,
    injection: Tensor,
    parameters: Sequence[Tensor],
    groups: int,
    gate: str,
    gate_input: str,
    tail: str,
    options: SolveOptions,
    *,
    gate_mask: Tensor | None = None,
    fusion_mask: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], Linear]:
    """Gradients of the fusion equilibrium.

    Args:
        gradient, state: (R, d), dL/dz_f* and z_f*; status: int32 (R,) of the solve.
        modalities, injection, parameters, groups, gate, gate_input, tail, gate_mask, fusion_mask:
            as in `solve_fusion`.
        options: of the solve of lambda = g + J^T lambda.

    Returns:
        dL/dz_i (N, R, d), dL/dx_f (R, d), the parameters' gradients in their order, and the linear
        solve's outcome, without a leading K.
    """
    count, rows, dim = modalities.shape
    layout = layout_of(dim, groups)
    plan = Plan.new(layout, 1, rows, options, config, injection.device, "fusion adjoint", count)
    shared = gate_input == "sum"

    def run(plan: Plan) -> tuple[Tensor, Tensor, list[Tensor], Linear]:
        dm = torch.empty_like(modalities, memory_format=torch.contiguous_format)
        dx, outcome = torch.empty_like(injection), _outcome(injection, rows)
        if rows == 0:
            nothing = [
                torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters
            ]
            return dm, dx, nothing, outcome
        flat, weights = _views(_fusion_block(parameters, gate_input), None, layout, options, True)
        forward = weights.forward.rows()
        backward, low = weights.pair(bool(options.cheap), backward=True)
        gate_of_modalities = 0 if shared else 2
        left, right = plan.rows_of(2 + count), plan.rows_of(2 + count)
        sums = plan.empty(plan.programs, 4, 1, layout.width)
        buffers = plan.run(
            fusion_adjoint_kernel,
            (
                gradient.contiguous(), state.contiguous(), status.contiguous(),
                modalities.contiguous(), injection, _or(gate_mask, injection),
                _or(fusion_mask, injection), dm, dx, *outcome,
                forward[0], forward[1], forward[gate_of_modalities],
                backward[0], backward[1], backward[gate_of_modalities], low[0], low[1],
                weights.vectors, plan.scratch(10 + count), plan.empty(plan.size, groups),
                plan.empty(plan.size), left, right, sums, *plan.meetings(weights.counters),
            ),
            {
                **_fusion_flags(gate, tail, gate_mask, fusion_mask, count),
                "TRUNCATED": options.truncated,
            },
            FUSION_ADJOINT_PHASES,
            flat,
        )  # fmt: skip
        found = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]
        gate_weight, gate_bias, weight, *rest = found
        _parameter_gradients(
            plan,
            buffers,
            left,
            right,
            sums,
            weight,
            gate_weight,
            (gate_bias, *rest),
            1,
            True,
            shared,
        )
        return dm, dx, found, outcome

    return solved(plan, run)


def _parameter_gradients(
    plan: Plan, buffers: Sequence[Tensor], left: Part, right: Part, sums: Part, a: Tensor,
    b: Tensor, vectors: Sequence[Tensor], split: int, fusion: bool, shared: bool,
) -> None:  # fmt: skip
    """Fills the weights' gradients a, b and the vectors'; left, right (jobs..., R', W)."""
    one, other = (part.tensor(buffers).flatten(0, -3) for part in (left, right))
    columns = math.prod(sums.shape[1:])
    grid, constants = _gradients(plan.layout, columns, split, fusion, shared, len(vectors))
    launch(
        parameter_gradients_kernel, grid,
        (
            weight_products(one, other, fusion, shared), sums, a, b, *vectors,
            *([vectors[0]] * (8 - len(vectors))), plan.programs, columns,
        ),
        constants, GRADIENTS, plan.shape, buffers=buffers,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _gradients(
    layout: Layout, columns: int, split: int, fusion: bool, shared: bool, vectors: int
) -> tuple[tuple[int], Constants]:
    """Grid and constants of the parameters' gradients."""
    # Powers of two that divide the width: a group's padded one does.
    tiles = dict(GRADIENT_TILES)
    for name in ("BO", "BI", "BV"):
        while layout.width % tiles[name]:
            tiles[name] //= 2
    outputs = (2 if shared else 3) if fusion else 2 * split
    programs = outputs * (layout.width // tiles["BO"]) * (layout.width // tiles["BI"])
    constants = {
        "SPLIT": split, "SHARED": shared, "FUSION": fusion, "OUTPUTS": outputs, "V": vectors,
        "DIM": layout.dim, "G": layout.groups, "P": layout.padded, **tiles,
    }  # fmt: skip
    return (programs + columns // tiles["BV"],), Constants(constants)
