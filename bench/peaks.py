"""What the machine can do, measured in the run whose figures are held against it.

Copy bandwidth counts what is read and what is written. Matrix rates are those of square products,
in fp32 ("highest"), in tf32 where a GPU has it, and in bfloat16. A busy machine shows no peak: the
runner measures before and after the cases, and the best counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from . import timing
from .contenders.base import products

COPY = {"cpu": 1 << 27, "cuda": 1 << 28}
"""Bytes, more than any cache holds."""

WIDTHS = {"cpu": (512, 1024), "cuda": (8192,)}
RUNS = 9


def measure(device: torch.device) -> dict[str, float]:
    """The best of a few runs.

    Args:
        device: "cpu" (with as many threads as torch has now) or "cuda".

    Returns:
        "copy" in bytes/s; "fp32", "bf16" and on a GPU "tf32" in FLOP/s.
    """
    source = torch.ones(COPY[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    found = {"copy": 2 * len(source) / _least(partial(target.copy_, source), device)}
    kinds = {"fp32": (torch.float32, "highest"), "bf16": (torch.bfloat16, "highest")}
    if device.type == "cuda":
        kinds["tf32"] = torch.float32, "high"
    for name, (dtype, precision) in kinds.items():
        for width in WIDTHS[device.type]:
            a = torch.randn(width, width, device=device).to(dtype)
            with products(precision):
                rate = 2 * width**3 / _least(partial(torch.mm, a, a), device)
            found[name] = max(found.get(name, 0.0), rate)
    return found


def best(*measured: Mapping[str, float]) -> dict[str, float]:
    """The largest of each peak."""
    return {name: max(found[name] for found in measured) for name in measured[0]}


def _least(function: Callable[[], object], device: torch.device) -> float:
    """Seconds: of the device where it tells, else of the clock."""
    stopwatch = timing.Stopwatch(device)
    stopwatch(function, 1)
    best = float("inf")
    for _ in range(RUNS):
        wall, on_device = stopwatch(function, 1)
        best = min(best, wall if on_device is None else on_device)
    return best
