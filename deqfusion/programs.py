"""The operators on the Triton programs of `deqfusion.kernels`.

Functions take what the operators of `deqfusion.ops` take, in plain values of this library, and give
the same. What the programs do not have is refused by name, never run elsewhere. Precision of the
products follows the features and `torch.get_float32_matmul_precision()`:

    float32    "highest": tf32x3 (ieee on AMD)    "high": tf32    "medium": half
    (ieee where there are no products in tf32: NVIDIA before sm_80, AMD but gfx942)
    bfloat16, float16: half

"half" is float16 in every step, of factors that the normalisations and unit gradients keep within
its range (beyond 65504 a row is NON_FINITE), and tf32 in products of which there is one a solve
and in phantom gradients, whose size is any.

Statistics, history and states are float32 throughout. With `ladder="auto"`, from width 256 on, the
first steps of "highest" have bfloat16 products; the steps that end a row do not. None has them
throughout: of a state rounded to bfloat16 the residual stalls near 1e-3, of one rounded to float16,
which has as many bits as tf32, it does not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deqfusion import kernels
from deqfusion.reference.accelerate import DEFAULT_RIDGE
from deqfusion.reference.cell import CellOptions, FusionParameters, ModalityParameters
from deqfusion.reference.solve import LADDER_WIDTH, SolverOptions

__all__ = [
    "adjoint_fusion",
    "adjoint_modality",
    "available",
    "inject",
    "inject_adjoint",
    "solve_fusion",
    "solve_modality",
    "solve_options",
]

_ELSE = "DEQFUSION_BACKEND=reference runs it"


def available(device: torch.device) -> None:
    """Checks that the programs can run on a device.

    Raises:
        ValueError: if Triton is missing, or the device needs its interpreter and has it not.
    """
    if kernels.triton_version() is None:
        raise ValueError(
            f"GPU programs on {device.type}: Triton cannot be imported, expected it installed; "
            "DEQFUSION_BACKEND=reference does without it"
        )
    if device.type == "cpu" and not kernels.interpreted():
        raise ValueError(
            "DEQFUSION_BACKEND=triton: got CPU tensors, expected CUDA ones, or TRITON_INTERPRET=1 "
            "in the environment before Triton is imported (slow, for tests)"
        )


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """The precision of products for features of a dtype, see the head of this file."""
    if _halves(dtype, device):
        return "half"
    strict = torch.get_float32_matmul_precision() == "highest"
    if not _has_tf32(device) or (strict and torch.version.hip is not None):
        return "ieee"
    return "tf32x3" if strict else "tf32"


def _halves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether steps multiply in float16."""
    low = dtype != torch.float32 or torch.get_float32_matmul_precision() == "medium"
    return low and _has_tf32(device)


def _has_tf32(device: torch.device) -> bool:
    """Whether products in tf32 exist: of AMD's devices Triton has them for one."""
    if device.type == "cpu":
        return False
    try:
        if torch.version.hip is not None:
            arch = torch.cuda.get_device_properties(device).gcnArchName
            return arch.split(":")[0] == "gfx942"
        return torch.cuda.get_device_capability(device)[0] >= 8
    except (AssertionError, RuntimeError):
        # Traced for a device that is not here, which is then taken for a new one.
        return True


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        raise ValueError(f"dtype: got {dtype}, {_schedules()} have float32 and less; {_ELSE}")


def _schedules() -> str:
    from deqfusion.kernels.config import SCHEDULES

    return f"the Triton programs (schedules {', '.join(SCHEDULES)})"


