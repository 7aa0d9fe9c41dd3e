"""Implicit differentiation with dense Jacobians, for problems small enough to afford it.

Every row is its own problem, so the Jacobian of a batch is B matrices of n x n with
n = (N+1) d. All of them come from one backward pass over n copies of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]


def _flatten(state: Tensor) -> Tensor:
    """(N+1, B, d) -> (B, (N+1) d), blocks in order."""
    blocks, batch, dim = state.shape
    return state.transpose(0, 1).reshape(batch, blocks * dim)


def _unflatten(vector: Tensor, blocks: int) -> Tensor:
    """(B, (N+1) d) -> (N+1, B, d)."""
    return vector.reshape(vector.shape[0], blocks, -1).transpose(0, 1)


def dense_jacobian(step_of_row: Callable[[Tensor, Tensor], Tensor], state: Tensor) -> Tensor:
    """Computes the Jacobian of every row of a row-wise map.

    Args:
        step_of_row: maps a state (N+1, R, d) and the row indices (R,) it belongs to, to the next
            state; the indices let it pick each row's features.
        state: where to differentiate, (N+1, B, d).

    Returns:
        J, (B, n, n) with J[b, i, j] = d f_i / d z_j and n = (N+1) d.
    """
    blocks, batch, dim = state.shape
    size = blocks * dim
    rows = torch.arange(batch).repeat_interleave(size)
    repeated = _flatten(state.detach()).repeat_interleave(size, dim=0)
    repeated = _unflatten(repeated, blocks).contiguous().requires_grad_()
    with torch.enable_grad():
        out = step_of_row(repeated, rows)
        eye = torch.eye(size, dtype=state.dtype).repeat(batch, 1)
        (gradient,) = torch.autograd.grad(out, repeated, _unflatten(eye, blocks))
    return _flatten(gradient).reshape(batch, size, size)


def dense_adjoint(jacobian: Tensor, cotangent: Tensor) -> Tensor:
    """Solves (I - J^T) lambda = v for every row.

    Args:
        jacobian: (B, n, n).
        cotangent: v, (N+1, B, d).

    Returns:
        lambda, (N+1, B, d).
    """
    system = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype) - jacobian.transpose(1, 2)
    solution = torch.linalg.solve(system, _flatten(cotangent).unsqueeze(-1)).squeeze(-1)
    return _unflatten(solution, cotangent.shape[0])


def implicit_gradient(
    step: Step, state: Tensor, jacobian: Tensor, cotangent: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Differentiates <cotangent, z*> with respect to inputs by the implicit function theorem.

    Args:
        step: the cell as a function of the state (N+1, B, d), closing over `inputs`.
        state: the fixed point.
        jacobian: J at the fixed point, (B, n, n).
        cotangent: v, (N+1, B, d).
        inputs: leaf tensors that require grad.

    Returns:
        One gradient per input; zeros where the cell does not depend on it.
    """
    adjoint = dense_adjoint(jacobian, cotangent)
    with torch.enable_grad():
        out = step(state.detach())
    return torch.autograd.grad(
        out, list(inputs), adjoint, allow_unused=True, materialize_grads=True
    )


def spectral_radius(jacobian: Tensor) -> Tensor:
    """Returns the largest eigenvalue magnitude of every row's Jacobian, (B,)."""
    return torch.linalg.eigvals(jacobian).abs().amax(dim=-1)
