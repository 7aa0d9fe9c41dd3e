"""Every answer is held against the cell in fp64 before its time counts.

An answer passes when, for every row and every block, the relative residual of the joint map,
norm(f(z) - z) / norm(f(z)), is at most the target; the adjoint likewise with
norm(J^T y + w - y) over the norm of the gradient by the block's output (`AdjointSystem`),
linearised where the contender linearised. Its gradients by
parameters and features must be those that its adjoint gives in fp64; a contender that does not
keep its adjoint has them held against true ones, solved in fp64 (`deqfusion.bench.trial`). A
Jacobian penalty must have the value and the gradients that fp64 gives at the same state and probe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .contenders import Penalty
from .contenders.textbook import gradient_of, stacked_gradients
from .problem import Problem, TextbookCell

KINK = 3e-6
"""fp32 rounding of what enters a ReLU: closer to 0 than that, either derivative is right."""


def _relative(difference: Tensor, reference: Tensor) -> Tensor:
    """Ratio of norms over the last axis; infinite where anything is not finite."""
    scale = reference.norm(dim=-1)
    error = difference.norm(dim=-1)
    ratio = error / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    # A block with a zero reference (an adjoint nothing reaches) is exact only if it is zero too.
    ratio = torch.where((scale == 0) & (error == 0), 0.0, ratio)
    return ratio.nan_to_num(nan=torch.inf, posinf=torch.inf)


def verify_state(problem: Problem, state: Tensor) -> float:
    """Worst relative residual over rows and blocks, in fp64.

    Args:
        problem: the case.
        state: (N + 1, B, d), any floating dtype.

    Returns:
        The largest norm(f(z) - z) / norm(f(z)); infinite if the state is not finite.
    """
    features = problem.features.double()
    state = state.detach().double()
    with torch.no_grad():
        cell = problem.cell64
        image = cell(problem.flatten(state), features, cell.inject(features))
        image = problem.unflatten(image)
    return float(_relative(image - state, image).max())


class Linearisation:
    """The joint map linearised at a point in fp64, with the derivative of ReLU cut at `kink`.

    Args:
        problem: the case.
        state: (N + 1, B, d), where to linearise.
        kink: see `TextbookCell`.
        split: the fusion step is linearised at the modalities' states (a block-triangular solve),
            not at their next states (the joint map). The two differ by the modalities' residual.
    """

    def __init__(self, problem: Problem, state: Tensor, kink: float, split: bool) -> None:
        self.problem = problem
        self.cell = TextbookCell(problem.parameters, kink).double()
        self.features = problem.features.double().requires_grad_(True)
        self.point = problem.flatten(state.detach().double()).requires_grad_(True)
        with torch.enable_grad():
            *states, fused = self.point.split(problem.shape.dim, dim=1)
            purified = self.cell.purify(states, self.features)
            seen = purified
            if split:
                pairs = zip(purified, states, strict=True)
                seen = [value + (state - value).detach() for value, state in pairs]
            self.seen = [value.detach() for value in seen]
            step = self.cell.combine(seen, fused, self.cell.inject(self.features))
            self.image = torch.cat([*purified, step], dim=1)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """J^T applied to (B, (N + 1) d)."""
        (gradient,) = torch.autograd.grad(self.image, self.point, cotangent, retain_graph=True)
        return gradient

    def through_fusion(self, cotangent: Tensor) -> Tensor:
        """What (B, d) at the fused output gives at the modalities' outputs, (N, B, d)."""
        leaves = [value.clone().requires_grad_(True) for value in self.seen]
        fused = self.problem.unflatten(self.point.detach())[-1]
        with torch.enable_grad():
            step = self.cell.combine(leaves, fused, self.cell.inject(self.features.detach()))
        return torch.stack(torch.autograd.grad(step, leaves, cotangent))

    def gradients(self, adjoint: Tensor) -> dict[str, Tensor]:
        """VJP of (B, (N + 1) d) by the parameters and "features"."""
        self.cell.zero_grad(set_to_none=True)
        self.features.grad = None
        self.image.backward(adjoint, retain_graph=True)
        return {"features": gradient_of(self.features), **stacked_gradients(self.cell)}


