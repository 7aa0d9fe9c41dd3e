"""Multi-label F1 against values worked out by hand."""

import numpy as np
import pytest

from deqfusion.metrics.multilabel import multilabel_f1

_LABELS = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
# Above 1/2: 1 0 0 / 0 1 1 / 1 0 0 / 0 0 0; exactly 1/2 is not.
_PROBABILITIES = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.6], [0.7, 0.4, 0.3], [0.1, 0.1, 0.1]])


def test_four_averages_by_hand():
    metrics = multilabel_f1(_PROBABILITIES, _LABELS)
    # True positives 3, false positives 1, false negatives 1.
    assert metrics["f1_micro"] == pytest.approx(6 / 8)
    # By label: 1, 1, 0.
    assert metrics["f1_macro"] == pytest.approx(2 / 3)
    # Supports 2, 1, 1.
    assert metrics["f1_weighted"] == pytest.approx(3 / 4)
    # By sample: 2/3, 2/3, 1, and 0 where there is nothing.
    assert metrics["f1_samples"] == pytest.approx((2 / 3 + 2 / 3 + 1 + 0) / 4)


def test_threshold():
    assert multilabel_f1(_PROBABILITIES, _LABELS, threshold=0.45)["f1_macro"] == pytest.approx(
        (1 + 1 + 2 / 3) / 3
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"got shapes \(4, 3\), \(4,\), expected the same"):
        multilabel_f1(_PROBABILITIES, _LABELS[:, 0])
    with pytest.raises(ValueError, match=r"labels: got numbers other than 0 and 1"):
        multilabel_f1(_PROBABILITIES, 2 * _LABELS)
    with pytest.raises(ValueError, match=r"labels: got 1 label, expected at least 2"):
        multilabel_f1(_PROBABILITIES[:, :1], _LABELS[:, :1])
