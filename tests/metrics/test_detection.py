"""Average precision against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from deqfusion.metrics import Detections, average_precision, box_iou, detection, detection_metrics


def boxes(*places):
    """Unit cubes at places along x."""
    rows = torch.zeros(len(places), 7)
    rows[:, 3:6] = 1
    rows[:, 0] = torch.tensor(places, dtype=torch.float32) if places else rows[:, 0]
    return rows


def scene(found=(), scores=(), true=(), classes=None, true_classes=None):
    return Detections(
        boxes(*found),
        torch.tensor(classes if classes is not None else [0] * len(found), dtype=torch.int64),
        torch.tensor(scores, dtype=torch.float32),
        boxes(*true),
        torch.tensor(true_classes if true_classes is not None else [0] * len(true)).long(),
    )


def ap(*scenes, threshold=0.25):
    return average_precision(scenes, threshold)[0].precision


def test_all_found_is_one_and_nothing_found_is_zero():
    assert ap(scene([0, 5], [0.3, 0.9], [0, 5])) == 1
    assert ap(scene([], [], [0, 5])) == 0
    assert ap(scene([20], [0.9], [0])) == 0


def test_precision_is_its_envelope():
    # Right, wrong, right, wrong, right of 4: precisions 1, 1/2, 2/3, 1/2, 3/5 at recalls 1/4, 2/4
    # and 3/4; each recall takes the best precision from there on.
    one = scene([0, 50, 10, 51, 20], [0.9, 0.8, 0.7, 0.6, 0.5], [0, 10, 20, 30])
    assert ap(one) == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    assert average_precision([one], 0.25)[0].recall == pytest.approx(3 / 4)
    # The envelope: wrong, right, right of 2 has 2/3 at both recalls.
    assert ap(scene([50, 0, 10], [0.9, 0.8, 0.7], [0, 10])) == pytest.approx(2 / 3)


def test_scores_rank_across_scenes():
    first = scene([0, 50], [0.9, 0.6], [0])
    second = scene([0, 51], [0.5, 0.7], [0])
    # Right, wrong, wrong, right of 2.
    assert ap(first, second) == pytest.approx((1 + 2 / 4) / 2)


def test_an_object_is_found_once():
    assert ap(scene([0, 0.1, 10], [0.9, 0.8, 0.7], [0, 10])) == pytest.approx((1 + 2 / 3) / 2)


def test_a_detection_has_one_chance_at_the_object_it_overlaps_most():
    # The second overlaps the object at 0 most, which is taken; VOC counts it wrong, though it
    # overlaps the other object too.
    one = scene([0, 0.25], [0.9, 0.8], [0, 0.6])
    assert ap(one) == pytest.approx(1 / 2)


def test_an_overlap_must_exceed_the_threshold():
    # 1/2 shared: IoU 1/3.
    assert ap(scene([0.5], [1.0], [0]), threshold=0.33) == 1
    assert ap(scene([0.5], [1.0], [0]), threshold=0.34) == 0
    # Exactly 1/3 shared of 2: IoU 1/3... equality is not enough: IoU 0 at threshold 0.
    assert ap(scene([1.0], [1.0], [0]), threshold=0.0) == 0


def test_mean_is_over_classes_that_have_objects():
    one = scene([0, 10, 20], [0.9, 0.9, 0.9], [0, 30], classes=[0, 2, 1], true_classes=[0, 1])
    results = average_precision([one], 0.25)
    assert {label: result.precision for label, result in results.items()} == {0: 1.0, 1: 0.0}
    assert [result.objects for result in results.values()] == [1, 1]
    metrics = detection_metrics([one])
    assert metrics == {"map_25": 0.5, "recall_25": 0.5, "map_50": 0.5, "recall_50": 0.5}


def test_overlaps_of_a_class_are_computed_once(monkeypatch):
    one = scene([0, 10, 20], [0.9, 0.8, 0.9], [0, 30], classes=[0, 2, 1], true_classes=[0, 1])
    calls = []
    monkeypatch.setattr(detection, "box_iou", lambda *two: calls.append(two) or box_iou(*two))
    metrics = detection_metrics([one, one], (0.25, 0.5), ["bed", "table", "sofa"])
    # Two classes that have objects, in each of two scenes.
    assert len(calls) == 4
    assert (metrics["ap_25_bed"], metrics["ap_25_table"]) == (1.0, 0.0)
    assert math.isnan(metrics["ap_25_sofa"])
    assert metrics["map_25"] == 0.5


def test_thresholds_have_hits_of_their_own():
    # IoU 1/3: right at 0.25, wrong at 0.5.
    metrics = detection_metrics([scene([0.5, 10], [0.9, 0.8], [0, 10])])
    assert metrics == {"map_25": 1.0, "recall_25": 1.0, "map_50": 0.25, "recall_50": 0.5}


def test_scenes_without_objects_count_against_precision_only():
    empty = scene([0], [0.95], [])
    assert ap(scene([0], [0.9], [0]), empty) == pytest.approx(1 / 2)
    assert ap(scene([0], [0.9], [0]), scene()) == 1
    assert all(math.isnan(value) for value in detection_metrics([empty]).values())


def test_threshold_is_checked():
    with pytest.raises(ValueError, match="threshold: got 1, expected a number from 0 to below 1"):
        average_precision([], 1)
