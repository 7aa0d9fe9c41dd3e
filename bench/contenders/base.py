"""What a contender is: something that solves a `Problem` forward, and forward and backward."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..problem import Problem

MAX_STEPS = 200
"""Steps every contender may take; one that needs more has failed."""


@dataclass(frozen=True)
class Answer:
    """What a solve leaves for verification; nothing that costs time to keep.

    Attributes:
        state: (N + 1, B, d), the returned equilibrium.
        steps: evaluations by solve, such as {"joint": 21} or {"modality": 11, "fusion": 14}.
        linearised_at: (N + 1, B, d), where the backward linearised; None after a forward.
        split: whether the fusion step was linearised at the modalities' states themselves.
        adjoint: gives the solved adjoint (N + 1, B, d) on request; None after a forward.
        gradients_at: (N + 1, B, d), where the final VJP by the parameters was taken, if that is
            not where the backward linearised.
        gradients: gives the gradients by `DEQFusion` parameter name, and "features", until the
            contender runs again; None after a forward.
    """

    state: Tensor
    steps: dict[str, int]
    linearised_at: Tensor | None = None
    split: bool = False
    adjoint: Callable[[], Tensor] | None = None
    gradients_at: Tensor | None = None
    gradients: Callable[[], Mapping[str, Tensor]] | None = None


class Contender(abc.ABC):
    """One way of solving the problem.

    Args:
        problem: the case; parameters are copied, so that contenders do not see each other's
            gradients.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    baseline: ClassVar[bool] = False
    """Whether it counts as something to be compared with, not as a variant of ours."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.tol = self.adjoint_tol = 0.0

    def set_tolerances(self, tol: float, adjoint_tol: float) -> None:
        """Relative tolerances of both solves, in the sense of the contender's stopping rule."""
        self.tol, self.adjoint_tol = tol, adjoint_tol

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot run here, or None if it can."""
        return None

    @abc.abstractmethod
    def forward(self) -> Answer:
        """Solves without gradients."""

    @abc.abstractmethod
    def forward_backward(self) -> Answer:
        """Solves, and takes the gradients of the loss by all parameters and the features."""
