"""This library with single optimisations switched off, to see what each of them gives."""

from __future__ import annotations

from typing import Any, ClassVar

from .base import FORWARD
from .ours import Ours
from .registry import register


@register
class OursNoLadder(Ours):
    """All products in the features' own precision."""

    name = "ours_noladder"
    summary = "ours without the precision ladder"
    solver_options: ClassVar[dict[str, Any]] = {"ladder": "off"}
    adjoint_options: ClassVar[dict[str, Any]] = {"ladder": "off"}


@register
class OursAbsoluteRidge(Ours):
    """The textbook's ridge in the backward solve."""

    name = "ours_absolute_ridge"
    summary = "ours with an absolute ridge of 1e-4 in the backward solve"
    adjoint_options: ClassVar[dict[str, Any]] = {"ridge": 1e-4, "ridge_mode": "absolute"}


@register
class OursJoint(Ours):
    """The whole state of a row as one problem."""

    name = "ours_joint"
    summary = "ours without the block-triangular split"
    module_options: ClassVar[dict[str, Any]] = {"joint": True}

    def rate_of(self, mode: str) -> str | None:
        # The adjoint is by blocks, with the ladder where that is on.
        return self.rate if mode == FORWARD else None
