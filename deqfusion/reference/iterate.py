r"""The loop: a fixed point of every row of a block, each stopped and frozen on its own.

Per step and row: f = f(z), g = f - z; the row has CONVERGED when ||g|| <= atol + rtol ||f||. The
best finite iterate is kept. A residual ten times the best, or one that is not finite, restarts the
row from its best iterate with a damped step (twice as damped each time, three times at most; a row
that then still is not finite ends NON_FINITE). A row whose best residual has not fallen for
`PATIENCE` steps is STAGNATED. Rows that end without converging return their best iterate's f(z).

On a CPU the loop looks at the rows' flags: it ends with the last row, and rows that ended are
dropped from the work once a quarter of them has (compaction). On other devices it looks at nothing:
it runs `max_steps` steps with ended rows frozen, without synchronisation.

Precision ladder (CPU): a row far from its fixed point after the first evaluation goes on with
bfloat16 products and leaves them for good once its residual is within reach of their floor, or
stops falling; only steps in full precision can end a row or become its best iterate. The choice is
made row by row, and products are never run on fewer than `MIN_ROWS` rows (below, the libraries
change their order of summation), so that a row's answer does not depend on the batch.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deqfusion.reference.product import take_rows

MIN_ROWS = 16
COMPACT_BELOW = 0.75
PATIENCE = 20
RISE = 10.0
MAX_RESTARTS = 3
# bfloat16 products floor the relative residual near 1e-3 (their inputs carry 2^-9); a row leaves
# them above that, where its steps are still as good as exact ones.
LOW_FLOOR = 1e-2
LOW_PATIENCE = 2

CONVERGED, AT_MAX_STEPS, STAGNATED, NON_FINITE = 0, 1, 2, 3


class Block(Protocol):
    """A map on rows: f(z) (K, R, d) for z (K, R, d) or None (zeros), and its part on some rows."""

    shape: torch.Size

    def __call__(self, z: Tensor | None, low: bool = False) -> Tensor: ...

    def take(self, index: Tensor) -> Block: ...


class Accelerator(Protocol):
    """See `deqfusion.reference.accelerate`."""

    def propose(self, step: int, z: Tensor | None, f: Tensor, g: Tensor) -> Tensor: ...

    def restart(self, rows: Tensor, step: int) -> None: ...

    def take(self, index: Tensor) -> None: ...


class Settings(NamedTuple):
    """When a row ends; `rtol` may be a tensor (), which is not read but compared with."""

    rtol: float | Tensor
    atol: float
    max_steps: int
    restart: bool = True
    ladder: bool = False


class Outcome(NamedTuple):
    """Results per row: state (K, R, d), status, steps int32 (K, R), residual fp32 (K, R)."""

    state: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor


class _Rows:
    """The tensors of the rows still in work, all (K, S) or (K, S, d), compacted together."""

    def __init__(self, running: Tensor, origin: Tensor, like: Tensor) -> None:
        self.running, self.origin = running, origin
        self.best = torch.full_like(like, torch.inf)
        self.improved_at = torch.zeros_like(origin)
        self.restarts = torch.zeros_like(origin)
        self.low = torch.zeros_like(running)
        self.low_best = torch.full_like(like, torch.inf)
        self.best_f: Tensor | None = None
        self.best_g: Tensor | None = None

    def take(self, index: Tensor) -> None:
        for name in ("running", "origin", "best", "improved_at", "restarts", "low", "low_best"):
            setattr(self, name, getattr(self, name).gather(1, index))
        if self.best_f is not None and self.best_g is not None:
            self.best_f, self.best_g = take_rows(self.best_f, index), take_rows(self.best_g, index)


def fixed_point(
    block: Block,
    start: Tensor | None,
    accelerator: Accelerator,
    settings: Settings,
    active: Tensor | None = None,
    trace: Tensor | None = None,
    example: Tensor | None = None,
) -> Outcome:
    """Solves z = f(z) for every row.

    Args:
        block: the map.
        start: (K, R, d), or None for zeros.
        accelerator: fresh.
        settings: tolerances and limits.
        active: bool (K, R); rows left out keep state 0, status CONVERGED, steps 0, residual 0.
        trace: (K, R, max_steps, 2), filled with ||g|| and ||f|| of every evaluation.
        example: a tensor with the dtype and device of the state.

    Returns:
        The outcome; the state of a row is f(z) of its last, or where it did not converge its best,
        evaluation in full precision. Without any (a first evaluation that is not finite) it is the
        start.
    """
    assert example is not None
    shape = block.shape
    host = example.device.type == "cpu"
    out = example.new_zeros(shape)
    if start is not None:
        out.copy_(torch.where(start.isfinite(), start, 0.0))
    status = torch.full(shape[:2], AT_MAX_STEPS, dtype=torch.int32, device=example.device)
    steps = torch.zeros_like(status)
    residual = torch.full(shape[:2], torch.inf, dtype=torch.float32, device=example.device)
    if active is not None:
        out.mul_(active.unsqueeze(-1))
        status.masked_fill_(~active, CONVERGED)
        residual.masked_fill_(~active, 0.0)
    outcome = Outcome(out, status, steps, residual)
    if out.numel() == 0:
        return outcome

    count = shape[1]
    origin = torch.arange(count, device=example.device).expand(shape[:2]).contiguous()
    running = torch.ones_like(origin, dtype=torch.bool) if active is None else active.clone()
    z = start
    if host and count < MIN_ROWS:
        origin = torch.arange(MIN_ROWS).clamp(max=count - 1).expand(shape[0], -1).contiguous()
        running = running.gather(1, origin) & (torch.arange(MIN_ROWS) < count)
        block = block.take(origin)
        z = None if z is None else take_rows(z, origin)
    ladder = settings.ladder and host
    rows = _Rows(running, origin, example.new_empty(origin.shape))

    def some(flags: Tensor) -> bool:
        return not host or bool(flags.any())

    for step in range(settings.max_steps):
        if host and not some(rows.running):
            break
        f = _evaluate(block, z, rows) if ladder else block(z)
        g = f if z is None else f - z
        gn, fn = torch.linalg.vector_norm(g, dim=-1), torch.linalg.vector_norm(f, dim=-1)
        relative = gn / fn.clamp_min(torch.finfo(fn.dtype).tiny)
        finite = relative.isfinite()
        if trace is not None:
            _scatter(trace[:, :, step], rows.origin, rows.running, torch.stack((gn, fn), -1), host)

        exact = rows.running & ~rows.low if ladder else rows.running
        improved = exact & finite & (relative < rows.best)
        _keep_best(rows, improved, relative, f, g, step, host)
        met = exact & finite & (gn <= settings.atol + settings.rtol * fn)
        broken = rows.running & ~finite
        hopeless = broken & ((rows.restarts >= MAX_RESTARTS) | rows.best.isinf())
        stagnant = exact & (step - rows.improved_at >= PATIENCE)
        if ladder:
            # A low-precision evaluation that is not finite is tried again in full precision.
            hopeless &= ~rows.low
        last = step + 1 == settings.max_steps
        ended = rows.running if last else met | hopeless | stagnant
        if some(ended):
            code = torch.where(stagnant, STAGNATED, AT_MAX_STEPS)
            code = torch.where(hopeless, NON_FINITE, code)
            code = torch.where(met, CONVERGED, code)
            _finish(outcome, rows, ended, code, step, host)
            rows.running = rows.running & ~ended
            if last:
                break
            if host:
                left = max(int(rows.running.sum(1).max()), MIN_ROWS)
                if left < COMPACT_BELOW * rows.running.shape[1]:
                    index = rows.running.argsort(dim=1, descending=True, stable=True)[:, :left]
                    rows.take(index)
                    block = block.take(index)
                    accelerator.take(index)
                    f, g = take_rows(f, index), take_rows(g, index)
                    z = None if z is None else take_rows(z, index)
                    relative, finite = relative.gather(1, index), finite.gather(1, index)

        following = accelerator.propose(step, z, f, g)
        lost = rows.running & ~finite
        if settings.restart:
            rising = finite & (relative > RISE * rows.best) & (rows.restarts < MAX_RESTARTS)
            lost = lost | (rows.running & rising)
        if some(lost):
            following = _restart(accelerator, rows, lost, following, z, step)
        if ladder and step == 0:
            # The first evaluation is exact: a warm start may need no other.
            rows.low = rows.running & finite & (relative > 10 * LOW_FLOOR)
        elif ladder:
            _leave_low(rows, relative, finite, settings.rtol, step)
        z = following
    return outcome


def _evaluate(block: Block, z: Tensor | None, rows: _Rows) -> Tensor:
    """f(z), with bfloat16 products for the rows of the ladder's lower step."""
    low = rows.low & rows.running
    high = ~rows.low & rows.running
    if not bool(low.any()):
        return block(z)
    if not bool(high.any()):
        return block(z, True)
    parts = []
    for subset, cheap in ((low, True), (high, False)):
        size = max(int(subset.sum(1).max()), MIN_ROWS)
        index = subset.argsort(dim=1, descending=True, stable=True)[:, :size]
        part = block.take(index)(None if z is None else take_rows(z, index), cheap)
        whole = part.new_zeros(*subset.shape, part.shape[-1])
        parts.append(whole.scatter_(1, index.unsqueeze(-1).expand_as(part), part))
    return torch.where(rows.low.unsqueeze(-1), parts[0], parts[1])


