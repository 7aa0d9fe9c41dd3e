"""Paired tests and their correction, against scipy and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from deqfusion.analysis.statistics import band, compare, holm, paired, summary


def test_summary_is_mean_and_standard_error():
    assert summary("x", [1.0, 2.0, 6.0]) == {
        "x": 3.0,
        "x_error": pytest.approx(math.sqrt(7.0) / math.sqrt(3.0)),
    }
    assert math.isnan(summary("x", [1.0])["x_error"])


def test_paired_looks_at_differences():
    first, second = [0.8, 0.7, 0.9, 0.6], [0.79, 0.68, 0.86, 0.61]
    found = paired(first, second)
    differences = np.subtract(first, second)
    assert found["difference"] == pytest.approx(differences.mean())
    t = differences.mean() / (differences.std(ddof=1) / 2)
    assert found["p_t"] == pytest.approx(2 * stats.t.sf(abs(t), 3))
    assert found["p_wilcoxon"] == pytest.approx(stats.wilcoxon(differences).pvalue)


def test_paired_without_a_spread_of_differences():
    assert paired([0.5, 0.6], [0.5, 0.6])["p_t"] == 1.0
    assert math.isnan(paired([0.5], [0.4])["p_t"])
    constant = paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert constant["difference"] == 1.0
    assert math.isnan(constant["p_t"])
    assert constant["p_wilcoxon"] == 0.25


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    # A larger p is never corrected to a smaller one, and none exceeds 1.
    np.testing.assert_allclose(holm([0.02, 0.021, 0.9]), [0.06, 0.06, 0.9])
    np.testing.assert_allclose(holm([0.8, 0.7]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.04, math.nan, 0.01]), [0.04, math.nan, 0.02])


def test_compare_takes_the_seeds_that_both_have():
    values = {
        "base": {0: 0.5, 1: 0.6, 2: 0.7},
        "other": {1: 0.7, 2: 0.9, 3: 0.0},
        "alone": {9: 0.1},
        "third": {0: 0.55, 1: 0.6, 2: 0.8},
    }
    found = compare(values, "base")
    assert found["base"] == found["alone"] == {}
    assert found["other"]["difference"] == pytest.approx(0.15)
    smaller, larger = sorted(found[name]["p_t"] for name in ("other", "third"))
    corrected = sorted(found[name]["p_holm"] for name in ("other", "third"))
    assert corrected == pytest.approx([min(1.0, 2 * smaller), max(2 * smaller, larger)])


def test_band_is_students_and_leaves_nan_out():
    values = np.array([[1.0, 4.0, math.nan], [2.0, math.nan, math.nan], [6.0, 8.0, 5.0]])
    mean, low, high = band(values)
    np.testing.assert_allclose(mean, [3.0, 6.0, 5.0])
    half = stats.t.ppf(0.975, 2) * math.sqrt(7.0 / 3.0)
    assert high[0] == pytest.approx(3.0 + half)
    assert low[1] == pytest.approx(6.0 - stats.t.ppf(0.975, 1) * 2.0)
    assert low[2] == high[2] == 5.0
    assert np.isnan(band(np.full((2, 1), math.nan))[0]).all()


def test_band_of_logarithms_stays_above_zero():
    mean, low, high = band(np.array([[1e-6], [1.0]]), log=True)
    np.testing.assert_allclose(mean, 1e-3)
    assert 0 < low[0] < mean[0] < high[0]
