r"""The history of a program that keeps it in registers: no step reads what an earlier one stored.

A program of one group, of M evaluations of a tile [BM, P] that is small enough, carries from step
to step, oldest first, what else would be the solver's planes in global memory:

    held = (z, f, g, gram)

z [BM, P], M - 1 evaluations and residuals each [BM, P], and the lower half of their Gram matrix,
row by row, (M - 1) M / 2 of [BM]. Entry i, of `step` - (M - 1 - i), counts in a row from its first
step on. The oldest residual is as a rule the largest, and eliminated first. Sums over channels are
tuples (||g||^2, ||f||^2, <g, g_0>, ...) of [BM]. All of it is fp32.

What other programs read, z, goes through global memory as ever, and so does the best iterate, which
is only written. There is no ladder: what that keeps would not find registers as well (LADDER "half"
keeps nothing, and is one in name only).
Source: as `kernels.anderson`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .anderson import solution
from .schedule import SUMS, share


@triton.jit
def held_from(z, M: tl.constexpr, BM: tl.constexpr, P: tl.constexpr, RESIDENT: tl.constexpr):
    """What a program holds before the first step from z [BM, P]; nothing where not RESIDENT."""
    if RESIDENT:
        blank = tl.zeros([BM, P], dtype=tl.float32)
        f = ()
        gram = ()
        for i in tl.static_range(M - 1):
            f = f + (blank,)
            for _ in tl.static_range(i + 1):
                gram = gram + (tl.zeros([BM], dtype=tl.float32),)
        held = (z, f, f, gram)
    else:
        held = (tl.zeros([1], dtype=tl.float32),)
    return held


@triton.jit
def blank_of(BM: tl.constexpr, P: tl.constexpr, RESIDENT: tl.constexpr):
    """A tile [BM, P] of what a program holds, or where it does not next to nothing."""
    shape: tl.constexpr = [BM, P] if RESIDENT else [1]
    return tl.zeros(shape, dtype=tl.float32)


@triton.jit
def sums_of(t, change, g, M: tl.constexpr):
    """This group's part of the sums; t, change: the newest evaluation and residual."""
    sums = (tl.sum(change * change, 1), tl.sum(t * t, 1))
    for i in tl.static_range(M - 1):
        sums = sums + (tl.sum(change * g[i], 1),)
    return sums


@triton.jit
def share_all(partials, step, group, sums, G: tl.constexpr, M: tl.constexpr, BM: tl.constexpr):
    """Stores this group's part of the sums; partials: as of `solver.share_sums`."""
    here = partials + (step % 2) * (G * SUMS * BM)
    for i in tl.static_range(M + 1):
        share(here, i, sums[i], group, BM)


@triton.jit
def gather_all(partials, step, G: tl.constexpr, M: tl.constexpr, BM: tl.constexpr):
    """The sums over all groups, in their order."""
    here = partials + (step % 2) * (G * SUMS * BM) + tl.arange(0, BM)
    sums = ()
    for i in tl.static_range(M + 1):
        total = tl.zeros([BM], dtype=tl.float32)
        for group in tl.static_range(G):
            total += tl.load(here + (group * SUMS + i) * BM)
        sums = sums + (total,)
    return sums


@triton.jit
def advance_held(
    held, t, change, z, best_f, best_g, sums, step, first, ridge, mixing, improved, moving, lost,
    restarts, group, deltas,
    W: tl.constexpr, P: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, RELATIVE: tl.constexpr,
    LADDER: tl.constexpr,
):  # fmt: skip
    """As `solver.advance`, of a program of one group. Returns what it holds from then on."""
    state, f, g, gram = held
    a = ()
    counts = ()
    for i in tl.static_range(M - 1):
        counts = counts + (step - (M - 1 - i) >= first,)
        for j in tl.static_range(i + 1):
            entry = gram[i * (i + 1) // 2 + j]
            a = a + (tl.where(counts[i] & counts[j], entry, 0.0),)
    for i in tl.static_range(M - 1):
        a = a + (tl.where(counts[i], sums[i + 2], 0.0),)
    a = a + (sums[0],)
    counts = counts + (first <= step,)
    weights, sound = solution(a, counts, ridge, M, BM, RELATIVE)
    rest = 1.0 - mixing
    following = tl.where(sound, weights[M - 1], 1.0)[:, None] * (t - rest * change)
    for i in tl.static_range(M - 1):
        # Beyond what counts there may be numbers that are not finite.
        used = counts[i] & sound
        weight = tl.where(used, weights[i], 0.0)[:, None]
        old = tl.where(used[:, None], f[i] - rest * g[i], 0.0)
        following += weight * old
    tile = tl.arange(0, BM)[:, None] * W + (group * P + tl.arange(0, P))[None, :]
    tl.store(best_f + tile, t, mask=improved[:, None])
    tl.store(best_g + tile, change, mask=improved[:, None])
    if tl.max(lost.to(tl.int32), 0) > 0:
        # A row that improved is not lost: its stores above do not race with these loads.
        back = 1.0 - tl.exp2(-restarts.to(tl.float32))
        best = tl.load(best_f + tile, mask=lost[:, None], other=0.0)
        step_back = tl.load(best_g + tile, mask=lost[:, None], other=0.0)
        following = tl.where(lost[:, None], best - back[:, None] * step_back, following)
    state = tl.where(moving[:, None], following, state)
    tl.store(z + tile, state)
    if LADDER == "half":
        tl.store(deltas + tile, state.to(tl.float16))
    later_f = ()
    later_g = ()
    later = ()
    for i in tl.static_range(1, M):
        if i < M - 1:
            later_f = later_f + (f[i],)
            later_g = later_g + (g[i],)
        for j in tl.static_range(1, i + 1):
            later = later + (a[i * (i + 1) // 2 + j],)
    return (state, later_f + (t,), later_g + (change,), later)
