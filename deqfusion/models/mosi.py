"""Encoders of utterances, a fusion and a linear head: sentiment as a number.

    x_i (rows, width_i) -> standardised -> ReLU(LayerNorm(Linear)), dropout -> (rows, dim)
    --fusion-->  (rows, dim), dropout -> one score per row

Text may instead come as tokens through a transformer: `text.TransformerEncoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..fusions import fuse
from ..solution import Equilibrium
from .classifier import projection
from .scaling import InputScaling

#: Kind of `InputScaling`.
FEATURE_SCALING = "standard"


class FeatureEncoder(nn.Module):
    """Standardises features, by what `scaling.fit` has seen, and projects them.

    Args:
        width: features of the input.
        dim: features of the result.
        dropout: of the result.
    """

    def __init__(self, width: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.scaling = InputScaling([width], FEATURE_SCALING)
        self.project = projection(width, dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (rows, width) to (rows, dim)."""
        (standard,) = self.scaling([x])
        return self.project(standard)


class SentimentOutput(NamedTuple):
    """Result of a `SentimentRegressor`.

    Attributes:
        scores: (rows,).
        features: the encoded modalities, each (rows, dim).
        equilibrium: the fusion's solution, where the fusion has one.
    """

    scores: Tensor
    features: tuple[Tensor, ...]
    equilibrium: Equilibrium | None


class SentimentRegressor(nn.Module):
    """One encoder per modality, a fusion, a linear head with one output.

    Args:
        encoders: one per modality, each to (rows, dim).
        fusion: maps N tensors (rows, dim) to one, as `build_fusion` makes them.
        dim: width of the encoded features.
        dropout: of the fused feature.
    """

    def __init__(
        self, encoders: Sequence[nn.Module], fusion: nn.Module, dim: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.fusion = fusion
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, 1))

    def forward(self, inputs: Sequence[Any]) -> SentimentOutput:
        """Score rows, with one input per encoder, of the kind that it takes."""
        pairs = zip(self.encoders, inputs, strict=True)
        features = tuple(encoder(view) for encoder, view in pairs)
        fused, equilibrium = fuse(self.fusion, features)
        return SentimentOutput(self.head(fused).squeeze(-1), features, equilibrium)
