"""Scaling of input features, fitted on training rows and kept with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

SCALINGS = ("minmax", "centered", "standard")


class InputScaling(nn.Module):
    """(x - shift) / span of every feature, in float64; a constant feature becomes 0.

    Until `fit`, it only converts.

    Args:
        widths: features of each modality.
        kind: over the rows fitted on, "minmax" to 0..1, "centered" the same less its mean, or
            "standard" to mean 0 and deviation 1.

    Raises:
        ValueError: another kind.
    """

    def __init__(self, widths: Sequence[int], kind: str = "minmax") -> None:
        super().__init__()
        if kind not in SCALINGS:
            raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(SCALINGS)}")
        self.widths, self.kind = list(widths), kind
        for index, width in enumerate(widths):
            self.register_buffer(f"shift_{index}", torch.zeros(width, dtype=torch.float64))
            self.register_buffer(f"span_{index}", torch.ones(width, dtype=torch.float64))

    def fit(self, views: Sequence[Tensor]) -> InputScaling:
        """Take shift and span from (rows, width_i), and return self."""
        for index, view in enumerate(views):
            view = view.double()
            shift = view.amin(0) if self.kind == "minmax" else view.mean(0)
            span = view.amax(0) - view.amin(0)
            if self.kind == "standard":
                span = view.std(0, correction=0)
            getattr(self, f"shift_{index}").copy_(shift)
            getattr(self, f"span_{index}").copy_(torch.where(span > 0, span, 1.0))
        return self

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Scale (rows, width_i) each; the results are float32, inf or NaN where that is too small.

        Raises:
            ValueError: another number of modalities or features.
        """
        got = [view.shape[-1] for view in views]
        if got != self.widths:
            raise ValueError(f"views: got {got} features, expected {self.widths}")
        return tuple(
            ((view - getattr(self, f"shift_{i}")) / getattr(self, f"span_{i}")).float()
            for i, view in enumerate(views)
        )

    def extra_repr(self) -> str:
        return f"widths={self.widths}, kind={self.kind!r}"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, values in state_dict.items():
            # A span of 0 or below was never fitted, and would only show as a poor figure.
            if name.startswith(f"{prefix}span_") and not (values > 0).all():
                args[-1].append(
                    f"tensor {name!r} has a number that is not > 0, as all are expected"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