class AdjointSystem:
    """Checks an adjoint (N + 1, B, d) of the joint map at a point, in fp64.

    Where an input of a ReLU is within fp32 rounding of 0, fp32 and fp64 may stand on either side
    of it, and the derivatives of that row differ by far more than rounding. A row is therefore
    held against the cuts at 0, `KINK` and -`KINK`, and the one that fits it best counts.

    Args:
        problem: the case.
        state: (N + 1, B, d), where to linearise.
        split: see `Linearisation`.
    """

    def __init__(self, problem: Problem, state: Tensor, split: bool = False) -> None:
        self.problem = problem
        self.cuts = [Linearisation(problem, state, kink, split) for kink in (0.0, KINK, -KINK)]
        self.right_hand_side = torch.zeros_like(self.cuts[0].image)
        self.right_hand_side[:, -problem.shape.dim :] = problem.cotangent.double()

    def residuals(self, adjoint: Tensor) -> Tensor:
        """Relative residual by cut, block and row: (3, N + 1, B).

        A modality's output reaches the loss through its own next step and through the fusion step
        of the same evaluation. Its gradients come from the sum of both, so that sum is the scale.
        """
        adjoint = adjoint.detach().double()
        flat = self.problem.flatten(adjoint)
        found = []
        for cut in self.cuts:
            step = cut.vjp(flat) + self.right_hand_side
            difference = self.problem.unflatten(step - flat)
            total = adjoint + difference
            total[:-1] += cut.through_fusion(adjoint[-1])
            found.append(_relative(difference, total))
        return torch.stack(found)

    def residual(self, adjoint: Tensor) -> float:
        """Worst relative residual over rows and blocks."""
        return float(self.residuals(adjoint).amax(dim=1).amin(dim=0).max())

    def gradients(self, adjoint: Tensor) -> dict[str, Tensor]:
        """The loss's gradients with this adjoint: by the parameters and "features"."""
        best = self.residuals(adjoint).amax(dim=1).argmin(dim=0)
        flat = self.problem.flatten(adjoint.detach().double())
        parts = [
            cut.gradients(flat * (best == index).unsqueeze(1))
            for index, cut in enumerate(self.cuts)
        ]
        return {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in parts[0]}


def penalty_in_fp64(problem: Problem, penalty: Penalty) -> tuple[float, dict[str, Tensor]]:
    """The Jacobian penalty at the same state and probe, in fp64.

    Returns:
        Its value, and its gradients by the parameters and "features", times the loss's weight.
    """
    cell = TextbookCell(problem.parameters).double()
    features = problem.features.double().requires_grad_(True)
    point = problem.flatten(penalty.at.detach().double()).requires_grad_(True)
    probe = problem.flatten(penalty.probe().double())
    with torch.enable_grad():
        image = cell(point, features, cell.inject(features))
        # J v is the derivative of u^T J by u, in the direction of v.
        first = probe if penalty.transposed else torch.zeros_like(image, requires_grad=True)
        (product,) = torch.autograd.grad(image, point, first, create_graph=True)
        if not penalty.transposed:
            (product,) = torch.autograd.grad(product, first, probe, create_graph=True)
        value = product.square().sum() / point.numel()
        (problem.penalty_weight * value).backward()
    # What the penalty does not depend on, as the last biases, gets none.
    for parameter in cell.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return float(value.detach()), {"features": gradient_of(features), **stacked_gradients(cell)}


def gradient_error(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Largest relative error over the named gradients, norm(g - r) / norm(r) per tensor.

    Infinite where a gradient, or what it is held against, is not finite.

    Raises:
        ValueError: if a gradient of the reference is missing.
    """
    missing = sorted(set(reference) - set(found))
    if missing:
        raise ValueError(f"gradients missing: {', '.join(missing)}")
    scale = max(float(value.norm()) for value in reference.values())
    errors = []
    for name, expected in reference.items():
        difference = float((found[name].detach().double() - expected).norm())
        # Biases in front of a norm have gradients near zero: their own norm is no scale.
        errors.append(_quotient(difference, max(float(expected.norm()), 1e-3 * scale)))
    return max(errors)


def penalty_error(found: float, expected: float) -> float:
    """Relative error of a penalty's value; infinite where one is not finite."""
    return _quotient(abs(found - expected), abs(expected))


def _quotient(difference: float, scale: float) -> float:
    """Infinite where anything is not finite: `max` passes over a NaN that is not its first."""
    if not (math.isfinite(difference) and math.isfinite(scale)):
        return math.inf
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf
