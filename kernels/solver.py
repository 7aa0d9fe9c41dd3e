r"""What ends a row, and its next iterate: the part of a step that every block and schedule shares.

Per step and row: CONVERGED at ||g|| <= atol + rtol ||f||; the best finite iterate is kept; a
residual ten times the best, or one that is not finite, restarts the row with a damped step from its
best iterate, three times at most; PATIENCE steps without a better one end it STAGNATED. Rules,
codes and constants are those of `deqfusion.reference.iterate`; rows that ended are frozen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .anderson import mixture, remember, valid

PATIENCE = tl.constexpr(20)
RISE = tl.constexpr(10.0)
MAX_RESTARTS = tl.constexpr(3)
CONVERGED = tl.constexpr(0)
AT_MAX_STEPS = tl.constexpr(1)
STAGNATED = tl.constexpr(2)
NON_FINITE = tl.constexpr(3)


@triton.jit
def record(t, z, f, g, history, tile, step, live, g2, f2, dots, M: tl.constexpr):
    """Stores an evaluation t [BM, P] of z and its residual in the newest slot of the history.

    Returns g2, f2 [BM] and dots (M of [BM]) with this group's part added.
    """
    newest = (step % M).to(tl.int64) if M > 0 else tl.zeros([], tl.int64)
    f2 += tl.sum(t * t, 1)
    tl.store(f + newest * history + tile, t)
    t -= tl.load(z + tile)
    g2 += tl.sum(t * t, 1)
    tl.store(g + newest * history + tile, t)
    if M > 1:
        sums = ()
        for j in tl.static_range(M):
            # A slot that nothing was stored in yet is not read.
            other = tl.load(g + j * history + tile, mask=live[:, None] & (j <= step), other=0.0)
            other = tl.where(newest == j, t, other)
            sums = sums + (dots[j] + tl.sum(other * t, 1),)
        dots = sums
    return g2, f2, dots


@triton.jit
def judge(
    gn, fn, step, running, best, improved_at, restarts, rtol, atol, last,
    RESTART: tl.constexpr,
):  # fmt: skip
    """What the residual norms gn, fn [BM] of an evaluation decide for the rows.

    Returns improved, ended, code, lost, best, improved_at; all [BM].
    """
    finite = (gn < float("inf")) & (fn < float("inf"))
    relative = tl.minimum(gn / tl.maximum(fn, 1.1754943508222875e-38), 3.4028234663852886e38)
    met = running & finite & (gn <= atol + rtol * fn)
    improved = met | (running & finite & (relative < best))
    best = tl.where(improved, relative, best)
    improved_at = tl.where(improved, step, improved_at)
    hopeless = running & (finite == 0) & ((restarts >= MAX_RESTARTS) | (best == float("inf")))
    stagnant = running & (step - improved_at >= PATIENCE)
    ended = met | hopeless | stagnant | (running & last)
    code = tl.where(stagnant, STAGNATED, AT_MAX_STEPS)
    code = tl.where(hopeless, NON_FINITE, code)
    code = tl.where(met, CONVERGED, code)
    lost = running & (finite == 0)
    if RESTART:
        rising = finite & (relative > best * RISE) & (restarts < MAX_RESTARTS)
        lost = lost | (running & rising)
    return improved, ended, code, lost & (ended == 0), best, improved_at


@triton.jit
def advance(
    z, state, best_g, f, g, history, gram_rows, dots, step, first, ridge, mixing, improved, moving,
    lost, restarts,
    G: tl.constexpr, P: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """Stores the best iterates of improved rows and the next iterates of moving ones.

    z, state, best_g: scalar pointers to the program's first row of D channels; f, g: the same in
    slot 0 of the history, whose slots are `history` elements apart; restarts counts this one.
    """
    newest = (step % M).to(tl.int64) if M > 0 else tl.zeros([], tl.int64)
    rows = tl.arange(0, BM)[:, None] * (G * P)
    back = 1.0 - tl.exp2(-restarts.to(tl.float32))
    if M > 1:
        remember(gram_rows, dots, step, M)
        tl.debug_barrier()
        weights = mixture(gram_rows, step, first, ridge, M, BM, RELATIVE)
    for group in range(0, G):
        tile = rows + (group * P + tl.arange(0, P))[None, :]  # [BM, P]
        new = tl.load(f + newest * history + tile)
        change = tl.load(g + newest * history + tile)
        tl.store(state + tile, new, mask=improved[:, None])
        tl.store(best_g + tile, change, mask=improved[:, None])
        if M > 1:
            following = tl.zeros([BM, P], dtype=tl.float32)
            for j in tl.static_range(M):
                counts = valid(j, step, first, M)[:, None]
                old = tl.load(f + j * history + tile, mask=counts, other=0.0)
                if mixing != 1.0:
                    back_j = tl.load(g + j * history + tile, mask=counts, other=0.0)
                    old -= (1.0 - mixing) * back_j
                following += weights[j][:, None] * old
        else:
            following = new - (1.0 - mixing) * change
        if tl.max(lost.to(tl.int32), 0) > 0:
            # A row that improved is not lost: its stores above do not race with these loads.
            best = tl.load(state + tile, mask=lost[:, None], other=0.0)
            step_back = tl.load(best_g + tile, mask=lost[:, None], other=0.0)
            following = tl.where(lost[:, None], best - back[:, None] * step_back, following)
        tl.store(z + tile, following, mask=moving[:, None])


@triton.jit
def finish(
    z, state, best_g, f, g, history, gram, status, steps, residual, g2, f2, dots, step, max_steps,
    running, best, improved_at, restarts, first, rtol, atol, ridge, mixing,
    G: tl.constexpr, P: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """The rest of a step once all groups are evaluated: ends rows, stores, the next iterates.

    Pointers are those of the program's first row; status, steps, residual are written for rows
    that end. Returns running, best, improved_at, restarts, first; all [BM].
    """
    local = tl.arange(0, BM)
    last = step + 1 == max_steps
    improved, ended, code, lost, best, improved_at = judge(
        tl.sqrt(g2), tl.sqrt(f2), step, running, best, improved_at, restarts, rtol, atol, last,
        RELATIVE,
    )  # fmt: skip
    tl.store(status + local, code, mask=ended)
    tl.store(steps + local, tl.zeros([BM], dtype=tl.int32) + step + 1, mask=ended)
    tl.store(residual + local, best, mask=ended)
    running = running & (ended == 0)
    restarts += lost.to(tl.int32)
    first = tl.where(lost, step + 1, first)
    advance(
        z, state, best_g, f, g, history, gram + local * (M * M), dots, step, first, ridge, mixing,
        improved, running, lost, restarts, G, P, M, BM, RELATIVE,
    )  # fmt: skip
    return running, best, improved_at, restarts, first
