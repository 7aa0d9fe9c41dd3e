"""Eager PyTorch as the tutorials write it: joint cell, Anderson on the whole state, a hook.

Forward: Anderson mixing with memory 6 and an absolute ridge of 1e-4 on the vector of all blocks
of a row; the batch stops when every row meets the tolerance. Backward: the same solver on
y = J^T y + w, in a hook on the output of one more cell evaluation.

Source: the scheme of the implicit-layers tutorial (Kolter, Duvenaud, Johnson, NeurIPS 2020),
which the authors' code and torchdeq follow. Differences: 1. a row's tolerance is relative,
norm(f(z) - z) <= tol norm(f(z)), so that residuals compare; 2. it returns f(z), not z, and in
case of failure that of the step with the least worst row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import Problem, TextbookCell
from .base import MAX_STEPS, Answer, Contender, Penalty, seed_probe
from .registry import register

MEMORY = 6
RIDGE = 1e-4


def anderson(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tol: float,
    max_steps: int = MAX_STEPS,
    memory: int = MEMORY,
    ridge: float = RIDGE,
) -> tuple[Tensor, int, bool]:
    """Solves z = function(z) for every row by Anderson mixing with an absolute ridge.

    Args:
        function: maps (B, D) to (B, D).
        start: (B, D).
        tol: relative tolerance, by row; the slowest row decides.
        max_steps: evaluations of the function at most.
        memory: states kept.
        ridge: added to the diagonal of the Gram matrix as it is.

    Returns:
        The state f(z) (B, D), the evaluations used, and whether every row converged.
    """
    rows, width = start.shape
    states = start.new_zeros(rows, memory, width)
    images = start.new_zeros(rows, memory, width)
    system = start.new_zeros(rows, memory + 1, memory + 1)
    system[:, 0, 1:] = 1
    system[:, 1:, 0] = 1
    right = start.new_zeros(rows, memory + 1, 1)
    right[:, 0] = 1
    eye = torch.eye(memory, dtype=start.dtype, device=start.device)

    state, best, least = start, start, float("inf")
    for step in range(max_steps):
        image = function(state)
        slot = step % memory
        states[:, slot], images[:, slot] = state, image
        worst = float(((image - state).norm(dim=1) / image.norm(dim=1)).max())
        if worst <= tol:
            return image, step + 1, True
        if worst < least:
            best, least = image, worst
        used = min(step + 1, memory)
        residuals = images[:, :used] - states[:, :used]
        gram = torch.bmm(residuals, residuals.transpose(1, 2)) + ridge * eye[:used, :used]
        system[:, 1 : used + 1, 1 : used + 1] = gram
        weights = torch.linalg.solve(system[:, : used + 1, : used + 1], right[:, : used + 1])[
            :, 1:, 0
        ]
        state = torch.bmm(weights[:, None], images[:, :used])[:, 0]
    return best, max_steps, False


def stacked_gradients(cell: TextbookCell) -> dict[str, Tensor]:
    """Gradients of the cell's parameters under the names of `DEQFusion.state_dict()`.

    Raises:
        RuntimeError: if a parameter has none.
    """
    found = {
        "gate_weight": gradient_of(cell.gate.weight),
        "gate_bias": gradient_of(cell.gate.bias),
        "fusion_weight": gradient_of(cell.fuse.weight),
        "fusion_bias": gradient_of(cell.fuse.bias),
        "fusion_norm_weight": gradient_of(cell.fusion_norm.weight),
        "fusion_norm_bias": gradient_of(cell.fusion_norm.bias),
        "injection_weight": gradient_of(cell.injection_weight),
        "injection_bias": gradient_of(cell.injection_bias),
    }
    stacks = {
        "modality_{}1": cell.linear1,
        "modality_{}2": cell.linear2,
        "norm1_{}": cell.norm1,
        "norm2_{}": cell.norm2,
        "norm3_{}": cell.norm3,
    }
    for pattern, layers in stacks.items():
        for kind in ("weight", "bias"):
            found[pattern.format(kind)] = torch.stack(
                [gradient_of(getattr(layer, kind)) for layer in layers]
            )
    return found


def gradient_of(tensor: Tensor) -> Tensor:
    """The tensor's gradient.

    Raises:
        RuntimeError: if there is none.
    """
    if tensor.grad is None:
        raise RuntimeError("no backward has reached this tensor")
    return tensor.grad


class JointContender(Contender):
    """Shared by the baselines that carry the whole state of a row as one vector."""

    baseline = True
    memory = MEMORY

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.cell = TextbookCell(problem.parameters)
        self.features = problem.features.clone().requires_grad_(True)
        shape = problem.shape
        size = shape.batch, (shape.num_modalities + 1) * shape.dim
        self.start = problem.features.new_zeros(size)

    def release(self) -> None:
        self.cell.zero_grad(set_to_none=True)
        self.features.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last backward, by name."""
        return {"features": gradient_of(self.features), **stacked_gradients(self.cell)}

    def penalty(self, output: Tensor, point: Tensor) -> Penalty:
        """The authors' Jacobian penalty, ||v^T J||^2 / numel: differentiable, `value` included.

        Args:
            output: the cell's (B, (N + 1) d), made of
            point: (B, (N + 1) d), which requires a gradient.
        """
        seed_probe()
        probe = torch.randn_like(point)
        (product,) = torch.autograd.grad(output, point, probe, create_graph=True)
        value = product.square().sum() / point.numel()
        return Penalty(value, self.problem.unflatten(point.detach()), self.probe, transposed=True)

    def probe(self) -> Tensor:
        """The probe of `penalty` once more, (N + 1, B, d)."""
        seed_probe()
        return self.problem.unflatten(torch.randn_like(self.start))

    def penalise(self, flat: Tensor) -> Penalty:
        """Adds the gradients of the weighted penalty at a state, by one more eager evaluation."""
        point = flat.detach().clone().requires_grad_(True)
        output = self.cell(point, self.features, self.cell.inject(self.features))
        found = self.penalty(output, point)
        (self.problem.penalty_weight * found.value).backward()
        return found


