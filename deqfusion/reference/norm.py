"""GroupNorm inside the solves, on rows (..., d) seen as (..., G, d / G).

The variance is that of the centred values, never E[x^2] - E[x]^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deqfusion.reference.cell import EPS, bound_of, within_range
from deqfusion.reference.product import take_rows


def injected_within_range(
    x: Tensor, groups: int, relu: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`within_range` of what a solve adds to a product (..., d) at every step.

    The product, which has no factor, is lost beside a group that has one, as it is beside the x
    that was given.

    Returns:
        x, and the factors (..., G, 1); None: all are 1, which is known on a CPU only.
    """
    if x.numel() == 0:
        return x, None
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = torch.aminmax(x)
        # A NaN, which hides how large the others are, compares as false.
        if (most if relu else torch.maximum(most, -least)) <= bound_of(x.dtype):
            return x, None
    return within_range(x, groups, relu)


def centre(x: Tensor, groups: int) -> Tensor:
    """x minus the group means of the last dimension."""
    grouped = x.view(*x.shape[:-1], groups, x.shape[-1] // groups)
    return (grouped - grouped.mean(-1, keepdim=True)).flatten(-2)


def centre_(x: Tensor, groups: int) -> Tensor:
    """`centre` in place."""
    grouped = x.view(*x.shape[:-1], groups, x.shape[-1] // groups)
    grouped.sub_(grouped.mean(-1, keepdim=True))
    return x


def inverse_deviation(centred: Tensor, groups: int) -> Tensor:
    """1 / sqrt(variance + EPS) of each group of centred rows (..., d): (..., G, 1)."""
    grouped = centred.view(*centred.shape[:-1], groups, centred.shape[-1] // groups)
    norm = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True)
    return norm.square_().div_(grouped.shape[-1]).add_(EPS).rsqrt_()


def multiply_groups(x: Tensor, factor: Tensor) -> Tensor:
    """x (..., d) times a factor per group (..., G, 1)."""
    return (x.unflatten(-1, (factor.shape[-2], -1)) * factor).flatten(-2)


def multiply_groups_(x: Tensor, factor: Tensor) -> Tensor:
    """`multiply_groups` in place."""
    groups = factor.shape[-2]
    x.view(*x.shape[:-1], groups, x.shape[-1] // groups).mul_(factor)
    return x


class NormVJP:
    """VJP of x -> (x - mean) / deviation at a point, group by group.

    (I - 1 1^T / n - xhat xhat^T / n) gradient / deviation, by the layer-norm backward kernel, which
    reads a row twice and writes it once.

    Args:
        centred: (..., d) contiguous, x minus its group means.
        rstd: (..., G, 1), inverse deviations.
        factor: (..., G, 1), by which x was taken `within_range`, or None.
    """

    def __init__(self, centred: Tensor, rstd: Tensor, factor: Tensor | None = None) -> None:
        self.centred, self.rstd, self.factor = centred, rstd, factor
        self.size = centred.shape[-1] // rstd.shape[-2]
        self.mean = rstd.new_zeros(rstd.numel(), 1)

    def __call__(self, gradient: Tensor) -> Tensor:
        if gradient.numel() == 0:
            return gradient
        out, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient.reshape(-1, self.size), self.centred.reshape(-1, self.size), (self.size,),
            self.mean, self.rstd.reshape(-1, 1), None, None, [True, False, False],
        )  # fmt: skip
        out = out.reshape(gradient.shape)
        return out if self.factor is None else multiply_groups_(out, self.factor)

    def normalized(self) -> Tensor:
        """xhat (..., d)."""
        return multiply_groups(self.centred, self.rstd)

    def take(self, index: Tensor) -> NormVJP:
        """The same for the rows index (K, S) of (K, R, d)."""

        def rows(t: Tensor) -> Tensor:
            return take_rows(t.squeeze(-1), index).unsqueeze(-1)

        factor = None if self.factor is None else rows(self.factor)
        return NormVJP(take_rows(self.centred, index), rows(self.rstd), factor)
