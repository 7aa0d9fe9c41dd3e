"""The eager textbook with products in tf32, for comparison with programs that have them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from .base import CPU, products
from .registry import register
from .textbook import Textbook


@register
class TextbookHigh(Textbook):
    """Eager PyTorch under `torch.set_float32_matmul_precision("high")`."""

    name = "textbook_high"
    summary = "the eager textbook, products of high precision (tf32)"

    @classmethod
    def unavailable(cls, device: torch.device = CPU) -> str | None:
        return None if device.type == "cuda" else "no GPU, whose tf32 products it is about"

    def context(self) -> AbstractContextManager[object]:
        return products("high")

    @property
    def rate(self) -> str:
        return "tf32"
