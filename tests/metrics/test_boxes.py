"""Oriented boxes: corners, points inside, IoU against hand-computed cases and a library."""

from __future__ import annotations

import math

import pytest
import torch

from deqfusion.metrics import box_corners, box_iou, points_in_boxes, suppress


def box(x=0.0, y=0.0, z=0.0, length=1.0, width=1.0, height=1.0, heading=0.0):
    return torch.tensor([[x, y, z, length, width, height, heading]], dtype=torch.float64)


def random_boxes(count, spread=1.0):
    places = spread * torch.randn(count, 3, dtype=torch.float64)
    sizes = 0.1 + 2 * torch.rand(count, 3, dtype=torch.float64)
    headings = 10 * torch.randn(count, 1, dtype=torch.float64)
    return torch.cat([places, sizes, headings], dim=1)


def test_heading_turns_from_x_towards_minus_y():
    corners = box_corners(box(x=1, length=4, width=2, heading=math.pi / 2))[0]
    # The length, along x before, lies along y, and the corner (2, 1) has gone to (1, -2).
    torch.testing.assert_close(corners[0], torch.tensor([2.0, -2.0]).double())
    assert corners[:, 0].max() == pytest.approx(2)
    assert corners[:, 1].max() == pytest.approx(2)


def test_points_are_inside_up_to_the_surface():
    points = torch.tensor([[1.9, 0.0, 0.0], [0.0, 1.9, 0.0], [0.0, 0.0, 0.5], [0.0, 0.0, 0.51]])
    boxes = torch.cat([box(length=4), box(length=4, heading=math.pi / 2)])
    inside = points_in_boxes(points.double(), boxes)
    assert inside.tolist() == [[True, False, True, False], [False, True, True, False]]
    # Another axis in front is a batch.
    batched = points_in_boxes(points.double().expand(2, -1, -1), boxes.expand(2, -1, -1))
    assert torch.equal(batched, inside.expand(2, -1, -1))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (box(), 1.0),
        (box(x=0.5), 1 / 3),
        (box(z=0.25), 0.75 / 1.25),
        (box(x=1.0), 0.0),  # they touch
        (box(z=2.0), 0.0),  # one above the other
        (box(x=5.0), 0.0),
        (box(length=0.5, width=0.5, height=0.5), 0.125),  # one inside the other
        (box(heading=math.pi / 2), 1.0),
        (box(heading=math.pi), 1.0),
        # Two unit squares at 45 degrees share an octagon of area 2 (sqrt 2 - 1).
        (box(heading=math.pi / 4), 1 / math.sqrt(2)),
        # A square on its corner at the edge x = 1/2: half of it, 1/2, is shared.
        (box(x=0.5, heading=math.pi / 4), None),
        (box(length=0.0), 0.0),
        (box(length=-1.0), 0.0),
    ],
)
def test_iou_of_hand_computed_cases(other, expected):
    if expected is None:
        # Right triangle with its apex at x = 1/2 - sqrt(1/2) and |y| <= 1/2 cutting off the corners
        # of the part x <= 1/2: area 1/2 - (sqrt(1/2) - 1/2)^2.
        shared = 0.5 - (math.sqrt(0.5) - 0.5) ** 2
        expected = shared / (2 - shared)
    assert box_iou(box(), other).item() == pytest.approx(expected, abs=1e-12)
    assert box_iou(other, box()).item() == pytest.approx(expected, abs=1e-12)


def test_iou_agrees_with_polygons_of_shapely():
    reason = "shapely is not installed: pip install shapely"
    geometry = pytest.importorskip("shapely.geometry", reason=reason)
    first, second = random_boxes(40, 0.6), random_boxes(50, 0.6)
    # Coincident edges, equal boxes, and touching ones are the hard cases of polygon clipping.
    second[:10] = first[:10]
    second[10:20] = first[10:20]
    second[10:20, 6] += math.pi / 2
    second[20:30] = first[20:30]
    second[20:30, 0] += first[20:30, 6].cos() * first[20:30, 3] / 2
    second[20:30, 1] -= first[20:30, 6].sin() * first[20:30, 3] / 2
    got = box_iou(first, second)
    polygons = [
        [geometry.Polygon(corners) for corners in box_corners(b).tolist()] for b in (first, second)
    ]
    worst = 0.0
    overlaps = 0
    for i, one in enumerate(polygons[0]):
        for j, other in enumerate(polygons[1]):
            a, b = first[i], second[j]
            top = min(a[2] + a[5] / 2, b[2] + b[5] / 2)
            bottom = max(a[2] - a[5] / 2, b[2] - b[5] / 2)
            shared = one.intersection(other).area * max(0.0, float(top - bottom))
            expected = shared / (float(a[3:6].prod() + b[3:6].prod()) - shared)
            overlaps += expected > 0
            worst = max(worst, abs(expected - got[i, j].item()))
    assert overlaps > 500
    assert worst < 1e-12


def test_iou_is_symmetric_and_rigid():
    first, second = random_boxes(30), random_boxes(30)
    iou = box_iou(first, second)
    torch.testing.assert_close(iou, box_iou(second, first).T)
    angle = 0.7
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    for boxes in (first, second):
        boxes[:, :2] = boxes[:, :2] @ turn.double().T + 3
        boxes[:, 6] -= angle
    torch.testing.assert_close(box_iou(first, second), iou)


def test_iou_of_no_boxes_and_of_wrong_shapes():
    assert box_iou(torch.zeros(0, 7), torch.zeros(3, 7)).shape == (0, 3)
    with pytest.raises(ValueError, match=r"second: got shape \(2, 6\), expected \(boxes, 7\)"):
        box_iou(torch.zeros(2, 7), torch.zeros(2, 6))


def test_suppression_keeps_the_best_of_a_class():
    boxes = torch.cat([box(), box(x=0.1), box(x=0.2), box(x=0.05), box(x=3)])
    scores = torch.tensor([0.5, 0.9, 0.7, 0.8, 0.1])
    classes = torch.tensor([0, 0, 0, 1, 0])
    # 0 and 2 overlap 1; 3 is of another class; 4 stands alone.
    assert suppress(boxes, scores, classes, 0.25).tolist() == [1, 3, 4]
    assert suppress(boxes, scores, classes, 1.0).tolist() == [1, 3, 2, 0, 4]
    assert suppress(boxes[:0], scores[:0], classes[:0], 0.25).tolist() == []


def test_suppressed_boxes_suppress_nothing():
    # 0 overlaps 1 and 1 overlaps 2, but 0 does not overlap 2: with 1 gone, 2 stays.
    boxes = torch.cat([box(), box(x=0.5), box(x=1.0)])
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert suppress(boxes, scores, torch.zeros(3, dtype=torch.int64), 0.25).tolist() == [0, 2]
