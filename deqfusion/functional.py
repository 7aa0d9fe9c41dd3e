r"""Equilibria as functions: solve, with implicit gradients.

    z* = f(z*; x, theta)        dL/dtheta = (df/dtheta)^T lambda,  lambda = dL/dz* + J^T lambda

`modality_equilibrium` and `fusion_equilibrium` are the two implicit layers of the block-triangular
solve; autograd between them passes the adjoint from fusion to the modalities. Each is one operator
forward and one backward (`deqfusion.ops`). `joint_equilibrium` finds the same fixed point by a
single solve of the whole state and differentiates it by the same two adjoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import deqfusion.ops  # noqa: F401  registers the operators
from deqfusion import validation as check
from deqfusion.adjoint import Adjoint, Implicit
from deqfusion.injection import differentiable_once, inject, stack_and_inject
from deqfusion.reference.cell import CellOptions, FusionParameters, ModalityParameters
from deqfusion.solvers import Anderson, Solver

__all__ = [
    "BlockSolution",
    "CellOptions",
    "FusionParameters",
    "LinearStats",
    "ModalityParameters",
    "fusion_adjoint",
    "fusion_equilibrium",
    "inject",
    "joint_equilibrium",
    "modality_adjoint",
    "modality_equilibrium",
    "pack",
    "stack_and_inject",
    "watching_adjoints",
]

_M, _F = len(ModalityParameters._fields), len(FusionParameters._fields)
_C, _S = len(CellOptions._fields), 1


class BlockSolution(NamedTuple):
    """A solved block (or the whole state).

    Attributes:
        state: (..., R, d), differentiable.
        status: int32 (..., R), values of `deqfusion.Status`.
        steps: int32 (..., R).
        residual: float32 (..., R), relative.
        trace: float32 (..., R, max_steps, 2), ||f - z|| and ||f|| of every evaluation (NaN after
            the row ended); max_steps is 0 in the shape unless the trace was asked for.
    """

    state: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    trace: Tensor


def _solution(
    state: Tensor, status: Tensor, steps: Tensor, residual: Tensor, trace: Tensor
) -> BlockSolution:
    """What an operator gave, with NaN where its trace says that nothing was evaluated."""
    if trace.shape[-2]:
        trace = torch.where(trace < 0, torch.nan, trace)
    return BlockSolution(state, status, steps, residual, trace)


class LinearStats(NamedTuple):
    """Outcome of an adjoint solve per row: status, steps int32 and relative residual float32."""

    status: Tensor
    steps: Tensor
    residual: Tensor


_watching: dict[int, list[LinearStats]] = {}


@contextmanager
def watching_adjoints() -> Iterator[list[LinearStats]]:
    """Collects the outcomes of the adjoint solves of all backward passes meanwhile.

    Every layer adds two, the last layer first: that of its fusion, (R,) each, and that of its
    modalities, (N, R). With `Implicit` a row that is not CONVERGED has the gradient of its best
    evaluation, of which the first is `OneStep`'s; one whose features are not finite takes no part.
    `Phantom` and `OneStep` take steps and do not solve, so that theirs are at MAX_STEPS as a rule.
    `Unroll` and compiled backward passes tell nothing. For the whole process, as backward runs in a
    thread of its own on a GPU; of several that watch each collects all.
    """
    told: list[LinearStats] = []
    _watching[id(told)] = told
    try:
        yield told
    finally:
        del _watching[id(told)]


def _tell(outcome: Sequence[Tensor]) -> None:
    # First of all: a compiled program that has looked who watches is made anew for every answer.
    if torch.compiler.is_compiling():
        return
    for told in list(_watching.values()):
        told.append(LinearStats(*outcome))


class _ModalityEquilibrium(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, init: Tensor | None, present: Tensor | None, packed: Tensor | None,
        tolerance: Tensor | None, record: bool, adjoint: str, *rest: Any,
    ) -> Any:  # fmt: skip
        state, status, steps, residual, trace = torch.ops.deqfusion.modality_equilibrium(
            x, init, present, packed, *rest, tolerance, record
        )
        ctx.mark_non_differentiable(status, steps, residual, trace)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, present, state, status, *rest[:_M])
        ctx.adjoint, ctx.cell = adjoint, rest[_M : _M + _C]
        return state, status, steps, residual, trace

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], gradient: Tensor | None, *_: Any) -> Any:
        nothing = (None,) * (7 + _M + _C + _S)
        if gradient is None:
            return nothing
        x, present, state, status, *parameters = saved
        dx, *grads = torch.ops.deqfusion.modality_adjoint(
            gradient, state, status, x, present, *parameters, *ctx.cell, ctx.adjoint
        )
        _tell(grads[_M:])
        return (dx, *nothing[:6], *grads[:_M], *nothing[: _C + _S])


class _FusionEquilibrium(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, modalities: Tensor, injection: Tensor, modality_status: Tensor | None,
        init: Tensor | None, gate_mask: Tensor | None, fusion_mask: Tensor | None,
        packed: Tensor | None, tolerance: Tensor | None, record: bool, adjoint: str, *rest: Any,
    ) -> Any:  # fmt: skip
        state, status, steps, residual, trace = torch.ops.deqfusion.fusion_equilibrium(
            modalities, injection, modality_status, init, gate_mask, fusion_mask, packed, *rest,
            tolerance, record,
        )  # fmt: skip
        ctx.mark_non_differentiable(status, steps, residual, trace)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            modalities, injection, gate_mask, fusion_mask, state, status, *rest[:_F]
        )
        ctx.adjoint, ctx.cell = adjoint, rest[_F : _F + _C]
        return state, status, steps, residual, trace

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], gradient: Tensor | None, *_: Any) -> Any:
        nothing = (None,) * (10 + _F + _C + _S)
        if gradient is None:
            return nothing
        modalities, injection, gate_mask, fusion_mask, state, status, *p = saved
        dm, dx, *grads = torch.ops.deqfusion.fusion_adjoint(
            gradient, state, status, modalities, injection, gate_mask, fusion_mask, *p, *ctx.cell,
            ctx.adjoint,
        )  # fmt: skip
        _tell(grads[_F:])
        return (dm, dx, *nothing[:8], *grads[:_F], *nothing[: _C + _S])


class _JointEquilibrium(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, injection: Tensor, init: Tensor | None, present: Tensor | None,
        gate_mask: Tensor | None, fusion_mask: Tensor | None, tolerance: Tensor | None,
        record: bool, adjoint: str, *rest: Any,
    ) -> Any:  # fmt: skip
        state, status, steps, residual, trace = torch.ops.deqfusion.joint_equilibrium(
            x, injection, init, present, gate_mask, fusion_mask, *rest, tolerance, record
        )
        ctx.mark_non_differentiable(status, steps, residual, trace)
        ctx.save_for_backward(
            x, injection, present, gate_mask, fusion_mask, state, status, *rest[: _M + _F]
        )
        ctx.adjoint, ctx.cell = adjoint, rest[_M + _F : _M + _F + _C]
        return state, status, steps, residual, trace

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], gradient: Tensor, *_: Any) -> Any:
        x, injection, present, gate_mask, fusion_mask, state, status, *p = saved
        dm, dinjection, *fusion = torch.ops.deqfusion.fusion_adjoint(
            gradient[-1], state[-1], status[-1], state[:-1], injection, gate_mask, fusion_mask,
            *p[_M:], *ctx.cell, ctx.adjoint,
        )  # fmt: skip
        dx, *modality = torch.ops.deqfusion.modality_adjoint(
            gradient[:-1] + dm, state[:-1], status[:-1], x, present, *p[:_M], *ctx.cell,
            ctx.adjoint,
        )  # fmt: skip
        _tell(fusion[_F:])
        _tell(modality[_M:])
        nothing = (None,) * 7
        rest = (None,) * (_C + _S)
        return (dx, dinjection, *nothing, *modality[:_M], *fusion[:_F], *rest)


def _check_modality(x: Any, parameters: Any, cell: CellOptions, adjoint: Any, present: Any) -> None:
    check.features("x", x, "N, R, d")
    check.cell_options(cell, x.shape[2])
    check.modality_parameters(parameters, x)
    check.instance("adjoint", adjoint, Adjoint)
    if present is not None:
        check.tensor("present", present, [tuple(x.shape[:2])], x, torch.bool)


def _check_fusion(
    modalities: Any, injection: Any, parameters: Any, cell: CellOptions, adjoint: Any,
    gate_mask: Any, fusion_mask: Any,
) -> None:  # fmt: skip
    check.features("injection", injection, "R, d")
    check.features("modalities", modalities, "N, R, d")
    rows, dim = injection.shape
    count = modalities.shape[0]
    check.tensor("injection", injection, [tuple(modalities.shape[1:])], modalities)
    check.cell_options(cell, dim)
    check.fusion_parameters(parameters, cell, injection)
    check.instance("adjoint", adjoint, Adjoint)
    if gate_mask is not None:
        shapes = [(count, rows, 1), (count, rows, dim)]
        check.tensor("gate_mask", gate_mask, shapes, injection)
    if fusion_mask is not None:
        check.tensor("fusion_mask", fusion_mask, [(rows, dim)], injection)


def _check_solve(solver: Any, init: Any, tolerance: Any, x: Tensor, shape: tuple[int, ...]) -> None:
    check.instance("solver", solver, Solver)
    if init is not None:
        check.tensor("init", init, [tuple(shape)], x)
    if tolerance is not None:
        check.tensor("tolerance", tolerance, [()], x)


def _check_solution(gradient: Any, z: Any, status: Tensor | None, x: Tensor) -> Tensor:
    """Checks what an adjoint starts from; returns the status, CONVERGED where it is None."""
    check.tensor("gradient", gradient, [tuple(x.shape)], x)
    check.tensor("z", z, [tuple(x.shape)], x)
    if status is None:
        return torch.zeros(x.shape[:-1], dtype=torch.int32, device=x.device)
    check.tensor("status", status, [tuple(x.shape[:-1])], x, torch.int32)
    return status


def pack(
    modality: ModalityParameters, fusion: FusionParameters, cell: CellOptions, solver: Solver
) -> tuple[Tensor, Tensor]:
    """Both blocks' parameters as the Triton programs read them, in one launch.

    What `modality_equilibrium` and `fusion_equilibrium` with the same options take as `packed`;
    empty where the reference runs. Pack anew when a parameter changes, or
    `torch.get_float32_matmul_precision()`: nothing notices.
    """
    one, two = torch.ops.deqfusion.pack(*modality, *fusion, *cell, solver.encoded)
    return one, two


def modality_equilibrium(
    x: Tensor,
    parameters: ModalityParameters,
    *,
    cell: CellOptions = CellOptions(),  # noqa: B008
    solver: Solver = Anderson(),  # noqa: B008
    adjoint: Adjoint = Implicit(),  # noqa: B008
    init: Tensor | None = None,
    present: Tensor | None = None,
    packed: Tensor | None = None,
    tolerance: Tensor | None = None,
    trace: bool = False,
) -> BlockSolution:
    """The N modality equilibria z_i* = f_i(z_i*; x_i) of every row, in one solve.

    Args:
        x: (N, R, d) features, fp64, fp32, bf16 or fp16.
        parameters: of the modality blocks, in the dtype of x.
        cell: equations.
        solver: forward solver.
        adjoint: `Implicit`, `Phantom` or `OneStep`.
        init: (N, R, d), where to start; None starts from 0. No gradient flows to it.
        present: bool (N, R); absent modalities are left out (state 0, gradient 0).
        packed: of `pack`, of these very parameters; None packs them where that is needed.
        tolerance: () float tensor in place of `solver.tol`.
        trace: whether to record residuals.

    Returns:
        `BlockSolution` with state (N, R, d).

    Raises:
        ValueError, TypeError: naming the argument, what was got and what was expected.

    Source: arXiv 2306.16645, equations 3 to 5; gradients by the implicit function theorem.
    """
    _check_modality(x, parameters, cell, adjoint, present)
    _check_solve(solver, init, tolerance, x, x.shape)
    encoded = adjoint.encoded
    if torch.is_grad_enabled():
        outputs = _ModalityEquilibrium.apply(
            x, init, present, packed, tolerance, trace, encoded, *parameters, *cell, solver.encoded
        )
    else:
        outputs = torch.ops.deqfusion.modality_equilibrium(
            x, init, present, packed, *parameters, *cell, solver.encoded, tolerance, trace
        )
    return _solution(*outputs)


def fusion_equilibrium(
    modalities: Tensor,
    injection: Tensor,
    parameters: FusionParameters,
    *,
    cell: CellOptions = CellOptions(),  # noqa: B008
    solver: Solver = Anderson(),  # noqa: B008
    adjoint: Adjoint = Implicit(),  # noqa: B008
    modality_status: Tensor | None = None,
    init: Tensor | None = None,
    gate_mask: Tensor | None = None,
    fusion_mask: Tensor | None = None,
    packed: Tensor | None = None,
    tolerance: Tensor | None = None,
    trace: bool = False,
) -> BlockSolution:
    """The fusion equilibrium z_f* of every row, for given modality states.

    Args:
        modalities: (N, R, d), z_i*; held fixed in the solve, differentiated through.
        injection: (R, d), x_f, see `inject`.
        parameters: of the fusion block, in the dtype of the tensors.
        modality_status: int32 (N, R), of the modalities' solve; a row with a NON_FINITE one has no
            answer, and is NON_FINITE.
        init: (R, d), where to start; None starts from 0.
        gate_mask: (N, R, 1 or d), factor on the gates (presence, dropout).
        fusion_mask: (R, d), factor on W_f u + b_f (dropout).
        cell, solver, adjoint, packed, tolerance, trace: as in `modality_equilibrium`.

    Returns:
        `BlockSolution` with state (R, d).

    Raises:
        ValueError, TypeError: naming the argument, what was got and what was expected.

    Source: arXiv 2306.16645, equations 6 and 7.
    """
    _check_fusion(modalities, injection, parameters, cell, adjoint, gate_mask, fusion_mask)
    _check_solve(solver, init, tolerance, injection, injection.shape)
    if modality_status is not None:
        shape = tuple(modalities.shape[:2])
        check.tensor("modality_status", modality_status, [shape], injection, torch.int32)
    encoded = adjoint.encoded
    tensors = modalities, injection, modality_status, init, gate_mask, fusion_mask, packed
    rest = *parameters, *cell, solver.encoded
    if torch.is_grad_enabled():
        outputs = _FusionEquilibrium.apply(*tensors, tolerance, trace, encoded, *rest)
    else:
        outputs = torch.ops.deqfusion.fusion_equilibrium(*tensors, *rest, tolerance, trace)
    return _solution(*outputs)


def joint_equilibrium(
    x: Tensor,
    injection: Tensor,
    modality_parameters: ModalityParameters,
    fusion_parameters: FusionParameters,
    *,
    cell: CellOptions = CellOptions(),  # noqa: B008
    solver: Solver = Anderson(),  # noqa: B008
    adjoint: Adjoint = Implicit(),  # noqa: B008
    init: Tensor | None = None,
    present: Tensor | None = None,
    gate_mask: Tensor | None = None,
    fusion_mask: Tensor | None = None,
    tolerance: Tensor | None = None,
    trace: bool = False,
) -> BlockSolution:
    """The fixed point of the joint map by one solve of the whole state, as the paper's code does.

    Arguments as in `modality_equilibrium` and `fusion_equilibrium`; `init` is (N+1, R, d).

    Returns:
        `BlockSolution` with state (N+1, R, d); the statistics, those of the whole state, are
        repeated for every block.
    """
    _check_modality(x, modality_parameters, cell, adjoint, present)
    _check_fusion(x, injection, fusion_parameters, cell, adjoint, gate_mask, fusion_mask)
    _check_solve(solver, init, tolerance, x, (x.shape[0] + 1, *x.shape[1:]))
    outputs = _JointEquilibrium.apply(
        x, injection, init, present, gate_mask, fusion_mask, tolerance, trace,
        adjoint.encoded, *modality_parameters, *fusion_parameters, *cell,
        solver.encoded,
    )  # fmt: skip
    return _solution(*outputs)


def modality_adjoint(
    gradient: Tensor,
    z: Tensor,
    x: Tensor,
    parameters: ModalityParameters,
    *,
    cell: CellOptions = CellOptions(),  # noqa: B008
    adjoint: Adjoint = Implicit(),  # noqa: B008
    status: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor, ModalityParameters, LinearStats]:
    """What backward runs for the modality equilibria, with the statistics of its linear solve.

    Args:
        gradient: (N, R, d), dL/dz*.
        z: (N, R, d), the equilibrium for features x (N, R, d).
        status: int32 (N, R) of the forward solve; None takes every row as CONVERGED.
        parameters, cell, adjoint, present: as in `modality_equilibrium`.

    Returns:
        (dL/dx (N, R, d), gradients of the parameters, statistics (N, R) each).
    """
    _check_modality(x, parameters, cell, adjoint, present)
    status = _check_solution(gradient, z, status, x)
    dx, *rest = torch.ops.deqfusion.modality_adjoint(
        gradient, z, status, x, present, *parameters, *cell, adjoint.encoded
    )
    return dx, ModalityParameters(*rest[:_M]), LinearStats(*rest[_M:])


def fusion_adjoint(
    gradient: Tensor,
    z: Tensor,
    modalities: Tensor,
    injection: Tensor,
    parameters: FusionParameters,
    *,
    cell: CellOptions = CellOptions(),  # noqa: B008
    adjoint: Adjoint = Implicit(),  # noqa: B008
    status: Tensor | None = None,
    gate_mask: Tensor | None = None,
    fusion_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, FusionParameters, LinearStats]:
    """What backward runs for the fusion equilibrium, with the statistics of its linear solve.

    Args:
        gradient, z: (R, d), dL/dz_f* and z_f*.
        modalities, injection, parameters, cell, adjoint, gate_mask, fusion_mask: as in
            `fusion_equilibrium`.
        status: int32 (R,) of the forward solve; None takes every row as CONVERGED.

    Returns:
        (dL/dz_i (N, R, d), dL/dx_f (R, d), gradients of the parameters, statistics (R,) each).
    """
    _check_fusion(modalities, injection, parameters, cell, adjoint, gate_mask, fusion_mask)
    status = _check_solution(gradient, z, status, injection)
    dm, dx, *rest = torch.ops.deqfusion.fusion_adjoint(
        gradient, z, status, modalities, injection, gate_mask, fusion_mask, *parameters, *cell,
        adjoint.encoded,
    )  # fmt: skip
    return dm, dx, FusionParameters(*rest[:_F]), LinearStats(*rest[_F:])
