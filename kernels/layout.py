r"""The padded layout of the GPU programs, and its inverse.

GroupNorm works on groups of d / G channels. Each group is padded with zeros to P channels, a power
of two (at least 16, the least a matrix instruction takes), so that one group is one block of
columns and the whole width is D = G P. Weights are stored as they are, (out, in), padded in both
directions: what stands in padded columns never reaches a true one. Group statistics divide by the
true count.

    rows     (..., d)     ->  (..., D)
    weights  (K, d, d)    ->  (K, D, D)
    vectors  (K, d)       ->  (K, D)

`pack` and `unpack` are exact inverses on the true channels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from .config import COUNTERS, MAX_PADDED, SCHEDULES

MIN_PADDED = 16


@dataclass(frozen=True)
class Layout:
    """Widths of a layer.

    Args:
        dim: d, channels.
        groups: G, a divisor of `dim`.

    Raises:
        ValueError: if `groups` does not divide `dim`.
    """

    dim: int
    groups: int

    def __post_init__(self) -> None:
        if self.groups < 1 or self.dim < 1 or self.dim % self.groups:
            raise ValueError(
                f"groups: got {self.groups} for dim {self.dim}, expected a divisor of it"
            )

    @functools.cached_property
    def group(self) -> int:
        """Channels of a group."""
        return self.dim // self.groups

    @functools.cached_property
    def padded(self) -> int:
        """P, channels of a padded group."""
        return max(MIN_PADDED, 1 << (self.group - 1).bit_length())

    @functools.cached_property
    def width(self) -> int:
        """D = G P."""
        return self.groups * self.padded

    def pack(self, x: Tensor) -> Tensor:
        """Rows or vectors (..., d) -> (..., D), contiguous."""
        out = x.new_zeros(*x.shape[:-1], self.groups, self.padded)
        out[..., : self.group] = x.unflatten(-1, (self.groups, self.group))
        return out.flatten(-2)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse: (..., D) -> (..., d), contiguous."""
        groups = x.unflatten(-1, (self.groups, self.padded))
        return groups[..., : self.group].reshape(*x.shape[:-1], self.dim)

    def pack_weight(self, weight: Tensor) -> Tensor:
        """(..., d_out, d_in) -> (..., D_out, D_in), contiguous."""
        return self.pack(self.pack(weight).transpose(-1, -2)).transpose(-1, -2).contiguous()

    def unpack_weight(self, weight: Tensor) -> Tensor:
        """The inverse: (..., D_out, D_in) -> (..., d_out, d_in), contiguous."""
        return self.unpack(self.unpack(weight).transpose(-1, -2)).transpose(-1, -2).contiguous()

    def check(self) -> None:
        """Checks that tiles may be as wide as a padded group.

        Raises:
            ValueError: if not, naming the schedules, none of which has wider ones.
        """
        if self.padded > MAX_PADDED:
            raise ValueError(
                f"dim {self.dim} in {self.groups} groups: got {self.group} channels per "
                f"group, the GPU programs (schedules {', '.join(SCHEDULES)}) have at most "
                f"{MAX_PADDED}; DEQFUSION_BACKEND=reference has no limit"
            )


@functools.lru_cache(maxsize=256)
def layout_of(dim: int, groups: int) -> Layout:
    """A layout, made and checked once."""
    layout = Layout(dim, groups)
    layout.check()
    return layout


def packed_sizes(
    layout: Layout, jobs: int, count: int, vectors: int, backward: bool = False
) -> tuple[int, int, int, int, int]:
    """Sizes in fp32 elements of the tensors of `kernels.packing`, in their order.

    They do not depend on the precision of products, which may be set anew between tracing and
    running: there is always room for weights in 16 bits.

    Args:
        jobs, count, vectors: J, K and V of a block.
        backward: whether there is this.
    """
    weights = jobs * count * layout.width**2
    return (
        weights, count * vectors * layout.width, weights // 2, COUNTERS, weights if backward else 0,
    )  # fmt: skip
