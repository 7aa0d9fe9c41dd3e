"""What a solve starts from: stacked features and the injected fusion feature, and its gradients.

x_f = sum_i w_i x_i + b        over the modalities present
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["inject", "inject_adjoint"]


def inject(
    features: Sequence[Tensor], present: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Stacked features and x_f.

    Args:
        features: N of (R, d).
        present: bool (N, R) or None; what stands for an absent modality is not looked at.
        weight: (N,); bias: (1,).

    Returns:
        x (N, R, d), 0 where absent, and x_f (R, d), NaN in rows without a modality.
    """
    x = torch.stack(tuple(features))
    if present is not None:
        x = torch.where(present.unsqueeze(-1), x, 0.0)
    injected = (weight.to(x.dtype)[:, None, None] * x).sum(0) + bias.to(x.dtype)
    if present is not None:
        injected = torch.where(present.any(0).unsqueeze(-1), injected, torch.nan)
    return x, injected


def inject_adjoint(
    gradient: Tensor, injected_gradient: Tensor, x: Tensor, present: Tensor | None, weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the features (N, R, d), of weight and of bias.

    Args:
        gradient: (N, R, d), dL/dx; injected_gradient: (R, d), dL/dx_f. A row whose own is 0 adds
            nothing, even where x is NaN.
        x, present, weight, bias: of `inject`.
    """
    if present is not None:
        injected_gradient = torch.where(present.any(0).unsqueeze(-1), injected_gradient, 0.0)
    features = gradient + weight.to(x.dtype)[:, None, None] * injected_gradient
    if present is not None:
        features = torch.where(present.unsqueeze(-1), features, 0.0)
    terms = torch.where(injected_gradient == 0, 0.0, injected_gradient * x)
    total = injected_gradient.sum().reshape(1)
    return features.contiguous(), terms.sum((1, 2)).to(weight.dtype), total.to(bias.dtype)
