"""Scaling of input features, fitted on training rows and kept with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SCALINGS = ("minmax", "centered", "standard")
# Of a scaled value: LayerNorm squares what the encoder makes of it, and float32 ends at 3e38.
_LARGEST = 1e17


class Outlier(NamedTuple):
    """A value so far outside the rows fitted on that a model's numbers would overflow.

    Attributes:
        view, row, column: where it is.
        value, scaled: before and after scaling.
    """

    view: int
    row: int
    column: int
    value: float
    scaled: float

    def __str__(self) -> str:
        return (
            f"got {self.value:g}, which is {self.scaled:g} on the scale of the rows trained on, "
            f"expected at most {_LARGEST:g} in size"
        )


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
            # Where the span itself overflows, unscaled values are seen to be too large.
            usable = (span > 0) & span.isfinite()
            getattr(self, f"span_{index}").copy_(torch.where(usable, span, 1.0))
        return self

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Scale (rows, width_i) each; the results are float32, inf or NaN where that is too small.

        Raises:
            ValueError: another number of modalities or features.
        """
        got = [view.shape[-1] for view in views]
        if got != self.widths:
            raise ValueError(f"views: got {got} features, expected {self.widths}")
        return tuple(self._scaled(index, view).float() for index, view in enumerate(views))

    def outlier(self, views: Sequence[Tensor]) -> Outlier | None:
        """Find the farthest of the first view of (rows, width_i) each that has one; or None."""
        for index, view in enumerate(views):
            scaled = self._scaled(index, view)
            sizes = scaled.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
            if sizes.numel() and sizes.max() > _LARGEST:
                row, column = divmod(int(sizes.argmax()), sizes.shape[1])
                values = view[row, column].item(), scaled[row, column].item()
                return Outlier(index, row, column, *values)
        return None

    def _scaled(self, index: int, view: Tensor) -> Tensor:
        return (view - getattr(self, f"shift_{index}")) / getattr(self, f"span_{index}")

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