def _leave_low(
    rows: _Rows, relative: Tensor, finite: Tensor, rtol: float | Tensor, step: int
) -> None:
    """Moves rows near the floor of the cheap products, or stalled, to full precision."""
    if not bool(rows.low.any()):
        return
    near = relative <= torch.clamp(torch.as_tensor(rtol, dtype=relative.dtype), min=LOW_FLOOR)
    fell = finite & (relative < 0.9 * rows.low_best)
    stalled = ~fell & (step - rows.improved_at >= LOW_PATIENCE)
    rows.improved_at = torch.where(rows.low & fell, step, rows.improved_at)
    rows.low_best = torch.where(fell, relative, rows.low_best)
    leave = rows.low & (near | stalled | ~finite)
    rows.improved_at = torch.where(leave, step, rows.improved_at)
    rows.low = rows.low & ~leave


def _keep_best(
    rows: _Rows, improved: Tensor, relative: Tensor, f: Tensor, g: Tensor, step: int, host: bool
) -> None:
    """Updates the best iterate; where every row improved, by reference."""
    if rows.best_f is None or rows.best_g is None or (host and bool(improved.all())):
        # At the first evaluation there is nothing better; where it is not finite, `best` says so.
        rows.best_f, rows.best_g = f, g
    elif not host or bool(improved.any()):
        rows.best_f = torch.where(improved.unsqueeze(-1), f, rows.best_f)
        rows.best_g = torch.where(improved.unsqueeze(-1), g, rows.best_g)
    rows.best = torch.where(improved, relative, rows.best)
    rows.improved_at = torch.where(improved, step, rows.improved_at)


