"""Layers on point clouds against plain loops."""

from __future__ import annotations

import pytest
import torch

from deqfusion.models import points as module
from deqfusion.models.points import (
    FeaturePropagation,
    PointBackbone,
    SetAbstraction,
    furthest_points,
    points_in_ball,
    take,
)


def test_furthest_points_by_a_loop():
    points = torch.randn(3, 40, 3)
    chosen = furthest_points(points, 10)
    for cloud, indices in zip(points, chosen.tolist(), strict=True):
        expected = [0]
        for _ in range(9):
            nearest = torch.cdist(cloud, cloud[expected]).amin(dim=1)
            expected.append(int(nearest.argmax()))
        assert indices == expected


def test_furthest_points_visit_all_and_then_repeat():
    chosen = furthest_points(torch.randn(2, 6, 3), 8)
    assert sorted(chosen[0, :6].tolist()) == list(range(6))
    assert (chosen[:, 6:] < 6).all()


def test_furthest_points_is_an_operator():
    torch.library.opcheck(
        torch.ops.deqfusion_models.furthest_points.default, (torch.randn(2, 9, 3), 4)
    )


@pytest.mark.parametrize("pairs", [2**24, 100])
def test_balls_by_a_loop(pairs, monkeypatch):
    monkeypatch.setattr(module, "_PAIRS", pairs)
    points, centers = torch.rand(2, 30, 3), torch.rand(2, 7, 3)
    centers[0, 3] = 50.0  # nothing near
    chosen = points_in_ball(points, centers, 0.4, 5)
    filled = set()
    for row in range(2):
        for place in range(7):
            gaps = (points[row] - centers[row, place]).norm(dim=1)
            inside = [index for index in range(30) if gaps[index] <= 0.4]
            filled.add(min(len(inside), 5))
            first = inside[:5] or [0]
            assert chosen[row, place].tolist() == first + [first[0]] * (5 - len(first))
    # None, some and more than enough were met.
    assert 0 in filled
    assert 5 in filled
    assert len(filled) > 2


def test_a_point_lies_in_its_own_ball_whatever_its_place():
    points = 1000 * torch.rand(1, 50, 3)
    chosen = points_in_ball(points, points, 1e-6, 2)
    assert torch.equal(chosen[0, :, 0], torch.arange(50))


def test_take_is_indexing():
    values, indices = torch.randn(2, 5, 3), torch.randint(5, (2, 4, 6))
    expected = torch.stack([row[index] for row, index in zip(values, indices, strict=True)])
    assert torch.equal(take(values, indices), expected)


def test_abstraction_is_the_largest_of_a_ball():
    layer = SetAbstraction(4, 0.5, 8, [2, 6]).eval()
    points, features = torch.rand(2, 20, 3), torch.randn(2, 20, 2)
    centers, out, chosen = layer(points, features)
    assert torch.equal(centers, take(points, chosen))
    center = centers[1, 2]
    inside = ((points[1] - center).norm(dim=1) <= 0.5).nonzero().flatten()[:8]
    rows = torch.cat([(points[1, inside] - center) / 0.5, features[1, inside]], dim=1)
    torch.testing.assert_close(out[1, 2], layer.net(rows).amax(dim=0))


def test_propagation_weighs_by_inverse_squared_distance():
    layer = FeaturePropagation([3, 3])
    layer.net = torch.nn.Identity()
    few = torch.tensor([[[1.0, 0, 0], [-2.0, 0, 0], [0, 2.0, 0], [9.0, 0, 0]]])
    values = torch.tensor([[[4.0], [8.0], [16.0], [99.0]]])
    features = torch.tensor([[[7.0, 6.0]]])
    out = layer(torch.zeros(1, 1, 3), features, few, values)
    # Weights 1, 1/4 and 1/4.
    assert out.flatten().tolist() == pytest.approx([(4 + 2 + 4) / 1.5, 7.0, 6.0])


def test_backbone_keeps_track_of_the_seeds():
    backbone = PointBackbone(1, num_seeds=12, width=8)
    points = torch.rand(2, 60, 3)
    seeds, features, indices = backbone(points, points[..., 2:])
    assert torch.equal(seeds, take(points, indices))
    assert features.shape == (2, 12, 16)
    with pytest.raises(ValueError, match="num_seeds: got 10, expected a multiple of 4"):
        PointBackbone(1, num_seeds=10)


def test_scenes_of_a_batch_do_not_mix():
    backbone = PointBackbone(1, num_seeds=12, width=8).eval()
    points = torch.rand(3, 60, 3)
    features = backbone(points, points[..., 2:])[1]
    alone = backbone(points[1:2], points[1:2, :, 2:])[1]
    torch.testing.assert_close(features[1:2], alone)
