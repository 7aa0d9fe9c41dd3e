"""A detector of boxes in point clouds with an image: seeds, fusion, votes, proposals.

    points (B, N, 3) --set abstraction--> seeds s (B, S, 3) with features g
    image (B, 3, H, W) --encoder--> map, read where each seed is seen: h
    fused f = fusion(LayerNorm(W g + b), LayerNorm(W' h + b'))                 (B, S, dim)
    votes v = s + dv with features (f + df) / |f + df|, (dv, df) = MLP(f)
    proposals: set abstraction of votes around P of them, then an MLP with, per proposal,
        objectness, centre c = v + dc, scores and residuals of headings and sizes, classes

A heading is one of H bins of width 2 pi / H around i 2 pi / H, and a residual in units of pi / H; a
size is one of the classes' median sizes, times 1 + residual.

Sources: C. Qi et al., VoteNet, 2019. C. Qi et al., ImVoteNet, 2020, fuses image features at the
seeds; J. Ni et al., Deep Equilibrium Multimodal Fusion, 2023, fuses them by an equilibrium.
Differences from VoteNet: 1. fused features in place of the point features; 2. LayerNorm before the
fusion, which needs features of unit scale. From ImVoteNet: 3. features of the image itself, read at
the pixels of the seeds, in place of votes of a 2-D detector; 4. one tower, not three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..fusions import fuse
from ..solution import Equilibrium
from .images import ResNetStem, SmallCNN, normalised, read_map
from .points import PointBackbone, PointwiseNet, furthest_points, points_in_ball, take

_CLUSTER_RADIUS, _CLUSTER_SAMPLES, _CLUSTER_WIDTH = 0.3, 16, 128


class Proposals(NamedTuple):
    """What a detector says of a batch.

    Attributes:
        seeds: (B, S, 3); seed_indices: int64 (B, S), among the points.
        votes: (B, S, 3).
        anchors: (B, P, 3), the votes that proposals stand on.
        centers: (B, P, 3).
        objectness: logits (B, P, 2), nothing and object.
        heading_logits, heading_residuals: (B, P, H), residuals in units of pi / H.
        size_logits: (B, P, K); size_residuals: (B, P, K, 3), in units of the class's size.
        class_logits: (B, P, K).
        features: what was fused: two tensors (B, S, dim), of points and image.
        equilibrium: the fusion's solution, where it has one.
    """

    seeds: Tensor
    seed_indices: Tensor
    votes: Tensor
    anchors: Tensor
    centers: Tensor
    objectness: Tensor
    heading_logits: Tensor
    heading_residuals: Tensor
    size_logits: Tensor
    size_residuals: Tensor
    class_logits: Tensor
    features: tuple[Tensor, Tensor]
    equilibrium: Equilibrium | None


class MultimodalVoteNet(nn.Module):
    """VoteNet with image features fused at the seeds.

    Args:
        fusion: of two modalities, N tensors (..., dim) to one.
        dim: its width.
        sizes: (l, w, h) of each of K classes, metres.
        image_encoder: maps normalised images to features.
        num_features: of each point, beside its place.
        num_seeds: S, a multiple of 4.
        num_proposals: P, at most S.
        num_headings: H.
        point_width: w of `PointBackbone`.
        dropout: on what goes into the fusion.

    Raises:
        ValueError: numbers that do not fit.
    """

    sizes: Tensor

    def __init__(
        self,
        fusion: nn.Module,
        dim: int,
        sizes: Sequence[Sequence[float]],
        image_encoder: SmallCNN | ResNetStem,
        *,
        num_features: int = 1,
        num_seeds: int = 1024,
        num_proposals: int = 256,
        num_headings: int = 12,
        point_width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= num_proposals <= num_seeds:
            raise ValueError(f"num_proposals: got {num_proposals}, expected 1 to {num_seeds}")
        self.num_proposals, self.num_headings = num_proposals, num_headings
        self.register_buffer("sizes", torch.tensor(sizes))
        self.backbone = PointBackbone(num_features, num_seeds, point_width)
        self.image_encoder = image_encoder
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim), nn.Dropout(dropout))
            for width in (2 * point_width, image_encoder.width)
        )
        self.fusion = fusion
        self.voting = nn.Sequential(PointwiseNet([dim, dim, dim]), nn.Linear(dim, 3 + dim))
        hidden, classes = _CLUSTER_WIDTH, len(sizes)
        self.cluster = PointwiseNet([dim + 3, hidden, hidden, hidden])
        # Objectness, centre, headings with residuals, sizes with residuals, classes.
        self._parts = [2, 3, num_headings, num_headings, classes, 3 * classes, classes]
        self.head = nn.Sequential(
            PointwiseNet([hidden, hidden, hidden]), nn.Linear(hidden, sum(self._parts))
        )

    def forward(self, points: Tensor, features: Tensor, pixels: Tensor, image: Tensor) -> Proposals:
        """Propose boxes.

        Args:
            points: (B, N, 3), metres, z up.
            features: (B, N, num_features).
            pixels: (B, N, 2), where the points are in the image, -1..1.
            image: uint8 (B, 3, height, width).

        Returns:
            Proposals.
        """
        seeds, seed_features, indices = self.backbone(points, features)
        seen = read_map(self.image_encoder(normalised(image)), take(pixels, indices))
        views = (self.projections[0](seed_features), self.projections[1](seen))
        fused, equilibrium = fuse(self.fusion, views)

        moves, changes = self.voting(fused).split([3, fused.shape[-1]], dim=-1)
        votes = seeds + moves
        vote_features = nn.functional.normalize(fused + changes, dim=-1)

        anchors = take(votes, furthest_points(votes, self.num_proposals))
        members = points_in_ball(votes, anchors, _CLUSTER_RADIUS, _CLUSTER_SAMPLES)
        offsets = (take(votes, members) - anchors[:, :, None]) / _CLUSTER_RADIUS
        rows = torch.cat([offsets, take(vote_features, members)], dim=-1)
        parts = self.head(self.cluster(rows).amax(dim=2)).split(self._parts, dim=-1)
        return Proposals(
            seeds=seeds,
            seed_indices=indices,
            votes=votes,
            anchors=anchors,
            centers=anchors + parts[1],
            objectness=parts[0],
            heading_logits=parts[2],
            heading_residuals=parts[3],
            size_logits=parts[4],
            size_residuals=parts[5].unflatten(-1, (-1, 3)),
            class_logits=parts[6],
            features=views,
            equilibrium=equilibrium,
        )


def heading_bin(headings: Tensor, num_headings: int) -> tuple[Tensor, Tensor]:
    """Return the nearest bin of each heading, int64, and the residual in units of pi / H, -1..1."""
    width = 2 * math.pi / num_headings
    bins = (headings / width).round()
    residuals = (headings - bins * width) / (width / 2)
    return bins.long() % num_headings, residuals


def decode_boxes(proposals: Proposals, sizes: Tensor) -> Tensor:
    """Return the boxes that are meant: of the likeliest heading and size.

    Args:
        proposals: of a batch.
        sizes: (K, 3), the classes' sizes.

    Returns:
        (B, P, 7): centre, full lengths, heading in -pi..pi. A length may come out below 0.
    """
    num_headings = proposals.heading_logits.shape[-1]
    bins = proposals.heading_logits.argmax(dim=-1, keepdim=True)
    residuals = proposals.heading_residuals.gather(-1, bins)
    headings = (2 * bins + residuals) * (math.pi / num_headings)
    headings = torch.remainder(headings + math.pi, 2 * math.pi) - math.pi
    labels = proposals.size_logits.argmax(dim=-1)
    growth = _chosen_rows(proposals.size_residuals, labels)
    return torch.cat([proposals.centers, sizes[labels] * (1 + growth), headings], dim=-1)


def _chosen_rows(values: Tensor, labels: Tensor) -> Tensor:
    """Rows `labels` (B, P) of values (B, P, K, 3): (B, P, 3)."""
    return values.gather(2, labels[..., None, None].expand(-1, -1, 1, 3)).squeeze(2)
