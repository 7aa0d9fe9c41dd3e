"""Boxes that rotate about the vertical axis: corners, points inside, overlap, suppression.

A box is seven numbers: centre (x, y, z), full lengths (l, w, h) and a heading, in radians. The
heading turns from +x towards -y, as in VoteNet's files for SUN RGB-D, so that the axis along l is
(cos heading, -sin heading) seen from above (x right, y inward, z up, metres).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Signs of a rectangle's corners, counter-clockwise.
_CORNERS = ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))


def box_corners(boxes: Tensor) -> Tensor:
    """Return the corners of boxes seen from above.

    Args:
        boxes: (..., 7).

    Returns:
        (..., 4, 2), counter-clockwise.
    """
    signs = boxes.new_tensor(_CORNERS)
    local = signs * boxes[..., None, 3:5] / 2
    return _turned(local, -boxes[..., None, 6]) + boxes[..., None, 0:2]


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Say which points lie in which boxes, surfaces included.

    Args:
        points: (..., N, 3).
        boxes: (..., K, 7).

    Returns:
        bool (..., K, N).
    """
    offsets = points[..., None, :, :] - boxes[..., :, None, 0:3]
    flat = _turned(offsets[..., :2], boxes[..., None, 6])
    inside = flat.abs() <= boxes[..., None, 3:5] / 2
    return inside.all(dim=-1) & (offsets[..., 2].abs() <= boxes[..., None, 5] / 2)


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Compute the volume of intersection over union of every pair of two sets of boxes.

    From above, the first rectangle in the frame of the second is cut by |x| <= l/2 and |y| <= w/2.
    A cut inserts the points where edges cross the two lines and moves what lies outside onto them:
    moved parts run to and fro on a line and enclose nothing, so that the shoelace formula

        area = 1/2 |sum_i x_i y_(i+1) - x_(i+1) y_i|

    over all 36 points gives the intersection. It is continuous in the boxes: nothing is decided
    by a comparison that rounding could turn, also where edges coincide. Computed in float64.

    Args:
        first: (N, 7).
        second: (M, 7). A length of 0 or less makes a box empty; its IoU is 0.

    Returns:
        float64 (N, M), 0 to 1.

    Raises:
        ValueError: other shapes.

    Source: definition of the metric in Song et al., SUN RGB-D, 2015.
    """
    for name, boxes in (("first", first), ("second", second)):
        if boxes.ndim != 2 or boxes.shape[1] != 7:
            raise ValueError(f"{name}: got shape {tuple(boxes.shape)}, expected (boxes, 7)")
    one, other = first.double()[:, None], second.double()[None]
    sizes = [boxes[..., 3:6].clamp(min=0) for boxes in (one, other)]
    corners = box_corners(torch.cat([one[..., :3], sizes[0], one[..., 6:]], dim=-1))
    polygon = _turned(corners - other[..., None, :2], other[..., None, 6])  # (N, M, 4, 2)
    for axis in (0, 1):
        polygon = _cut(polygon, axis, sizes[1][..., axis] / 2)
    x, y = polygon.unbind(dim=-1)
    area = (x * y.roll(-1, -1) - x.roll(-1, -1) * y).sum(dim=-1).abs() / 2
    tops = [
        boxes[..., 2] + size[..., 2] / 2 for boxes, size in zip((one, other), sizes, strict=True)
    ]
    bottoms = [top - size[..., 2] for top, size in zip(tops, sizes, strict=True)]
    height = (torch.minimum(*tops) - torch.maximum(*bottoms)).clamp(min=0)
    intersection = area * height
    union = sizes[0].prod(dim=-1) + sizes[1].prod(dim=-1) - intersection
    return torch.where(union > 0, intersection / union.clamp(min=1e-300), 0.0).clamp(0, 1)


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Keep the best of boxes that overlap: non-maximum suppression in 3-D, class by class.

    From the highest score down, a box is kept unless it overlaps a kept one of its class by more
    than `threshold`.

    Args:
        boxes: (K, 7).
        scores: (K,).
        classes: int64 (K,).
        threshold: IoU from 0 to 1.

    Returns:
        int64 indices of the kept boxes, highest score first.

    Source: VoteNet's `nms_3d_faster_samecls`. Difference: 1. IoU of the oriented boxes, not of the
    upright boxes around them, which join neighbours that stand askew.
    """
    order = scores.argsort(descending=True, stable=True)
    ordered = classes[order]
    clash = (box_iou(boxes[order], boxes[order]) > threshold) & (ordered[:, None] == ordered)
    kept: list[int] = []
    for index, row in enumerate(clash.cpu()):
        if not row[kept].any():
            kept.append(index)
    return order[torch.tensor(kept, dtype=torch.int64, device=order.device)]


def _turned(vectors: Tensor, angles: Tensor) -> Tensor:
    """Turn vectors (..., 2) counter-clockwise by angles (...)."""
    cosine, sine = angles.cos(), angles.sin()
    x, y = vectors.unbind(dim=-1)
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], dim=-1)


def _cut(polygon: Tensor, axis: int, half: Tensor) -> Tensor:
    """Cut polygons (..., P, 2) to |coordinate| <= half (...): (..., 3 P, 2), as `box_iou` says."""
    step = polygon.roll(-1, -2) - polygon
    start, length = polygon[..., axis], step[..., axis]
    # An edge along the lines crosses neither; any place on it will do.
    length = torch.where(length == 0, 1.0, length)
    places = torch.stack([(-half[..., None] - start) / length, (half[..., None] - start) / length])
    places = places.clamp(0, 1).sort(dim=0).values
    crossings = polygon + places[..., None] * step  # (2, ..., P, 2)
    points = torch.stack([polygon, *crossings], dim=-2).flatten(-3, -2)
    limit = half[..., None]
    cut = torch.minimum(torch.maximum(points[..., axis], -limit), limit)
    return torch.stack([cut, points[..., 1]] if axis == 0 else [points[..., 0], cut], dim=-1)
