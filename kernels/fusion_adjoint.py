r"""Gradients of the fusion equilibrium in one launch (schedule *step*: a launch per phase).

    lambda = g + J^T lambda,      r = N(lambda w) [v > 0]       y = (F r) W_f
                                  J^T lambda = y s + (y t) W_g

with s = sum_i M_i a_i and t = z* sum_i M_i a_i' saved at z* (a_i' the derivative of the gate: a_i
(1 - a_i), or 1 for the identity); tail "norm_relu": r = N(lambda w [f > 0]). A program owns BM rows
and works as in `kernels.modality_adjoint`. It ends with dL/dx_f = r, with dL/dz_i = dc_i W_m where
dc_i = y z* M_i a_i', and with what the parameter gradients are made of (`kernels.gradients`): the
factors F r, u = s z* of dW_f, y t, z* of dW_g and dc_i, z_i of dW_m, and the sums over its rows of
sum_i dc_i, F r, lambda xhat, lambda (behind the ReLU).

Scratch (packed, W = G P, R' = R rounded up to BM), fp32: per row block 10 + N planes (BM, W),
unit gradient, gate W_g z*, s, t, y s, xhat, open (behind the ReLU), z, best_f, best_g, constants,
and the solver's; rstd (R', G); scale (R'); left, right (2 + N, R', W) the factors in the order
above; gram, partials and counters as in `kernels.fusion`; sums (ceil(R / BM), 4, 1, W). Weights
forward and, for products with W itself, backward. Unpacked: gradient, state, x_f, dx (R, d);
modalities, dm (N, R, d). PHASE: 1 to 3 the linearisation, 4 to 7 a step, 8 to 10 the VJP.
Source: implicit function theorem; S. Bai et al., "Deep equilibrium models", NeurIPS 2019.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fusion import constant, gate, injected, injection_tile, normalised
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

PHASES = (3, 4, 3)
"""How many phases are the linearisation, a step, the VJP."""


@triton.jit
def slope_of(a, SIGMOID: tl.constexpr):
    """a_i' from a_i."""
    return a * (1.0 - a) if SIGMOID else tl.full(a.shape, 1.0, dtype=tl.float32)


@triton.jit
def behind(
    gradient, xhat, vectors, tile, group,
    W: tl.constexpr, P: tl.constexpr, RELU_LAST: tl.constexpr,
):  # fmt: skip
    """The gradient behind the affine part, and xhat, of one group [BM, P]."""
    hat = tl.load(xhat + tile)
    if RELU_LAST:
        at = vectors + 2 * W + group * P + tl.arange(0, P)
        gradient = tl.where(affine(hat, tl.load(at), tl.load(at + W)) > 0.0, gradient, 0.0)
    return gradient, hat


@triton.jit
def back(
    gradient, xhat, rstd, open_, vectors, tile, local, group,
    W: tl.constexpr, G: tl.constexpr, DG: tl.constexpr, P: tl.constexpr, RELU_LAST: tl.constexpr,
):  # fmt: skip
    """r before F, of one group [BM, P]."""
    column = tl.arange(0, P)
    gradient, hat = behind(gradient, xhat, vectors, tile, group, W, P, RELU_LAST)
    gradient = gradient * tl.load(vectors + 2 * W + group * P + column)[None, :]
    r = standardise_vjp(gradient, hat, tl.load(rstd + local * G + group), column, DG)
    return r * tl.load(open_ + tile)


