"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from deqfusion.metrics import classification_metrics, mean_and_error


def test_two_classes():
    score = np.array([0.1, 0.6, 0.4, 0.8])
    metrics = classification_metrics(np.stack([1 - score, score], 1), np.array([0, 0, 1, 1]))
    # Predicted 0 1 0 1: one true positive, one false positive, one false negative.
    assert metrics == {"accuracy": 0.5, "f1": 0.5, "auc": 0.75}


def test_more_classes():
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    metrics = classification_metrics(probabilities, np.array([0, 1, 1, 2]))
    assert metrics["accuracy"] == 0.75
    # F1 by class: 2/3, 2/3, 1; supports 1, 2, 1.
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert metrics["f1_weighted"] == pytest.approx((2 / 3 + 2 * 2 / 3 + 1) / 4)
    assert metrics["auc_macro"] == 1.0
    assert metrics["auc_weighted"] == 1.0


def test_auc_is_undefined_where_a_class_is_absent():
    probabilities = np.full((4, 3), 1 / 3)
    metrics = classification_metrics(probabilities, np.array([0, 1, 0, 1]))
    assert math.isnan(metrics["auc_macro"])
    assert math.isnan(classification_metrics(probabilities[:, :2], np.zeros(4, int))["auc"])
    assert metrics["accuracy"] == 0.5


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"got shapes \(4, 3\), \(5,\)"):
        classification_metrics(np.zeros((4, 3)), np.zeros(5, int))


def test_mean_and_standard_error():
    mean, error = mean_and_error(np.array([1.0, 2.0, 3.0]))
    assert (mean, error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert math.isnan(mean_and_error(np.array([1.0]))[1])
