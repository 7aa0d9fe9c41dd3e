"""One contender on one problem: tolerances at equal verified residual, and its verification.

Every contender starts from the tolerance that is the target. Stopping rules differ: a contender
that measures a row's whole state as one vector can stop while one block is still above the target.
So whoever misses the target in fp64 has its tolerance tightened, in proportion to the miss, until
every row and every block meets it, forward first, then the backward at that forward tolerance.
One whose steps do not suffice is failed and gets no time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deqfusion import Anderson, DEQFusion, Implicit
from deqfusion.tuning.result import told

from . import contenders
from .contenders import BACKWARD, FORWARD, Answer
from .contenders.ours import OursReference, backend, joint_adjoint, recorded_adjoints
from .problem import NUM_GROUPS, Problem
from .verification import (
    AdjointSystem,
    gradient_error,
    penalty_error,
    penalty_in_fp64,
    verify_state,
)

TIGHTEN = (0.5, 0.95)
"""Bounds of the factor by which a tolerance is tightened; between them, target over residual."""

GRADIENT_SLACK = 10
"""Allowed error over the target of the gradients against what the adjoint gives in fp64: a ReLU's
input within rounding of 0 may go either way in some row (`AdjointSystem`)."""

TRUE = 1e-2
"""Residual over the target, of state and adjoint in fp64, from which on gradients are true ones."""

MOST = 5
"""Largest allowed error of gradients over the root of the target. A residual moves inputs of ReLUs
across 0, a share of them in its proportion, and the norm of what that changes goes by its root: at
1e-3 the reference's own gradients are off by 0.1 to 6 % (`Truth.allowed` is twice that), where the
problem is well conditioned, and there the most is 16 %."""

TIGHTEST = 1e-3
"""The smallest fraction of the target tried as a tolerance."""


class Truth:
    """A problem's true gradients, solved in fp64 once, for contenders that keep no adjoint.

    Args:
        problem: the case.
        target: relative residual to be met.
    """

    def __init__(self, problem: Problem, target: float) -> None:
        self.problem, self.target = problem, target

    @cached_property
    def gradients(self) -> Mapping[str, Tensor]:
        """By parameter name, and "features".

        Raises:
            RuntimeError: if state or adjoint did not converge: nothing can be held against them.
        """
        shape, close = self.problem.shape, Anderson(tol=1e-8, max_steps=200, memory=8, ladder="off")
        layer = DEQFusion(
            shape.dim, shape.num_modalities, num_groups=NUM_GROUPS, solver=close,
            adjoint=Implicit(close), dtype=torch.float64,
        ).to(self.problem.features.device)  # fmt: skip
        layer.load_state_dict({k: value.double() for k, value in self.problem.parameters.items()})
        features = self.problem.features.double().requires_grad_()
        with backend("reference"), recorded_adjoints() as adjoints:
            equilibrium = layer.equilibrium(features)
            (equilibrium.fused * self.problem.cotangent).sum().backward()
        state = equilibrium.state.detach()
        residual = verify_state(self.problem, state)
        system = AdjointSystem(self.problem, state, split=True)
        adjoint_residual = system.residual(joint_adjoint(adjoints))
        if not max(residual, adjoint_residual) <= TRUE * self.target:
            raise RuntimeError(
                f"no true gradients: residual {residual:.2e}, adjoint_residual "
                f"{adjoint_residual:.2e} in fp64, expected at most {TRUE * self.target:.0e}"
            )
        named = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        if features.grad is None:
            raise RuntimeError("no backward has reached the features")
        return {"features": features.grad, **named}

    @cached_property
    def allowed(self) -> float:
        """Error of gradients, `GRADIENT_SLACK` targets, or twice the reference's at the target.

        How much of a residual gradients show depends on the problem's conditioning.

        Raises:
            RuntimeError: if that is more than `MOST` roots of the target: gradients that far off
                would verify nothing.
        """
        contender = OursReference(self.problem)
        contender.set_tolerances(self.target, self.target)
        answer = contender.run(BACKWARD)
        if answer.gradients is None:
            raise RuntimeError("no gradients after a forward_backward")
        error = gradient_error(answer.gradients(), self.gradients)
        most = MOST * math.sqrt(self.target)
        if not 2 * error <= most:
            raise RuntimeError(
                f"no gradients to be held against: at this target the reference's are off by "
                f"{error:.2e}, expected at most {most / 2:.2e}"
            )
        return max(GRADIENT_SLACK * self.target, 2 * error)


class Trial:
    """One contender on one problem: its tolerances, and what verification said of its answers.

    Args:
        name: of the contender.
        problem: the case.
        target: relative residual to be met.
        modes: to be verified, of `suites.MODES` and `contenders.PENALTY`.
        truth: shared by the trials of a problem; None: of its own.

    Attributes:
        status: by mode, "ok", "failed" or "unavailable"; the runner adds "skipped". What fails
            forward has failed in every mode, what fails backward may be right forward.
        reason: by mode, why it is not "ok"; empty if it is.
        found: by mode, the verified residuals and the steps of the last verified answer.
        evaluations: by mode, of all rows and by solve.
    """

    def __init__(
        self, name: str, problem: Problem, target: float,
        modes: tuple[str, ...] = (FORWARD, BACKWARD), truth: Truth | None = None,
    ) -> None:  # fmt: skip
        self.name, self.problem, self.target, self.modes = name, problem, target, modes
        self.truth = Truth(problem, target) if truth is None else truth
        self.status, self.reason = dict.fromkeys(modes, "ok"), dict.fromkeys(modes, "")
        every = dict.fromkeys((FORWARD, *modes))
        self.found: dict[str, dict[str, Any]] = {mode: {} for mode in every}
        self.evaluations: dict[str, dict[str, int]] = {mode: {} for mode in every}
        self.tolerances = dict.fromkeys((FORWARD, BACKWARD), target)
        self._allowed = dict.fromkeys(("residual", "adjoint_residual"), target)
        self._allowed |= dict.fromkeys(("gradient_error", "penalty_error"), GRADIENT_SLACK * target)
        kind = contenders.get(name)
        with self.guard(FORWARD):
            unavailable = kind.unavailable(problem.features.device)
            if unavailable is not None:
                self._mark("unavailable", unavailable)
                return
            self.contender = kind(problem)
            # The forward tolerance is found forward, also where only backwards are timed.
            self._tighten(FORWARD)
        for mode in modes:
            if mode != FORWARD and self.status[mode] == "ok":
                with self.guard(mode):
                    self._tighten(mode)

    def verify(self, mode: str, answer: Answer) -> bool:
        """Checks an answer in fp64 and records the outcome; False where it misses the target."""
        found: dict[str, Any] = {"residual": verify_state(self.problem, answer.state)}
        if mode != FORWARD:
            found |= self._verify_backward(answer)
        self.found[mode] = {**found, "steps": answer.steps}
        self.evaluations[mode] = answer.evaluations(self.problem.shape.batch)
        return self._miss(mode) <= 1

    def missed(self, mode: str) -> None:
        """Takes the contender out of the comparison for what `found` says of this mode."""
        figures = ", ".join(
            f"{key} {value:.2e}" for key, value in self.found[mode].items() if key != "steps"
        )
        steps = ", ".join(f"{key} {count}" for key, count in self.found[mode]["steps"].items())
        self.fail(
            mode, f"{mode}: {figures} after {steps} steps, expected at most {self.target:.0e}"
        )

    def fail(self, mode: str, reason: str, status: str = "failed") -> None:
        """Takes the contender out of a mode's comparison; forward, of every mode's."""
        if mode == FORWARD:
            self._mark(status, reason)
        else:
            self.status[mode], self.reason[mode] = status, reason

    def _mark(self, status: str, reason: str) -> None:
        self.status = dict.fromkeys(self.modes, status)
        self.reason = dict.fromkeys(self.modes, reason)

    @contextmanager
    def guard(self, mode: str) -> Iterator[None]:
        """What raises fails this contender: a program that a device cannot run, or memory that it
        does not have, is no reason to lose what the others take."""
        try:
            yield
        except Exception as error:
            self.raised(mode, error)

    def raised(self, mode: str, error: Exception) -> None:
        """Takes the contender out of a mode's comparison for what it raised."""
        if isinstance(error, contenders.Unavailable):
            self.fail(mode, str(error), "unavailable")
        else:
            self.fail(mode, told(error))

    def _miss(self, mode: str) -> float:
        """The worst figure of the last verification over what is allowed for it."""
        worst = (
            value / self._allowed[key] for key, value in self.found[mode].items() if key != "steps"
        )
        # `max` passes over a NaN that is not its first.
        return max(value if math.isfinite(value) else math.inf for value in worst)

    def _tighten(self, mode: str) -> None:
        tolerance = FORWARD if mode == FORWARD else BACKWARD
        while True:
            self.contender.set_tolerances(self.tolerances[FORWARD], self.tolerances[BACKWARD])
            if self.verify(mode, self.contender.run(mode)):
                return
            self.tolerances[tolerance] *= min(max(1 / self._miss(mode), TIGHTEN[0]), TIGHTEN[1])
            if self.tolerances[tolerance] < self.target * TIGHTEST:
                self.missed(mode)
                return

    def _verify_backward(self, answer: Answer) -> dict[str, float]:
        """What the backward of an answer is off by, against fp64."""
        if answer.linearised_at is None or answer.gradients is None:
            raise ValueError("a forward_backward answer needs linearised_at and gradients")
        # Before the adjoint, which may take another run: these are the gradients that were timed.
        gradients = answer.gradients()
        found: dict[str, float] = {}
        if answer.adjoint is None:
            expected = self.truth.gradients
            self._allowed["gradient_error"] = self.truth.allowed
        else:
            system = AdjointSystem(self.problem, answer.linearised_at, answer.split)
            adjoint = answer.adjoint()
            found["adjoint_residual"] = system.residual(adjoint)
            if answer.gradients_at is not None:
                system = AdjointSystem(self.problem, answer.gradients_at, answer.split)
            expected = system.gradients(adjoint)
        if answer.penalty is not None:
            value, extra = penalty_in_fp64(self.problem, answer.penalty)
            found["penalty_error"] = penalty_error(float(answer.penalty.value.detach()), value)
            expected = {name: g + extra[name] for name, g in expected.items()}
        return {**found, "gradient_error": gradient_error(gradients, expected)}