def _restart(
    accelerator: Accelerator, rows: _Rows, lost: Tensor, following: Tensor, z: Tensor | None,
    step: int,
) -> Tensor:  # fmt: skip
    """Damped steps from the best iterates of the rows `lost`, their history forgotten."""
    assert rows.best_f is not None
    assert rows.best_g is not None
    accelerator.restart(lost, step + 1)
    rows.restarts = rows.restarts + lost
    back = 1.0 - torch.pow(0.5, rows.restarts.to(following.dtype)).unsqueeze(-1)
    damped = rows.best_f - back * rows.best_g
    # Without a best iterate (the cheap products failed at once) the row begins again.
    begin = torch.zeros_like(damped) if z is None else z
    damped = torch.where(rows.best.isinf().unsqueeze(-1), begin, damped)
    return torch.where(lost.unsqueeze(-1), damped, following)


def _finish(
    outcome: Outcome, rows: _Rows, ended: Tensor, code: Tensor, step: int, host: bool
) -> None:
    """Writes the results of the rows that ended where they came from."""
    assert rows.best_f is not None
    known = ended & rows.best.isfinite()
    _scatter(outcome.state, rows.origin, known, rows.best_f, host)
    _scatter(outcome.residual, rows.origin, known, rows.best.to(torch.float32), host)
    _scatter(outcome.status, rows.origin, ended, code.to(torch.int32), host)
    _scatter(outcome.steps, rows.origin, ended, torch.full_like(code, step + 1, dtype=torch.int32),
             host)  # fmt: skip


def _scatter(target: Tensor, origin: Tensor, chosen: Tensor, values: Tensor, host: bool) -> None:
    """target[k, origin[k, s]] = values[k, s] for the chosen (k, s)."""
    if host:
        block, row = chosen.nonzero(as_tuple=True)
        target[block, origin[block, row]] = values[block, row].to(target.dtype)
        return
    # Nothing is compacted here: origin is the identity.
    chosen = chosen.reshape(*chosen.shape, *([1] * (values.dim() - 2)))
    target.copy_(torch.where(chosen, values, target))
