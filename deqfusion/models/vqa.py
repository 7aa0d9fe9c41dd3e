"""Visual question answering: every word of the question looks at the image, and is fused with it.

    words (B, T) -> embedding -> GRU or transformer -> q (B, T, d)
    regions (B, K, v) -> v (B, K, d);  u_t = attention of q_t over v
    z_t = fusion(LayerNorm(W_q q_t), LayerNorm(W_u u_t)),  one row per word
    answer = MLP(sum_t softmax_t(s(z_t)) z_t)

Without an image z_t = q_t: the question-only baseline. Words are fused without their padding, so
that no equilibrium is solved for it. LayerNorm gives both features the unit scale that the
equilibrium cell wants.

Source: P. Anderson et al., "Bottom-up and top-down attention", CVPR 2018, and D. Teney et al.,
"Tips and tricks for visual question answering", CVPR 2018. Different from them:

1. every word attends to the regions, not the last state of the GRU alone, with dot products and
   several heads in place of an MLP, so that there is a row per word to fuse;
2. a fusion by choice in place of the elementwise product, and a weighted sum over the words;
3. ReLU in place of gated tanh, and word vectors that begin at random.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..fusions import fuse
from ..module import DEQFusion
from ..solution import Equilibrium

ENCODERS = ("gru", "transformer")
_WORD_WIDTH = 300


class VQAOutput(NamedTuple):
    """Result of a `VQAModel`.

    Attributes:
        logits: (B, answers).
        features: what was fused, two of (words without padding, dim); empty without an image.
        equilibrium: the fusion's solution, where the fusion has one.
        fusion: the layer that solved, with `equilibrium`.
    """

    logits: Tensor
    features: tuple[Tensor, ...] = ()
    equilibrium: Equilibrium | None = None
    fusion: DEQFusion | None = None


class QuestionEncoder(nn.Module):
    """Word vectors, and a GRU or a transformer over them.

    Args:
        num_words: words that are told apart, 0 among them, which is padding.
        dim: width of the result.
        kind: "gru" or "transformer".
        max_words: words of the longest question; only for the transformer's positions.
        heads, layers: of the transformer; heads divide `dim`.
        dropout: on the word vectors, and within the transformer.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(
        self,
        num_words: int,
        dim: int,
        kind: str = "gru",
        *,
        max_words: int = 14,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in ENCODERS:
            raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(ENCODERS)}")
        self.words = nn.Embedding(num_words, _WORD_WIDTH, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.recurrent: nn.GRU | None = None
        if kind == "gru":
            self.recurrent = nn.GRU(_WORD_WIDTH, dim, batch_first=True)
            return
        self.projection = nn.Linear(_WORD_WIDTH, dim)
        self.positions = nn.Parameter(torch.empty(max_words, dim))
        nn.init.normal_(self.positions, std=0.02)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        """Encode words int64 (B, T), padded by 0 at the end, as (B, T, dim)."""
        vectors = self.dropout(self.words(words))
        if self.recurrent is not None:
            # What follows the last word cannot reach the states before it: no packing is needed.
            states: Tensor = self.recurrent(vectors)[0]
            return states
        inputs = self.projection(vectors) + self.positions[: words.shape[1]]
        return self.transformer(inputs, src_key_padding_mask=words == 0)


class RegionAttention(nn.Module):
    """Attention of words over the regions of an image.

    Args:
        region_width: features of a region.
        dim: width of words and result.
        heads: divide `dim`.
        dropout: on the attention's weights.
    """

    def __init__(
        self, region_width: int, dim: int, *, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(region_width, dim), nn.ReLU(), nn.LayerNorm(dim))
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)

    def forward(self, words: Tensor, regions: Tensor, counts: Tensor) -> Tensor:
        """Attend.

        Args:
            words: (B, T, dim).
            regions: (B, K, region_width); what stands behind the first `counts` is not looked at.
            counts: int64 (B,), from 1 to K.

        Returns:
            (B, T, dim).
        """
        missing = torch.arange(regions.shape[1], device=counts.device) >= counts.unsqueeze(1)
        keys = self.projection(regions.masked_fill(missing.unsqueeze(-1), 0.0))
        attended: Tensor = self.attention(
            words, keys, keys, key_padding_mask=missing, need_weights=False
        )[0]
        return attended


class VQAModel(nn.Module):
    """Question encoder, region attention, fusion over words, and a classifier of answers.

    Args:
        encoder: maps words (B, T) to (B, T, dim).
        dim: width of the features.
        num_answers: answers to tell apart.
        attention: over regions; None for the question-only baseline.
        fusion: of two features of width `dim`; with `attention`, and only then.
        dropout: before the fusion and in the classifier.

    Raises:
        ValueError: one of `attention` and `fusion` without the other.
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        num_answers: int,
        attention: RegionAttention | None = None,
        fusion: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if (attention is None) != (fusion is None):
            raise ValueError("attention, fusion: got one of them, expected both or neither")
        self.encoder, self.attention, self.fusion = encoder, attention, fusion
        if fusion is not None:
            self.features = nn.ModuleList(
                nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.Dropout(dropout))
                for _ in range(2)
            )
        self.importance = nn.Linear(dim, 1)
        answers = nn.Linear(2 * dim, num_answers)
        # Each answer is rarely right: from a probability of 1/2 the first epoch unlearns it.
        nn.init.constant_(answers.bias, -math.log(num_answers))
        self.classifier = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Dropout(dropout), answers
        )

    def forward(
        self,
        words: Tensor,
        places: Tensor,
        regions: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> VQAOutput:
        """Answer questions.

        Args:
            words: int64 (B, T), padded by 0 at the end; at least one word in each.
            places: int64 (R,), where in `words.flatten()` the R words are; of the caller, since
                to find them here would wait for the device.
            regions, counts: as in `RegionAttention`; with an image.

        Returns:
            VQAOutput.

        Raises:
            ValueError: regions where the model has no attention, or none where it has.
        """
        states = self.encoder(words)
        features: tuple[Tensor, ...] = ()
        equilibrium = None
        solver = self.fusion if isinstance(self.fusion, DEQFusion) else None
        if (regions is None) != (self.attention is None):
            raise ValueError(
                f"regions: got {'none' if regions is None else 'some'}, expected "
                f"{'none' if self.attention is None else 'some'} as the model was built"
            )
        if self.attention is not None and self.fusion is not None:
            pair = (states, self.attention(states, regions, counts))
            features = tuple(
                layer(part.flatten(0, 1)[places])
                for layer, part in zip(self.features, pair, strict=True)
            )
            fused, equilibrium = fuse(self.fusion, features)
            rows = fused.new_zeros(words.numel(), fused.shape[-1]).index_copy(0, places, fused)
            states = rows.unflatten(0, words.shape)
        scores = self.importance(states).masked_fill((words == 0).unsqueeze(-1), -torch.inf)
        pooled = (torch.softmax(scores, dim=1) * states).sum(dim=1)
        return VQAOutput(self.classifier(pooled), features, equilibrium, solver)
