"""GPU programs of the equilibrium solves; installed as ``deqfusion.kernels``.

    layout      channels padded group by group, weights packed
    config      tiles and options of a program
    primitives  device functions: product and GroupNorm of one group
    anderson    device functions: Gram row, small solve
    solver      device functions: when a row ends, its next iterate
    rows        what a launch of schedule *row* allocates
    modality    the modality equilibria in one launch (schedule *row*)
    fusion      the fusion equilibrium in one launch (schedule *row*)
    targets     programs compiled ahead of time, and what they need

The operators do not launch programs yet: the two forward solves are written and tested in the
interpreter, the backward pass is not, so every solve runs on the reference implementation.
This package imports nothing of ``deqfusion``, and no Triton until asked, so that it can be
inspected on machines that have neither.
"""

from __future__ import annotations

import importlib

#: Names of the GPU programs that the operators launch.
PROGRAMS: tuple[str, ...] = ()


def triton_version() -> str | None:
    """Import Triton and return its version, or None where it cannot be imported."""
    try:
        triton = importlib.import_module("triton")
    except Exception:  # a broken driver stack raises more than ImportError from here
        return None
    return str(triton.__version__)


def status() -> tuple[bool, str]:
    """Say whether the GPU programs can run, and why (not).

    Returns:
        A pair ``(usable, reason)``: ``usable`` is True when Triton imports and at least one
        program exists; ``reason`` is one sentence for a person.
    """
    version = triton_version()
    found = f"Triton {version} imports" if version else "Triton cannot be imported"
    if not PROGRAMS:
        return False, f"{found}; the operators launch no GPU programs yet"
    return version is not None, f"{found}; programs: {', '.join(PROGRAMS)}"
