r"""Operations and bytes of a solve, counted from its steps and its shape, not measured.

An evaluation of a row is P products of d x d and an Anderson step of width s with m states:

    operations  = 2 P d^2
    bytes       = 4 (2 P d  +  (2 m + 4) s)                  per row
                + 4 P d^2                                    per step, the weights once

(a product reads a row and writes one; mixing reads m states and m images, writes one of each, and
the state is read and written). The whole state as one problem has P = 3 N + 1 and s = (N + 1) d; a
block of the split solve P = 2 and s = d. All values are counted with 4 bytes. What is done once per
solve (the gates' constants, the last VJP by the parameters) is not counted, so that rates err on
the low side, and steps that a block takes as one are counted as often as there are blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .problem import Shape

SPLIT = ("modality", "fusion", "adjoint modality", "adjoint fusion")
JOINT = ("joint", "adjoint")


def count(
    shape: Shape, mode: str, evaluations: Mapping[str, int], steps: Mapping[str, int], memory: int
) -> dict[str, float] | None:
    """Counts a run.

    Args:
        shape: B, d, N.
        mode: of the run; what has a backward must tell its steps.
        evaluations: of all rows (and blocks), by solve.
        steps: of the slowest row, by solve.
        memory: m.

    Returns:
        "operations" and "bytes"; None where the steps of a solve are not known.
    """
    adjoint = any(name.startswith("adjoint") for name in evaluations)
    if (
        not set(evaluations) <= {*SPLIT, *JOINT}
        or not evaluations
        or (mode != "forward" and not adjoint)
    ):
        return None
    d, n = shape.dim, shape.num_modalities
    operations = moved = 0.0
    for name, rows in evaluations.items():
        products, width = (3 * n + 1, (n + 1) * d) if name in JOINT else (2, d)
        blocks = n if name.endswith("modality") else 1
        operations += rows * 2 * products * d * d
        moved += rows * 4 * (2 * products * d + (2 * memory + 4) * width)
        moved += steps[name] * blocks * 4 * products * d * d
    return {"operations": operations, "bytes": moved}


def achieved(
    counted: dict[str, float] | None, seconds: float, rate: str | None
) -> dict[str, Any] | None:
    """What a count comes to in `seconds`.

    Args:
        counted: of `count`, or None.
        seconds: of the run.
        rate: the key of `peaks.measure` that the products are held against; None: none.

    Returns:
        The count, with "operations_per_second", "bytes_per_second" and "rate".
    """
    if counted is None:
        return None
    return {
        **counted,
        "operations_per_second": counted["operations"] / seconds,
        "bytes_per_second": counted["bytes"] / seconds,
        "rate": rate,
    }


def shares(
    work: Mapping[str, Any] | None, peaks: Mapping[str, float]
) -> tuple[float | None, float | None]:
    """Shares of the matrix rate and of the copy bandwidth, None where one was not measured."""
    if work is None:
        return None, None
    rate, copy = peaks.get(work["rate"]), peaks.get("copy")
    return (
        work["operations_per_second"] / rate if rate else None,
        work["bytes_per_second"] / copy if copy else None,
    )
