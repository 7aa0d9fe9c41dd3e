"""GPU programs of the equilibrium solves and their adjoints; installed as ``deqfusion.kernels``.

    layout            channels padded group by group, weights packed
    packing           packed parameters
    injection         what a solve starts from, and its gradients
    config            schedule, tiles and options of a program
    primitives        device functions: products, GroupNorm and its VJP
    anderson          device functions: Gram row, small solve
    schedule          device functions: how the groups of a row meet
    scaling           device functions: unit gradients
    solver            device functions: when a row ends, its next iterate
    modality, fusion  the equilibria, in one launch or a launch per phase
    modality_adjoint, fusion_adjoint    their gradients, up to those of the parameters
    gradients         gradients of the parameters
    arguments, compiled    what a launch is given, and launching what was compiled before
    launch, solves    the same as functions of tensors
    cost, candidates  what a solve should cost on a device, and what to try for one
    tuning            what was found to be best
    targets           programs compiled ahead of time, and what they need

This package imports nothing of ``deqfusion``, and no Triton until asked, so that it can be
inspected on machines that have neither.
"""

from __future__ import annotations

import functools
import importlib

#: Names of the GPU programs that the operators launch.
PROGRAMS: tuple[str, ...] = (
    "modality_solve_kernel",
    "fusion_solve_kernel",
    "modality_adjoint_kernel",
    "fusion_adjoint_kernel",
    "parameter_gradients_kernel",
)


@functools.cache
def triton_version() -> str | None:
    """Import Triton and return its version, or None where it cannot be imported."""
    try:
        triton = importlib.import_module("triton")
    except Exception:  # a broken driver stack raises more than ImportError from here
        return None
    return str(triton.__version__)


@functools.cache
def interpreted() -> bool:
    """Whether the programs run in Triton's interpreter, on CPU tensors."""
    return triton_version() is not None and bool(
        importlib.import_module(".primitives", __name__).interpreted()
    )


def status() -> tuple[bool, str]:
    """Say whether the GPU programs can run, and why (not).

    Returns:
        A pair ``(usable, reason)``: ``usable`` is True when Triton imports; ``reason`` is one
        sentence for a person.
    """
    version = triton_version()
    if version is None:
        return False, "Triton cannot be imported: pip install triton"
    return True, f"Triton {version} imports; programs: {', '.join(PROGRAMS)}"
