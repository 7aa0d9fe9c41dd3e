r"""Fixed-point solvers as values: what to run, to which tolerance, with which memory.

A solver object holds options only; it is immutable, comparable and picklable. The iteration runs
inside one operator per solve (`deqfusion.ops`), on every row separately: a row stops when

    ||f(z) - z|| <= atol + tol * ||f(z)||

and is frozen then, so that its answer does not depend on the other rows of the batch.

Sources: D. G. Anderson, "Iterative procedures for nonlinear integral equations", J. ACM 12 (1965);
H. F. Walker and P. Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49
(2011); C. G. Broyden, "A class of methods for solving nonlinear simultaneous equations", Math.
Comp. 19 (1965). Numbered differences are in the classes' docstrings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deqfusion import validation as check
from deqfusion.reference.solve import SolverOptions

__all__ = ["Anderson", "Broyden", "Picard", "Solver", "ToleranceSchedule"]


@dataclass(frozen=True)
class ToleranceSchedule:
    """A tolerance that tightens geometrically as training goes on.

    In training mode the k-th forward pass of the layer that holds the schedule (k from 0) uses
    `start * (end / start) ** min(k / steps, 1)`; in evaluation mode `end` is used. The count is a
    buffer of the layer (`solver_progress`), so that it is saved with the parameters and a resumed
    run continues where it stopped. It is a tensor on the device: no recompilation as it changes.

    Args:
        start: tolerance at the first training step, > 0.
        end: tolerance from step `steps` on and in evaluation mode, > 0 and at most `start`.
        steps: training forward passes over which it tightens, >= 1.

    Raises:
        ValueError: if a tolerance is not positive and finite, `end` is above `start`, or `steps`
            is below 1.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        check.positive("start", self.start)
        check.positive("end", self.end)
        if self.end > self.start:
            raise ValueError(f"end: got {self.end}, expected at most start = {self.start}")
        check.count("steps", self.steps, minimum=1)

    def at(self, progress: Tensor) -> Tensor:
        """Tolerance after `progress` training forward passes (integer tensor), float64 ()."""
        fraction = (progress.to(torch.float64) / self.steps).clamp(max=1.0)
        return self.start * torch.exp(fraction * math.log(self.end / self.start))


@dataclass(frozen=True)
class Solver:
    """What every solver has in common; use `Anderson`, `Picard` or `Broyden`.

    Args:
        tol, atol, max_steps: as in `Anderson`.

    Raises:
        ValueError, TypeError: naming the argument, what was got and what was expected.
    """

    tol: float | ToleranceSchedule = 1e-3
    atol: float = 0.0
    max_steps: int = 50
    encoded: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        if not isinstance(self.tol, ToleranceSchedule):
            check.positive("tol", self.tol)
        check.non_negative("atol", self.atol)
        check.count("max_steps", self.max_steps, minimum=1)

    def _options(self) -> SolverOptions:
        raise NotImplementedError

    def _finish(self) -> None:
        # Encoded once, at construction: the operators take it as it is.
        object.__setattr__(self, "encoded", self._options().encode())

    @property
    def _common(self) -> tuple[float, float, int]:
        return self.final_tol, float(self.atol), int(self.max_steps)

    @property
    def final_tol(self) -> float:
        """The tolerance as a float; of a schedule, where it ends."""
        return self.tol.end if isinstance(self.tol, ToleranceSchedule) else float(self.tol)


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration of every row, with a ridge relative to its Gram matrix.

    The next iterate mixes the last `memory` evaluations, z = sum_j a_j (mixing * f_j +
    (1 - mixing) * z_j), with the weights of least ||sum_j a_j (f_j - z_j)|| among those that sum
    to 1. Differences from the widely copied implementation: (1) the ridge is relative to the mean
    diagonal of the Gram matrix, so that a solve is invariant to scaling; (2) rows stop and freeze
    one by one; (3) one row of the Gram matrix is computed per step; (4) the best finite iterate is
    kept and returned as f(z); (5) a rising residual restarts the row with a damped step.

    Args:
        tol: relative tolerance on the residual, > 0: a float, or a `ToleranceSchedule`.
        atol: absolute tolerance added to it, >= 0, in units of the state's 2-norm (of a backward
            solve, in units of the 2-norm of the row's incoming gradient).
        max_steps: evaluations of the map at most, >= 1.
        memory: evaluations mixed; 0 is plain iteration. (The Triton programs take 0 to 8.)
        ridge: regularisation of the Gram matrix, >= 0; None chooses by dtype.
        ridge_mode: "relative" (times the mean diagonal) or "absolute" (parity with the authors'
            solver: the ridge is added as it is, and only a row that is not finite restarts).
        mixing: beta in (0, 1].
        ladder: "auto" runs the steps far from the tolerance with bfloat16 products where the
            processor has fast ones and the layer is at least 256 wide; the last steps, the
            residual that stops a row and the returned state are in the features' precision. "off"
            uses the features' precision throughout.
    """

    memory: int = 5
    ridge: float | None = None
    ridge_mode: str = "relative"
    mixing: float = 1.0
    ladder: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check.count("memory", self.memory, minimum=0)
        if self.ridge is not None:
            check.non_negative("ridge", self.ridge)
        check.choice("ridge_mode", self.ridge_mode, ("relative", "absolute"))
        check.fraction("mixing", self.mixing)
        check.choice("ladder", self.ladder, ("auto", "off"))
        self._finish()

    def _options(self) -> SolverOptions:
        relative = self.ridge_mode == "relative"
        return SolverOptions(
            "anderson", *self._common, int(self.memory), self.ridge, relative, float(self.mixing),
            self.ladder == "auto",
        )  # fmt: skip


@dataclass(frozen=True)
class Picard(Solver):
    """Damped plain iteration z <- z + damping * (f(z) - z); undamped, the paper's weight-tied one.

    A residual that rises tenfold sends the row back to its best iterate, three times at most.

    Args:
        tol, atol, max_steps: as in `Anderson`.
        damping: step length in (0, 1].
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check.fraction("damping", self.damping)
        self._finish()

    def _options(self) -> SolverOptions:
        return SolverOptions("picard", *self._common, 0, None, True, float(self.damping), False)


@dataclass(frozen=True)
class Broyden(Solver):
    """Limited-memory Broyden ("good" update) on every row, without line search.

    Differences from the authors' solver: (1) rows stop and freeze one by one; (2) `memory` rank-one
    updates are kept and the row restarts when they are used up, instead of one per step.

    Args:
        tol, atol, max_steps: as in `Anderson`.
        memory: rank-one updates kept, >= 1.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check.count("memory", self.memory, minimum=1)
        self._finish()

    def _options(self) -> SolverOptions:
        return SolverOptions("broyden", *self._common, int(self.memory), None, True, 1.0, False)
