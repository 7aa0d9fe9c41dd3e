"""torchdeq (optional dependency) on the same cell: its Anderson solver, implicit gradients.

Differences from its defaults: relative stopping in both solves, and the step limit of the other
contenders. Memory 6, ridge 1e-4 and the stop by the slowest row are its own. It takes the
parameters' VJP one evaluation before the point where it takes J.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from .base import CPU, MAX_STEPS, Answer, Penalty, seed_probe
from .registry import register
from .textbook import JointContender


@register
class TorchDEQ(JointContender):
    """torchdeq's `DEQIndexing` with `ift=True`."""

    name = "torchdeq"
    summary = "torchdeq 0.1.0: Anderson, implicit function theorem, relative stop"

    @classmethod
    def unavailable(cls, device: torch.device = CPU) -> str | None:
        if importlib.util.find_spec("torchdeq") is None:
            return "torchdeq is not installed: pip install torchdeq==0.1.0"
        return None

    def set_tolerances(self, tol: float, adjoint_tol: float) -> None:
        super().set_tolerances(tol, adjoint_tol)
        from torchdeq import get_deq

        self.deq = get_deq(
            core="indexing",
            ift=True,
            f_solver="anderson",
            b_solver="anderson",
            f_max_iter=MAX_STEPS,
            b_max_iter=MAX_STEPS,
            f_tol=tol,
            b_tol=adjoint_tol,
            f_stop_mode="rel",
            b_stop_mode="rel",
        )

    def forward(self) -> Answer:
        self.deq.eval()
        with torch.no_grad():
            injected = self.cell.inject(self.features)
            (flat,), info = self.deq(lambda z: self.cell(z, self.features, injected), self.start)
        return Answer(self.problem.unflatten(flat), {"joint": _steps(info)})

    def forward_backward(self, penalty: bool = False) -> Answer:
        self.release()
        self.deq.train()
        injected = self.cell.inject(self.features)
        solved: list[Tensor] = []
        adjoint_info: dict[str, Any] = {}
        points: list[Tensor] = []

        def cell(flat: Tensor) -> Tensor:
            output = self.cell(flat, self.features, injected)
            # The first evaluation with gradients is the one the adjoint is handed to.
            if torch.is_grad_enabled() and not points:
                points.append(flat)
                output.register_hook(solved.append)
            return output

        (flat,), info = self.deq(cell, self.start, backward_writer=adjoint_info.update)
        fused = flat[:, -self.problem.shape.dim :]
        loss, found = (fused * self.problem.cotangent).sum(), None
        if penalty:
            found = self._penalty(flat)
            loss = loss + self.problem.penalty_weight * found.value
        loss.backward()
        state = self.problem.unflatten(flat.detach())
        return Answer(
            state=state,
            solves={"joint": _steps(info), "adjoint": _steps(adjoint_info)},
            linearised_at=state,
            adjoint=lambda: self.problem.unflatten(solved[0]),
            gradients_at=self.problem.unflatten(points[0].detach()),
            gradients=self.gradients,
            penalty=found,
        )

    def _penalty(self, flat: Tensor) -> Penalty:
        """Its own `jac_reg`, at the state that it returned."""
        from torchdeq.loss import jac_reg

        point = flat.detach().requires_grad_(True)
        output = self.cell(point, self.features, self.cell.inject(self.features))
        seed_probe()
        value = jac_reg(output, point)
        return Penalty(value, self.problem.unflatten(point.detach()), self.probe, transposed=True)

    def probe(self) -> Tensor:
        # It draws on the CPU, whatever the device.
        seed_probe()
        return self.problem.unflatten(torch.randn(*self.start.shape).to(self.start))


def _steps(info: dict[str, Any]) -> int:
    """Evaluations until the slowest row had its best residual."""
    return int(info["nstep"].max())
