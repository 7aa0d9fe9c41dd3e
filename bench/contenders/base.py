"""What a contender is: something that solves a `Problem` forward, and forward and backward."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..problem import Problem

MAX_STEPS = 200
"""Steps every contender may take; one that needs more has failed."""

MEMORY = 5
"""States that ours mixes, for the count of bytes; the textbook's is its own."""

CPU = torch.device("cpu")
FORWARD, BACKWARD, PENALTY = "forward", "forward_backward", "forward_backward_penalty"
PROBE_SEED = 1
"""Of the penalty's probes, so that verification draws the same ones in fp64."""


class Unavailable(RuntimeError):
    """Raised by a run that the device cannot have as the contender is named; says why."""


@dataclass(frozen=True)
class Penalty:
    """The Jacobian penalty that was part of a loss.

    Attributes:
        value: what the contender computed.
        at: (N + 1, B, d), where J was taken.
        probe: draws the probe again, (N + 1, B, d).
        transposed: whether J^T v was taken, not J v.
    """

    value: Tensor
    at: Tensor
    probe: Callable[[], Tensor]
    transposed: bool


@dataclass(frozen=True)
class Answer:
    """What a solve leaves for verification; nothing that costs time to keep.

    Attributes:
        state: (N + 1, B, d), the returned equilibrium.
        solves: evaluations by solve: one count where all rows take the same, as {"joint": 21}, or
            the counts of every block and row; asking for `adjoint` may add to it.
        linearised_at: (N + 1, B, d), where the backward linearised; None after a forward.
        split: whether the fusion step was linearised at the modalities' states themselves.
        adjoint: gives the solved adjoint (N + 1, B, d) on request; None after a forward, and from
            a contender that does not keep it: its gradients are held against true ones.
        gradients_at: (N + 1, B, d), where the final VJP by the parameters was taken, if that is
            not where the backward linearised.
        gradients: gives the gradients by `DEQFusion` parameter name, and "features", until the
            contender runs again; None after a forward.
        penalty: the Jacobian penalty, where the loss had one.
    """

    state: Tensor
    solves: Mapping[str, int | Tensor]
    linearised_at: Tensor | None = None
    split: bool = False
    adjoint: Callable[[], Tensor] | None = None
    gradients_at: Tensor | None = None
    gradients: Callable[[], Mapping[str, Tensor]] | None = None
    penalty: Penalty | None = None

    @property
    def steps(self) -> dict[str, int]:
        """Evaluations of the slowest row, by solve."""
        return {
            name: count if isinstance(count, int) else int(count.max())
            for name, count in self.solves.items()
        }

    def evaluations(self, rows: int) -> dict[str, int]:
        """Evaluations of all rows (and blocks, where the count is by block), by solve."""
        return {
            name: count * rows if isinstance(count, int) else int(count.sum())
            for name, count in self.solves.items()
        }


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

    memory: ClassVar[int] = MEMORY
    """States its Anderson mixing keeps."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.tol = self.adjoint_tol = 0.0

    def set_tolerances(self, tol: float, adjoint_tol: float) -> None:
        """Relative tolerances of both solves, in the sense of the contender's stopping rule."""
        self.tol, self.adjoint_tol = tol, adjoint_tol

    @classmethod
    def unavailable(cls, device: torch.device = CPU) -> str | None:
        """Why it cannot run on tensors of a device, or None if it can."""
        return None

    def context(self) -> AbstractContextManager[object]:
        """What it runs under: a backend, a schedule, a precision of products."""
        return nullcontext()

    @property
    def rate(self) -> str:
        """The matrix rate that its products are held against, a key of `peaks.measure`."""
        return "fp32"

    def rate_of(self, mode: str) -> str | None:
        """That of a mode; None where its solves have different ones."""
        return self.rate

    def function(self, mode: str) -> Callable[[], Answer]:
        """What a mode runs, to be called under `context`."""
        functions: dict[str, Callable[[], Answer]] = {
            FORWARD: self.forward,
            BACKWARD: self.forward_backward,
            PENALTY: partial(self.forward_backward, penalty=True),
        }
        return functions[mode]

    def release(self) -> None:  # noqa: B027 (not every contender keeps something)
        """Lets go of what the last run left, gradients above all."""

    def run(self, mode: str) -> Answer:
        """Runs a mode once, under `context`."""
        with self.context():
            return self.function(mode)()

    @abc.abstractmethod
    def forward(self) -> Answer:
        """Solves without gradients."""

    @abc.abstractmethod
    def forward_backward(self, penalty: bool = False) -> Answer:
        """Solves, and takes the gradients of the loss by all parameters and the features.

        Args:
            penalty: adds `Problem.penalty_weight` times the Jacobian penalty to the loss.
        """


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Sets the precision of fp32 products for a while, as torch names it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def seed_probe() -> None:
    """What every contender does before it draws its probe."""
    torch.manual_seed(PROBE_SEED)