def solve_options(o: SolverOptions, x: Tensor) -> Any:
    """A solver as the programs take it.

    Raises:
        ValueError: for what they do not have.
    """
    from deqfusion.kernels.config import SolveOptions

    if o.method == "broyden":
        raise ValueError(f"solver: got Broyden, {_schedules()} have Anderson and Picard; {_ELSE}")
    _check_dtype(x.dtype)
    plain = o.method in ("picard", "truncated")
    return SolveOptions(
        rtol=o.rtol, atol=o.atol, max_steps=o.max_steps, memory=0 if plain else o.memory,
        ridge=DEFAULT_RIDGE[torch.float32] if o.ridge is None else float(o.ridge),
        relative=o.relative_ridge, mixing=o.mixing, precision=precision(x.dtype, x.device),
        ladder=o.ladder and x.shape[-1] >= LADDER_WIDTH, truncated=o.method == "truncated",
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _made(o: SolverOptions, like: tuple[Any, ...]) -> Any:
    """`solve_options` for features of a dtype, device and width, and a precision of products."""
    return solve_options(o, torch.empty(0, like[2], dtype=like[0], device=like[1]))


def _kept(o: SolverOptions, x: Tensor) -> Any:
    """`solve_options`, made once for all that they depend on."""
    return _made(o, (x.dtype, x.device, x.shape[-1], torch.get_float32_matmul_precision()))


def inject(
    features: Sequence[Tensor], present: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """As `deqfusion.reference.injection.inject`."""
    from deqfusion.kernels import injection

    _check_dtype(features[0].dtype)
    return injection.inject(features, present, weight, bias)


def inject_adjoint(
    gradient: Tensor, injected_gradient: Tensor, x: Tensor, present: Tensor | None, weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `deqfusion.reference.injection.inject_adjoint`."""
    from deqfusion.kernels import injection

    _check_dtype(x.dtype)
    return injection.inject_adjoint(gradient, injected_gradient, x, present, weight, bias)


def packed_sizes(count: int, dim: int, cell: CellOptions) -> tuple[int, int]:
    """Elements of both tensors of `pack`, for N modalities of width d."""
    from deqfusion.kernels.layout import Layout, packed_sizes

    layout = Layout(dim, cell.num_groups)
    jobs = 3 if cell.gate_input == "concat" else 2
    return (
        sum(packed_sizes(layout, 2, count, len(ModalityParameters._fields) - 2)),
        sum(packed_sizes(layout, jobs, 1, len(FusionParameters._fields) - 2)),
    )


def pack(
    p: ModalityParameters, fusion: FusionParameters, cell: CellOptions, o: SolverOptions
) -> tuple[Tensor, ...]:
    """Both blocks' parameters for solves with these options, in one launch."""
    from deqfusion.kernels import solves

    # Features have the dtype of the parameters. What is returned has no part without a value.
    low = _kept(o, p.weight1).low or "bfloat16"
    return tuple(solves.pack(p, fusion, cell.num_groups, cell.gate_input, low))


def solve_modality(
    x: Tensor, init: Tensor | None, present: Tensor | None, packed: Tensor | None,
    p: ModalityParameters, cell: CellOptions, o: SolverOptions, tolerance: Tensor | None,
    record: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `deqfusion.reference.solve.solve_modality`."""
    from deqfusion.kernels import solves

    return solves.solve_modality(
        x.contiguous(), p, cell.num_groups, cell.skip, _kept(o, x), init=init,
        present=present, tolerance=tolerance, record=record, weights=packed,
    )  # fmt: skip


def adjoint_modality(
    gradient: Tensor, z: Tensor, status: Tensor, x: Tensor, present: Tensor | None,
    p: ModalityParameters, cell: CellOptions, o: SolverOptions,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `deqfusion.reference.adjoint.adjoint_modality`, flat."""
    from deqfusion.kernels import solves

    dx, gradients, outcome = solves.adjoint_modality(
        gradient, z, status, x.contiguous(), p, cell.num_groups, cell.skip, _kept(o, x),
        present=present,
    )  # fmt: skip
    return dx, *gradients, *outcome


def solve_fusion(
    modalities: Tensor, injection: Tensor, modality_status: Tensor | None, init: Tensor | None,
    gate_mask: Tensor | None, fusion_mask: Tensor | None, packed: Tensor | None,
    p: FusionParameters, cell: CellOptions, o: SolverOptions, tolerance: Tensor | None,
    record: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `deqfusion.reference.solve.solve_fusion`, without the leading dimension 1."""
    from deqfusion.kernels import solves

    solution = solves.solve_fusion(
        modalities, injection.contiguous(), p, cell.num_groups, cell.gate, cell.gate_input,
        cell.tail, _kept(o, injection), modality_status=modality_status, init=init,
        gate_mask=gate_mask, fusion_mask=fusion_mask, tolerance=tolerance, record=record,
        weights=packed,
    )  # fmt: skip
    return tuple(solution)


def adjoint_fusion(
    gradient: Tensor, z: Tensor, status: Tensor, modalities: Tensor, injection: Tensor,
    gate_mask: Tensor | None, fusion_mask: Tensor | None, p: FusionParameters, cell: CellOptions,
    o: SolverOptions,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `deqfusion.reference.adjoint.adjoint_fusion`, flat, without the leading dimension 1."""
    from deqfusion.kernels import solves

    dm, dx, gradients, outcome = solves.adjoint_fusion(
        gradient, z, status, modalities, injection.contiguous(), p, cell.num_groups, cell.gate,
        cell.gate_input, cell.tail, _kept(o, injection), gate_mask=gate_mask,
        fusion_mask=fusion_mask,
    )  # fmt: skip
    return dm, dx, *gradients, *outcome
