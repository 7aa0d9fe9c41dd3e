"""The textbook with its cell under `torch.compile`, the way that is fastest for it.

The loop around the cell stays eager: the number of steps depends on the data. A compiled function
always computes the gradients of everything that requires one, so the adjoint iterations run on a
compiled cell whose parameters are frozen, and the parameters' gradients are taken once at the end.
The Jacobian penalty is eager: it differentiates twice, which compiled functions do not.
"""

from __future__ import annotations

import copy
import shutil
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from ..problem import Problem
from .base import CPU, Answer, Penalty
from .registry import register
from .textbook import JointContender, anderson


@register
class TextbookCompiled(JointContender):
    """The cell compiled, the solver eager."""

    name = "textbook_compiled"
    mode: ClassVar[str | None] = None
    summary = "the textbook with its cell under torch.compile"

    @classmethod
    def unavailable(cls, device: torch.device = CPU) -> str | None:
        if device.type != "cpu":
            return None
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            return "no C++ compiler, which torch.compile needs on a CPU"
        return None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.compiled = torch.compile(self.cell, dynamic=False, mode=self.mode)
        frozen = copy.deepcopy(self.cell).requires_grad_(False)
        self.compiled_frozen = torch.compile(frozen, dynamic=False, mode=self.mode)

    def context(self) -> AbstractContextManager[object]:
        from torch._dynamo import config

        # Contenders share the cell's code, and its limit on recompilations would end in eager
        # execution; what other cases compiled is forgotten by the runner.
        return config.patch(recompile_limit=64)

    def forward(self) -> Answer:
        with torch.no_grad():
            flat, steps = self._solve()
        return Answer(self.problem.unflatten(flat), {"joint": steps})

    def forward_backward(self, penalty: bool = False) -> Answer:
        self.release()
        with torch.no_grad():
            flat, steps = self._solve()
            injected = self.cell.inject(self.features)
        point = flat.clone().requires_grad_(True)
        # The graph is walked once per step; donated buffers would be gone after the first.
        with functorch_config.patch(donated_buffer=False):
            image = self.compiled_frozen(point, self.features.detach(), injected)
            right = torch.zeros_like(flat)
            right[:, -self.problem.shape.dim :] = self.problem.cotangent
            adjoint, adjoint_steps, _ = anderson(
                lambda y: torch.autograd.grad(image, point, y, retain_graph=True)[0] + right,
                torch.zeros_like(right),
                tol=self.adjoint_tol,
            )
            output = self.compiled(flat, self.features, self.cell.inject(self.features))
            output.backward(adjoint)
        found: Penalty | None = self.penalise(flat) if penalty else None
        unflatten = self.problem.unflatten
        return Answer(
            state=unflatten(output.detach()),
            solves={"joint": steps, "adjoint": adjoint_steps},
            linearised_at=unflatten(flat),
            adjoint=lambda: unflatten(adjoint),
            gradients=self.gradients,
            penalty=found,
        )

    def _solve(self) -> tuple[Tensor, int]:
        features = self.features.detach()
        injected = self.cell.inject(features)
        flat, steps, _ = anderson(
            lambda z: self.step(z, features, injected), self.start, tol=self.tol
        )
        return flat, steps

    def step(self, z: Tensor, features: Tensor, injected: Tensor) -> Tensor:
        """One step of the frozen cell."""
        return self.compiled_frozen(z, features, injected)


class TextbookInGraphs(TextbookCompiled):
    """What is common to the compiler's modes that capture CUDA graphs on a GPU; no contender."""

    def step(self, z: Tensor, features: Tensor, injected: Tensor) -> Tensor:
        # A replay writes over what the one before returned.
        torch.compiler.cudagraph_mark_step_begin()
        return super().step(z, features, injected).clone()
