"""This library as it comes, and on its reference implementation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from deqfusion import Anderson, DEQFusion, Implicit, ops
from deqfusion.kernels.config import Config
from deqfusion.reference import adjoint as adjoints
from deqfusion.reference.solve import LADDER_WIDTH, bfloat16_instructions

from ..problem import NUM_GROUPS, Problem
from .base import MAX_STEPS, Answer, Contender, Penalty, products, seed_probe
from .registry import register
from .textbook import gradient_of


@contextmanager
def backend(name: str, precision: str = "highest") -> Iterator[None]:
    """Sets `DEQFUSION_BACKEND` and the precision of fp32 products for a while."""
    before = os.environ.get("DEQFUSION_BACKEND")
    os.environ["DEQFUSION_BACKEND"] = name
    try:
        with products(precision):
            yield
    finally:
        os.environ.pop("DEQFUSION_BACKEND")
        if before is not None:
            os.environ["DEQFUSION_BACKEND"] = before


@contextmanager
def recorded_adjoints() -> Iterator[dict[str, Any]]:
    """Collects what the reference's adjoint solves got and found meanwhile, by block."""
    found: dict[str, Any] = {}

    def recording(block: str) -> Any:
        adjoint = getattr(adjoints, f"adjoint_{block}")

        def run(*args: Any) -> Any:
            result = adjoint(*args)
            found[block] = args[0], result[-1]
            return result

        return mock.patch.object(adjoints, f"adjoint_{block}", run)

    with recording("modality"), recording("fusion"):
        yield found


def joint_adjoint(found: Mapping[str, Any]) -> Tensor:
    """The joint map's adjoint (N + 1, B, d) of `recorded_adjoints`."""
    # Of the joint map, a modality's adjoint excludes what reaches it through the fusion step.
    incoming, modality = found["modality"]
    return torch.cat([modality.state - incoming, found["fusion"][1].state])


@register
class Ours(Contender):
    """`DEQFusion` with its defaults, apart from the tolerances and the limit on steps.

    Attributes:
        programs: whether it solves by Triton programs.
        configs: by mode, what the solves of the last `run` ran in, in their order; of programs.
    """

    name = "ours"
    summary = "deqfusion: split solve, relative ridge, precision ladder, compaction"
    solver_options: ClassVar[dict[str, Any]] = {}
    adjoint_options: ClassVar[dict[str, Any]] = {}
    module_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.features = problem.features.clone().requires_grad_(True)
        self.configs: dict[str, tuple[Config, ...]] = {}
        operator = "joint_equilibrium" if self.module_options.get("joint") else "fusion_equilibrium"
        with self.context():
            self.programs = ops.implementation(self.features.device.type, operator) == "triton"

    @property
    def rate(self) -> str:
        # The ladder's first products are in bfloat16, where it may be on: not in the joint solve,
        # and without programs in none off the CPU (`deqfusion.reference.solve.run_loop`).
        wide = self.problem.shape.dim >= LADDER_WIDTH and not self.module_options.get("joint")
        on_cpu = self.features.device.type == "cpu" and bfloat16_instructions() is not None
        climbs = wide and (self.programs or on_cpu) and self.solver_options.get("ladder") != "off"
        return "bf16" if climbs else "fp32"

    def set_tolerances(self, tol: float, adjoint_tol: float) -> None:
        super().set_tolerances(tol, adjoint_tol)
        shape = self.problem.shape
        self.module = DEQFusion(
            shape.dim,
            shape.num_modalities,
            num_groups=NUM_GROUPS,
            solver=Anderson(tol=tol, max_steps=MAX_STEPS, **self.solver_options),
            adjoint=Implicit(
                solver=Anderson(tol=adjoint_tol, max_steps=MAX_STEPS, **self.adjoint_options)
            ),
            **self.module_options,
        ).to(self.features.device)
        self.module.load_state_dict(self.problem.parameters)

    def release(self) -> None:
        self.module.zero_grad(set_to_none=True)
        self.features.grad = None

    def run(self, mode: str) -> Answer:
        if not self.programs:
            return super().run(mode)
        from deqfusion.kernels.launch import ran

        with ran() as configs:
            answer = super().run(mode)
        self.configs[mode] = tuple(configs)
        return answer

    def forward(self) -> Answer:
        with torch.no_grad():
            equilibrium = self.module.equilibrium(self.features)
        return Answer(equilibrium.state, _steps(equilibrium.stats))

    def forward_backward(self, penalty: bool = False) -> Answer:
        self.release()
        equilibrium = self.module.equilibrium(self.features)
        loss, found = (equilibrium.fused * self.problem.cotangent).sum(), None
        if penalty:
            seed_probe()
            value = self.module.jacobian_penalty(equilibrium, self.features)
            loss = loss + self.problem.penalty_weight * value
            found = Penalty(value.detach(), equilibrium.state.detach(), self._probe, False)
        loss.backward()
        state, solves = equilibrium.state.detach(), _steps(equilibrium.stats)
        return Answer(
            state=state,
            solves=solves,
            linearised_at=state,
            split=True,
            adjoint=None if self.programs else lambda: self._adjoint(solves),
            gradients=self._gradients,
            penalty=found,
        )

    def _gradients(self) -> dict[str, Tensor]:
        named = {name: gradient_of(value) for name, value in self.module.named_parameters()}
        return {"features": gradient_of(self.features), **named}

    def _probe(self) -> Tensor:
        seed_probe()
        count, rows, dim = self.features.shape
        return torch.randn(count + 1, rows, dim, device=self.features.device)

    def _adjoint(self, solves: dict[str, Tensor]) -> Tensor:
        """Runs again, and keeps the adjoints that the operators do not return, and their steps."""
        with self.context(), recorded_adjoints() as found:
            self.forward_backward()
        for block, (_, outcome) in found.items():
            solves[f"adjoint {block}"] = outcome.steps
        return joint_adjoint(found)


def _steps(stats: Any) -> dict[str, Tensor]:
    """Steps of every row in the modality blocks and in the fusion block; nothing is waited for."""
    return {"modality": stats.steps[:-1], "fusion": stats.steps[-1]}


@register
class OursReference(Ours):
    """The implementation in PyTorch, on any device."""

    name = "ours_reference"
    summary = "ours in PyTorch operations (DEQFUSION_BACKEND=reference), on any device"

    def context(self) -> AbstractContextManager[object]:
        return backend("reference", torch.get_float32_matmul_precision())
