"""The compiled textbook in `torch.compile`'s mode "max-autotune": products tuned, CUDA graphs."""

from __future__ import annotations

from .registry import register
from .textbook_compiled import TextbookInGraphs


@register
class TextbookMaxAutotune(TextbookInGraphs):
    """The compiler times its own products and torch's, and takes the faster."""

    name = "textbook_max_autotune"
    summary = 'the compiled textbook, mode="max-autotune" (products tuned by the compiler)'
    mode = "max-autotune"
