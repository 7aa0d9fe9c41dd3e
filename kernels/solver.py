r"""What ends a row, and its next iterate: the part of a step that every block and schedule shares.

Per step and row: CONVERGED at ||g|| <= atol + rtol ||f||; the best finite iterate is kept; a
residual ten times the best, or one that is not finite, restarts the row with a damped step from its
best iterate, three times at most; PATIENCE steps without a better one end it STAGNATED. Rules,
codes and constants are those of `deqfusion.reference.iterate`; rows that ended are frozen.

Precision ladder, as in `deqfusion.reference.host`: a program begins with cheap products of
differences from the last exact evaluation, which all rows have in the first, the fifth, the
eleventh and so on (`kind_of`). A row leaves, and waits, when its residual is within REACH of the
tolerance, when it is lost, or when the next evaluation is its last. When no row is left, all that
wait go on by exact evaluations alone, their history forgotten. Only exact evaluations end a row or
become its best iterate. No row's steps depend on another's.

A truncated solve (phantom gradients) takes `max_steps` plain damped steps and returns the last
iterate; it has M = 1, whose one dot is <f, g>.

A program owns BM rows: flags, residuals and counts are tiles [BM], states [BM, P] a group at a time
out of planes (BM, W); the history, M planes of f and M of g behind a kernel's own, is that of
`kernels.anderson`. All of it is fp32 or int32. On the ladder there follow planes (5, BM, W) of the
size of fp32: anchors (4, BM, W), of either product its factor in the last exact evaluation, the
origin, and what it gave; and in bfloat16 deltas (2, BM, W), the factors less their origins.
Source: as `kernels.anderson`; phantom gradients: Z. Geng et al., "On training implicit models",
NeurIPS 2021.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .anderson import SLOTS, column_of, mixture, remember, valid, with_column
from .primitives import ANCHORED, EXACT, NEAR
from .resident import advance_held, gather_all, share_all, sums_of
from .schedule import SUMS, gather, share

PATIENCE = tl.constexpr(20)
RISE = tl.constexpr(10.0)
MAX_RESTARTS = tl.constexpr(3)
REACH = tl.constexpr(2.0)
FIRST_ANCHOR = tl.constexpr(4)
ANCHOR_EVERY = tl.constexpr(6)
CONVERGED = tl.constexpr(0)
AT_MAX_STEPS = tl.constexpr(1)
STAGNATED = tl.constexpr(2)
NON_FINITE = tl.constexpr(3)
SAVED = tl.constexpr(9)
HELD = tl.constexpr(2048)
"""Elements of a part of a tile, of which one for every slot of the history is held at once."""


@triton.jit
def planes_of(own: tl.constexpr, M: tl.constexpr, LADDER: tl.constexpr):
    """Planes (BM, W) of a row block's scratch, of which `own` are the kernel's and come first."""
    return own + 2 * (M if M > 0 else 1) + (0 if LADDER == "" else 1 if LADDER == "half" else 5)


@triton.jit
def history_of(f, W: tl.constexpr, BM: tl.constexpr, M: tl.constexpr, LADDER: tl.constexpr):
    """g, anchors and deltas, which follow the slots of f in a row block's scratch.

    On the ladder: four planes in fp32, and two in bfloat16; with LADDER "half" the last two, in
    float16, follow g; else these are g.
    """
    SLOTS_OF: tl.constexpr = (M if M > 0 else 1) * BM * W
    g = f + SLOTS_OF
    if LADDER == "":
        anchors = g
        deltas = g
    elif LADDER == "half":
        anchors = g
        deltas = (g + SLOTS_OF).to(tl.pointer_type(tl.float16), bitcast=True)
    else:
        anchors = g + SLOTS_OF
        deltas = (anchors + 4 * BM * W).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    return g, anchors, deltas


@triton.jit
def record(
    held, t, z, f, g, group, step, sums,
    W: tl.constexpr, P: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Stores an evaluation t [BM, P] of z and its residual in the newest slot of the history.

    Returns the sums (||g||^2, ||f||^2 [BM], products of residuals [BM, 8]) with this group's part
    added. Where a program is RESIDENT (`kernels.resident`) t goes through slot 0 only to be read in
    another layout, the sums are this group's alone, and t and its residual are returned as well.
    """
    if RESIDENT:
        # Read by whole rows, whose sums then stay within a warp.
        tile = tl.arange(0, BM)[:, None] * W + (group * P + tl.arange(0, P))[None, :]
        tl.store(f + tile, t)
        tl.debug_barrier()
        t = tl.load(f + tile)
        change = t - held[0]
        sums = sums_of(t, change, held[2], M)
    else:
        change = held[0]
        sums = recorded(t, z, f, g, group, step, sums, W, P, M, BM)
        t = change
    return sums, t, change


