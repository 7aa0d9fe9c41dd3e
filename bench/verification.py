"""Every answer is held against the cell in fp64 before its time counts.

An answer passes when, for every row and every block, the relative residual of the joint map,
norm(f(z) - z) / norm(f(z)), is at most the target; the adjoint likewise with
norm(J^T y + w - y) over the norm of the gradient by the block's output (`AdjointSystem`),
linearised where the contender linearised. Its gradients by
parameters and features must be those that its adjoint gives in fp64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .contenders.textbook import gradient_of, stacked_gradients
from .problem import Problem, TextbookCell


def _worst(difference: Tensor, reference: Tensor) -> float:
    """Largest ratio of norms over the last axis; infinite where anything is not finite."""
    scale = reference.norm(dim=-1)
    ratio = difference.norm(dim=-1) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    # A block with a zero reference (an adjoint nothing reaches) is exact only if it is zero too.
    ratio = torch.where((scale == 0) & (difference.norm(dim=-1) == 0), 0.0, ratio)
    return float(ratio.nan_to_num(nan=torch.inf).max())


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
    return _worst(image - state, image)


class AdjointSystem:
    """The joint map linearised at a point, in fp64: J^T, the right-hand side, the last VJP.

    Args:
        problem: the case.
        state: (N + 1, B, d), where to linearise.
    """

    def __init__(self, problem: Problem, state: Tensor) -> None:
        self.problem = problem
        self.cell = TextbookCell(problem.parameters).double()
        self.features = problem.features.double().requires_grad_(True)
        self.point = problem.flatten(state.detach().double()).requires_grad_(True)
        with torch.enable_grad():
            self.image = self.cell(self.point, self.features, self.cell.inject(self.features))
        self.right_hand_side = torch.zeros_like(self.image)
        self.right_hand_side[:, -problem.shape.dim :] = problem.cotangent.double()

    def vjp(self, cotangent: Tensor) -> Tensor:
        """J^T applied to (B, (N + 1) d)."""
        (gradient,) = torch.autograd.grad(self.image, self.point, cotangent, retain_graph=True)
        return gradient

    def residual(self, adjoint: Tensor) -> float:
        """Worst relative residual over rows and blocks of an adjoint (N + 1, B, d).

        A modality's output reaches the loss through its own next step and through the fusion step
        of the same evaluation. Its gradients come from the sum of both, so that sum is the scale.
        """
        unflatten = self.problem.unflatten
        flat = self.problem.flatten(adjoint.detach().double())
        difference = unflatten(self.vjp(flat) + self.right_hand_side - flat)
        total = adjoint.detach().double() + difference
        *outputs, _ = unflatten(self.image.detach()).unbind()
        leaves = [output.clone().requires_grad_(True) for output in outputs]
        fused = unflatten(self.point.detach())[-1]
        features = self.features.detach()
        with torch.enable_grad():
            step = self.cell.combine(leaves, fused, self.cell.inject(features))
        through = torch.autograd.grad(step, leaves, adjoint[-1].detach().double())
        total[:-1] += torch.stack(through)
        return _worst(difference, total)

    def gradients(self, adjoint: Tensor) -> dict[str, Tensor]:
        """The loss's gradients with this adjoint (N + 1, B, d): parameters and "features"."""
        self.cell.zero_grad(set_to_none=True)
        self.features.grad = None
        self.image.backward(self.problem.flatten(adjoint.detach().double()), retain_graph=True)
        return {"features": gradient_of(self.features), **stacked_gradients(self.cell)}


def gradient_error(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Largest relative error over the named gradients, norm(g - r) / norm(r) per tensor.

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
        errors.append(difference / max(float(expected.norm()), 1e-3 * scale))
    return max(errors)
