r"""Backward modes as values: how the gradient of an equilibrium is computed.

At the fixed point z* = f(z*; x) the gradient of a loss with dL/dz* = g is (df/dx)^T lambda, where

    lambda = g + J^T lambda,    J = df/dz at z*           (implicit function theorem)

`Implicit` solves this linear fixed point; the others approximate it. All but `Unroll` keep nothing
but z* between forward and backward, so that memory does not grow with the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from deqfusion import validation as check
from deqfusion.reference.solve import SolverOptions
from deqfusion.solvers import Anderson, Solver, ToleranceSchedule

__all__ = ["Adjoint", "Implicit", "OneStep", "Phantom", "Unroll"]


@dataclass(frozen=True)
class Adjoint:
    """A backward mode; use `Implicit`, `Phantom`, `OneStep` or `Unroll`."""

    @property
    def encoded(self) -> str:
        """The solver of lambda = g + J^T lambda, as the operators take it."""
        raise TypeError(f"adjoint: got {self!r}, expected Implicit, Phantom or OneStep")


def _truncated(steps: int, damping: float) -> str:
    return SolverOptions("truncated", 0.0, 0.0, steps, 0, None, True, damping, False).encode()


_ONE_STEP = _truncated(1, 1.0)


@dataclass(frozen=True)
class Implicit(Adjoint):
    """Exact gradient to a tolerance: solves lambda = g + J^T lambda per row.

    Args:
        solver: any solver; its tolerance is relative to lambda, hence invariant to the gradient's
            scale. A `ToleranceSchedule` is not accepted here.

    Source: S. Bai, J. Z. Kolter, V. Koltun, "Deep equilibrium models", NeurIPS 2019.
    """

    solver: Solver = field(default_factory=Anderson)

    def __post_init__(self) -> None:
        check.instance("solver", self.solver, Solver)
        if isinstance(self.solver.tol, ToleranceSchedule):
            raise TypeError("Implicit(solver=...): got a tol schedule, expected a float tol")

    @property
    def encoded(self) -> str:
        return self.solver.encoded


@dataclass(frozen=True)
class Phantom(Adjoint):
    """Phantom gradient: `steps` damped steps of the adjoint iteration, linearised at z*.

    lambda_k = damping * sum_{j<k} ((1 - damping) I + damping J^T)^j g, which is backpropagation
    through `steps` damped steps of the map started at z*.

    Args:
        steps: >= 1.
        damping: in (0, 1].

    Source: Z. Geng et al., "On training implicit models", NeurIPS 2021. Difference: the steps
    share one linearisation at z* instead of unrolling the map.
    """

    steps: int = 5
    damping: float = 0.5
    _encoded: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        check.count("steps", self.steps, minimum=1)
        check.fraction("damping", self.damping)
        object.__setattr__(self, "_encoded", _truncated(int(self.steps), float(self.damping)))

    @property
    def encoded(self) -> str:
        return self._encoded


@dataclass(frozen=True)
class OneStep(Adjoint):
    """Jacobian-free backpropagation: lambda = g, the gradient through one application of f.

    Source: S. W. Fung et al., "JFB: Jacobian-free backpropagation for implicit networks", AAAI
    2022.
    """

    @property
    def encoded(self) -> str:
        return _ONE_STEP


@dataclass(frozen=True)
class Unroll(Adjoint):
    """Weight-tied fusion: `steps` plain steps of the joint map, differentiated through.

    No solve takes place: the layer returns the state after `steps` steps, its residual is that of
    the last step, and memory grows with `steps`. Of the solver's options only the tolerances
    matter: they say which rows count as CONVERGED.

    Args:
        steps: >= 1.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        check.count("steps", self.steps, minimum=1)
