r"""The operators: one per solve and one per backward pass of a block.

    deqfusion::inject                 what a solve starts from: stacked features, x_f
    deqfusion::inject_adjoint         its gradients
    deqfusion::pack                   both blocks' parameters as the Triton programs read them
    deqfusion::modality_equilibrium   N modality equilibria of R rows
    deqfusion::modality_adjoint       their gradients: implicit solve and final VJP
    deqfusion::fusion_equilibrium     the fusion equilibrium of R rows
    deqfusion::fusion_adjoint         its gradients
    deqfusion::joint_equilibrium      the whole state as one problem (for the paper's traces)

Schemas are functional, take plain values and tensors, and never alias an input. The device of the
features decides the implementation: CPU tensors the PyTorch reference, CUDA (and ROCm) tensors the
Triton programs (`deqfusion.programs`). There is no fallback: what the programs do not have
(float64, Broyden, memory above 8) is an error there. `joint_equilibrium`, which is for comparison,
is the reference on either. What was tuned for the device (`deqfusion.kernels.tuning`) is looked up:
the programs' configurations, and on a CPU when rows that ended leave the work. `DEQFUSION_BACKEND`
overrides: "reference" everywhere (on CUDA without any synchronisation), "triton" the programs on
CPU tensors too, in Triton's interpreter. The autograd formulas are in `deqfusion.functional`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from deqfusion import programs
from deqfusion.kernels import tuning
from deqfusion.reference import adjoint, joint, solve
from deqfusion.reference import injection as inputs
from deqfusion.reference.cell import CellOptions, FusionParameters, ModalityParameters
from deqfusion.reference.solve import SolverOptions

__all__ = ["BACKENDS", "backend", "checked_implementation", "compacting", "implementation"]

BACKENDS = ("auto", "reference", "triton")

_CELL = "int num_groups, str gate, str gate_input, bool skip, str tail"
_SOLVER = "str solver"
_MODALITY = ", ".join(f"Tensor {name}" for name in ModalityParameters._fields)
_FUSION = ", ".join(f"Tensor fusion_{name}" for name in FusionParameters._fields)
_MASKS = "Tensor? gate_mask, Tensor? fusion_mask"
_SOLUTION = "(Tensor, Tensor, Tensor, Tensor, Tensor)"

_SCHEMAS = {
    "inject": "(Tensor[] features, Tensor? present, Tensor weight, Tensor bias) -> "
    "(Tensor, Tensor)",
    "inject_adjoint": "(Tensor gradient, Tensor injected_gradient, Tensor x, Tensor? present, "
    "Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)",
    "pack": f"({_MODALITY}, {_FUSION}, {_CELL}, {_SOLVER}) -> (Tensor, Tensor)",
    "modality_equilibrium": "(Tensor x, Tensor? init, Tensor? present, Tensor? packed, "
    f"{_MODALITY}, {_CELL}, "
    f"{_SOLVER}, Tensor? tolerance, bool record) -> {_SOLUTION}",
    "modality_adjoint": f"(Tensor gradient, Tensor z, Tensor status, Tensor x, Tensor? present, "
    f"{_MODALITY}, {_CELL}, {_SOLVER}) -> ({', '.join(['Tensor'] * 14)})",
    "fusion_equilibrium": "(Tensor modalities, Tensor injection, Tensor? modality_status, "
    f"Tensor? init, {_MASKS}, Tensor? packed, {_FUSION}, {_CELL}, {_SOLVER}, Tensor? tolerance, "
    f"bool record) -> {_SOLUTION}",
    "fusion_adjoint": f"(Tensor gradient, Tensor z, Tensor status, Tensor modalities, "
    f"Tensor injection, {_MASKS}, {_FUSION}, {_CELL}, {_SOLVER}) -> "
    f"({', '.join(['Tensor'] * 11)})",
    "joint_equilibrium": f"(Tensor x, Tensor injection, Tensor? init, Tensor? present, {_MASKS}, "
    f"{_MODALITY}, {_FUSION}, {_CELL}, {_SOLVER}, Tensor? tolerance, bool record) -> {_SOLUTION}",
}

_compact_below: float | None = None

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


def implementation(device: str, operator: str = "modality_equilibrium") -> str:
    """Which implementation an operator runs on tensors of a kind of device ("cpu" or "cuda").

    Returns:
        "reference" or "triton".

    Raises:
        ValueError: as `backend` does.
    """
    asked = backend()
    if operator == "joint_equilibrium" or asked == "reference":
        return "reference"
    return "triton" if asked == "triton" or device == "cuda" else "reference"


def checked_implementation(device: torch.device) -> str:
    """As `implementation`, of the solves on a device, having checked that it can run there.

    Raises:
        ValueError: as `backend` and `deqfusion.programs.available` do.
    """
    name = implementation(device.type)
    if name == "triton":
        programs.available(device)
    return name


def _split(values: tuple[Any, ...], *counts: int) -> list[tuple[Any, ...]]:
    """Cuts `values` into runs of the given lengths and the rest."""
    out, at = [], 0
    for count in counts:
        out.append(values[at : at + count])
        at += count
    out.append(values[at:])
    return out


def _triton(x: Tensor) -> bool:
    """Whether the Triton programs run on features x; checks that they can."""
    return checked_implementation(x.device) == "triton"


@contextmanager
def compacting(below: float) -> Iterator[None]:
    """On a CPU rows that ended leave the work when fewer than this share still run.

    For the whole process, and in place of what was tuned.
    """
    global _compact_below
    before, _compact_below = _compact_below, below
    try:
        yield
    finally:
        _compact_below = before


def _on_host(o: SolverOptions, x: Tensor, modalities: int, cell: CellOptions) -> SolverOptions:
    """The options of a solve of features x (..., R, d) with what this processor is to do."""
    if x.device.type != "cpu":
        return o
    below = _compact_below
    if below is None:
        rows, dim = x.shape[-2:]
        found = tuning.lookup(
            tuning.host_name(), "host", dim, cell.num_groups, modalities,
            str(x.dtype).removeprefix("torch."), o.memory, torch.get_num_threads(),
            tuning.bucket(rows),
        )  # fmt: skip
        if not isinstance(found, tuning.Host):
            return o
        below = found.compact_below
    return o._replace(compact_below=below)


# --- what each operator computes -----------------------------------------------------------------


def _inject(
    features: list[Tensor], present: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    chosen = programs if _triton(features[0]) else inputs
    return chosen.inject(features, present, weight, bias)


def _inject_adjoint(
    gradient: Tensor, injected_gradient: Tensor, x: Tensor, present: Tensor | None, weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    chosen = programs if _triton(x) else inputs
    return chosen.inject_adjoint(gradient, injected_gradient, x, present, weight, bias)


def _pack(*arguments: Any) -> tuple[Tensor, ...]:
    m, f, c, s, _ = _split(arguments, _M, _F, _C, _S)
    parameters = ModalityParameters(*m)
    if not _triton(parameters.weight1):
        return _fake_pack(*arguments)
    return programs.pack(
        parameters, FusionParameters(*f), CellOptions(*c), SolverOptions.decode(*s)
    )


def _marked(solution: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """A solution whose trace has -1 for NaN, where nothing was evaluated: checks of an operator
    compare its results, and NaN is not equal to itself. `deqfusion.functional` puts it back."""
    *rest, trace = solution
    return *rest, torch.where(trace.isnan(), -1.0, trace) if trace.numel() else trace


def _modality_equilibrium(
    x: Tensor, init: Tensor | None, present: Tensor | None, packed: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    p, c, s, (tolerance, record) = _split(rest, _M, _C, _S)
    values = ModalityParameters(*p), CellOptions(*c)
    o, how = SolverOptions.decode(*s), (tolerance, record)
    if _triton(x):
        return _marked(programs.solve_modality(x, init, present, packed, *values, o, *how))
    o = _on_host(o, x, x.shape[0], values[1])
    return _marked(solve.solve_modality(x, init, present, *values, o, *how))


def _modality_adjoint(
    gradient: Tensor, z: Tensor, status: Tensor, x: Tensor, present: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    p, c, s, _ = _split(rest, _M, _C, _S)
    values, o = (ModalityParameters(*p), CellOptions(*c)), SolverOptions.decode(*s)
    if _triton(x):
        return programs.adjoint_modality(gradient, z, status, x, present, *values, o)
    o = _on_host(o, x, x.shape[0], values[1])
    dx, grads, outcome = adjoint.adjoint_modality(gradient, z, status, x, present, *values, o)
    return dx, *grads, *outcome[1:]


def _fusion_equilibrium(
    modalities: Tensor, injection: Tensor, modality_status: Tensor | None, init: Tensor | None,
    gate_mask: Tensor | None, fusion_mask: Tensor | None, packed: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    p, c, s, (tolerance, record) = _split(rest, _F, _C, _S)
    values = FusionParameters(*p), CellOptions(*c)
    o, how = SolverOptions.decode(*s), (tolerance, record)
    tensors = modalities, injection, modality_status, init, gate_mask, fusion_mask
    if _triton(injection):
        return _marked(programs.solve_fusion(*tensors, packed, *values, o, *how))
    o = _on_host(o, injection, modalities.shape[0], values[1])
    solution = solve.solve_fusion(*tensors, *values, o, *how)
    return _marked(t.squeeze(0) for t in solution)


def _fusion_adjoint(
    gradient: Tensor, z: Tensor, status: Tensor, modalities: Tensor, injection: Tensor,
    gate_mask: Tensor | None, fusion_mask: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    p, c, s, _ = _split(rest, _F, _C, _S)
    values, o = (FusionParameters(*p), CellOptions(*c)), SolverOptions.decode(*s)
    tensors = gradient, z, status, modalities, injection, gate_mask, fusion_mask
    if _triton(injection):
        return programs.adjoint_fusion(*tensors, *values, o)
    o = _on_host(o, injection, modalities.shape[0], values[1])
    dm, dx, grads, outcome = adjoint.adjoint_fusion(*tensors, *values, o)
    return dm, dx, *grads, *(t.squeeze(0) for t in outcome[1:])


def _joint_equilibrium(
    x: Tensor, injection: Tensor, init: Tensor | None, present: Tensor | None,
    gate_mask: Tensor | None, fusion_mask: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    pm, pf, c, s, (tolerance, record) = _split(rest, _M, _F, _C, _S)
    return _marked(
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


def _fake_inject(features: list[Tensor], present: Any, weight: Any, bias: Any) -> Any:
    first = features[0]
    return first.new_empty((len(features), *first.shape)), first.new_empty(first.shape)


def _fake_inject_adjoint(
    gradient: Any, injected_gradient: Any, x: Tensor, present: Any, weight: Tensor, bias: Tensor
) -> Any:
    return tuple(_fresh((x, weight, bias)))


def _fake_pack(*arguments: Any) -> Any:
    """The reference reads the parameters as they are: nothing is packed for it."""
    m, _, c, _, _ = _split(arguments, _M, _F, _C, _S)
    weight, sizes = m[0], (0, 0)
    if implementation(weight.device.type) == "triton":
        count, dim = weight.shape[:2]
        sizes = programs.packed_sizes(count, dim, CellOptions(*c))
    return tuple(weight.new_empty(size, dtype=torch.float32) for size in sizes)


def _fake_modality_equilibrium(x: Tensor, init: Any, present: Any, packed: Any, *rest: Any) -> Any:
    _, _, s, (_, record) = _split(rest, _M, _C, _S)
    return _solution_like(x, tuple(x.shape[:2]), SolverOptions.decode(*s).max_steps, record)


def _fake_modality_adjoint(
    gradient: Tensor, z: Tensor, status: Tensor, x: Tensor, present: Any, *rest: Any
) -> Any:
    p = _split(rest, _M)[0]
    return (*_fresh((x, *p)), *_linear_outcome_like(x))


def _fake_fusion_equilibrium(
    modalities: Tensor, injection: Tensor, modality_status: Any, init: Any, gate_mask: Any,
    fusion_mask: Any, packed: Any, *rest: Any,
) -> Any:  # fmt: skip
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
    "inject": (_inject, _fake_inject),
    "inject_adjoint": (_inject_adjoint, _fake_inject_adjoint),
    "pack": (_pack, _fake_pack),
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
        # The first argument of every operator is a tensor, or a list of some. Autocast would reach
        # into the solve.
        device = (args[0][0] if isinstance(args[0], list) else args[0]).device
        kind = device.type
        # Triton launches on the current device, which need not be that of the tensors.
        elsewhere = kind == "cuda" and torch.cuda.current_device() != device.index
        # Contexts that would change nothing cost as much as a launch.
        if not (elsewhere or torch.is_grad_enabled() or torch.is_autocast_enabled(kind)):
            return reference(*args)
        there = torch.cuda.device(device) if elsewhere else nullcontext()
        with torch.no_grad(), torch.autocast(kind, enabled=False), there:
            return reference(*args)

    return run


_register()
