"""Kinds of values: what a command-line argument, or a value in a stored configuration, may be.

Each kind converts an argument's text when it is called, as `argparse` wants it, and says of a value
read from JSON whether it `accepts` it: one statement of a range serves both.
"""

from __future__ import annotations

import argparse
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..fusions import FUSION_NAMES

_MOST_STEPS = 1000
_HEX_DIGITS = frozenset("0123456789abcdef")


class Kind(ABC):
    """What a value may be; called with an argument's text, the value that it stands for."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """What is accepted, as it follows "expected" in a message."""

    @abstractmethod
    def accepts(self, value: Any) -> bool:
        """Whether a value read from JSON is one: 8, but not 8.0, "8" or true for a whole number."""

    def parse(self, text: str) -> Any:
        """Return what an argument's text stands for, or raise ValueError."""
        return text

    def __call__(self, text: str) -> Any:
        try:
            value = self.parse(text)
        except (KeyError, ValueError):
            value = None
        if not self.accepts(value):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {self.expected}")
        return value


@dataclass(frozen=True)
class WholeNumber(Kind):
    """A whole number >= minimum, and <= maximum where there is one."""

    minimum: int
    maximum: int | None = None

    @property
    def expected(self) -> str:
        if self.maximum is None:
            return f"a whole number >= {self.minimum}"
        return f"a whole number from {self.minimum} to {self.maximum}"

    def accepts(self, value: Any) -> bool:
        # The type itself, since True is an int too.
        if type(value) is not int or value < self.minimum:
            return False
        return self.maximum is None or value <= self.maximum

    def parse(self, text: str) -> int:
        return int(text)


@dataclass(frozen=True)
class RealNumber(Kind):
    """A finite number >= minimum (or > minimum with `above`), and < `below` where it is given."""

    minimum: float
    above: bool = False
    below: float | None = None

    @property
    def expected(self) -> str:
        bounds = f"{'>' if self.above else '>='} {self.minimum:g}"
        return f"a number {bounds}" + (f" and < {self.below:g}" if self.below is not None else "")

    def accepts(self, value: Any) -> bool:
        # No whole number that is beyond a float either.
        if type(value) not in (int, float) or not value <= sys.float_info.max:
            return False
        if self.below is not None and value >= self.below:
            return False
        return value > self.minimum if self.above else value >= self.minimum

    def parse(self, text: str) -> float:
        return float(text)


@dataclass(frozen=True)
class WholeNumbers(Kind):
    """A list of 1 to 100 whole numbers, each from minimum to maximum; as an argument, `1,2,3`."""

    minimum: int
    maximum: int
    distinct: bool = False

    @property
    def expected(self) -> str:
        which = "distinct whole numbers" if self.distinct else "whole numbers"
        return f"1 to 100 {which} from {self.minimum} to {self.maximum}"

    def accepts(self, value: Any) -> bool:
        number = WholeNumber(self.minimum, self.maximum)
        if not isinstance(value, list) or not 1 <= len(value) <= 100:
            return False
        return all(map(number.accepts, value)) and (
            not self.distinct or len(set(value)) == len(value)
        )

    def parse(self, text: str) -> list[int]:
        fields = text.split(",")
        if not all(field.isascii() and field.isdigit() for field in fields):
            raise ValueError(text)
        return list(map(int, fields))


@dataclass(frozen=True)
class OneOf(Kind):
    """One of a few texts."""

    texts: Sequence[str]

    @property
    def expected(self) -> str:
        return " or ".join(map(repr, self.texts))

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.texts


@dataclass(frozen=True)
class SomeOf(Kind):
    """A list of distinct texts of a few, at least one; as an argument, `a,b`."""

    texts: Sequence[str]

    @property
    def expected(self) -> str:
        return f"distinct ones of {', '.join(self.texts)}"

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, list) or not value:
            return False
        known = all(isinstance(text, str) and text in self.texts for text in value)
        return known and len(set(value)) == len(value)

    def parse(self, text: str) -> list[str]:
        return text.split(",")


@dataclass(frozen=True)
class Switch(Kind):
    """True or false; as an argument, `--name` or `--no-name`."""

    @property
    def expected(self) -> str:
        return "true or false"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def parse(self, text: str) -> bool:
        return {"true": True, "false": False}[text]


@dataclass(frozen=True)
class FusionName(Kind):
    """A name for `build_fusion`, with a number of weight-tied steps that ends in finite time."""

    @property
    def expected(self) -> str:
        return f"one of {', '.join(FUSION_NAMES)} (K from 1 to {_MOST_STEPS})"

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, str):
            return False
        name, colon, steps = value.partition(":")
        if not colon:
            return name in FUSION_NAMES
        numeral = steps.isascii() and steps.isdigit() and len(steps) <= len(str(_MOST_STEPS))
        return name == "weight_tied" and numeral and 1 <= int(steps) <= _MOST_STEPS


@dataclass(frozen=True)
class Sha256(Kind):
    """A SHA-256 in hexadecimal."""

    @property
    def expected(self) -> str:
        return "a SHA-256 of 64 hexadecimal digits"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and len(value) == 64 and set(value) <= _HEX_DIGITS


@dataclass(frozen=True)
class Sha256s(Kind):
    """A list of them; no argument."""

    @property
    def expected(self) -> str:
        return f"a list, each {Sha256().expected}"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, list) and all(map(Sha256().accepts, value))


@dataclass(frozen=True)
class OrNull(Kind):
    """Another kind, or nothing; as an argument, `none`."""

    kind: Kind

    @property
    def expected(self) -> str:
        return f"{self.kind.expected}, or null"

    def accepts(self, value: Any) -> bool:
        return value is None or self.kind.accepts(value)

    def __call__(self, text: str) -> Any:
        return None if text == "none" else self.kind(text)


def choices(kind: Kind) -> str:
    """Return what an option may be where that is a few texts, as its help says it; else ""."""
    if isinstance(kind, OrNull):
        return choices(kind.kind)
    if isinstance(kind, FusionName):
        return ", ".join(FUSION_NAMES)
    if isinstance(kind, SomeOf):
        return f"some of {','.join(kind.texts)}"
    if isinstance(kind, OneOf):
        *others, last = kind.texts
        return f"{', '.join(others)} or {last}"
    return ""
