"""Fusions with one call, N features (..., d) to one (..., d): equilibrium fusion and its baselines.

concat          W [x_1; ...; x_N] + b
sum             x_1 + ... + x_N
gated           sum_i sigmoid(W_i [x_1; ...; x_N] + b_i) * x_i: gates that see every modality
                (Arevalo et al., Gated Multimodal Units, 2017)
tensor          sum_r w_r prod_i (A_ir [x_i; 1]) + b: the product of all modalities, of low rank
                (Z. Liu et al., Efficient Low-rank Multimodal Fusion, ACL 2018)
attention       mean over i of x_i + MultiheadAttention(x)_i: modalities as tokens
                (A. Vaswani et al., Attention Is All You Need, NeurIPS 2017)
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

FUSION_NAMES = ("deq", "concat", "sum", "gated", "tensor", "attention", "weight_tied:K")


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


class TensorFusion(_Fusion):
    """Low-rank tensor fusion: an elementwise product over modalities, summed over ranks.

    Args:
        dim, num_modalities: as in `ConcatFusion`.
        rank: number of products, R >= 1.

    Raises:
        ValueError: a dimension or rank below 1; in the call, features of another number or shape.

    Source: Z. Liu et al., "Efficient low-rank multimodal fusion with modality-specific factors",
    ACL 2018. Difference: (1) factors begin with bias 1: products of N factors of zero mean would
    begin, and stay, near 0.
    """

    def __init__(self, dim: int, num_modalities: int, rank: int = 4) -> None:
        super().__init__(dim, num_modalities)
        if rank < 1:
            raise ValueError(f"rank: got {rank!r}, expected a whole number >= 1")
        self.rank = rank
        factors = [nn.Linear(dim, rank * dim) for _ in range(num_modalities)]
        self.factors = nn.ModuleList(factors)
        self.weights = nn.Parameter(torch.full((rank,), rank**-0.5))
        self.bias = nn.Parameter(torch.zeros(dim))
        for factor in factors:
            nn.init.ones_(factor.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"

    def forward(self, features: Sequence[Tensor] | Tensor) -> Tensor:
        """Fuse N tensors (..., d) into one (..., d)."""
        parts = self._checked(features)
        product: Tensor | None = None
        for factor, part in zip(self.factors, parts, strict=True):
            image = factor(part).unflatten(-1, (self.rank, self.dim))
            product = image if product is None else product * image
        return torch.einsum("...rd,r->...d", product, self.weights) + self.bias


class AttentionFusion(_Fusion):
    """Self-attention over the modalities as tokens, added to them, and averaged.

    Args:
        dim, num_modalities: as in `ConcatFusion`.
        num_heads: of `torch.nn.MultiheadAttention`; divides `dim`.

    Raises:
        ValueError: a dimension below 1, or `dim` that `num_heads` does not divide; in the call,
            features of another number or shape.

    Each modality has a learned embedding, since attention does not tell tokens apart by place.
    """

    def __init__(self, dim: int, num_modalities: int, num_heads: int = 4) -> None:
        super().__init__(dim, num_modalities)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads!r}, expected a divisor of dim = {dim}")
        self.embedding = nn.Parameter(torch.randn(num_modalities, dim) * 0.02)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, features: Sequence[Tensor] | Tensor) -> Tensor:
        """Fuse N tensors (..., d) into one (..., d)."""
        tokens = torch.stack(self._checked(features), dim=-2)
        leading = tokens.shape[:-2]
        tokens = tokens.reshape(-1, self.num_modalities, self.dim)
        keys = tokens + self.embedding
        mixed, _ = self.attention(keys, keys, tokens, need_weights=False)
        return (tokens + mixed).mean(dim=-2).reshape(*leading, self.dim)


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
        name: "deq", "concat", "sum", "gated", "tensor", "attention", or "weight_tied:K" with a
            whole number K >= 1.
        dim: width d of features and result.
        num_modalities: N.
        **options: those of `DEQFusion` for "deq" and, save `adjoint`, "weight_tied:K"; `rank` for
            "tensor" and `num_heads` for "attention".

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
    if name in ("tensor", "attention"):
        known = "rank" if name == "tensor" else "num_heads"
        if options.keys() - {known}:
            raise TypeError(f"fusion {name!r}: got options {sorted(options)}, expected {known!r}")
        kind = TensorFusion if name == "tensor" else AttentionFusion
        return kind(dim, num_modalities, **options)
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
