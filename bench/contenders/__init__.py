"""Registry of contenders: every module of this package is imported, every contender registers.

To add one, put a file here with a `@register` class that implements `Contender`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from .base import (
    BACKWARD,
    FORWARD,
    MAX_STEPS,
    PENALTY,
    Answer,
    Contender,
    Penalty,
    Unavailable,
)
from .registry import _REGISTRY, register

__all__ = [
    "BACKWARD",
    "FORWARD",
    "MAX_STEPS",
    "PENALTY",
    "Answer",
    "Contender",
    "Penalty",
    "Unavailable",
    "contenders",
    "get",
    "register",
]


@cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def contenders() -> dict[str, type[Contender]]:
    """All contenders by name, in the order of their names."""
    _discover()
    return dict(sorted(_REGISTRY.items()))


def get(name: str) -> type[Contender]:
    """The contender of that name.

    Raises:
        ValueError: if there is none; the message lists those there are.
    """
    known = contenders()
    if name not in known:
        raise ValueError(f"unknown contender {name!r}, expected one of {', '.join(known)}")
    return known[name]
