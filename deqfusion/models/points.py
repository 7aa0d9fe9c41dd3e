"""Layers on point clouds: furthest point sampling, balls, set abstraction, feature propagation.

Set abstraction gathers the features f of points around chosen centres c and takes, per channel, the
largest that a small network makes of them:

    f'(c) = max over p with |p - c| <= r of MLP([(p - c) / r; f(p)])

Feature propagation carries features of few points to many: the three nearest, weighted by inverse
squared distance, joined to what the many already have.

Source: C. Qi et al., PointNet++, 2017, in the shapes of VoteNet (2019). Differences: 1. plain
PyTorch, no kernels of its own; 2. tensors end in channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

# Distances are worked out for so many pairs at a time: 64 MiB of float32.
_PAIRS = 2**24


@torch.library.custom_op("deqfusion_models::furthest_points", mutates_args=())
def furthest_points(points: Tensor, count: int) -> Tensor:
    """Choose points, each the furthest from those chosen before; the first is point 0.

    An operator, so that compilers see one call instead of `count` steps; not of the namespace
    `deqfusion`, which is the solves'.

    Args:
        points: (B, N, 3).
        count: how many, 1 or more; once all points are chosen, the first is repeated.

    Returns:
        int64 (B, count), indices of points.
    """
    batch = points.shape[0]
    columns = points.detach().mT.contiguous()  # (B, 3, N): N is long, and read in every step
    nearest = columns.new_full((batch, points.shape[1]), float("inf"))
    chosen = points.new_zeros((batch, count), dtype=torch.int64)
    for step in range(1, count):
        last = columns.gather(2, chosen[:, None, step - 1 : step].expand(-1, 3, -1))
        torch.minimum(nearest, (columns - last).square_().sum(dim=1), out=nearest)
        chosen[:, step] = nearest.argmax(dim=1)
    return chosen


@furthest_points.register_fake
def _(points: Tensor, count: int) -> Tensor:
    return points.new_empty((points.shape[0], count), dtype=torch.int64)


@torch.no_grad()
def points_in_ball(points: Tensor, centers: Tensor, radius: float, count: int) -> Tensor:
    """Choose the first `count` points within a radius of each centre.

    The j-th of them is where the running number of points inside reaches j. Where there are fewer
    than `count`, the first is repeated; where there is none, it is point 0.

    Args:
        points: (B, N, 3).
        centers: (B, Q, 3).
        radius: metres.
        count: points per centre.

    Returns:
        int64 (B, Q, count), indices of points.
    """
    wanted = torch.arange(1, count + 1, device=points.device, dtype=torch.int32)
    size = max(1, _PAIRS // (points.shape[0] * points.shape[1]))
    chosen = []
    for some in centers.split(size, dim=1):
        # Not by matrix products: their rounding would move points of no distance out of the ball.
        mode = "donot_use_mm_for_euclid_dist"
        inside = torch.cdist(some, points, compute_mode=mode) <= radius
        running = inside.cumsum(dim=-1, dtype=torch.int32)
        places = torch.searchsorted(running, wanted.expand(*running.shape[:-1], -1).contiguous())
        chosen.append(torch.where(places < points.shape[1], places, places[..., :1]))
    return torch.cat(chosen, dim=1) % points.shape[1]


def take(values: Tensor, indices: Tensor) -> Tensor:
    """Take rows `indices` (B, ...) of values (B, N, C): (B, ..., C)."""
    flat = indices.flatten(1)
    rows = values.gather(1, flat[..., None].expand(-1, -1, values.shape[2]))
    return rows.view(*indices.shape, values.shape[2])


class PointwiseNet(nn.Module):
    """Linear layers, each with batch normalisation and ReLU, on rows (..., widths[0]).

    Args:
        widths: of the input and of each layer.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, rows: Tensor) -> Tensor:
        """Map (..., widths[0]) to (..., widths[-1])."""
        return self.layers(rows.flatten(0, -2)).unflatten(0, rows.shape[:-1])


class SetAbstraction(nn.Module):
    """Features of balls around points that are furthest from each other.

    Args:
        count: centres Q.
        radius: of the balls, metres.
        samples: points of a ball that are looked at.
        widths: of the features (0 for none), and of each layer.
    """

    def __init__(self, count: int, radius: float, samples: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.count, self.radius, self.samples = count, radius, samples
        self.net = PointwiseNet([widths[0] + 3, *widths[1:]])

    def forward(self, points: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Abstract a set.

        Args:
            points: (B, N, 3).
            features: (B, N, widths[0]).

        Returns:
            Centres (B, Q, 3), their features (B, Q, widths[-1]), their indices int64 (B, Q).
        """
        chosen = furthest_points(points, self.count)
        centers = take(points, chosen)
        members = points_in_ball(points, centers, self.radius, self.samples)  # (B, Q, samples)
        offsets = (take(points, members) - centers[:, :, None]) / self.radius
        rows = self.net(torch.cat([offsets, take(features, members)], dim=-1))
        return centers, rows.amax(dim=2), chosen


class FeaturePropagation(nn.Module):
    """Features of few points, carried to many.

    Args:
        widths: of the few's and the many's features together, and of each layer.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.net = PointwiseNet(widths)

    def forward(
        self, points: Tensor, features: Tensor, few: Tensor, few_features: Tensor
    ) -> Tensor:
        """Carry features.

        Args:
            points: (B, N, 3).
            features: (B, N, C).
            few: (B, M, 3) with M >= 3.
            few_features: (B, M, C').

        Returns:
            (B, N, widths[-1]).
        """
        near = torch.cdist(points, few).topk(3, largest=False)
        weights = 1 / (near.values.square() + 1e-8)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        carried = (take(few_features, near.indices) * weights[..., None]).sum(dim=2)
        return self.net(torch.cat([carried, features], dim=-1))


class PointBackbone(nn.Module):
    """Four set abstractions and two feature propagations: points to seeds with features.

    Args:
        num_features: of each point, beside its place.
        num_seeds: S, a multiple of 4, at least 12: 2 S, S, S/2 and S/4 centres.
        width: w; seeds have 2 w features.
    """

    def __init__(self, num_features: int, num_seeds: int = 1024, width: int = 128) -> None:
        super().__init__()
        if num_seeds < 12 or num_seeds % 4:
            raise ValueError(f"num_seeds: got {num_seeds}, expected a multiple of 4, at least 12")
        narrow, wide = [width // 2, width // 2, width], [width, width, 2 * width]
        self.abstractions = nn.ModuleList(
            [
                SetAbstraction(2 * num_seeds, 0.2, 64, [num_features, *narrow]),
                SetAbstraction(num_seeds, 0.4, 32, [width, *wide]),
                SetAbstraction(num_seeds // 2, 0.8, 16, [2 * width, *wide]),
                SetAbstraction(num_seeds // 4, 1.2, 16, [2 * width, *wide]),
            ]
        )
        self.propagations = nn.ModuleList(
            FeaturePropagation([4 * width, 2 * width, 2 * width]) for _ in range(2)
        )

    def forward(self, points: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find seeds.

        Args:
            points: (B, N, 3).
            features: (B, N, num_features).

        Returns:
            Seeds (B, S, 3), their features (B, S, 2 w), their indices among points int64 (B, S).
        """
        levels, chosen = [], []
        for layer in self.abstractions:
            points, features, indices = layer(points, features)
            levels.append((points, features))
            chosen.append(indices)
        carried = self.propagations[0](*levels[2], *levels[3])
        carried = self.propagations[1](*levels[1], levels[2][0], carried)
        return levels[1][0], carried, chosen[0].gather(1, chosen[1])