@triton.jit
def recorded(
    t, z, f, g, group, step, sums,
    W: tl.constexpr, P: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """`record` in global memory; returns the sums."""
    g2, f2, dots = sums
    C: tl.constexpr = P if BM * P <= HELD else HELD // BM
    rows = tl.arange(0, BM)[:, None] * W + group * P
    tile = rows + tl.arange(0, P)[None, :]
    newest = step % M if M > 0 else 0 * step
    f2 += tl.sum(t * t, 1)
    tl.store(f + newest * (BM * W) + tile, t)
    change = t - tl.load(z + tile)
    own = tl.sum(change * change, 1)
    g2 += own
    tl.store(g + newest * (BM * W) + tile, change)
    if M == 1:
        dots = with_column(dots, 0, tl.sum(t * change, 1))
    elif M > 1:
        dots = with_column(dots, newest, own)
        # Other threads read what was stored.
        tl.debug_barrier()
        for start in range(0, P, C):
            part = rows + (start + tl.arange(0, C))[None, :]
            new = tl.load(g + newest * (BM * W) + part)
            dots = products_of(new, g, part, step, dots, BM * W, M)
    return g2, f2, dots


@triton.jit
def products_of(change, g, part, step, dots, SLOT: tl.constexpr, M: tl.constexpr):
    """dots [BM, 8] and the products of a tile of the newest residual with the older ones."""
    # Unrolled, so that no load waits for the one before. What no slot holds yet is not read.
    for past in tl.static_range(1, M):
        j = (step - past + M) % M
        held = tl.zeros(change.shape, dtype=tl.int32) + step >= past
        other = tl.load(g + j * SLOT + part, mask=held, other=0.0)
        dots = with_column(dots, j, tl.sum(other * change, 1))
    return dots


@triton.jit
def share_sums(
    partials, step, group, sums, G: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
    SPREAD: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Stores a group's part of the sums of `record` where the groups are programs.

    partials: (2, G, SUMS, BM), of this row block; the two halves serve even and odd steps.
    """
    if RESIDENT:
        share_all(partials, step, group, sums, G, M, BM)
    elif SPREAD:
        g2, f2, dots = sums
        here = partials + (step % 2) * (G * SUMS * BM)
        share(here, 0, g2, group, BM)
        share(here, 1, f2, group, BM)
        if M > 0:
            slot = (tl.arange(0, SLOTS)[None, :] + 2) * BM + tl.arange(0, BM)[:, None]
            tl.store(here + group * (SUMS * BM) + slot, dots)


@triton.jit
def gather_sums(
    partials, step, G: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, RESIDENT: tl.constexpr
):
    """The sums of `record` over all groups, from what `share_sums` stored."""
    if RESIDENT:
        sums = gather_all(partials, step, G, M, BM)
    else:
        here = partials + (step % 2) * (G * SUMS * BM)
        dots = tl.zeros([BM, SLOTS], dtype=tl.float32)
        if M > 0:
            slot = (tl.arange(0, SLOTS)[None, :] + 2) * BM + tl.arange(0, BM)[:, None]
            for group in tl.static_range(G):
                dots += tl.load(here + group * (SUMS * BM) + slot)
        sums = (gather(here, 0, BM, G), gather(here, 1, BM, G), dots)
    return sums


@triton.jit
def kind_of(exact, step, LADDER: tl.constexpr):
    """How the products of an evaluation are made: EXACT, or on the ladder ANCHORED or NEAR."""
    if LADDER == "" or LADDER == "half":
        kind = EXACT
    else:
        anchored = (step == 0) | ((step - FIRST_ANCHOR) % ANCHOR_EVERY == 0)
        kind = tl.where(exact > 0, EXACT, tl.where(anchored, ANCHORED, NEAR))
    return kind


@triton.jit
def judge(
    gn, fn, done, running, best, improved_at, restarts, last, rtol, atol, ADJOINT: tl.constexpr
):
    """What the residual norms gn, fn [BM] of a row's `done`-th evaluation, an exact one, decide.

    In an adjoint solve, of a unit gradient from 0, no residual above 1 is the best but the first;
    if it is less beside ||f|| than the best, it is progress all the same.

    Returns improved, ended, code, best, improved_at; all [BM].
    """
    finite = (gn < float("inf")) & (fn < float("inf"))
    relative = relative_residual(gn, fn)
    met = running & finite & (gn <= atol + rtol * fn)
    nearer = met | (running & finite & (relative < best))
    improved = nearer
    if ADJOINT:
        improved = nearer & (met | (gn <= 1.0) | (best == float("inf")))
    best = tl.where(improved, relative, best)
    improved_at = tl.where(nearer, done, improved_at)
    hopeless = running & (finite == 0) & ((restarts >= MAX_RESTARTS) | (best == float("inf")))
    stagnant = running & (done - improved_at >= PATIENCE)
    ended = met | hopeless | stagnant | (running & last)
    code = tl.where(stagnant, STAGNATED, AT_MAX_STEPS)
    code = tl.where(hopeless, NON_FINITE, code)
    code = tl.where(met, CONVERGED, code)
    return improved, ended, code, best, improved_at


@triton.jit
def relative_residual(gn, fn):
    """gn / fn [BM], within the range of fp32; of no meaning where either is not finite."""
    return tl.minimum(gn / tl.maximum(fn, 1.1754943508222875e-38), 3.4028234663852886e38)


@triton.jit
def astray(gn, fn, moving, best, restarts, RESTART: tl.constexpr):
    """Which moving rows [BM] are not finite or, with RESTART and some left, far from their best."""
    lost = ((gn < float("inf")) & (fn < float("inf"))) == 0
    if RESTART:
        rising = (relative_residual(gn, fn) > best * RISE) & (restarts < MAX_RESTARTS)
        lost = lost | rising
    return moving & lost


@triton.jit
def advance(
    z, best_f, best_g, f, g, anchors, deltas, gram, dots, step, first, ridge, mixing,
    improved, moving, lost, restarts, kind, first_group, last_group,
    W: tl.constexpr, P: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, RELATIVE: tl.constexpr,
    TRUNCATED: tl.constexpr, LADDER: tl.constexpr,
):  # fmt: skip
    """Stores the best iterates of improved rows and the next iterates of moving ones.

    z, best_f, best_g: scalar pointers to the program's first row of W channels; f, g: the same in
    slot 0 of the history, whose slots are next to one another; restarts counts this one. With
    a LADDER z is a factor of products, of which anchors has the origin and deltas the difference,
    or, with "half", z in float16.
    """
    newest = step % M if M > 0 else 0 * step
    rows = tl.arange(0, BM)[:, None] * W
    if M > 1:
        remember(gram, dots, step, M, BM)
        tl.debug_barrier()
        weights = mixture(gram, step, first, ridge, M, BM, RELATIVE)
    C: tl.constexpr = P if BM * P <= HELD else HELD // BM
    for start in range(first_group * P, last_group * P, C):
        tile = rows + (start + tl.arange(0, C))[None, :]  # [BM, C]
        new = tl.load(f + newest * (BM * W) + tile)
        change = tl.load(g + newest * (BM * W) + tile)
        following = new - (1.0 - mixing) * change
        if M > 1:
            following *= column_of(weights, newest)[:, None]
            for past in tl.static_range(1, M):
                j = (step - past + M) % M
                counts = valid(j, step, first, M)[:, None]
                slot = j * (BM * W)
                old = tl.load((f + slot) + tile, mask=counts, other=0.0)
                if mixing != 1.0:
                    residue = tl.load((g + slot) + tile, mask=counts, other=0.0)
                    old -= (1.0 - mixing) * residue
                following += column_of(weights, j)[:, None] * old
        if TRUNCATED:
            new = following
        tl.store(best_f + tile, new, mask=improved[:, None])
        tl.store(best_g + tile, change, mask=improved[:, None])
        if tl.max(lost.to(tl.int32), 0) > 0:
            # A row that improved is not lost: its stores above do not race with these loads.
            back = 1.0 - tl.exp2(-restarts.to(tl.float32))
            best = tl.load(best_f + tile, mask=lost[:, None], other=0.0)
            step_back = tl.load(best_g + tile, mask=lost[:, None], other=0.0)
            following = tl.where(lost[:, None], best - back[:, None] * step_back, following)
        if LADDER == "half":
            tl.store(deltas + tile, following.to(tl.float16), mask=moving[:, None])
        elif LADDER != "":
            # What was evaluated is the next differences' origin, or there is one.
            every = tl.zeros([BM, C], dtype=tl.int32) + kind
            evaluated = tl.load(z + tile, mask=every == ANCHORED, other=0.0)
            tl.store(anchors + tile, evaluated, mask=every == ANCHORED)
            apart = following - evaluated
            apart -= tl.load(anchors + tile, mask=every == NEAR, other=0.0)
            tl.store(deltas + tile, apart.to(tl.bfloat16), mask=every != EXACT)
            # z was loaded in another layout than it is stored in: by other threads.
            tl.debug_barrier()
        tl.store(z + tile, following, mask=moving[:, None])


@triton.jit
def finish(
    held, t, change, z, best_f, best_g, f, g, anchors, deltas, gram, status, steps, residual,
    trace, sums, step, max_steps, alive, running, best, improved_at, restarts, first, done, exact,
    kind, rtol, atol, ridge, mixing, first_group, last_group,
    W: tl.constexpr, P: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, RELATIVE: tl.constexpr,
    LADDER: tl.constexpr, TRACE: tl.constexpr, TRUNCATED: tl.constexpr, ADJOINT: tl.constexpr,
    RESIDENT: tl.constexpr,
):  # fmt: skip
    """The rest of a step once all groups are evaluated: ends rows, stores the next iterates.

    Pointers are those of the program's first row; status, steps, residual, trace are written by the
    program of group 0. Rows: alive (not ended), running (alive and not waiting), best residual and
    the evaluation it fell in, restarts, first step that counts, done (evaluations so far), all
    [BM]; exact: whether the rows are off the ladder, a scalar; kind: of this evaluation; ADJOINT:
    whether not z itself is multiplied, but what is made of it, and see `judge`; held, t, change: of
    a RESIDENT program.
    Returns all eight, the step's number and held, as the next step finds them.
    """
    CLIMBS: tl.constexpr = LADDER != "" and LADDER != "half"
    local = tl.arange(0, BM)
    g2, f2 = sums[0], sums[1]
    done += running.to(tl.int32)
    gn = tl.sqrt(g2)
    fn = tl.sqrt(f2)
    writes = running & (first_group == 0)
    if TRACE:
        at = (local.to(tl.int64) * max_steps + done - 1) * 2
        tl.store(trace + at, gn, mask=writes)
        tl.store(trace + at + 1, fn, mask=writes)
    if TRUNCATED:
        # ||f - (1 - beta) g||, the size of the iterate that this step leads to.
        rest = 1.0 - mixing
        size = tl.sqrt(tl.maximum(f2 - 2.0 * rest * column_of(sums[2], 0) + rest * rest * g2, 0.0))
        best = tl.where(size > 0.0, gn / size, 0.0)
        improved = running & (done >= max_steps)
        ended = improved
        code = tl.where(gn <= atol + rtol * size, CONVERGED, AT_MAX_STEPS)
        lost = running & (running == 0)
        moving = running
        alive = alive & (ended == 0)
        running = alive
    else:
        improved, ended, code, fell, fell_at = judge(
            gn, fn, done, running, best, improved_at, restarts, done >= max_steps, rtol, atol,
            ADJOINT,
        )  # fmt: skip
        if CLIMBS:
            judged = local * 0 + kind != NEAR
            improved = improved & judged
            ended = ended & judged
            fell = tl.where(judged, fell, best)
            fell_at = tl.where(judged, fell_at, improved_at)
        moving = running & (ended == 0)
        lost = astray(gn, fn, moving, fell, restarts, RELATIVE)
        running = moving
        if CLIMBS:
            near = gn <= (atol + rtol * fn) * REACH
            leaving = moving & (lost | near | (done + 1 >= max_steps))
            running = moving & ((leaving == 0) | (local * 0 + exact > 0))
        lost = lost & (restarts < MAX_RESTARTS)
        best = fell
        improved_at = fell_at
        alive = alive & (ended == 0)
        running = running & alive
    writes = ended & (first_group == 0)
    tl.store(status + local, code, mask=writes)
    tl.store(steps + local, done, mask=writes)
    tl.store(residual + local, best, mask=writes)
    restarts += lost.to(tl.int32)
    first = tl.where(lost, step + 1, first)
    if RESIDENT:
        held = advance_held(
            held, t, change, z, best_f, best_g, sums, step, first, ridge, mixing, improved, moving,
            lost, restarts, first_group, deltas, W, P, M, BM, RELATIVE, "" if ADJOINT else LADDER,
        )  # fmt: skip
    else:
        advance(
            z, best_f, best_g, f, g, anchors, deltas, gram, sums[2], step, first, ridge, mixing,
            improved, moving, lost, restarts, kind, first_group, last_group, W, P, M, BM, RELATIVE,
            TRUNCATED, "" if ADJOINT else LADDER,
        )  # fmt: skip
    if CLIMBS:
        # All rows wait, or ended: those that wait go on.
        switch = (local * 0 + exact == 0) & (tl.max(running.to(tl.int32), 0) == 0)
        exact = tl.max(tl.where(switch, 1, local * 0 + exact), 0)
        running = tl.where(switch, alive, running)
        first = tl.where(switch, 0, first)
        # Steps count anew, so that the slots of the history do not tell when others were ready.
        step = tl.min(tl.where(switch, -1, local * 0 + step), 0)
    return alive, running, best, improved_at, restarts, first, done, exact, step + 1, held


@triton.jit
def fresh(alive, BM: tl.constexpr, LADDER: tl.constexpr):
    """What `finish` returns after alive, as the first step finds it, for rows alive [BM]."""
    zero = tl.zeros([BM], dtype=tl.int32)
    step = tl.min(zero, 0)
    exact = step + 1 if LADDER == "" or LADDER == "half" else step
    best = tl.full([BM], float("inf"), dtype=tl.float32)
    return alive, best, zero, zero, zero, zero, exact, step


@triton.jit
def store_rows(
    saved, ended_blocks, first_group, alive, running, best, improved_at, restarts, first, done,
    exact, step, BM: tl.constexpr,
):  # fmt: skip
    """Stores what `finish` returns for the next launch, and counts a row block that has ended.

    saved: int32 (SAVED, BM), of this program; ended_blocks: int32, for whoever launches the steps.
    """
    if (tl.max(alive.to(tl.int32), 0) == 0) & (first_group == 0):
        tl.atomic_add(ended_blocks, 1)
    at = saved + tl.arange(0, BM)
    tl.store(at, alive.to(tl.int32))
    tl.store(at + BM, running.to(tl.int32))
    tl.store(at + 2 * BM, best.to(tl.int32, bitcast=True))
    tl.store(at + 3 * BM, improved_at)
    tl.store(at + 4 * BM, restarts)
    tl.store(at + 5 * BM, first)
    tl.store(at + 6 * BM, done)
    tl.store(at + 7 * BM, tl.zeros([BM], dtype=tl.int32) + exact)
    tl.store(at + 8 * BM, tl.zeros([BM], dtype=tl.int32) + step)


@triton.jit
def forget_ended(ended_blocks):
    """Clears the count of `store_rows`, after the last step."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(ended_blocks, 0)


@triton.jit
def load_rows(saved, BM: tl.constexpr):
    """What `store_rows` stored, in its order."""
    at = saved + tl.arange(0, BM)
    return (
        tl.load(at) != 0,
        tl.load(at + BM) != 0,
        tl.load(at + 2 * BM).to(tl.float32, bitcast=True),
        tl.load(at + 3 * BM),
        tl.load(at + 4 * BM),
        tl.load(at + 5 * BM),
        tl.load(at + 6 * BM),
        tl.load(saved + 7 * BM),
        tl.load(saved + 8 * BM),
    )


@triton.jit
def report_nothing(status, steps, residual, live, first_group, BM: tl.constexpr):
    """What rows that take no part report; the others overwrite it when they end."""
    if first_group == 0:
        local = tl.arange(0, BM)
        tl.store(status + local, local * 0, mask=live)
        tl.store(steps + local, local * 0, mask=live)
        tl.store(residual + local, tl.zeros([BM], dtype=tl.float32), mask=live)


@triton.jit
def no_sums(BM: tl.constexpr, M: tl.constexpr, RESIDENT: tl.constexpr):
    """The sums of `record` before the first group."""
    zero = tl.zeros([BM], dtype=tl.float32)
    if RESIDENT:
        sums = (zero,)
        for _ in tl.static_range(M):
            sums = sums + (zero,)
    else:
        sums = (zero, zero, tl.zeros([BM, SLOTS], dtype=tl.float32))
    return sums
