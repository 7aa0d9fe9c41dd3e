"""Metrics of sentiment regression on CMU-MOSI's scale, -3 to 3, as its literature reports them.

    acc7       share of predictions that are clipped to -3..3 and rounded (halves to the even
               number, as numpy rounds) the same whole number as the score
    acc2_has0  share of predictions on the right side: non-negative (>= 0) or negative
    acc2_non0  the same over scores other than 0: positive (> 0) or negative
    f1_has0, f1_non0   F1 of these two decisions, weighted by class
    mae, pearson       mean absolute error and correlation of the unrounded predictions

The two conventions of Acc-2 and F1 are both in use, and differ by a point or more: Zadeh et al.
(2018) count 0 as non-negative, Tsai et al. (Multimodal Transformer, ACL 2019) leave it out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LARGEST = 3.0


def sentiment_metrics(
    predicted: NDArray[np.floating], scores: NDArray[np.floating]
) -> dict[str, float]:
    """Compute the metrics that the module's docstring lists.

    Args:
        predicted: (utterances,), any finite numbers.
        scores: (utterances,), -3 to 3.

    Returns:
        The metrics by name. `pearson` is NaN where one side is constant; `acc2_non0` and `f1_non0`
        are NaN where every score is 0.

    Raises:
        ValueError: the shapes do not fit, or nothing is given.
    """
    from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

    if predicted.ndim != 1 or predicted.shape != scores.shape or not len(scores):
        raise ValueError(
            f"predicted, scores: got shapes {predicted.shape}, {scores.shape}, "
            "expected the same (utterances,), at least one"
        )
    predicted, scores = predicted.astype(np.float64), scores.astype(np.float64)
    rounded, truth = (
        np.round(np.clip(values, -_LARGEST, _LARGEST)) for values in (predicted, scores)
    )
    metrics = {"acc7": float((rounded == truth).mean())}
    nonzero = scores != 0
    decisions = {
        "has0": (predicted >= 0, scores >= 0),
        "non0": (predicted[nonzero] > 0, scores[nonzero] > 0),
    }
    for convention, (decided, right) in decisions.items():
        accuracy, f1 = np.nan, np.nan
        if len(right):
            accuracy = float(accuracy_score(right, decided))
            f1 = float(f1_score(right, decided, average="weighted", zero_division=0.0))
        metrics[f"acc2_{convention}"] = accuracy
        metrics[f"f1_{convention}"] = f1
    metrics["mae"] = float(mean_absolute_error(scores, predicted))
    varies = np.ptp(predicted) > 0 and np.ptp(scores) > 0
    metrics["pearson"] = float(np.corrcoef(predicted, scores)[0, 1]) if varies else np.nan
    return metrics
