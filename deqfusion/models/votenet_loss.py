"""VoteNet's loss: votes, objectness, centres, headings, sizes and classes.

Per scene, with a proposal an object's where its anchor is nearer than 0.3 m to the centre of the
nearest object, nothing's beyond 0.6 m, and unjudged between,

    L = 10 (L_vote + 0.5 L_objectness + L_box + 0.1 L_class)
    L_box = L_centre + 0.1 L_heading + L_heading_residual + 0.1 L_size + L_size_residual

    L_vote     mean over seeds in a box of min_j |v - (s + o_j)|_1 over their three offsets o_j
    L_centre   mean over objects' proposals of |c - c_k|^2, k their object, plus
               mean over objects of min_p |c_p - c_k|^2
    residuals  Huber's loss, quadratic below 1
    others     cross entropies; objectness with weights 0.2 for nothing and 0.8 for an object

Source: C. Qi et al., VoteNet, 2019, and its `loss_helper.py`. Differences: 1. each scene is
averaged on its own, then scenes, so that a scene's part does not depend on those beside it; 2. rows
that pad the list of objects have no centre; there it is the origin; 3. a proposal's centre is held
against its own object's, there against whichever is nearest, so that chairs which stand under a
table draw its centre to theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .points import take
from .votenet import Proposals, _chosen_rows, heading_bin

_NEAR, _FAR = 0.3, 0.6
_OBJECTNESS_WEIGHTS = (0.2, 0.8)


class SceneTargets(NamedTuple):
    """What is in the scenes of a batch.

    Attributes:
        votes: (B, N, 3, 3), three offsets from each point to centres of boxes that it is in.
        in_box: bool (B, N).
        boxes: (B, M, 7), padded; M >= 1.
        classes: int64 (B, M).
        present: bool (B, M), false for padding.
    """

    votes: Tensor
    in_box: Tensor
    boxes: Tensor
    classes: Tensor
    present: Tensor


class VoteNetLosses(NamedTuple):
    """The terms of the loss, unweighted, of each scene: (B,)."""

    vote: Tensor
    objectness: Tensor
    center: Tensor
    heading: Tensor
    heading_residual: Tensor
    size: Tensor
    size_residual: Tensor
    semantic: Tensor

    def total(self) -> Tensor:
        """Return L of each scene: (B,)."""
        box = self.center + 0.1 * self.heading + self.heading_residual
        box = box + 0.1 * self.size + self.size_residual
        return 10 * (self.vote + 0.5 * self.objectness + box + 0.1 * self.semantic)


def votenet_losses(proposals: Proposals, targets: SceneTargets, sizes: Tensor) -> VoteNetLosses:
    """Compute the terms of VoteNet's loss.

    Args:
        proposals: of a batch.
        targets: of the same batch.
        sizes: (K, 3), the classes' sizes.

    Returns:
        VoteNetLosses. A scene without objects has a loss of objectness only.
    """
    num_headings = proposals.heading_logits.shape[-1]
    true_centers = targets.boxes[..., :3]
    absent = ~targets.present

    nearest = _squared(proposals.anchors, true_centers).masked_fill(absent[:, None], torch.inf)
    squared, match = nearest.min(dim=2)  # (B, P)
    distance = squared.sqrt()
    is_object = distance < _NEAR
    judged = is_object | (distance > _FAR)
    weights = proposals.objectness.new_tensor(_OBJECTNESS_WEIGHTS)
    objectness = _cross_entropy(proposals.objectness, is_object.long()) * weights[is_object.long()]

    boxes, labels = take(targets.boxes, match), targets.classes.gather(1, match)
    missed = (proposals.centers - boxes[..., :3]).square().sum(dim=-1)
    reached = _squared(proposals.centers, true_centers).amin(dim=1)
    center = _mean(missed, is_object) + _mean(reached, targets.present)

    bins, turns = heading_bin(boxes[..., 6], num_headings)
    turn = proposals.heading_residuals.gather(-1, bins[..., None]).squeeze(-1)
    growth = boxes[..., 3:6] / sizes[labels] - 1
    grown = _chosen_rows(proposals.size_residuals, labels)
    return VoteNetLosses(
        vote=_vote_loss(proposals, targets),
        objectness=_mean(objectness, judged),
        center=center,
        heading=_mean(_cross_entropy(proposals.heading_logits, bins), is_object),
        heading_residual=_mean(F.huber_loss(turn, turns, reduction="none"), is_object),
        size=_mean(_cross_entropy(proposals.size_logits, labels), is_object),
        size_residual=_mean(F.huber_loss(grown, growth, reduction="none").mean(dim=-1), is_object),
        semantic=_mean(_cross_entropy(proposals.class_logits, labels), is_object),
    )


def _vote_loss(proposals: Proposals, targets: SceneTargets) -> Tensor:
    indices = proposals.seed_indices
    offsets = take(targets.votes.flatten(2), indices).unflatten(-1, (3, 3))
    moves = (proposals.votes - proposals.seeds)[:, :, None]
    missed = (moves - offsets).abs().sum(dim=-1).amin(dim=-1)
    return _mean(missed, targets.in_box.gather(1, indices))


def _squared(first: Tensor, second: Tensor) -> Tensor:
    """Squared distances of (B, P, 3) and (B, M, 3): (B, P, M)."""
    return (first[:, :, None] - second[:, None]).square().sum(dim=-1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of values (B, P) over where weights are true, per scene; 0 where nowhere: (B,)."""
    chosen = torch.where(weights, values, 0.0)
    return chosen.sum(dim=1) / weights.sum(dim=1).clamp(min=1)
