"""Timing equilibrium fusion against other implementations, at equal verified residual.

`deqfusion bench` (the same as `python -m deqfusion.bench`) runs a suite; `python -m
deqfusion.bench.profile` says where the time of a solve goes; `quick_comparison` is the short
comparison from Python. `NOTES.md` beside this file has what was measured.
"""

from __future__ import annotations

from typing import Any

from .cli import register_commands

__all__ = ["quick_comparison", "register_commands"]


def __getattr__(name: str) -> Any:
    # Building the command line must not import torch.
    if name == "quick_comparison":
        from .runner import quick_comparison

        return quick_comparison
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
