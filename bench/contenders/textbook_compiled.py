"""The textbook with its cell under `torch.compile`, the way that is fastest for it.

The loop around the cell stays eager: the number of steps depends on the data. A compiled function
always computes the gradients of everything that requires one, so the adjoint iterations run on a
compiled cell whose parameters are frozen, and the parameters' gradients are taken once at the end.
"""

from __future__ import annotations

import copy
import shutil
from typing import ClassVar

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from ..problem import Problem
from .base import Answer
from .registry import register
from .textbook import JointContender, anderson


@register
class TextbookCompiled(JointContender):
    """The cell compiled, the solver eager."""

    name = "textbook_compiled"
    mode: ClassVar[str | None] = None
    summary = "the textbook with its cell under torch.compile"

    @classmethod
    def unavailable(cls) -> str | None:
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            return "no C++ compiler, which torch.compile needs on a CPU"
        return None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        # Code is compiled for one shape and thread count; the limit on recompilations would
        # otherwise count over the cases of a suite and end in eager execution.
        torch.compiler.reset()
        self.compiled = torch.compile(self.cell, dynamic=False, mode=self.mode)
        frozen = copy.deepcopy(self.cell).requires_grad_(False)
        self.compiled_frozen = torch.compile(frozen, dynamic=False, mode=self.mode)

    def forward(self) -> Answer:
        with torch.no_grad():
            flat, steps = self._solve()
        return Answer(self.problem.unflatten(flat), {"joint": steps})

    def forward_backward(self) -> Answer:
        self.clear_gradients()
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
        unflatten = self.problem.unflatten
        return Answer(
            state=unflatten(output.detach()),
            steps={"joint": steps, "adjoint": adjoint_steps},
            linearised_at=unflatten(flat),
            adjoint=lambda: unflatten(adjoint),
            gradients=self.gradients,
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


@register
class TextbookReduceOverhead(TextbookCompiled):
    """The same captured in CUDA graphs; without a GPU the mode changes nothing."""

    name = "textbook_reduce_overhead"
    summary = 'the compiled textbook, mode="reduce-overhead" (CUDA graphs)'
    mode = "reduce-overhead"

    @classmethod
    def unavailable(cls) -> str | None:
        return None if torch.cuda.is_available() else "no GPU, whose graphs the mode is about"

    def step(self, z: Tensor, features: Tensor, injected: Tensor) -> Tensor:
        # A replay writes over what the one before returned.
        torch.compiler.cudagraph_mark_step_begin()
        return super().step(z, features, injected).clone()
