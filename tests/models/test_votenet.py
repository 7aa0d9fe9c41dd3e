"""The detector's shapes, decoding, and its loss against loops and cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from deqfusion.data.sunrgbd import SUNRGBD_SIZES
from deqfusion.fusions import build_fusion
from deqfusion.models.images import build_image_encoder
from deqfusion.models.points import take
from deqfusion.models.votenet import MultimodalVoteNet, Proposals, decode_boxes, heading_bin
from deqfusion.models.votenet_loss import SceneTargets, votenet_losses

SIZES = torch.tensor(SUNRGBD_SIZES)


def detector(fusion="deq", **options):
    options = {"num_seeds": 16, "num_proposals": 8, "point_width": 8, **options}
    encoder = build_image_encoder("cnn", 8)
    return MultimodalVoteNet(build_fusion(fusion, 16, 2), 16, SUNRGBD_SIZES, encoder, **options)


def inputs(batch=2, count=80):
    points = torch.rand(batch, count, 3)
    image = torch.randint(256, (batch, 3, 24, 32), dtype=torch.uint8)
    return points, points[..., 2:], 2 * torch.rand(batch, count, 2) - 1, image


def random_proposals(batch=2, seeds=6, proposals=5, headings=12, classes=10):
    shape = (batch, proposals)
    anchors = torch.rand(*shape, 3)
    return Proposals(
        seeds=torch.rand(batch, seeds, 3),
        seed_indices=torch.randint(20, (batch, seeds)),
        votes=torch.rand(batch, seeds, 3),
        anchors=anchors,
        centers=anchors + 0.1 * torch.randn(*shape, 3),
        objectness=torch.randn(*shape, 2),
        heading_logits=torch.randn(*shape, headings),
        heading_residuals=2 * torch.randn(*shape, headings),
        size_logits=torch.randn(*shape, classes),
        size_residuals=2 * torch.randn(*shape, classes, 3),
        class_logits=torch.randn(*shape, classes),
        features=(torch.zeros(0), torch.zeros(0)),
        equilibrium=None,
    )


def random_targets(counts=(3, 1), points=20, most=3):
    batch = len(counts)
    sizes = 0.5 + torch.rand(batch, most, 3)
    boxes = torch.cat([torch.rand(batch, most, 3), sizes, 3 * torch.randn(batch, most, 1)], dim=2)
    present = torch.arange(most) < torch.tensor(counts)[:, None]
    return SceneTargets(
        votes=torch.randn(batch, points, 3, 3),
        in_box=torch.rand(batch, points) < 0.5,
        boxes=torch.where(present[..., None], boxes, 0.0),
        classes=torch.randint(10, (batch, most)) * present,
        present=present,
    )


@pytest.mark.parametrize("fusion", ["deq", "concat", "gated", "weight_tied:2"])
def test_every_fusion_trains(fusion):
    model = detector(fusion)
    arguments = inputs()
    proposals = model(*arguments)
    assert proposals.centers.shape == (2, 8, 3)
    assert proposals.size_residuals.shape == (2, 8, 10, 3)
    assert torch.equal(proposals.seeds, take(arguments[0], proposals.seed_indices))
    assert (proposals.equilibrium is None) == (fusion in ("concat", "gated"))
    targets = random_targets(points=80)
    votenet_losses(proposals, targets, model.sizes).total().mean().backward()
    assert all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all()
        for parameter in model.parameters()
    )


def test_seeds_read_the_image_at_their_pixels():
    model = detector().eval()
    points, features, pixels, image = inputs(1)
    before = model(points, features, pixels, image)
    unseen = torch.ones(80, dtype=torch.bool)
    unseen[before.seed_indices[0]] = False
    moved = torch.where(unseen[:, None], 0.9, pixels)
    assert torch.equal(model(points, features, moved, image).class_logits, before.class_logits)
    moved = torch.where(unseen[:, None], pixels, -pixels)
    assert not torch.allclose(
        model(points, features, moved, image).class_logits, before.class_logits
    )


def test_scenes_of_a_batch_do_not_mix():
    model = detector("concat").eval()
    arguments = inputs(3)
    together = model(*arguments)
    alone = model(*(argument[1:2] for argument in arguments))
    torch.testing.assert_close(together.centers[1:2], alone.centers)
    torch.testing.assert_close(together.class_logits[1:2], alone.class_logits)


def test_numbers_are_checked():
    with pytest.raises(ValueError, match="num_proposals: got 17, expected 1 to 16"):
        detector(num_proposals=17)


def test_heading_bins_come_back():
    headings = torch.tensor([0.0, 0.2, -0.2, math.pi, -math.pi, 3.0, 7.0, -100.0])
    bins, residuals = heading_bin(headings, 12)
    assert bins[:5].tolist() == [0, 0, 0, 6, 6]
    assert ((bins >= 0) & (bins < 12)).all()
    assert (residuals.abs() <= 1).all()
    back = (2 * bins + residuals) * math.pi / 12
    gaps = torch.remainder(back - headings + math.pi, 2 * math.pi) - math.pi
    assert gaps.abs().max() < 1e-4


def exact_proposals(targets):
    """Proposals that say exactly what the targets are."""
    proposals = random_proposals(2, proposals=3)
    bins, residuals = heading_bin(targets.boxes[..., 6], 12)
    labels = targets.classes
    growth = targets.boxes[..., 3:6] / SIZES[labels] - 1
    return proposals._replace(
        anchors=targets.boxes[..., :3],
        centers=targets.boxes[..., :3],
        objectness=torch.tensor([-50.0, 50.0]).expand(2, 3, 2),
        heading_logits=100.0 * F.one_hot(bins, 12),
        heading_residuals=residuals[..., None].expand(-1, -1, 12),
        size_logits=100.0 * F.one_hot(labels, 10),
        size_residuals=growth[:, :, None].expand(-1, -1, 10, 3),
        class_logits=100.0 * F.one_hot(labels, 10),
    )


def test_exact_proposals_have_no_loss_but_votes_and_decode_to_the_boxes():
    targets = random_targets((3, 3))
    targets.boxes[..., 0] = torch.tensor([0.0, 5.0, 10.0])  # far from each other
    proposals = exact_proposals(targets)
    losses = votenet_losses(proposals, targets, SIZES)
    for name, value in losses._asdict().items():
        if name != "vote":
            assert value.abs().max() < 1e-5, name
    assert (losses.vote > 0).all()
    decoded = decode_boxes(proposals, SIZES)
    torch.testing.assert_close(decoded[..., :6], targets.boxes[..., :6])
    gaps = decoded[..., 6] - targets.boxes[..., 6]
    assert (torch.remainder(gaps + 1, 2 * math.pi) - 1).abs().max() < 1e-4
    assert (decoded[..., 6].abs() <= math.pi + 1e-6).all()


def test_losses_by_a_loop():
    proposals, targets = random_proposals(seeds=30, proposals=12), random_targets()
    losses = votenet_losses(proposals, targets, SIZES)
    for scene in range(2):
        expected = dict.fromkeys(losses._fields, 0.0)
        true = range(int(targets.present[scene].sum()))
        count = judged = 0
        for p in range(12):
            gaps = [
                (proposals.anchors[scene, p] - targets.boxes[scene, k, :3]).norm() for k in true
            ]
            k = min(true, key=lambda index: gaps[index])
            near = bool(gaps[k] < 0.3)
            if near or gaps[k] > 0.6:
                judged += 1
                log = proposals.objectness[scene, p].log_softmax(0)
                expected["objectness"] -= (0.8 if near else 0.2) * log[int(near)]
            if not near:
                continue
            count += 1
            target, label = targets.boxes[scene, k], int(targets.classes[scene, k])
            expected["center"] += (proposals.centers[scene, p] - target[:3]).square().sum()
            turned = target[6] % (2 * math.pi)
            heading = int((turned / (math.pi / 6) + 0.5) % 12)
            gap = (turned - heading * math.pi / 6 + math.pi) % (2 * math.pi) - math.pi
            log = proposals.heading_logits[scene, p].log_softmax(0)
            expected["heading"] -= log[heading]
            turn = proposals.heading_residuals[scene, p, heading] - gap / (math.pi / 12)
            expected["heading_residual"] += F.huber_loss(turn, torch.tensor(0.0))
            expected["size"] -= proposals.size_logits[scene, p].log_softmax(0)[label]
            expected["semantic"] -= proposals.class_logits[scene, p].log_softmax(0)[label]
            growth = (target[3:6] - SIZES[label]) / SIZES[label]
            expected["size_residual"] += F.huber_loss(
                proposals.size_residuals[scene, p, label], growth
            )
        assert 0 < count < judged
        expected = {name: value / count for name, value in expected.items()}
        expected["objectness"] *= count / judged
        for k in true:
            gaps = (proposals.centers[scene] - targets.boxes[scene, k, :3]).square().sum(1)
            expected["center"] += gaps.min() / len(true)
        votes = []
        for s, point in enumerate(proposals.seed_indices[scene].tolist()):
            if targets.in_box[scene, point]:
                move = proposals.votes[scene, s] - proposals.seeds[scene, s]
                votes.append(min((move - o).abs().sum() for o in targets.votes[scene, point]))
        assert votes
        expected["vote"] = sum(votes) / len(votes)
        for name, value in losses._asdict().items():
            torch.testing.assert_close(value[scene], expected[name], msg=lambda m, n=name: n + m)


def test_a_scene_without_objects_has_nothing_but_objectness():
    proposals, targets = random_proposals(), random_targets((0, 2))
    targets = targets._replace(in_box=torch.tensor([[False], [True]]).expand(2, 20))
    centers = proposals.centers.requires_grad_()
    losses = votenet_losses(proposals, targets, SIZES)
    for name, value in losses._asdict().items():
        assert (value[0] > 0) == (name == "objectness"), name
    losses.total().sum().backward()
    assert torch.isfinite(centers.grad).all()
    assert (centers.grad[0] == 0).all()


def test_padding_is_no_object():
    proposals, targets = random_proposals(), random_targets()
    # An anchor at the origin, where padded rows are, is not near an object.
    proposals.anchors[1, 0] = 0
    targets.boxes[1, 0, :3] = 5
    more = targets._replace(
        boxes=F.pad(targets.boxes, (0, 0, 0, 4)),
        classes=F.pad(targets.classes, (0, 4)),
        present=F.pad(targets.present, (0, 4)),
    )
    for one, other in zip(
        votenet_losses(proposals, targets, SIZES),
        votenet_losses(proposals, more, SIZES),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert votenet_losses(proposals, targets, SIZES).semantic[1] == 0
