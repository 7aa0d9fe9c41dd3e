r"""Gradients of the modality equilibria in one launch (schedule *step*: a launch per phase).

    lambda = g + J^T lambda,      p = N_3(lambda w_3) [t > 0]      q = N_2(p w_2)       `outer`
                                  r = (q W_2) [h > 0]              s = N_1(r w_1)       `inner`
                                  J^T lambda = s W_1 (+ p)

A program owns BM rows of one modality. It linearises the block at z* (one evaluation, xhat_j and
rstd_j kept), solves for lambda like `kernels.modality` solves for z, each row's g divided by its
norm so that nothing underflows, and ends with dL/dx = q at the solution and with what the parameter
gradients are made of (`kernels.gradients`): the factors s, z* and q, h of the weights' gradients,
and the sums over its rows of s, r xhat_1, r, q, p xhat_2, p, lambda xhat_3, lambda. N_j: the VJP of
the j-th normalisation. Rows that are NON_FINITE, absent, or whose g is 0 take no part.

Scratch (packed, W = G P, R' = R rounded up to BM), fp32: per row block 8 planes (BM, W), unit
gradient, z, p, xhat_1 to xhat_3, best_f, best_g, and the solver's; factors left, right (2 N, R',
W);
rstd (N, R', G, 4), rstd_1 to rstd_3 and what a row's g was divided by; gram, partials,
counters and so on as in `kernels.modality`; sums (ceil(R / BM), 8, N, W). Weights forward (N, W, W)
W_j, and backward W_j^T. Unpacked: gradient, state, x, dx (N, R, d). PHASE: 1 to 3 the
linearisation, 4 to 7 a step, 8 and 9 the VJP.
Source: implicit function theorem; S. Bai et al., "Deep equilibrium models", NeurIPS 2019.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .modality import evaluated, hidden
from .primitives import (
    EXACT,
    affine,
    keep,
    ladder_product,
    load_true,
    product,
    standardise_vjp,
    store_true,
    within_range,
)
from .resident import blank_of, held_from
from .scaling import divisor_of, largest_of, scales
from .schedule import SUMS, gather, gather_largest, meet, own_groups, share
from .solver import (
    NON_FINITE,
    SAVED,
    finish,
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

PHASES = (3, 4, 2)
"""How many phases are the linearisation, a step, the VJP."""


@triton.jit
def outer(
    gradient, xhat, rstd, vectors, z, tile, local, group, plane: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, DG: tl.constexpr, P: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """p and q [BM, P] of one group, from a tile of lambda.

    xhat: of the first normalisation, `plane` elements before that of the next; z: packed z*.
    """
    column = tl.arange(0, P)
    v = vectors + group * P + column
    at = (local * G + group) * 4
    xhat2 = tl.load(xhat + plane + tile)
    xhat3 = tl.load(xhat + 2 * plane + tile)
    t = affine(xhat2, tl.load(v + 4 * W), tl.load(v + 5 * W))
    if SKIP:
        t += tl.load(z + tile)
    w3 = tl.load(v + 6 * W)
    p = standardise_vjp(gradient * w3[None, :], xhat3, tl.load(rstd + at + 2), column, DG)
    p = tl.where(t > 0.0, p, 0.0)
    w2 = tl.load(v + 4 * W)
    q = standardise_vjp(p * w2[None, :], xhat2, tl.load(rstd + at + 1), column, DG)
    return p, q


@triton.jit
def inner(
    r, xhat, rstd, vectors, tile, local, group,
    W: tl.constexpr, G: tl.constexpr, DG: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """r [h > 0], s [BM, P] and xhat_1 of one group, from r = q W_2."""
    column = tl.arange(0, P)
    v = vectors + group * P + column
    xhat1 = tl.load(xhat + tile)
    w1 = tl.load(v + W)
    r = tl.where(affine(xhat1, w1, tl.load(v + 2 * W)) > 0.0, r, 0.0)
    s = standardise_vjp(r * w1[None, :], xhat1, tl.load(rstd + (local * G + group) * 4), column, DG)
    return r, s, xhat1


@triton.jit
def modality_adjoint_step(
    state,
    local, column, first_group, last_group, unit, z, p, xhat, best_f, best_g, f, g, anchors,
    deltas, s_rows, q_rows, z_rows, counter, status, steps, residual, b1, b2, lowb1, lowb2,
    vectors, rstd, gram, partials, counters, saved, max_steps, rtol, atol, ridge, mixing,
    DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    M: tl.constexpr, SKIP: tl.constexpr, TRUNCATED: tl.constexpr, RELATIVE: tl.constexpr,
    PRECISION: tl.constexpr, LADDER: tl.constexpr, COOPERATIVE: tl.constexpr,
    RESIDENT: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """An evaluation and what follows; state: what `finish` returns, after the meetings so far."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    SPREAD: tl.constexpr = COOPERATIVE or PHASE > 0
    meeting, alive, running, best, improved_at, restarts, first, done, exact, step, held = state
    t_own = blank_of(BM, P, RESIDENT)
    change = t_own
    depth = tl.where(tl.max(done, 0) == 0, 0, W)
    kind = kind_of(exact, step, LADDER)
    if PHASE == 0 or PHASE == 4:
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]  # [BM, P]
            p_tile, q = outer(
                tl.load(z + tile), xhat, rstd, vectors, z_rows, tile, local, group,
                BM * W, W, G, DG, P, SKIP,
            )  # fmt: skip
            keep(q, q_rows, anchors, deltas, tile, kind, LADDER)
            if SKIP:
                tl.store(p + tile, p_tile)
    meet(counter, meeting + 1, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 5:
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            r = ladder_product(
                q_rows, b2, lowb2, deltas, anchors + BM * W, group, depth, kind, W, BM,
                P, BK, PRECISION, LADDER,
            )  # fmt: skip
            _, s, _ = inner(r, xhat, rstd, vectors, tile, local, group, W, G, DG, P)
            keep(s, s_rows, anchors + 2 * BM * W, deltas + BM * W, tile, kind, LADDER)
    meet(counter, meeting + 2, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 6:
        totals = no_sums(BM, M, RESIDENT)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            t = ladder_product(
                s_rows, b1, lowb1, deltas + BM * W, anchors + 3 * BM * W, group, depth,
                kind, W, BM, P, BK, PRECISION, LADDER,
            )  # fmt: skip
            t += tl.load(unit + tile)
            if SKIP:
                t += tl.load(p + tile)
            totals, t_own, change = record(
                held, t, z, f, g, group, step, totals, W, P, M, BM, RESIDENT
            )
        share_sums(partials, step, first_group, totals, G, M, BM, SPREAD, RESIDENT)
    meet(counter, meeting + 3, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 7:
        if SPREAD:
            totals = gather_sums(partials, step, G, M, BM, RESIDENT)
        (
            alive, running, best, improved_at, restarts, first, done, exact, step, held,
        ) = finish(
            held, t_own, change, z, best_f, best_g, f, g, anchors, deltas, gram, status,
            steps, residual, residual, totals, step, max_steps, alive, running, best,
            improved_at, restarts, first, done, exact, kind, rtol, atol, ridge, mixing,
            first_group, last_group, W, P, M, BM, RELATIVE, LADDER, False, TRUNCATED,
            True, RESIDENT,
        )  # fmt: skip
    tl.debug_barrier()
    meeting += 3
    if PHASE == 7:
        store_rows(
            saved, counters, first_group, alive, running, best, improved_at, restarts,
            first, done, exact, step, BM,
        )  # fmt: skip
    return meeting, alive, running, best, improved_at, restarts, first, done, exact, step, held


@triton.jit
def modality_adjoint_rows(
    block,
    gradient, state, solved, x, present, dx, status, steps, residual,
    w1, w2, b1, b2, lowb1, lowb2, vectors,
    scratch, rstd, left, right, sums, gram, partials, counters, saved,
    rows, padded_rows, max_steps, rtol, atol, ridge, mixing,
    DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    M: tl.constexpr, SKIP: tl.constexpr, PRESENT: tl.constexpr, TRUNCATED: tl.constexpr,
    RELATIVE: tl.constexpr, PRECISION: tl.constexpr, LADDER: tl.constexpr,
    COOPERATIVE: tl.constexpr, RESIDENT: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """The adjoint of BM rows of a modality; arguments and tiles: the head of this file."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    SPREAD: tl.constexpr = COOPERATIVE or PHASE > 0
    k = tl.program_id(1).to(tl.int64)
    count = tl.num_programs(1).to(tl.int64)
    begin = block * BM
    local = tl.arange(0, BM)  # [BM]
    column = tl.arange(0, P)  # [P]
    live = begin + local < rows
    first_group, last_group = own_groups(G)
    unpacked = k * rows
    own = k * padded_rows + begin
    factors = count * padded_rows * W
    gradient, state = gradient + unpacked * DIM, state + unpacked * DIM
    x, dx = x + unpacked * DIM, dx + unpacked * DIM
    status, steps = status + unpacked + begin, steps + unpacked + begin
    residual = residual + unpacked + begin
    # One address, as in `kernels.modality`.
    scratch = scratch + own * planes_of(8, M, LADDER) * W
    unit, z, p, xhat = scratch, scratch + BM * W, scratch + 2 * BM * W, scratch + 3 * BM * W
    best_f, best_g, f = scratch + 6 * BM * W, scratch + 7 * BM * W, scratch + 8 * BM * W
    g, anchors, deltas = history_of(f, W, BM, M, LADDER)
    rstd = rstd + own * (4 * G)
    # Factors of dW_1 and dW_2, one after the other: s and z*, q and h.
    s_rows, q_rows = left + own * W, left + (factors + own * W)
    z_rows, h_rows = right + own * W, right + (factors + own * W)
    gram = gram + (first_group * count * padded_rows + own) * (M * M)
    place = k * (padded_rows // BM) + block
    partials, counter = partials + place * (2 * SUMS * G * BM), counters + place
    saved = saved + (place * G + first_group) * (SAVED * BM)
    w1, w2, b1, b2 = w1 + k * W * W, w2 + k * W * W, b1 + k * W * W, b2 + k * W * W
    lowb1, lowb2 = lowb1 + k * W * W, lowb2 + k * W * W
    vectors = vectors + k * 8 * W
    take_part = live & (
        tl.load(solved + unpacked + begin + local, mask=live, other=0) != NON_FINITE
    )
    if PRESENT:
        here = tl.load(present + unpacked + begin + local, mask=live, other=0)
        take_part = take_part & (here != 0)
    meeting = 1

    if PHASE <= 1:
        # z* of the rows that take part, and the largest element of their gradients.
        report_nothing(status, steps, residual, live, first_group, BM)
        largest = tl.zeros([BM], dtype=tl.float32)
        for group in range(first_group, last_group):
            value = load_true(gradient, begin, local, take_part, group, column, DIM, DG)
            largest = tl.maximum(largest, largest_of(value))
            tile = local[:, None] * W + (group * P + column)[None, :]
            solution = load_true(state, begin, local, take_part, group, column, DIM, DG)
            tl.store(z_rows + tile, solution)
        if SPREAD:
            share(partials, 0, largest, first_group, BM)
    meet(counter, meeting, G, COOPERATIVE)
    if SPREAD and (PHASE == 0 or PHASE == 2 or PHASE == 3):
        largest = gather_largest(partials, 0, BM, G)
    if PHASE == 0 or PHASE == 2:
        # Their norms, and the first half of the block at z*.
        divisor = divisor_of(largest)
        total = tl.zeros([BM], dtype=tl.float32)
        for group in range(first_group, last_group):
            value = load_true(gradient, begin, local, take_part, group, column, DIM, DG)
            value = value / divisor[:, None]
            total += tl.sum(value * value, 1)
            h, xhat1, rstd1 = hidden(
                z_rows, w1, w1, z, z, vectors, group, W, EXACT, W, DG, P, BM, BK, PRECISION, ""
            )
            tile = local[:, None] * W + (group * P + column)[None, :]
            tl.store(h_rows + tile, h)
            tl.store(xhat + tile, xhat1)
            tl.store(rstd + (local * G + group) * 4, rstd1)
        if SPREAD:
            share(partials, 1, total, first_group, BM)
    meet(counter, meeting + 1, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 3:
        # The second half, and unit gradients.
        if SPREAD:
            total = gather(partials, 1, BM, G)
        divisor, norm, whole = scales(largest, total, TRUNCATED)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            # Rows that take no part are 0 at the end.
            whole_at = rstd + (local * G + group) * 4 + 3
            tl.store(whole_at, tl.where(take_part, whole, 0.0))
            value = load_true(gradient, begin, local, take_part, group, column, DIM, DG)
            tl.store(unit + tile, value / divisor[:, None] / norm[:, None])
            tl.store(z + tile, tl.zeros([BM, P], dtype=tl.float32))
            tl.store(best_f + tile, tl.zeros([BM, P], dtype=tl.float32))
            injected = load_true(x, begin, local, take_part, group, column, DIM, DG)
            injected, factor = within_range(injected, False)
            z_tile = tl.load(z_rows + tile)
            _, xhat2, rstd2, xhat3, rstd3 = evaluated(
                h_rows, w2, w2, z, z, vectors, injected, z_tile, group, EXACT, W, DG, P, BM, BK,
                SKIP, PRECISION, "",
            )  # fmt: skip
            tl.store(xhat + BM * W + tile, xhat2)
            tl.store(xhat + 2 * BM * W + tile, xhat3)
            tl.store(rstd + (local * G + group) * 4 + 1, rstd2 * factor)
            tl.store(rstd + (local * G + group) * 4 + 2, rstd3)
        alive = take_part
        if not TRUNCATED:
            alive = alive & (largest > 0.0)
        running, best, improved_at, restarts, first, done, exact, step = fresh(alive, BM, LADDER)
        if PHASE == 3:
            store_rows(
                saved, counters, first_group, alive, running, best, improved_at, restarts, first,
                done, exact, step, BM,
            )  # fmt: skip
    if PHASE > 3:
        alive, running, best, improved_at, restarts, first, done, exact, step = load_rows(saved, BM)
    tl.debug_barrier()
    meeting += 1

    if PHASE == 0 or (PHASE > 3 and PHASE < 8):
        going = tl.max(alive.to(tl.int32), 0)
        state = (
            meeting, alive, running, best, improved_at, restarts, first, done, exact, step,
            held_from(blank_of(BM, P, RESIDENT), M, BM, P, RESIDENT),
        )  # fmt: skip
        if RESIDENT:
            # Not `while`: with tiles to carry the compiler's layouts do not settle in one.
            for _turn in range(0, max_steps):
                if going > 0:
                    state = modality_adjoint_step(
                        state, local, column, first_group, last_group, unit, z, p, xhat, best_f,
                        best_g, f, g, anchors, deltas, s_rows, q_rows, z_rows, counter, status,
                        steps, residual, b1, b2, lowb1, lowb2, vectors, rstd, gram, partials,
                        counters, saved, max_steps, rtol, atol, ridge, mixing, DIM, G, P, BM,
                        BK, M, SKIP, TRUNCATED, RELATIVE, PRECISION, LADDER, COOPERATIVE,
                        RESIDENT, PHASE,
                    )  # fmt: skip
                    going = tl.max(state[1].to(tl.int32), 0)
        else:
            while going > 0:
                state = modality_adjoint_step(
                    state, local, column, first_group, last_group, unit, z, p, xhat, best_f,
                    best_g, f, g, anchors, deltas, s_rows, q_rows, z_rows, counter, status,
                    steps, residual, b1, b2, lowb1, lowb2, vectors, rstd, gram, partials,
                    counters, saved, max_steps, rtol, atol, ridge, mixing, DIM, G, P, BM, BK, M,
                    SKIP, TRUNCATED, RELATIVE, PRECISION, LADDER, COOPERATIVE, RESIDENT, PHASE,
                )  # fmt: skip
                going = tl.max(state[1].to(tl.int32), 0) if PHASE == 0 else going * 0
        meeting = state[0]

    # The final VJP, with lambda in place of its unit.
    tl.debug_barrier()
    if PHASE == 0 or PHASE == 8:
        whole = tl.load(rstd + (local * G + first_group) * 4 + 3)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            solution = tl.load(best_f + tile) * whole[:, None]
            row = sums + (block * 8 * count + k) * W + group * P + column
            tl.store(row + 6 * count * W, tl.sum(solution * tl.load(xhat + 2 * BM * W + tile), 0))
            tl.store(row + 7 * count * W, tl.sum(solution, 0))
            p_tile, q = outer(
                solution, xhat, rstd, vectors, z_rows, tile, local, group, BM * W, W, G, DG, P,
                SKIP,
            )  # fmt: skip
            tl.store(row + 4 * count * W, tl.sum(p_tile * tl.load(xhat + BM * W + tile), 0))
            tl.store(row + 5 * count * W, tl.sum(p_tile, 0))
            tl.store(q_rows + tile, q)
            store_true(dx, q, begin, local, live, group, column, DIM, DG)
            tl.store(row + 3 * count * W, tl.sum(q, 0))
    meet(counter, meeting + 1, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 9:
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            r = product(q_rows, b2 + group * P * W, W, W, BM, P, BK, PRECISION)
            r, s, xhat1 = inner(r, xhat, rstd, vectors, tile, local, group, W, G, DG, P)
            tl.store(s_rows + tile, s)
            row = sums + (block * 8 * count + k) * W + group * P + column
            tl.store(row, tl.sum(s, 0))
            tl.store(row + count * W, tl.sum(r * xhat1, 0))
            tl.store(row + 2 * count * W, tl.sum(r, 0))


@triton.jit(do_not_specialize=["rows", "padded_rows", "max_steps"])
def modality_adjoint_kernel(
    gradient, state, solved, x, present, dx, status, steps, residual,
    w1, w2, b1, b2, lowb1, lowb2, vectors,
    scratch, rstd, left, right, sums, gram, partials, counters, saved,
    rows, padded_rows, max_steps, rtol, atol, ridge, mixing,
    DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    M: tl.constexpr, SKIP: tl.constexpr, PRESENT: tl.constexpr, TRUNCATED: tl.constexpr,
    RELATIVE: tl.constexpr, PRECISION: tl.constexpr, LADDER: tl.constexpr,
    COOPERATIVE: tl.constexpr, RESIDENT: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """A row block, or in schedule cooperative several one after the other."""
    if COOPERATIVE:
        for block in range(tl.program_id(0), padded_rows // BM, tl.num_programs(0)):
            modality_adjoint_rows(
                tl.zeros([], dtype=tl.int64) + block,
                gradient, state, solved, x, present, dx, status, steps, residual, w1,
                w2, b1, b2, lowb1, lowb2, vectors, scratch, rstd, left, right, sums,
                gram, partials, counters, saved, rows, padded_rows, max_steps, rtol,
                atol, ridge, mixing, DIM, G, P, BM, BK, M, SKIP, PRESENT, TRUNCATED,
                RELATIVE, PRECISION, LADDER, COOPERATIVE, RESIDENT, PHASE,
            )  # fmt: skip
    else:
        modality_adjoint_rows(
            tl.program_id(0).to(tl.int64),
            gradient, state, solved, x, present, dx, status, steps, residual, w1,
            w2, b1, b2, lowb1, lowb2, vectors, scratch, rstd, left, right, sums,
            gram, partials, counters, saved, rows, padded_rows, max_steps, rtol,
            atol, ridge, mixing, DIM, G, P, BM, BK, M, SKIP, PRESENT, TRUNCATED,
            RELATIVE, PRECISION, LADDER, COOPERATIVE, RESIDENT, PHASE,
        )  # fmt: skip
