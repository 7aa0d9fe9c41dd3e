"""Metrics of predictions, as published evaluations compute them."""

from .classification import classification_metrics, mean_and_error
from .multilabel import multilabel_f1
from .regression import sentiment_metrics

__all__ = ["classification_metrics", "mean_and_error", "multilabel_f1", "sentiment_metrics"]
