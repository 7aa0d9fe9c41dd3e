"""Metrics of predictions, as published evaluations compute them."""

from .classification import classification_metrics, mean_and_error

__all__ = ["classification_metrics", "mean_and_error"]
