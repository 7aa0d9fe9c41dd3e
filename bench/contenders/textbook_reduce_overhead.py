"""The compiled textbook in `torch.compile`'s mode "reduce-overhead": the cell in CUDA graphs."""

from __future__ import annotations

import torch

from .base import CPU
from .registry import register
from .textbook_compiled import TextbookInGraphs


@register
class TextbookReduceOverhead(TextbookInGraphs):
    """Captured by the compiler; without a GPU the mode changes nothing."""

    name = "textbook_reduce_overhead"
    summary = 'the compiled textbook, mode="reduce-overhead" (CUDA graphs)'
    mode = "reduce-overhead"

    @classmethod
    def unavailable(cls, device: torch.device = CPU) -> str | None:
        return None if device.type == "cuda" else "no GPU, whose graphs the mode is about"
