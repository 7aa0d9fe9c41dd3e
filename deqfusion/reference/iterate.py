r"""What every solve of a block shares: when a row ends, and how.

Per step and row: f = f(z), g = f - z; the row has CONVERGED when ||g|| <= atol + rtol ||f||. The
best finite iterate is kept. A residual ten times the best, or one that is not finite, restarts the
row from its best iterate with a damped step (twice as damped each time, three times at most; a row
that then still is not finite ends NON_FINITE). A row whose best residual has not fallen for
`PATIENCE` steps is STAGNATED. Rows that end without converging return their best iterate's f(z).

Best is the least ||g|| / ||f||. Where a map expands, that falls towards 1 while f grows without
end. In an adjoint solve, for a gradient of norm 1 from 0, the residual begins at 1: there no
evaluation with a larger one is the best, so that such a row falls back on its gradient. One that is
nearer, ||g|| / ||f|| less than the best's, counts as progress all the same: where a map expands for
a while only, the row has such ones before it converges.

Two loops do that: `deqfusion.reference.host` looks at the flags of the rows and drops those that
ended; `fixed_point_masked` here looks at nothing, runs `max_steps` steps with ended rows frozen,
and so never waits for a device.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deqfusion.reference.accelerate import Accelerator

PATIENCE = 20
RISE = 10.0
MAX_RESTARTS = 3
COMPACT_BELOW = 0.75
"""Rows that ended leave the work when fewer than this share still run; changes no answer."""

CONVERGED, AT_MAX_STEPS, STAGNATED, NON_FINITE = 0, 1, 2, 3

Anchor = tuple[Tensor, ...]
"""Tensors (K, R, d) of an exact evaluation, z first: what later ones are differences from."""


class Block(Protocol):
    """A map on rows: f(z) (K, R, d) for z (K, R, d) or None (zeros), and its part on some rows."""

    shape: torch.Size

    def __call__(self, z: Tensor | None) -> Tensor: ...

    def take(self, index: Tensor) -> Block:
        """The map of the rows index (K, S)."""
        ...


class LadderBlock(Block, Protocol):
    """A block with products of two precisions.

    A product W z near a point z_r where W z_r is known costs bfloat16 inputs only:
    W z = W z_r + W (z - z_r), with an error in proportion to ||z - z_r||.
    """

    def anchored(self, z: Tensor) -> tuple[Tensor, Anchor]:
        """f(z) exactly, and the anchor at z."""
        ...

    def near(self, z: Tensor, anchor: Anchor | None) -> Tensor:
        """f(z) with bfloat16 products of differences from the anchor; None stands for zeros."""
        ...

    def take(self, index: Tensor) -> LadderBlock: ...


class Settings(NamedTuple):
    """When a row ends, `rtol` may be a tensor (), and when rows that did leave the work.

    most: of an adjoint 1, the largest ||g|| that the best evaluation may have, but for the first.
    """

    rtol: float | Tensor
    atol: float
    max_steps: int
    restart: bool = True
    ladder: bool = False
    compact_below: float = COMPACT_BELOW
    most: float = math.inf


class Outcome(NamedTuple):
    """Results per row: state (K, R, d), status, steps int32 (K, R), residual fp32 (K, R).

    The state of a row is f(z) of its last, or where it did not converge of its best, evaluation in
    full precision. Without any (a first evaluation that is not finite) it is the start.
    """

    state: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor


def new_outcome(
    shape: torch.Size, start: Tensor | None, active: Tensor | None, example: Tensor
) -> Outcome:
    """Before the first step; rows that are not `active` (K, R) keep state 0, CONVERGED, 0 steps."""
    state = example.new_zeros(shape)
    if start is not None:
        state.copy_(torch.where(start.isfinite(), start, 0.0))
    status = torch.full(shape[:2], AT_MAX_STEPS, dtype=torch.int32, device=example.device)
    steps = torch.zeros_like(status)
    residual = torch.full(shape[:2], torch.inf, dtype=torch.float32, device=example.device)
    if active is not None:
        state.mul_(active.unsqueeze(-1))
        status.masked_fill_(~active, CONVERGED)
        residual.masked_fill_(~active, 0.0)
    return Outcome(state, status, steps, residual)


def relative_residual(gn: Tensor, fn: Tensor) -> Tensor:
    """||g|| / ||f||; 0 where both are 0, the largest finite number where f alone is."""
    limits = torch.finfo(fn.dtype)
    return (gn / fn.clamp_min(limits.tiny)).clamp_max(limits.max)


def damped(best_f: Tensor, best_g: Tensor, restarts: Tensor) -> Tensor:
    """Steps of half, a quarter, ... from best iterates (K, R, d), after `restarts` (K, R) >= 1."""
    back = 1.0 - torch.pow(0.5, restarts.to(best_f.dtype)).unsqueeze(-1)
    return best_f - back * best_g


def fixed_point_masked(
    block: Block,
    start: Tensor | None,
    accelerator: Accelerator,
    settings: Settings,
    active: Tensor | None,
    trace: Tensor | None,
    example: Tensor,
) -> Outcome:
    """Solves z = f(z) for every row without reading a flag.

    Args:
        block: the map.
        start: (K, R, d), or None for zeros.
        accelerator: fresh.
        settings: tolerances and limits; the ladder is not climbed here.
        active: bool (K, R) or None; see `new_outcome`.
        trace: (K, R, max_steps, 2) or None, filled with ||g|| and ||f|| of every evaluation.
        example: a tensor with the dtype and device of the state.

    Returns:
        The outcome.
    """
    outcome = new_outcome(block.shape, start, active, example)
    if outcome.state.numel() == 0:
        return outcome
    running = torch.ones_like(outcome.status, dtype=torch.bool) if active is None else active
    best = torch.full(running.shape, torch.inf, dtype=example.dtype, device=example.device)
    improved_at, restarts = torch.zeros_like(outcome.steps), torch.zeros_like(outcome.steps)
    best_f = best_g = outcome.state
    z = start
    for step in range(settings.max_steps):
        f = block(z)
        g = f if z is None else f - z
        gn, fn = torch.linalg.vector_norm(g, dim=-1), torch.linalg.vector_norm(f, dim=-1)
        relative = relative_residual(gn, fn)
        finite = gn.isfinite() & fn.isfinite()
        if trace is not None:
            _write(trace[:, :, step], running, torch.stack((gn, fn), -1))
        met = running & finite & (gn <= settings.atol + settings.rtol * fn)
        nearer = met | running & finite & (relative < best)
        improved = nearer & (met | (gn <= settings.most) | best.isinf())
        best_f = torch.where(improved.unsqueeze(-1), f, best_f)
        best_g = torch.where(improved.unsqueeze(-1), g, best_g)
        best = torch.where(improved, relative, best)
        improved_at = torch.where(nearer, step, improved_at)
        hopeless = running & ~finite & ((restarts >= MAX_RESTARTS) | best.isinf())
        stagnant = running & (step - improved_at >= PATIENCE)
        last = step + 1 == settings.max_steps
        ended = running if last else met | hopeless | stagnant
        known = ended & best.isfinite()
        _write(outcome.state, known, best_f)
        _write(outcome.residual, known, best.to(torch.float32))
        _write(outcome.status, ended, codes(met, hopeless, stagnant))
        outcome.steps.masked_fill_(ended, step + 1)
        running = running & ~ended
        if last:
            break
        z = accelerator.propose(z, f, g)
        lost = running & ~finite
        if settings.restart:
            lost = lost | running & finite & (relative > RISE * best) & (restarts < MAX_RESTARTS)
        accelerator.restart(lost)
        restarts = restarts + lost
        z = torch.where(lost.unsqueeze(-1), damped(best_f, best_g, restarts), z)
    return outcome


def codes(met: Tensor, hopeless: Tensor, stagnant: Tensor) -> Tensor:
    """The status int32 of rows that end."""
    code = torch.where(stagnant, STAGNATED, AT_MAX_STEPS)
    code = torch.where(hopeless, NON_FINITE, code)
    return torch.where(met, CONVERGED, code).to(torch.int32)


def _write(target: Tensor, chosen: Tensor, values: Tensor) -> None:
    chosen = chosen.reshape(*chosen.shape, *([1] * (values.dim() - chosen.dim())))
    target.copy_(torch.where(chosen, values, target))
