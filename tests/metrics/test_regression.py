"""Sentiment metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from deqfusion.metrics.regression import sentiment_metrics


def test_both_conventions_by_hand():
    predicted = np.array([0.2, -0.4, 4.0, -1.2, 0.0])
    scores = np.array([0.0, 0.6, 3.0, -1.4, -0.2])
    metrics = sentiment_metrics(predicted, scores)
    # Rounded: 0 -0 3 -1 0 against 0 1 3 -1 -0.
    assert metrics["acc7"] == 0.8
    # >= 0: 1 0 1 0 1 against 1 1 1 0 0.
    assert metrics["acc2_has0"] == 0.6
    # F1 of True: precision 2/3, recall 2/3; of False: 1/2; supports 3 and 2.
    assert metrics["f1_has0"] == pytest.approx((3 * 2 / 3 + 2 * 1 / 2) / 5)
    # Without the first, > 0: 0 1 0 0 against 1 1 0 0.
    assert metrics["acc2_non0"] == 0.75
    # True: precision 1, recall 1/2; False: precision 2/3, recall 1; supports 2 and 2.
    assert metrics["f1_non0"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert metrics["mae"] == pytest.approx((0.2 + 1.0 + 1.0 + 0.2 + 0.2) / 5)
    # Deviations from the means, 0.52 and 0.4.
    p = predicted - predicted.mean()
    s = scores - scores.mean()
    assert metrics["pearson"] == pytest.approx((p @ s) / math.sqrt((p @ p) * (s @ s)))


def test_halves_round_to_even_and_predictions_are_clipped():
    metrics = sentiment_metrics(np.array([0.5, 1.5, -9.0]), np.array([0.0, 2.0, -3.0]))
    assert metrics["acc7"] == 1.0


def test_what_is_not_defined_is_nan():
    metrics = sentiment_metrics(np.zeros(3), np.zeros(3))
    assert math.isnan(metrics["pearson"])
    assert math.isnan(metrics["acc2_non0"])
    assert math.isnan(metrics["f1_non0"])
    assert metrics["acc2_has0"] == 1.0
    assert math.isnan(sentiment_metrics(np.zeros(2), np.array([1.0, -1.0]))["pearson"])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"got shapes \(3,\), \(4,\), expected the same"):
        sentiment_metrics(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match=r"got shapes \(0,\), \(0,\)"):
        sentiment_metrics(np.zeros(0), np.zeros(0))
