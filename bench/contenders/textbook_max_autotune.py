"""The compiled textbook in `torch.compile`'s mode "max-autotune": products tuned, CUDA graphs."""

from __future__ import annotations

import torch

from .base import CPU
from .registry import register
from .textbook_reduce_overhead import TextbookReduceOverhead


@register
class TextbookMaxAutotune(TextbookReduceOverhead):
    """The compiler times its own products and torch's, and takes the faster."""

    name = "textbook_max_autotune"
    summary = 'the compiled textbook, mode="max-autotune" (products tuned by the compiler)'
    mode = "max-autotune"

    @classmethod
    def unavailable(cls, device: torch.device = CPU) -> str | None:
        return super(TextbookReduceOverhead, cls).unavailable(device)
