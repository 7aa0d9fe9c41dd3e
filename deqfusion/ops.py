r"""The operators: one per solve and one per backward pass of a block.

    deqfusion::modality_equilibrium   N modality equilibria of R rows
    deqfusion::modality_adjoint       their gradients: implicit solve and final VJP
    deqfusion::fusion_equilibrium     the fusion equilibrium of R rows
    deqfusion::fusion_adjoint         its gradients
    deqfusion::joint_equilibrium      the whole state as one problem (for the paper's traces)

Schemas are functional, take plain values and tensors, and never alias an input. The device of the
features decides the implementation; CPU and, until the Triton programs are there, CUDA run the
PyTorch reference (on CUDA without any synchronisation). `DEQFUSION_BACKEND` may name it:
"reference" asks for it explicitly; anything else that is not installed is an error, not a fallback.
The autograd formulas are in `deqfusion.functional`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqfusion.reference import adjoint, joint, solve
from deqfusion.reference.cell import CellOptions, FusionParameters, ModalityParameters
from deqfusion.reference.solve import SolverOptions

__all__ = ["BACKENDS", "backend"]

BACKENDS = ("auto", "reference")

_CELL = "int num_groups, str gate, str gate_input, bool skip, str tail"
_SOLVER = "str solver"
_MODALITY = ", ".join(f"Tensor {name}" for name in ModalityParameters._fields)
_FUSION = ", ".join(f"Tensor fusion_{name}" for name in FusionParameters._fields)
_MASKS = "Tensor? gate_mask, Tensor? fusion_mask"
_SOLUTION = "(Tensor, Tensor, Tensor, Tensor, Tensor)"

_SCHEMAS = {
    "modality_equilibrium": f"(Tensor x, Tensor? init, Tensor? present, {_MODALITY}, {_CELL}, "
    f"{_SOLVER}, Tensor? tolerance, bool record) -> {_SOLUTION}",
    "modality_adjoint": f"(Tensor gradient, Tensor z, Tensor status, Tensor x, Tensor? present, "
    f"{_MODALITY}, {_CELL}, {_SOLVER}) -> ({', '.join(['Tensor'] * 14)})",
    "fusion_equilibrium": "(Tensor modalities, Tensor injection, Tensor? init, "
    f"{_MASKS}, {_FUSION}, {_CELL}, {_SOLVER}, Tensor? tolerance, bool record) -> {_SOLUTION}",
    "fusion_adjoint": f"(Tensor gradient, Tensor z, Tensor status, Tensor modalities, "
    f"Tensor injection, {_MASKS}, {_FUSION}, {_CELL}, {_SOLVER}) -> "
    f"({', '.join(['Tensor'] * 11)})",
    "joint_equilibrium": f"(Tensor x, Tensor injection, Tensor? init, Tensor? present, {_MASKS}, "
    f"{_MODALITY}, {_FUSION}, {_CELL}, {_SOLVER}, Tensor? tolerance, bool record) -> {_SOLUTION}",
}

_M, _F = len(ModalityParameters._fields), len(FusionParameters._fields)
_C, _S = len(CellOptions._fields), 1


def backend() -> str:
    """The implementation that `DEQFUSION_BACKEND` asks for.

    Raises:
        ValueError: for a name that is not one of `BACKENDS`.
    """
    name = os.environ.get("DEQFUSION_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"DEQFUSION_BACKEND: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


def _split(values: tuple[Any, ...], *counts: int) -> list[tuple[Any, ...]]:
    """Cuts `values` into runs of the given lengths and the rest."""
    out, at = [], 0
    for count in counts:
        out.append(values[at : at + count])
        at += count
    out.append(values[at:])
    return out


# --- what each operator computes -----------------------------------------------------------------


def _modality_equilibrium(
    x: Tensor, init: Tensor | None, present: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    p, c, s, (tolerance, record) = _split(rest, _M, _C, _S)
    parameters, cell, solver = ModalityParameters(*p), CellOptions(*c), SolverOptions.decode(*s)
    return tuple(
        solve.solve_modality(x, init, present, parameters, cell, solver, tolerance, record)
    )


def _modality_adjoint(
    gradient: Tensor, z: Tensor, status: Tensor, x: Tensor, present: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    p, c, s, _ = _split(rest, _M, _C, _S)
    dx, grads, outcome = adjoint.adjoint_modality(
        gradient,
        z,
        status,
        x,
        present,
        ModalityParameters(*p),
        CellOptions(*c),
        SolverOptions.decode(*s),
    )
    return dx, *grads, *outcome[1:]


def _fusion_equilibrium(
    modalities: Tensor, injection: Tensor, init: Tensor | None, gate_mask: Tensor | None,
    fusion_mask: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    p, c, s, (tolerance, record) = _split(rest, _F, _C, _S)
    solution = solve.solve_fusion(
        modalities, injection, init, gate_mask, fusion_mask, FusionParameters(*p), CellOptions(*c),
        SolverOptions.decode(*s), tolerance, record,
    )  # fmt: skip
    return tuple(t.squeeze(0) for t in solution)


def _fusion_adjoint(
    gradient: Tensor, z: Tensor, status: Tensor, modalities: Tensor, injection: Tensor,
    gate_mask: Tensor | None, fusion_mask: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    p, c, s, _ = _split(rest, _F, _C, _S)
    dm, dx, grads, outcome = adjoint.adjoint_fusion(
        gradient, z, status, modalities, injection, gate_mask, fusion_mask, FusionParameters(*p),
        CellOptions(*c), SolverOptions.decode(*s),
    )  # fmt: skip
    return dm, dx, *grads, *(t.squeeze(0) for t in outcome[1:])


def _joint_equilibrium(
    x: Tensor, injection: Tensor, init: Tensor | None, present: Tensor | None,
    gate_mask: Tensor | None, fusion_mask: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    pm, pf, c, s, (tolerance, record) = _split(rest, _M, _F, _C, _S)
    return tuple(
        joint.solve_joint(
            x, injection, init, present, gate_mask, fusion_mask, ModalityParameters(*pm),
            FusionParameters(*pf), CellOptions(*c), SolverOptions.decode(*s), tolerance, record,
        )
    )  # fmt: skip


# --- shapes and dtypes ---------------------------------------------------------------------------


def _solution_like(state: Tensor, rows: tuple[Any, ...], max_steps: int, record: bool) -> Any:
    return (
        torch.empty_like(state, memory_format=torch.contiguous_format),
        state.new_empty(rows, dtype=torch.int32),
        state.new_empty(rows, dtype=torch.int32),
        state.new_empty(rows, dtype=torch.float32),
        state.new_empty((*rows, max_steps if record else 0, 2), dtype=torch.float32),
    )


def _linear_outcome_like(state: Tensor) -> Any:
    return _solution_like(state, tuple(state.shape[:-1]), 0, False)[1:4]


def _fresh(tensors: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def _fake_modality_equilibrium(x: Tensor, init: Any, present: Any, *rest: Any) -> Any:
    _, _, s, (_, record) = _split(rest, _M, _C, _S)
    return _solution_like(x, tuple(x.shape[:2]), SolverOptions.decode(*s).max_steps, record)


def _fake_modality_adjoint(
    gradient: Tensor, z: Tensor, status: Tensor, x: Tensor, present: Any, *rest: Any
) -> Any:
    p = _split(rest, _M)[0]
    return (*_fresh((x, *p)), *_linear_outcome_like(x))


def _fake_fusion_equilibrium(
    modalities: Tensor, injection: Tensor, init: Any, gate_mask: Any, fusion_mask: Any, *rest: Any
) -> Any:
    _, _, s, (_, record) = _split(rest, _F, _C, _S)
    steps = SolverOptions.decode(*s).max_steps
    return _solution_like(injection, tuple(injection.shape[:1]), steps, record)


def _fake_fusion_adjoint(
    gradient: Tensor, z: Tensor, status: Tensor, modalities: Tensor, injection: Tensor,
    gate_mask: Any, fusion_mask: Any, *rest: Any,
) -> Any:  # fmt: skip
    p = _split(rest, _F)[0]
    return (*_fresh((modalities, injection, *p)), *_linear_outcome_like(injection))


def _fake_joint_equilibrium(
    x: Tensor, injection: Tensor, init: Any, present: Any, gate_mask: Any, fusion_mask: Any,
    *rest: Any,
) -> Any:  # fmt: skip
    _, _, _, s, (_, record) = _split(rest, _M, _F, _C, _S)
    state = x.new_empty((x.shape[0] + 1, *x.shape[1:]))
    return _solution_like(state, tuple(state.shape[:2]), SolverOptions.decode(*s).max_steps, record)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "modality_equilibrium": (_modality_equilibrium, _fake_modality_equilibrium),
    "modality_adjoint": (_modality_adjoint, _fake_modality_adjoint),
    "fusion_equilibrium": (_fusion_equilibrium, _fake_fusion_equilibrium),
    "fusion_adjoint": (_fusion_adjoint, _fake_fusion_adjoint),
    "joint_equilibrium": (_joint_equilibrium, _fake_joint_equilibrium),
}


def _register() -> None:
    for name, schema in _SCHEMAS.items():
        qualified = f"deqfusion::{name}"
        reference, fake = _IMPLEMENTATIONS[name]
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        implementation = _checked(reference)
        torch.library.impl(qualified, "CPU", implementation)
        torch.library.impl(qualified, "CUDA", implementation)
        torch.library.register_fake(qualified, fake)
        # No formula here: `deqfusion.functional` differentiates, and an operator called on its
        # own returns tensors that do not require gradients.
        torch.library.impl(qualified, "Autograd", torch.library.fallthrough_kernel)


def _checked(reference: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        backend()
        # The first argument of every operator is a tensor. Autocast would reach into the solve.
        with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
            return reference(*args)

    return run


_register()
