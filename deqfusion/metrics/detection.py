"""Average precision of detected boxes, by the rules of PASCAL VOC with all points.

Per class, the detections of all scenes are gone through from the highest score down. A detection is
right where the object of its class and scene that it overlaps most is overlapped by more than the
threshold and was not found before, and wrong otherwise. With precision p(r) at recall r,

    AP = sum_i (r_i - r_(i-1)) max_(j >= i) p(r_j)

and mAP is the mean over classes that have objects.

Source: Everingham et al., The PASCAL VOC Challenge, 2010, as VoteNet's `eval_det.py` computes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import box_iou


class Detections(NamedTuple):
    """What was found in a scene, and what is there.

    Attributes:
        boxes: (D, 7), as in `metrics.boxes`.
        classes: int64 (D,).
        scores: (D,).
        true_boxes: (K, 7).
        true_classes: int64 (K,).
    """

    boxes: Tensor
    classes: Tensor
    scores: Tensor
    true_boxes: Tensor
    true_classes: Tensor


class ClassResult(NamedTuple):
    """Average precision of a class, the share of its objects that were found, their number."""

    precision: float
    recall: float
    objects: int


def average_precision(scenes: Sequence[Detections], threshold: float) -> dict[int, ClassResult]:
    """Compute average precision and recall of each class.

    Args:
        scenes: the detections of a split.
        threshold: IoU that an overlap must exceed, 0 to below 1.

    Returns:
        A result for each class that has an object in a scene.

    Raises:
        ValueError: a threshold out of range.

    Source: VoteNet's `eval_det.py`. Difference: 1. a class without objects has no result there
    either, but where something was detected of it; there it is NaN.
    """
    return _results(scenes, [threshold])[0]


def detection_metrics(
    scenes: Sequence[Detections],
    thresholds: Sequence[float] = (0.25, 0.5),
    classes: Sequence[str] = (),
) -> dict[str, float]:
    """Compute mean average precision and mean recall over the classes that have objects.

    Args:
        scenes: the detections of a split.
        thresholds: IoUs, as in `average_precision`.
        classes: names of classes 0, 1, ... whose average precision at the first threshold is
            wanted too.

    Returns:
        `map_25`, `recall_25` and so on: a name and the threshold in per cent; `ap_25_NAME` of each
        of `classes`. NaN where no scene has an object, or one of the class.
    """
    metrics, names = {}, [f"{100 * threshold:g}" for threshold in thresholds]
    found = _results(scenes, thresholds)
    for name, results in zip(names, found, strict=True):
        count = len(results)
        precision = sum(result.precision for result in results.values())
        recall = sum(result.recall for result in results.values())
        metrics[f"map_{name}"] = precision / count if count else math.nan
        metrics[f"recall_{name}"] = recall / count if count else math.nan
    for label, title in enumerate(classes):
        known = found[0].get(label)
        metrics[f"ap_{names[0]}_{title}"] = math.nan if known is None else known.precision
    return metrics


def _results(
    scenes: Sequence[Detections], thresholds: Sequence[float]
) -> list[dict[int, ClassResult]]:
    """Of each threshold the results by class; overlaps, which take the time, are computed once."""
    for threshold in thresholds:
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold: got {threshold}, expected a number from 0 to below 1")
    present = {int(label) for scene in scenes for label in scene.true_classes.unique()}
    by_class = {label: _class_results(scenes, label, thresholds) for label in sorted(present)}
    return [
        {label: results[place] for label, results in by_class.items()}
        for place in range(len(thresholds))
    ]


def _class_results(
    scenes: Sequence[Detections], label: int, thresholds: Sequence[float]
) -> list[ClassResult]:
    scores, right, objects = [], [], 0
    for scene in scenes:
        mine, true = scene.classes == label, scene.true_classes == label
        objects += int(true.sum())
        order = scene.scores[mine].argsort(descending=True, stable=True)
        scores.append(scene.scores[mine][order].double().cpu())
        right.append(_right(scene.boxes[mine][order], scene.true_boxes[true], thresholds))
    order = torch.cat(scores).argsort(descending=True, stable=True)
    hits = torch.cat(right, dim=1)[:, order].double()
    return [_class_result(hit, objects) for hit in hits]


def _class_result(hit: Tensor, objects: int) -> ClassResult:
    found = hit.cumsum(0)
    precision = found / torch.arange(1, len(hit) + 1, dtype=torch.float64)
    envelope = precision.flip(0).cummax(0).values.flip(0) if len(hit) else precision
    return ClassResult(
        # Recall grows by 1/objects at each hit and stands still elsewhere.
        precision=float((envelope * hit).sum() / objects),
        recall=float(hit.sum() / objects),
        objects=objects,
    )


def _right(boxes: Tensor, true_boxes: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Which boxes of a scene, highest score first, find an object, at each threshold.

    Returns:
        bool (thresholds, D), on the CPU.
    """
    right = torch.zeros(len(thresholds), len(boxes), dtype=torch.bool)
    if len(boxes) == 0 or len(true_boxes) == 0:
        return right
    best = box_iou(boxes, true_boxes).cpu().max(dim=1)
    overlaps, places = best.values.tolist(), best.indices.tolist()
    for row, threshold in zip(right, thresholds, strict=True):
        taken: set[int] = set()
        for index, (overlap, place) in enumerate(zip(overlaps, places, strict=True)):
            if overlap > threshold and place not in taken:
                taken.add(place)
                row[index] = True
    return right
