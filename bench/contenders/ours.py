"""This library: as it comes, and with single optimisations switched off for attribution."""

from __future__ import annotations

from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from deqfusion import Anderson, DEQFusion, Implicit
from deqfusion.reference import adjoint as adjoints

from ..problem import NUM_GROUPS, Problem
from .base import Answer, Contender
from .registry import register
from .textbook import gradient_of


@register
class Ours(Contender):
    """`DEQFusion` with its defaults, apart from the tolerances."""

    name = "ours"
    summary = "deqfusion: split solve, relative ridge, precision ladder, compaction"
    solver_options: ClassVar[dict[str, Any]] = {}
    adjoint_options: ClassVar[dict[str, Any]] = {}
    module_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.features = problem.features.clone().requires_grad_(True)

    def set_tolerances(self, tol: float, adjoint_tol: float) -> None:
        super().set_tolerances(tol, adjoint_tol)
        shape = self.problem.shape
        self.module = DEQFusion(
            shape.dim,
            shape.num_modalities,
            num_groups=NUM_GROUPS,
            solver=Anderson(tol=tol, **self.solver_options),
            adjoint=Implicit(solver=Anderson(tol=adjoint_tol, **self.adjoint_options)),
            **self.module_options,
        ).to(self.features.device)
        self.module.load_state_dict(self.problem.parameters)

    def forward(self) -> Answer:
        with torch.no_grad():
            equilibrium = self.module.equilibrium(self.features)
        return Answer(equilibrium.state, _steps(equilibrium.stats))

    def forward_backward(self) -> Answer:
        self.module.zero_grad(set_to_none=True)
        self.features.grad = None
        equilibrium = self.module.equilibrium(self.features)
        (equilibrium.fused * self.problem.cotangent).sum().backward()
        state, steps = equilibrium.state.detach(), _steps(equilibrium.stats)
        return Answer(
            state=state,
            steps=steps,
            linearised_at=state,
            split=True,
            adjoint=lambda: self._adjoint(steps),
            gradients=self._gradients,
        )

    def _gradients(self) -> dict[str, Tensor]:
        named = {name: gradient_of(value) for name, value in self.module.named_parameters()}
        return {"features": gradient_of(self.features), **named}

    def _adjoint(self, steps: dict[str, int]) -> Tensor:
        """Runs again, and keeps the adjoints that the operators do not return, and their steps."""
        found: dict[str, Any] = {}

        def recording(block: str) -> Any:
            adjoint = getattr(adjoints, f"adjoint_{block}")

            def run(*args: Any) -> Any:
                result = adjoint(*args)
                found[block] = args[0], result[-1]
                return result

            return mock.patch.object(adjoints, f"adjoint_{block}", run)

        with recording("modality"), recording("fusion"):
            self.forward_backward()
        for block, (_, outcome) in found.items():
            steps[f"adjoint {block}"] = int(outcome.steps.max())
        # Of the joint map, a modality's adjoint excludes what reaches it through the fusion step.
        incoming, modality = found["modality"]
        return torch.cat([modality.state - incoming, found["fusion"][1].state])


def _steps(stats: Any) -> dict[str, int]:
    """Steps of the slowest row in the modality blocks and in the fusion block."""
    return {"modality": int(stats.steps[:-1].max()), "fusion": int(stats.steps[-1].max())}


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
