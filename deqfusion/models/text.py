"""Sentences through a transformer encoder of Hugging Face, to one feature each.

    tokens (rows, length) -> transformer -> mean over tokens -> ReLU(LayerNorm(Linear)), dropout

The mean over tokens serves encoders with and without a token for the whole sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from .classifier import projection


class TransformerEncoder(nn.Module):
    """A transformer, the mean of what it says of the tokens, and a projection.

    Args:
        transformer: an encoder of the library `transformers`: called with `input_ids` and
            `attention_mask`, both int64 (rows, length), it returns a `last_hidden_state`
            (rows, length, hidden), and its `config` has `hidden_size`.
        dim: features of the result.
        dropout: of the result.
    """

    def __init__(self, transformer: nn.Module, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.transformer = transformer
        hidden = cast(Any, transformer.config).hidden_size
        self.project = projection(hidden, dim, dropout)

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Encode `input_ids` and `attention_mask`, (rows, length) each, to (rows, dim)."""
        mask = tokens["attention_mask"]
        hidden = self.transformer(
            input_ids=tokens["input_ids"], attention_mask=mask
        ).last_hidden_state
        share = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * share).sum(dim=1) / share.sum(dim=1).clamp(min=1)
        return self.project(mean)
