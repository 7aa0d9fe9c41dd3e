"""Metrics of predictions, as published evaluations compute them."""

from .boxes import box_corners, box_iou, points_in_boxes, suppress
from .classification import classification_metrics, mean_and_error
from .detection import ClassResult, Detections, average_precision, detection_metrics
from .multilabel import multilabel_f1
from .regression import sentiment_metrics
from .vqa import answer_accuracy, mean_accuracies, normalise_answer

__all__ = [
    "ClassResult",
    "Detections",
    "answer_accuracy",
    "average_precision",
    "box_corners",
    "box_iou",
    "classification_metrics",
    "detection_metrics",
    "mean_accuracies",
    "mean_and_error",
    "multilabel_f1",
    "normalise_answer",
    "points_in_boxes",
    "sentiment_metrics",
    "suppress",
]
