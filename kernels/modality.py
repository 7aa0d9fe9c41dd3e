r"""The N modality equilibria in one launch (schedule *step*: a launch per phase).

    u = W_1 z + b_1               h = ReLU(GN_1(u))                                     `hidden`
    q = W_2 h + b_2 + x           t = GN_2(q) (+ z)          f = GN_3(ReLU(t))          `evaluated`

A program owns BM rows of one modality, and all groups (schedule *row*) or one: both phases, the
Anderson step, and again, until the rows have ended. z, h and the history go through global memory
(scratch of the rows' own, which stays in L2); weights are streamed. Grid: (ceil(R / BM), N, 1 or
G).

Scratch (packed, `kernels.layout`, width W = G P; R' = R rounded up to BM), fp32: per row block 5
planes (BM, W), packed x, z, h, best_f, best_g, and the solver's (`kernels.solver`); gram (1 or G,
N, R', M, M). Weights (N, W, W); vectors (N, 8, W): b_1, weight and bias of GN_1, b_2, those
of GN_2 and of GN_3. Unpacked: x, init and out (N, R, d) in the dtype of the features; present int8,
status, steps int32, residual fp32 (N, R); trace (N, R, max_steps, 2) fp32. Precision:
`kernels.primitives`; groups, meetings, PHASE (1 start, 2 to 4 a step, 5 end), partials, counters,
saved: `kernels.schedule`; anchors, deltas: `kernels.solver`.
Source: arXiv 2306.16645, equations 3 to 5.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    affine,
    keep,
    ladder_product,
    load_true,
    relu,
    standardise,
    store_true,
    within_range,
)
from .resident import blank_of, held_from
from .schedule import SUMS, leave, meet, own_groups
from .solver import (
    SAVED,
    finish,
    forget_ended,
    fresh,
    gather_sums,
    history_of,
    kind_of,
    load_rows,
    no_sums,
    planes_of,
    record,
    report_nothing,
    share_sums,
    store_rows,
)

PHASES = (1, 3, 1)
"""How many phases are the start, a step, the end."""


@triton.jit
def hidden(
    z, w1, low1, delta, through, vectors, group, depth, kind,
    W: tl.constexpr, DG: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, LADDER: tl.constexpr,
):  # fmt: skip
    """h, xhat_1 [BM, P] and rstd_1 [BM] of one group; vectors: of this modality.

    delta, through, kind: as of `ladder_product`.
    """
    column = tl.arange(0, P)
    v = vectors + group * P + column
    u = ladder_product(
        z, w1, low1, delta, through, group, depth, kind, W, BM, P, BK, PRECISION, LADDER
    )
    xhat, rstd = standardise(u + tl.load(v)[None, :], column, DG)
    return relu(affine(xhat, tl.load(v + W), tl.load(v + 2 * W))), xhat, rstd


@triton.jit
def evaluated(
    h, w2, low2, delta, through, vectors, injected, z_tile, group, kind,
    W: tl.constexpr, DG: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    SKIP: tl.constexpr, PRECISION: tl.constexpr, LADDER: tl.constexpr,
):  # fmt: skip
    """f [BM, P] of one group, and xhat_2, rstd_2, xhat_3, rstd_3; injected: the tile of x."""
    column = tl.arange(0, P)
    v = vectors + 3 * W + group * P + column
    q = ladder_product(h, w2, low2, delta, through, group, W, kind, W, BM, P, BK, PRECISION, LADDER)
    xhat2, rstd2 = standardise(q + tl.load(v)[None, :] + injected, column, DG)
    t = affine(xhat2, tl.load(v + W), tl.load(v + 2 * W))
    if SKIP:
        t += z_tile
    xhat3, rstd3 = standardise(relu(t), column, DG)
    f = affine(xhat3, tl.load(v + 3 * W), tl.load(v + 4 * W))
    return f, xhat2, rstd2, xhat3, rstd3


@triton.jit
def modality_step(
    state,
    local, column, first_group, last_group, packed, z, h, best_f, best_g, f, g, anchors, deltas,
    counter, status, steps, residual, trace, w1, w2, low1, low2, vectors, gram, partials,
    counters, saved, max_steps, rtol, atol, ridge, mixing,
    DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    M: tl.constexpr, SKIP: tl.constexpr, INIT: tl.constexpr, TRACE: tl.constexpr,
    RELATIVE: tl.constexpr, PRECISION: tl.constexpr, LADDER: tl.constexpr,
    COOPERATIVE: tl.constexpr, RESIDENT: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """An evaluation and what follows; state: what `finish` returns, after the meetings so far."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    SPREAD: tl.constexpr = COOPERATIVE or PHASE > 0
    meeting, alive, running, best, improved_at, restarts, first, done, exact, step, held = state
    t_own = blank_of(BM, P, RESIDENT)
    change = t_own
    # From z = 0 the first product is none.
    depth = tl.where(tl.max(done, 0) == 0, 0, W)
    if INIT:
        depth = W + 0 * step
    kind = kind_of(exact, step, LADDER)
    if PHASE == 0 or PHASE == 2:
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]  # [BM, P]
            value, _, _ = hidden(
                z, w1, low1, deltas, anchors + BM * W, vectors, group, depth, kind, W,
                DG, P, BM, BK, PRECISION, LADDER,
            )  # fmt: skip
            keep(value, h, anchors + 2 * BM * W, deltas + BM * W, tile, kind, LADDER)
    meet(counter, meeting + 1, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 3:
        sums = no_sums(BM, M, RESIDENT)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]  # [BM, P]
            z_tile = tl.load(z + tile)
            t, _, _, _, _ = evaluated(
                h, w2, low2, deltas + BM * W, anchors + 3 * BM * W, vectors,
                tl.load(packed + tile), z_tile, group, kind, W, DG, P, BM, BK, SKIP,
                PRECISION, LADDER,
            )  # fmt: skip
            sums, t_own, change = record(held, t, z, f, g, group, step, sums, W, P, M, BM, RESIDENT)
        share_sums(partials, step, first_group, sums, G, M, BM, SPREAD, RESIDENT)
    meet(counter, meeting + 2, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 4:
        if SPREAD:
            sums = gather_sums(partials, step, G, M, BM, RESIDENT)
        (
            alive, running, best, improved_at, restarts, first, done, exact, step, held,
        ) = finish(
            held, t_own, change, z, best_f, best_g, f, g, anchors, deltas, gram, status,
            steps, residual, trace, sums, step, max_steps, alive, running, best,
            improved_at, restarts, first, done, exact, kind, rtol, atol, ridge, mixing,
            first_group, last_group, W, P, M, BM, RELATIVE, LADDER, TRACE, False, False,
            RESIDENT,
        )  # fmt: skip
    meeting += 3
    meet(counter, meeting, G, COOPERATIVE)
    if PHASE == 4:
        store_rows(
            saved, counters, first_group, alive, running, best, improved_at, restarts,
            first, done, exact, step, BM,
        )  # fmt: skip
    return meeting, alive, running, best, improved_at, restarts, first, done, exact, step, held


@triton.jit
def modality_solve_rows(
    block,
    x, init, present, out, status, steps, residual, trace, tolerance,
    w1, w2, low1, low2, vectors,
    scratch, gram, partials, counters, saved,
    rows, padded_rows, max_steps, rtol, atol, ridge, mixing,
    DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    M: tl.constexpr, SKIP: tl.constexpr, INIT: tl.constexpr, PRESENT: tl.constexpr,
    TOLERANCE: tl.constexpr, TRACE: tl.constexpr, RELATIVE: tl.constexpr,
    PRECISION: tl.constexpr, LADDER: tl.constexpr, COOPERATIVE: tl.constexpr,
    RESIDENT: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """The solve of BM rows of a modality; arguments and tiles: the head of this file."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    k = tl.program_id(1).to(tl.int64)
    count = tl.num_programs(1).to(tl.int64)
    begin = block * BM
    local = tl.arange(0, BM)  # [BM]
    column = tl.arange(0, P)  # [P]
    live = begin + local < rows
    first_group, last_group = own_groups(G)
    unpacked = k * rows
    own = k * padded_rows + begin
    x, out = x + unpacked * DIM, out + unpacked * DIM
    status, steps = status + unpacked + begin, steps + unpacked + begin
    residual = residual + unpacked + begin
    trace = trace + (unpacked + begin) * max_steps * 2
    # One address, and distances that the compiler knows: more would not all find registers.
    scratch = scratch + own * planes_of(5, M, LADDER) * W
    packed, z, h = scratch, scratch + BM * W, scratch + 2 * BM * W
    best_f, best_g, f = scratch + 3 * BM * W, scratch + 4 * BM * W, scratch + 5 * BM * W
    g, anchors, deltas = history_of(f, W, BM, M, LADDER)
    gram = gram + (first_group * count * padded_rows + own) * (M * M)
    place = k * (padded_rows // BM) + block
    partials, counter = partials + place * (2 * SUMS * G * BM), counters + place
    saved = saved + (place * G + first_group) * (SAVED * BM)
    w1, w2, low1, low2 = w1 + k * W * W, w2 + k * W * W, low1 + k * W * W, low2 + k * W * W
    vectors = vectors + k * 8 * W
    if TOLERANCE:
        rtol = tl.load(tolerance).to(tl.float32)
    meeting = 1
    z_own = blank_of(BM, P, RESIDENT)

    if PHASE <= 1:
        alive = live
        if PRESENT:
            here = tl.load(present + unpacked + begin + local, mask=live, other=0)
            alive = alive & (here != 0)
        report_nothing(status, steps, residual, live, first_group, BM)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            value = load_true(x, begin, local, live, group, column, DIM, DG)
            value, _ = within_range(value, False)
            tl.store(packed + tile, value)
            start = tl.zeros([BM, P], dtype=tl.float32)
            if INIT:
                start = load_true(init + unpacked * DIM, begin, local, live, group, column, DIM, DG)
            tl.store(z + tile, start)
            if LADDER == "half":
                tl.store(deltas + tile, start.to(tl.float16))
            if RESIDENT:
                z_own = start
            known = alive[:, None] & (tl.abs(start) < float("inf"))
            tl.store(best_f + tile, tl.where(known, start, 0.0))
        meet(counter, meeting, G, COOPERATIVE)
        running, best, improved_at, restarts, first, done, exact, step = fresh(alive, BM, LADDER)
        if PHASE == 1:
            store_rows(
                saved, counters, first_group, alive, running, best, improved_at, restarts, first,
                done, exact, step, BM,
            )  # fmt: skip
    else:
        alive, running, best, improved_at, restarts, first, done, exact, step = load_rows(saved, BM)

    if PHASE == 0 or (PHASE > 1 and PHASE < 5):
        going = tl.max(alive.to(tl.int32), 0)
        state = (
            meeting, alive, running, best, improved_at, restarts, first, done, exact, step,
            held_from(z_own, M, BM, P, RESIDENT),
        )  # fmt: skip
        if RESIDENT:
            # Not `while`: with tiles to carry the compiler's layouts do not settle in one.
            for _turn in range(0, max_steps):
                if going > 0:
                    state = modality_step(
                        state, local, column, first_group, last_group, packed, z, h, best_f,
                        best_g, f, g, anchors, deltas, counter, status, steps, residual, trace,
                        w1, w2, low1, low2, vectors, gram, partials, counters, saved, max_steps,
                        rtol, atol, ridge, mixing, DIM, G, P, BM, BK, M, SKIP, INIT, TRACE,
                        RELATIVE, PRECISION, LADDER, COOPERATIVE, RESIDENT, PHASE,
                    )  # fmt: skip
                    going = tl.max(state[1].to(tl.int32), 0)
        else:
            while going > 0:
                state = modality_step(
                    state, local, column, first_group, last_group, packed, z, h, best_f, best_g,
                    f, g, anchors, deltas, counter, status, steps, residual, trace, w1, w2,
                    low1, low2, vectors, gram, partials, counters, saved, max_steps, rtol, atol,
                    ridge, mixing, DIM, G, P, BM, BK, M, SKIP, INIT, TRACE, RELATIVE, PRECISION,
                    LADDER, COOPERATIVE, RESIDENT, PHASE,
                )  # fmt: skip
                going = tl.max(state[1].to(tl.int32), 0) if PHASE == 0 else going * 0
        meeting = state[0]

    if PHASE == 0 or PHASE == 5:
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            store_true(out, tl.load(best_f + tile), begin, local, live, group, column, DIM, DG)
    leave(counter, meeting, G, COOPERATIVE)
    if PHASE == 5:
        forget_ended(counters)


@triton.jit(
    do_not_specialize=["rows", "padded_rows", "max_steps"],
    do_not_specialize_on_alignment=["init"],
)
def modality_solve_kernel(
    x, init, present, out, status, steps, residual, trace, tolerance,
    w1, w2, low1, low2, vectors,
    scratch, gram, partials, counters, saved,
    rows, padded_rows, max_steps, rtol, atol, ridge, mixing,
    DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    M: tl.constexpr, SKIP: tl.constexpr, INIT: tl.constexpr, PRESENT: tl.constexpr,
    TOLERANCE: tl.constexpr, TRACE: tl.constexpr, RELATIVE: tl.constexpr,
    PRECISION: tl.constexpr, LADDER: tl.constexpr, COOPERATIVE: tl.constexpr,
    RESIDENT: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """A row block, or in schedule cooperative several one after the other."""
    if COOPERATIVE:
        for block in range(tl.program_id(0), padded_rows // BM, tl.num_programs(0)):
            modality_solve_rows(
                tl.zeros([], dtype=tl.int64) + block,
                x, init, present, out, status, steps, residual, trace, tolerance, w1,
                w2, low1, low2, vectors, scratch, gram, partials, counters, saved, rows,
                padded_rows, max_steps, rtol, atol, ridge, mixing, DIM, G, P, BM, BK, M,
                SKIP, INIT, PRESENT, TOLERANCE, TRACE, RELATIVE, PRECISION, LADDER,
                COOPERATIVE, RESIDENT, PHASE,
            )  # fmt: skip
    else:
        modality_solve_rows(
            tl.program_id(0).to(tl.int64),
            x, init, present, out, status, steps, residual, trace, tolerance, w1,
            w2, low1, low2, vectors, scratch, gram, partials, counters, saved, rows,
            padded_rows, max_steps, rtol, atol, ridge, mixing, DIM, G, P, BM, BK, M,
            SKIP, INIT, PRESENT, TOLERANCE, TRACE, RELATIVE, PRECISION, LADDER,
            COOPERATIVE, RESIDENT, PHASE,
        )  # fmt: skip