@triton.jit
def fusion_adjoint_step(
    state,
    begin, local, column, first_group, last_group, unit, s, t, ys, xhat, open_, z, best_f,
    best_g, f, g, anchors, deltas, counter, r_rows, yt_rows, take_part, fusion_mask, status,
    steps, residual, bg, bf, lowbg, lowbf, vectors, rstd, gram, partials, counters, saved,
    max_steps, rtol, atol, ridge, mixing,
    DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    M: tl.constexpr, FUSION_MASK: tl.constexpr, RELU_LAST: tl.constexpr, TRUNCATED: tl.constexpr,
    RELATIVE: tl.constexpr, PRECISION: tl.constexpr, LADDER: tl.constexpr,
    COOPERATIVE: tl.constexpr, RESIDENT: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """An evaluation and what follows; state: what `finish` returns, after the meetings so far."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    SPREAD: tl.constexpr = COOPERATIVE or PHASE > 0
    meeting, alive, running, best, improved_at, restarts, first, done, exact, step, held = state
    t_own = blank_of(BM, P, RESIDENT)
    apart = t_own
    depth = tl.where(tl.max(done, 0) == 0, 0, W)
    kind = kind_of(exact, step, LADDER)
    if PHASE == 0 or PHASE == 4:
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]  # [BM, P]
            r = back(
                tl.load(z + tile), xhat, rstd, open_, vectors, tile, local, group, W, G,
                DG, P, RELU_LAST,
            )  # fmt: skip
            if FUSION_MASK:
                r *= load_true(fusion_mask, begin, local, take_part, group, column, DIM, DG)
            keep(r, r_rows, anchors, deltas, tile, kind, LADDER)
    meet(counter, meeting + 1, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 5:
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            y = ladder_product(
                r_rows, bf, lowbf, deltas, anchors + BM * W, group, depth, kind, W, BM,
                P, BK, PRECISION, LADDER,
            )  # fmt: skip
            tl.store(ys + tile, y * tl.load(s + tile))
            yt = y * tl.load(t + tile)
            keep(yt, yt_rows, anchors + 2 * BM * W, deltas + BM * W, tile, kind, LADDER)
    meet(counter, meeting + 2, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 6:
        totals = no_sums(BM, M, RESIDENT)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            value = ladder_product(
                yt_rows, bg, lowbg, deltas + BM * W, anchors + 3 * BM * W, group, depth,
                kind, W, BM, P, BK, PRECISION, LADDER,
            )  # fmt: skip
            value += tl.load(ys + tile) + tl.load(unit + tile)
            totals, t_own, apart = record(
                held, value, z, f, g, group, step, totals, W, P, M, BM, RESIDENT
            )
        share_sums(partials, step, first_group, totals, G, M, BM, SPREAD, RESIDENT)
    meet(counter, meeting + 3, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 7:
        if SPREAD:
            totals = gather_sums(partials, step, G, M, BM, RESIDENT)
        (
            alive, running, best, improved_at, restarts, first, done, exact, step, held,
        ) = finish(
            held, t_own, apart, z, best_f, best_g, f, g, anchors, deltas, gram, status,
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
def fusion_adjoint_rows(
    block,
    gradient, state, solved, modalities, x, gate_mask, fusion_mask, dm, dx, status, steps, residual,
    wg, wf, wm, bg, bf, bm, lowbg, lowbf, vectors,
    scratch, rstd, scale, left, right, sums, gram, partials, counters, saved,
    rows, padded_rows, max_steps, rtol, atol, ridge, mixing,
    N: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, M: tl.constexpr, SIGMOID: tl.constexpr, GATE_MASK: tl.constexpr,
    FUSION_MASK: tl.constexpr, RELU_LAST: tl.constexpr, TRUNCATED: tl.constexpr,
    RELATIVE: tl.constexpr, PRECISION: tl.constexpr, LADDER: tl.constexpr,
    COOPERATIVE: tl.constexpr, RESIDENT: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """The adjoint of BM rows; arguments and tiles: the head of this file."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    SPREAD: tl.constexpr = COOPERATIVE or PHASE > 0
    begin = block * BM
    local = tl.arange(0, BM)  # [BM]
    column = tl.arange(0, P)  # [P]
    live = begin + local < rows
    first_group, last_group = own_groups(G)
    factors = padded_rows.to(tl.int64) * W
    status, steps, residual = status + begin, steps + begin, residual + begin
    # One address, as in `kernels.modality`.
    scratch = scratch + begin * planes_of(10 + N, M, LADDER) * W
    unit, through, s = scratch, scratch + BM * W, scratch + 2 * BM * W
    t, ys = scratch + 3 * BM * W, scratch + 4 * BM * W
    xhat, open_ = scratch + 5 * BM * W, scratch + 6 * BM * W
    z, best_f, best_g = scratch + 7 * BM * W, scratch + 8 * BM * W, scratch + 9 * BM * W
    constants, f = scratch + 10 * BM * W, scratch + (10 + N) * BM * W
    g, anchors, deltas = history_of(f, W, BM, M, LADDER)
    rstd = rstd + begin * G
    gram = gram + (first_group * padded_rows.to(tl.int64) + begin) * (M * M)
    partials, counter = partials + block * (2 * SUMS * G * BM), counters + block
    saved = saved + (block * G + first_group) * (SAVED * BM)
    r_rows, u_rows = left + begin * W, right + begin * W
    yt_rows, z_rows = r_rows + factors, u_rows + factors
    dc_rows, m_rows = yt_rows + factors, z_rows + factors
    scale = scale + begin
    take_part = live & (tl.load(solved + begin + local, mask=live, other=0) != NON_FINITE)
    meeting = 1

    if PHASE <= 1:
        # z* and z_i of the rows that take part, and the largest element of their gradients.
        report_nothing(status, steps, residual, live, first_group, BM)
        largest = tl.zeros([BM], dtype=tl.float32)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            solution = load_true(state, begin, local, take_part, group, column, DIM, DG)
            tl.store(z_rows + tile, solution)
            for i in range(0, N):
                plane = modalities + i * rows.to(tl.int64) * DIM
                value = load_true(plane, begin, local, take_part, group, column, DIM, DG)
                tl.store(m_rows + i * factors + tile, value)
            value = load_true(gradient, begin, local, take_part, group, column, DIM, DG)
            largest = tl.maximum(largest, largest_of(value))
        if SPREAD:
            share(partials, 0, largest, first_group, BM)
    meet(counter, meeting, G, COOPERATIVE)
    if SPREAD and (PHASE == 0 or PHASE == 2 or PHASE == 3):
        largest = gather_largest(partials, 0, BM, G)
    if PHASE == 0 or PHASE == 2:
        # Their norms, and the gates at z*.
        divisor = divisor_of(largest)
        total = tl.zeros([BM], dtype=tl.float32)
        for group in range(first_group, last_group):
            value = load_true(gradient, begin, local, take_part, group, column, DIM, DG)
            value = value / divisor[:, None]
            total += tl.sum(value * value, 1)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            p = product(z_rows, wg + group * P * W, W, W, BM, P, BK, PRECISION)
            tl.store(through + tile, p)
            for i in range(0, N):
                c = constant(m_rows + i * factors, wm, vectors, group, W, P, BM, BK, PRECISION)
                tl.store(constants + i * (BM * W) + tile, c)
            # Loaded again, so that it need not stay in registers meanwhile.
            tl.debug_barrier()
            p = tl.load(through + tile)
            total_gate = tl.zeros([BM, P], dtype=tl.float32)
            for i in range(0, N):
                a, factor = gate(
                    p, constants, gate_mask, i, rows, begin, local, take_part, group, column, tile,
                    BM * W, DIM, DG, SIGMOID, GATE_MASK,
                )  # fmt: skip
                total_gate += a * factor
            tl.store(s + tile, total_gate)
            tl.store(u_rows + tile, total_gate * tl.load(z_rows + tile))
            slope = tl.zeros([BM, P], dtype=tl.float32)
            for i in range(0, N):
                a, factor = gate(
                    p, constants, gate_mask, i, rows, begin, local, take_part, group, column, tile,
                    BM * W, DIM, DG, SIGMOID, GATE_MASK,
                )  # fmt: skip
                slope += slope_of(a, SIGMOID) * factor
            tl.store(t + tile, slope * tl.load(z_rows + tile))
        if SPREAD:
            share(partials, 1, total, first_group, BM)
    meet(counter, meeting + 1, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 3:
        # The block itself, and unit gradients.
        if SPREAD:
            total = gather(partials, 1, BM, G)
        divisor, norm, whole = scales(largest, total, TRUNCATED)
        # Every group's program writes the same; rows that take no part are 0 at the end.
        tl.store(scale + local, tl.where(take_part, whole, 0.0))
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            value = load_true(gradient, begin, local, take_part, group, column, DIM, DG)
            tl.store(unit + tile, value / divisor[:, None] / norm[:, None])
            tl.store(z + tile, tl.zeros([BM, P], dtype=tl.float32))
            tl.store(best_f + tile, tl.zeros([BM, P], dtype=tl.float32))
            factor = tl.full([BM, P], 1.0, dtype=tl.float32)
            if FUSION_MASK:
                factor = load_true(fusion_mask, begin, local, take_part, group, column, DIM, DG)
            x_tile = injection_tile(x, begin, local, take_part, group, column, DIM, DG)
            v = injected(
                u_rows, wf, wf, z, z, vectors, x_tile, factor, group, W, EXACT, W, P, BM, BK,
                PRECISION, "",
            )  # fmt: skip
            # What is beside a large number with it: else its sign would be the product's.
            v_scaled, scaled = within_range(v, not RELU_LAST)
            _, hat, deviation = normalised(v_scaled, vectors, group, W, DG, P, RELU_LAST)
            tl.store(xhat + tile, hat)
            tl.store(rstd + local * G + group, deviation * scaled)
            if RELU_LAST:
                tl.store(open_ + tile, tl.full([BM, P], 1.0, dtype=tl.float32))
            else:
                tl.store(open_ + tile, tl.where(v > 0.0, 1.0, 0.0))
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
                    state = fusion_adjoint_step(
                        state, begin, local, column, first_group, last_group, unit, s, t, ys,
                        xhat, open_, z, best_f, best_g, f, g, anchors, deltas, counter, r_rows,
                        yt_rows, take_part, fusion_mask, status, steps, residual, bg, bf, lowbg,
                        lowbf, vectors, rstd, gram, partials, counters, saved, max_steps, rtol,
                        atol, ridge, mixing, DIM, G, P, BM, BK, M, FUSION_MASK, RELU_LAST,
                        TRUNCATED, RELATIVE, PRECISION, LADDER, COOPERATIVE, RESIDENT, PHASE,
                    )  # fmt: skip
                    going = tl.max(state[1].to(tl.int32), 0)
        else:
            while going > 0:
                state = fusion_adjoint_step(
                    state, begin, local, column, first_group, last_group, unit, s, t, ys, xhat,
                    open_, z, best_f, best_g, f, g, anchors, deltas, counter, r_rows, yt_rows,
                    take_part, fusion_mask, status, steps, residual, bg, bf, lowbg, lowbf,
                    vectors, rstd, gram, partials, counters, saved, max_steps, rtol, atol,
                    ridge, mixing, DIM, G, P, BM, BK, M, FUSION_MASK, RELU_LAST, TRUNCATED,
                    RELATIVE, PRECISION, LADDER, COOPERATIVE, RESIDENT, PHASE,
                )  # fmt: skip
                going = tl.max(state[1].to(tl.int32), 0) if PHASE == 0 else going * 0
        meeting = state[0]

    # The final VJP, with lambda in place of its unit.
    tl.debug_barrier()
    if PHASE == 0 or PHASE == 8:
        whole = tl.load(scale + local)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            solution = tl.load(best_f + tile) * whole[:, None]
            row = sums + block * 4 * W + group * P + column
            affected, hat = behind(solution, xhat, vectors, tile, group, W, P, RELU_LAST)
            tl.store(row + 2 * W, tl.sum(affected * hat, 0))
            tl.store(row + 3 * W, tl.sum(affected, 0))
            r = back(
                solution, xhat, rstd, open_, vectors, tile, local, group, W, G, DG, P, RELU_LAST
            )
            store_true(dx, r, begin, local, live, group, column, DIM, DG)
            if FUSION_MASK:
                r *= load_true(fusion_mask, begin, local, take_part, group, column, DIM, DG)
            tl.store(r_rows + tile, r)
            tl.store(row + W, tl.sum(r, 0))
    meet(counter, meeting + 1, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 9:
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            y = product(r_rows, bf + group * P * W, W, W, BM, P, BK, PRECISION)
            tl.store(yt_rows + tile, y * tl.load(t + tile))
            p = tl.load(through + tile)
            yz = y * tl.load(z_rows + tile)
            change = tl.zeros([P], dtype=tl.float32)
            for i in range(0, N):
                a, factor = gate(
                    p, constants, gate_mask, i, rows, begin, local, take_part, group, column, tile,
                    BM * W, DIM, DG, SIGMOID, GATE_MASK,
                )  # fmt: skip
                dc = yz * factor * slope_of(a, SIGMOID)
                tl.store(dc_rows + i * factors + tile, dc)
                change += tl.sum(dc, 0)
            tl.store(sums + block * 4 * W + group * P + column, change)
    meet(counter, meeting + 2, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 10:
        for group in range(first_group, last_group):
            for i in range(0, N):
                value = product(
                    dc_rows + i * factors, bm + group * P * W, W, W, BM, P, BK, PRECISION
                )
                plane = dm + i * rows.to(tl.int64) * DIM
                store_true(plane, value, begin, local, live, group, column, DIM, DG)


@triton.jit(do_not_specialize=["rows", "padded_rows", "max_steps"])
def fusion_adjoint_kernel(
    gradient, state, solved, modalities, x, gate_mask, fusion_mask, dm, dx, status, steps, residual,
    wg, wf, wm, bg, bf, bm, lowbg, lowbf, vectors,
    scratch, rstd, scale, left, right, sums, gram, partials, counters, saved,
    rows, padded_rows, max_steps, rtol, atol, ridge, mixing,
    N: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, M: tl.constexpr, SIGMOID: tl.constexpr, GATE_MASK: tl.constexpr,
    FUSION_MASK: tl.constexpr, RELU_LAST: tl.constexpr, TRUNCATED: tl.constexpr,
    RELATIVE: tl.constexpr, PRECISION: tl.constexpr, LADDER: tl.constexpr,
    COOPERATIVE: tl.constexpr, RESIDENT: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """A row block, or in schedule cooperative several one after the other."""
    if COOPERATIVE:
        for block in range(tl.program_id(0), padded_rows // BM, tl.num_programs(0)):
            fusion_adjoint_rows(
                tl.zeros([], dtype=tl.int64) + block,
                gradient, state, solved, modalities, x, gate_mask, fusion_mask, dm, dx,
                status, steps, residual, wg, wf, wm, bg, bf, bm, lowbg, lowbf, vectors,
                scratch, rstd, scale, left, right, sums, gram, partials, counters,
                saved, rows, padded_rows, max_steps, rtol, atol, ridge, mixing, N, DIM,
                G, P, BM, BK, M, SIGMOID, GATE_MASK, FUSION_MASK, RELU_LAST, TRUNCATED,
                RELATIVE, PRECISION, LADDER, COOPERATIVE, RESIDENT, PHASE,
            )  # fmt: skip
    else:
        fusion_adjoint_rows(
            tl.program_id(0).to(tl.int64),
            gradient, state, solved, modalities, x, gate_mask, fusion_mask, dm, dx,
            status, steps, residual, wg, wf, wm, bg, bf, bm, lowbg, lowbf, vectors,
            scratch, rstd, scale, left, right, sums, gram, partials, counters,
            saved, rows, padded_rows, max_steps, rtol, atol, ridge, mixing, N, DIM,
            G, P, BM, BK, M, SIGMOID, GATE_MASK, FUSION_MASK, RELU_LAST, TRUNCATED,
            RELATIVE, PRECISION, LADDER, COOPERATIVE, RESIDENT, PHASE,
        )  # fmt: skip
