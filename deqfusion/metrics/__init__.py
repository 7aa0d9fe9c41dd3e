"""Metrics of predictions, as published evaluations compute them."""

from .boxes import box_corners, box_iou, points_in_boxes, suppress
from .classification import classification_metrics, mean_and_error
from .detection import ClassResult, Detections, average_precision, detection_metrics

__all__ = [
    "ClassResult",
    "Detections",
    "average_precision",
    "box_corners",
    "box_iou",
    "classification_metrics",
    "detection_metrics",
    "mean_and_error",
    "points_in_boxes",
    "suppress",
]
