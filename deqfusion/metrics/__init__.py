"""Metrics of predictions, as published evaluations compute them."""

from .classification import classification_metrics, mean_and_error
from .vqa import answer_accuracy, mean_accuracies, normalise_answer

__all__ = [
    "answer_accuracy",
    "classification_metrics",
    "mean_accuracies",
    "mean_and_error",
    "normalise_answer",
]
