"""Classification metrics from class probabilities, by scikit-learn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def classification_metrics(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer]
) -> dict[str, float]:
    """Compute accuracy, F1 and area under the ROC curve.

    Args:
        probabilities: (rows, classes), rows summing to 1.
        labels: (rows,), 0 to classes - 1.

    Returns:
        For two classes `accuracy`, `f1` and `auc` (of class 1); for more `accuracy`, `f1_macro`,
        `f1_weighted`, `auc_macro` and `auc_weighted` (one class against the rest). An AUC is NaN
        where a class has no row among `labels`, since it is not defined then.

    Raises:
        ValueError: the shapes do not fit.
    """
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities, labels: got shapes {probabilities.shape}, {labels.shape}, "
            "expected (rows, classes), (rows,)"
        )
    classes = np.arange(probabilities.shape[1])
    predicted = probabilities.argmax(axis=1)
    complete = len(np.unique(labels)) == len(classes)
    metrics = {"accuracy": float(accuracy_score(labels, predicted))}
    if len(classes) == 2:
        metrics["f1"] = float(f1_score(labels, predicted, zero_division=0.0))
        metrics["auc"] = float(roc_auc_score(labels, probabilities[:, 1])) if complete else np.nan
        return metrics
    for average in ("macro", "weighted"):
        metrics[f"f1_{average}"] = float(
            f1_score(labels, predicted, labels=classes, average=average, zero_division=0.0)
        )
    for average in ("macro", "weighted"):
        metrics[f"auc_{average}"] = (
            float(roc_auc_score(labels, probabilities, multi_class="ovr", average=average))
            if complete
            else np.nan
        )
    return metrics


def mean_and_error(values: NDArray[np.floating]) -> tuple[float, float]:
    """Return mean and standard error of a sample; the error of one value is NaN."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(error)