@register
class Textbook(JointContender):
    """Eager PyTorch."""

    name = "textbook"
    summary = "eager PyTorch: joint cell, Anderson m = 6 with absolute ridge, hook"

    def forward(self) -> Answer:
        with torch.no_grad():
            flat, steps, _ = self._solve()
        return Answer(self.problem.unflatten(flat), {"joint": steps})

    def forward_backward(self, penalty: bool = False) -> Answer:
        self.release()
        with torch.no_grad():
            flat, steps, _ = self._solve()
        point = flat.requires_grad_(True)
        output = self.cell(point, self.features, self.cell.inject(self.features))
        # Before the hook, which the VJP of the penalty would start as well.
        found = self.penalty(output, point) if penalty else None
        solved: dict[str, tuple[Tensor, int]] = {}

        def solve_adjoint(gradient: Tensor) -> Tensor:
            handle.remove()
            adjoint, adjoint_steps, _ = anderson(
                lambda y: torch.autograd.grad(output, point, y, retain_graph=True)[0] + gradient,
                torch.zeros_like(gradient),
                tol=self.adjoint_tol,
            )
            solved["adjoint"] = adjoint, adjoint_steps
            return adjoint

        handle = output.register_hook(solve_adjoint)
        fused = output[:, -self.problem.shape.dim :]
        loss = (fused * self.problem.cotangent).sum()
        if found is not None:
            loss = loss + self.problem.penalty_weight * found.value
        loss.backward()
        adjoint, adjoint_steps = solved["adjoint"]
        unflatten = self.problem.unflatten
        return Answer(
            state=unflatten(output.detach()),
            solves={"joint": steps, "adjoint": adjoint_steps},
            linearised_at=unflatten(point.detach()),
            adjoint=lambda: unflatten(adjoint),
            gradients=self.gradients,
            penalty=found,
        )

    def _solve(self) -> tuple[Tensor, int, bool]:
        injected = self.cell.inject(self.features)
        return anderson(lambda z: self.cell(z, self.features, injected), self.start, tol=self.tol)
