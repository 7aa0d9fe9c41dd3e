"""Metrics of predictions, as published evaluations compute them."""

from .classification import classification_metrics, mean_and_error
from .multilabel import multilabel_f1
from .regression import sentiment_metrics
from .vqa import answer_accuracy, mean_accuracies, normalise_answer

__all__ = [
    "answer_accuracy",
    "classification_metrics",
    "mean_accuracies",
    "mean_and_error",
    "multilabel_f1",
    "normalise_answer",
    "sentiment_metrics",
]
