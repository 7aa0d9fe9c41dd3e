"""Fusions with one call, N features (..., d) to one (..., d): equilibrium fusion and its baselines.

concat          W [x_1; ...; x_N] + b
sum             x_1 + ... + x_N
gated           sum_i sigmoid(W_i [x_1; ...; x_N] + b_i) * x_i: gates that see every modality
                (Arevalo et al., Gated Multimodal Units, 2017)
weight_tied:K   K steps of the equilibrium cell, with gradients through all of them
deq             the equilibrium of that cell
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adjoint import Unroll
from .module import DEQFusion
from .solution import Equilibrium

FUSION_NAMES = ("deq", "concat", "sum", "gated", "weight_tied:K")


class _Fusion(nn.Module):
    """Dimensions and the check of features that the simple fusions share."""

    def __init__(self, dim: int, num_modalities: int) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_modalities", num_modalities)):
            if value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a whole number >= 1")
        self.dim = dim
        self.num_modalities = num_modalities

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_modalities={self.num_modalities}"

    def _checked(self, features: Sequence[Tensor] | Tensor) -> list[Tensor]:
        parts = list(features)
        if len(parts) != self.num_modalities:
            raise ValueError(f"features: got {len(parts)} tensors, expected {self.num_modalities}")
        for index, part in enumerate(parts):
            if part.shape != parts[0].shape or part.shape[-1:] != (self.dim,):
                raise ValueError(
                    f"features[{index}]: got shape {tuple(part.shape)}, expected the shape of "
                    f"features[0], {tuple(parts[0].shape)}, with last dimension {self.dim}"
                )
        return parts


class ConcatFusion(_Fusion):
    """Linear map of the concatenated features.

    Args:
        dim: width d of each feature and of the result.
        num_modalities: N.

    Raises:
        ValueError: a dimension below 1; in the call, features of another number or shape.
    """

    def __init__(self, dim: int, num_modalities: int) -> None:
        super().__init__(dim, num_modalities)
        self.projection = nn.Linear(dim * num_modalities, dim)

    def forward(self, features: Sequence[Tensor] | Tensor) -> Tensor:
        """Fuse N tensors (..., d) into one (..., d)."""
        return self.projection(torch.cat(self._checked(features), dim=-1))


class SumFusion(_Fusion):
    """Sum of the features, without parameters; arguments and errors as in `ConcatFusion`."""

    def forward(self, features: Sequence[Tensor] | Tensor) -> Tensor:
        """Fuse N tensors (..., d) into one (..., d)."""
        return torch.stack(self._checked(features)).sum(dim=0)


class GatedFusion(_Fusion):
    """Sum of the features, each through a sigmoid gate; arguments and errors as in `ConcatFusion`.

    Gates are elementwise and computed from all features together.
    """

    def __init__(self, dim: int, num_modalities: int) -> None:
        super().__init__(dim, num_modalities)
        self.gates = nn.Linear(dim * num_modalities, dim * num_modalities)

    def forward(self, features: Sequence[Tensor] | Tensor) -> Tensor:
        """Fuse N tensors (..., d) into one (..., d)."""
        parts = self._checked(features)
        gates = torch.sigmoid(self.gates(torch.cat(parts, dim=-1)))
        gated = gates.unflatten(-1, (self.num_modalities, self.dim)) * torch.stack(parts, dim=-2)
        return gated.sum(dim=-2)


def fuse(
    fusion: nn.Module, features: Sequence[Tensor], *, trace: bool = False
) -> tuple[Tensor, Equilibrium | None]:
    """Fuse features by any fusion, and keep the solution where there is one.

    Args:
        fusion: made by `build_fusion`.
        features: N tensors (..., d).
        trace: record the residual of every step of a solve.

    Returns:
        The fused features (..., d), and the equilibrium of a `DEQFusion` or None.
    """
    if isinstance(fusion, DEQFusion):
        equilibrium = fusion.equilibrium(features, trace=trace)
        return equilibrium.fused, equilibrium
    return fusion(features), None


def build_fusion(name: str, dim: int, num_modalities: int, **options: Any) -> nn.Module:
    """Build a fusion by name.

    Args:
        name: "deq", "concat", "sum", "gated" or "weight_tied:K" with a whole number K >= 1.
        dim: width d of features and result.
        num_modalities: N.
        **options: those of `DEQFusion`; only for "deq" and, save `adjoint`, "weight_tied:K".

    Returns:
        A module that maps a sequence of N tensors (..., d), or one (N, ..., d), to (..., d).

    Raises:
        ValueError: an unknown name, a K below 1, bad dimensions.
        TypeError: options that the fusion does not have.
    """
    simple = {"concat": ConcatFusion, "sum": SumFusion, "gated": GatedFusion}.get(name)
    if simple is not None:
        if options:
            raise TypeError(f"fusion {name!r}: got options {sorted(options)}, expected none")
        return simple(dim, num_modalities)
    if name == "deq":
        return DEQFusion(dim, num_modalities, **options)
    if name.startswith("weight_tied:"):
        if "adjoint" in options:
            raise TypeError(f"fusion {name!r}: got option 'adjoint', which its name already sets")
        return DEQFusion(dim, num_modalities, adjoint=Unroll(_steps(name)), **options)
    raise ValueError(f"fusion: got {name!r}, expected one of {', '.join(FUSION_NAMES)}")


def _steps(name: str) -> int:
    steps = name.partition(":")[2]
    if not (steps.isascii() and steps.isdigit()) or int(steps) < 1:
        raise ValueError(f"fusion: got {name!r}, expected weight_tied:K with a whole number K >= 1")
    return int(steps)
