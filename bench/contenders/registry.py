"""The table behind the registry, apart from the package so that contenders can import it."""

from __future__ import annotations

from typing import TypeVar

from .base import Contender

C = TypeVar("C", bound=type[Contender])

_REGISTRY: dict[str, type[Contender]] = {}


def register(contender: C) -> C:
    """Class decorator that makes a contender known under its `name`.

    Raises:
        ValueError: if another class has that name.
    """
    known = _REGISTRY.setdefault(contender.name, contender)
    if known is not contender:
        raise ValueError(f"contender {contender.name!r} is already {known.__qualname__}")
    return contender
