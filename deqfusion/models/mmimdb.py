"""Maxout encoders, a fusion and a linear head: the host network of MM-IMDB.

    x_i (rows, width_i) -> BN -> maxout -> BN, dropout -> maxout -> BN, dropout -> (rows, dim)
    --fusion-->  (rows, dim) -> logits, one per genre

Source: the late-fusion baseline of MultiBench (Liang et al., NeurIPS 2021), which the authors of
DEQ fusion kept: hidden layers of 512 for text and 1024 for images, 512 features, maxout of 2 maps.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..fusions import fuse
from .classifier import ClassifierOutput

_PIECES = 2
# Of the batch normalisation of the inputs.
_INPUT_EPS = 1e-4


class Maxout(nn.Module):
    """Elementwise maximum of several linear maps (Goodfellow et al., 2013).

    Args:
        width: features of the input.
        dim: features of the result.
        pieces: number of maps.
    """

    def __init__(self, width: int, dim: int, pieces: int = _PIECES) -> None:
        super().__init__()
        self.dim = dim
        self.pieces = pieces
        self.maps = nn.Linear(width, dim * pieces)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., dim)."""
        return self.maps(x).unflatten(-1, (self.dim, self.pieces)).amax(dim=-1)


class MaxoutClassifier(nn.Module):
    """One maxout encoder per modality, a fusion, a linear head over labels.

    Args:
        input_widths: features of each modality.
        num_labels: labels, any number of which may apply.
        fusion: maps N tensors (rows, dim) to one, as `build_fusion` makes them.
        dim: width of the encoded features.
        hidden: width of each encoder's first layer.
        dropout: after each maxout layer.

    Raises:
        ValueError: numbers of modalities that differ.
    """

    def __init__(
        self,
        input_widths: Sequence[int],
        num_labels: int,
        fusion: nn.Module,
        *,
        dim: int = 512,
        hidden: Sequence[int] = (512, 1024),
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if len(hidden) != len(input_widths):
            raise ValueError(
                f"hidden: got {len(hidden)} widths, "
                f"expected one for each of {len(input_widths)} modalities"
            )
        pairs = zip(input_widths, hidden, strict=True)
        self.encoders = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(width, eps=_INPUT_EPS),
                Maxout(width, inner),
                nn.BatchNorm1d(inner),
                nn.Dropout(dropout),
                Maxout(inner, dim),
                nn.BatchNorm1d(dim),
                nn.Dropout(dropout),
            )
            for width, inner in pairs
        )
        self.fusion = fusion
        self.head = nn.Linear(dim, num_labels)

    def forward(self, inputs: Sequence[Tensor]) -> ClassifierOutput:
        """Classify rows, one (rows, width_i) per modality; in training more than one row.

        The sigmoid of a logit is its label's probability.
        """
        pairs = zip(self.encoders, inputs, strict=True)
        features = tuple(encoder(view) for encoder, view in pairs)
        fused, equilibrium = fuse(self.fusion, features)
        return ClassifierOutput(self.head(fused), features, equilibrium)
