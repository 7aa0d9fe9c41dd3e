"""Means, standard errors, and paired tests of what is compared seed by seed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics import mean_and_error


def summary(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return mean and standard error as columns `name` and `name_error`."""
    if not len(values):
        return {name: np.nan, f"{name}_error": np.nan}
    mean, error = mean_and_error(np.asarray(values, dtype=float))
    return {name: mean, f"{name}_error": error}


def band(
    values: NDArray[np.float64], *, log: bool = False, level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean over seeds, and its confidence band by Student's t, point by point.

    Args:
        values: (seeds, points); NaN, at a point, is left out.
        log: average logarithms, of values > 0: the band stays above 0.
        level: of confidence.

    Returns:
        Mean, lower and upper bound, (points,) each; the band of one seed is its mean.
    """
    from scipy.stats import t

    inner = np.log(np.maximum(values, np.finfo(float).tiny)) if log else values
    counts = (~np.isnan(inner)).sum(axis=0)
    with warnings.catch_warnings():
        # A point that no seed has is NaN, which needs no warning.
        warnings.simplefilter("ignore", RuntimeWarning)
        mean = np.nanmean(inner, axis=0)
        deviation = np.nanstd(inner, axis=0, ddof=1) / np.sqrt(counts)
        half = t.ppf(0.5 + level / 2, np.maximum(counts - 1, 1)) * deviation
    half = np.where(counts > 1, half, 0.0)
    low, high = mean - half, mean + half
    # Of two seeds, a bound of logarithms may be beyond what a float holds.
    return (_exp(mean), _exp(low), _exp(high)) if log else (mean, low, high)


def _exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(np.clip(values, -200.0, 200.0))


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Compare two samples seed by seed.

    Args:
        first, second: values of the same seeds in the same order.

    Returns:
        `difference` (first minus second, the mean) and its standard error, and the two-sided p of
        Student's paired t test, `p_t`, and of Wilcoxon's signed-rank test, `p_wilcoxon`: NaN for
        fewer than two seeds; 1 where every difference is 0. With 5 seeds the smallest that
        Wilcoxon's can be is 0.0625.
    """
    from scipy.stats import ttest_rel, wilcoxon

    one, two = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    columns = summary("difference", list(one - two))
    if len(one) < 2 or not np.isfinite(one - two).all():
        return {**columns, "p_t": np.nan, "p_wilcoxon": np.nan}
    if not (one - two).any():
        return {**columns, "p_t": 1.0, "p_wilcoxon": 1.0}
    if np.ptp(one - two) == 0:
        # The same difference for every seed: t is infinite, which says more than five seeds can.
        return {**columns, "p_t": np.nan, "p_wilcoxon": float(wilcoxon(one, two).pvalue)}
    return {
        **columns,
        "p_t": float(ttest_rel(one, two).pvalue),
        "p_wilcoxon": float(wilcoxon(one, two).pvalue),
    }


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Correct p values for their number by Holm's step-down method; NaN stays, and does not count.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J.
    Statistics 6, 1979.
    """
    p = np.asarray(p_values, dtype=float)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    corrected = np.full(len(p), np.nan)
    factors = len(order) - np.arange(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return corrected


def compare(values: Mapping[str, Mapping[int, float]], base: str) -> dict[str, dict[str, Any]]:
    """Compare every name with one of them on the seeds that both have.

    Args:
        values: name -> seed -> value.
        base: the name that the others are compared with; may be missing.

    Returns:
        name -> the columns of `paired` and `p_holm`, Holm's correction of `p_t` for all names; {}
        for the base.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, by_seed in values.items():
        seeds = sorted(by_seed.keys() & values.get(base, {}).keys())
        if name != base and seeds:
            reference = values[base]
            rows[name] = paired([by_seed[s] for s in seeds], [reference[s] for s in seeds])
    corrected = holm([row["p_t"] for row in rows.values()])
    for row, p in zip(rows.values(), corrected, strict=True):
        row["p_holm"] = float(p)
    return {name: rows.get(name, {}) for name in values}
