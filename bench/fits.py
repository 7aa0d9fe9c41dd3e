r"""How time grows with a factor: exponents p of t = a x^p, by least squares in logarithms.

    log t = log a + p log x,   standard error of p = sqrt(sum r^2 / (k - 2) / sum (log x - mean)^2)

over k points with residuals r. Fewer than three points, or a factor that does not vary, give no
exponent. Small sizes are bound by fixed costs: an exponent below the count of operations says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LEAST = 3
"""Points that a fit needs: with two the error is not known."""


def power_law(x: Sequence[float], y: Sequence[float]) -> dict[str, float] | None:
    """Fits y = a x^p.

    Args:
        x, y: positive, of the same length.

    Returns:
        "exponent", its standard "error", "factor" a and "points"; None if they are too few.

    Raises:
        ValueError: for lengths that differ, or values that are not positive.
    """
    if len(x) != len(y) or (len(x) and min(*x, *y) <= 0):
        raise ValueError(f"expected positive values, as many x as y, got {list(x)} and {list(y)}")
    if len(set(x)) < LEAST:
        return None
    u, v = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    centred = u - u.mean()
    spread = float(centred @ centred)
    exponent = float(centred @ v) / spread
    residuals = v - v.mean() - exponent * centred
    error = float(np.sqrt(residuals @ residuals / (len(u) - 2) / spread))
    factor = float(np.exp(v.mean() - exponent * u.mean()))
    return {"exponent": exponent, "error": error, "factor": factor, "points": len(u)}


def of_cases(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fits every contender's median time along every factor that the cases vary.

    Args:
        cases: of a result.

    Returns:
        Records of threads, mode, contender, factor and the fit (None where points are too few).
    """
    points: dict[tuple[Any, ...], tuple[list[float], list[float]]] = {}
    for case in cases:
        for factor in case.get("factors", ()):
            for name, entry in case["contenders"].items():
                x, y = points.setdefault((case["threads"], case["mode"], name, factor), ([], []))
                if entry["seconds"] is not None:
                    x.append(_value(case, entry, factor))
                    y.append(entry["seconds"]["median"])
    return [
        {"threads": threads, "mode": mode, "contender": name, "factor": factor,
         "fit": power_law(x, y)}
        for (threads, mode, name, factor), (x, y) in sorted(points.items())
    ]  # fmt: skip


def _value(case: dict[str, Any], entry: dict[str, Any], factor: str) -> float:
    """The factor's value: of the shape, or the steps that the contender took to a target."""
    if factor == "steps":
        return float(sum(entry["verified"]["steps"].values()))
    return float(case["shape"][("batch", "dim", "num_modalities").index(factor)])
