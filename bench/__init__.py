"""Timing equilibrium fusion against other implementations, at equal verified residual.

`deqfusion bench` (the same as `python -m deqfusion.bench`) runs a suite, `deqfusion plot` draws a
result again; `python -m deqfusion.bench.profile` says where the time of a solve goes, `python -m
deqfusion.bench.comparison` draws the README's table; `quick_comparison` is the short comparison
from Python. `hot_paths/` has cases for pytest-benchmark, `NOTES.md` what was measured. A contender
is a file in `contenders/`, a suite an entry in `suites.py`.
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
