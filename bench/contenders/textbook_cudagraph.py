"""The eager textbook with every step of its loops in a CUDA graph captured by hand.

A step is the cell, the residual, the Gram matrix, its solve and the mixture: some 60 launches that
a replay makes one of. Which slot of the history a step writes is part of the graph, so that there
is one per step until the memory is full and one per slot from there on; the host replays them and
reads the worst row's residual after each, as the eager loop does. The backward is graphs too: one
evaluation that keeps what its VJP needs, one per adjoint step, and one of the final VJP.

Differences from the eager textbook: 1. the solve of the small system does not check for
singularity, which would wait for the device; 2. in case of failure the last state is returned, not
the best. The Jacobian penalty is eager.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import Problem
from .base import CPU, MAX_STEPS, Answer, Penalty
from .registry import register
from .textbook import MEMORY, RIDGE, JointContender


def captured(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """What replays a function's launches; off a GPU the function itself, having run once.

    Args:
        function: works on tensors that stay, and waits for nothing.
        device: of these.
    """
    if device.type != "cuda":
        function()
        return function
    # Libraries initialise themselves at first use, which a capture forbids.
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class GraphedAnderson:
    """Anderson mixing as in `textbook.anderson`, a graph per step.

    Args:
        function: maps the state (B, D) to (B, D).
        start: (B, D) zeros.

    Attributes:
        state: (B, D), what the next step evaluates.
        image: (B, D), the last evaluation.
        worst: (), its residual, of the worst row.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], start: Tensor) -> None:
        rows, width = start.shape
        self.function = function
        self.state, self.image = start.clone(), torch.empty_like(start)
        self.worst = start.new_zeros(())
        self.states = start.new_zeros(rows, MEMORY, width)
        self.images = start.new_zeros(rows, MEMORY, width)
        self.system = start.new_zeros(rows, MEMORY + 1, MEMORY + 1)
        self.system[:, 0, 1:] = 1
        self.system[:, 1:, 0] = 1
        self.right = start.new_zeros(rows, MEMORY + 1, 1)
        self.right[:, 0] = 1
        self.ridge = RIDGE * torch.eye(MEMORY, dtype=start.dtype, device=start.device)
        self.replays: list[Callable[[], object]] = []

    def step(self, slot: int, used: int) -> None:
        """One evaluation into a slot of the history, and the mixture of the `used` there are."""
        image = self.function(self.state)
        self.image.copy_(image)
        self.states[:, slot], self.images[:, slot] = self.state, image
        self.worst.copy_(((image - self.state).norm(dim=1) / image.norm(dim=1)).max())
        residuals = self.images[:, :used] - self.states[:, :used]
        gram = torch.bmm(residuals, residuals.transpose(1, 2)) + self.ridge[:used, :used]
        self.system[:, 1 : used + 1, 1 : used + 1] = gram
        solution, _ = torch.linalg.solve_ex(
            self.system[:, : used + 1, : used + 1], self.right[:, : used + 1]
        )
        weights = solution[:, 1:, 0]
        self.state.copy_(torch.bmm(weights[:, None], self.images[:, :used])[:, 0])

    def capture(self) -> None:
        """Captures the steps; the history is that of garbage afterwards, and needs `solve`."""
        for step in range(2 * MEMORY):
            slot, used = step % MEMORY, min(step + 1, MEMORY)

            def run(slot: int = slot, used: int = used) -> None:
                self.step(slot, used)

            self.replays.append(captured(run, self.state.device))

    def solve(self, tol: float) -> int:
        """Solves from zero.

        Returns:
            The evaluations used; `image` is the answer.
        """
        if not self.replays:
            self.capture()
        self.state.zero_()
        for step in range(MAX_STEPS):
            self.replays[step if step < MEMORY else MEMORY + step % MEMORY]()
            if float(self.worst) <= tol:
                return step + 1
        return MAX_STEPS


@register
class TextbookCUDAGraph(JointContender):
    """The textbook's loops as graphs."""

    name = "textbook_cudagraph"
    summary = "the eager textbook, every step of its loops in a hand-captured CUDA graph"

    @classmethod
    def unavailable(cls, device: torch.device = CPU) -> str | None:
        return None if device.type == "cuda" else "no GPU, whose graphs it captures"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        features = self.features.detach()
        self.injected = self.cell.inject(features).detach()
        self.forward_solver = GraphedAnderson(
            lambda z: self._frozen(z, features), torch.zeros_like(self.start)
        )
        self.point = torch.zeros_like(self.start).requires_grad_(True)
        self.leaves = [*self.cell.parameters(), self.features]
        self.backward_solver: GraphedAnderson | None = None

    def forward(self) -> Answer:
        steps = self._solve()
        return Answer(self.problem.unflatten(self.forward_solver.image.clone()), {"joint": steps})

    def forward_backward(self, penalty: bool = False) -> Answer:
        self.release()
        steps = self._solve()
        with torch.no_grad():
            self.point.copy_(self.forward_solver.image)
        if self.backward_solver is None:
            self._capture_backward()
        assert self.backward_solver is not None
        self._evaluate()
        adjoint_steps = self.backward_solver.solve(self.adjoint_tol)
        self._differentiate()
        for leaf, gradient in zip(self.leaves, self.found, strict=True):
            leaf.grad = gradient
        # The penalty accumulates into these gradients, which the next replay writes anew.
        found: Penalty | None = self.penalise(self.point) if penalty else None
        unflatten, adjoint = self.problem.unflatten, self.backward_solver.image
        return Answer(
            state=unflatten(self.output.detach()),
            solves={"joint": steps, "adjoint": adjoint_steps},
            linearised_at=unflatten(self.point.detach()),
            adjoint=lambda: unflatten(adjoint),
            gradients=self.gradients,
            penalty=found,
        )

    def _solve(self) -> int:
        self.injected.copy_(self.cell.inject(self.features).detach())
        return self.forward_solver.solve(self.tol)

    def _frozen(self, flat: Tensor, features: Tensor) -> Tensor:
        with torch.no_grad():
            return self.cell(flat, features, self.injected)

    def _capture_backward(self) -> None:
        """Captures the evaluation that keeps its graph, the adjoint's steps, and the final VJP."""
        right = torch.zeros_like(self.start)
        right[:, -self.problem.shape.dim :] = self.problem.cotangent

        def evaluate() -> None:
            injected = self.cell.inject(self.features)
            self.output = self.cell(self.point, self.features, injected)

        def vjp(y: Tensor) -> Tensor:
            (gradient,) = torch.autograd.grad(self.output, self.point, y, retain_graph=True)
            return gradient + right

        device = self.start.device
        self._evaluate = captured(evaluate, device)
        self.backward_solver = solver = GraphedAnderson(vjp, torch.zeros_like(self.start))
        solver.capture()

        def differentiate() -> None:
            self.found = torch.autograd.grad(
                self.output, self.leaves, solver.image, retain_graph=True
            )

        self._differentiate = captured(differentiate, device)
