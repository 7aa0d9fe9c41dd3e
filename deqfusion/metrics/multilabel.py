"""Multi-label metrics, by scikit-learn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_AVERAGES = ("micro", "macro", "weighted", "samples")


def multilabel_f1(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer], threshold: float = 0.5
) -> dict[str, float]:
    """Compute F1 of the labels whose probability exceeds a threshold, averaged in four ways.

    Args:
        probabilities: (samples, labels), each between 0 and 1 and independent of the others.
        labels: (samples, labels), 1 where the label applies and 0 elsewhere.
        threshold: above which a label is predicted.

    Returns:
        `f1_micro` (over all decisions), `f1_macro` (mean over labels), `f1_weighted` (mean over
        labels, by how often each applies) and `f1_samples` (mean over samples). A label or sample
        without true and predicted labels counts as 0, as in scikit-learn.

    Raises:
        ValueError: the shapes do not fit, nothing is given, or `labels` has other numbers.
    """
    from sklearn.metrics import f1_score

    if probabilities.ndim != 2 or probabilities.shape != labels.shape or not probabilities.size:
        raise ValueError(
            f"probabilities, labels: got shapes {probabilities.shape}, {labels.shape}, "
            "expected the same (samples, labels), at least one of each"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels: got numbers other than 0 and 1, expected only these")
    # A single column would be taken for a binary problem, which has no average over samples.
    predicted = (probabilities > threshold).astype(np.int64)
    truth = labels.astype(np.int64)
    if truth.shape[1] == 1:
        raise ValueError("labels: got 1 label, expected at least 2")
    return {
        f"f1_{average}": float(f1_score(truth, predicted, average=average, zero_division=0.0))
        for average in _AVERAGES
    }
