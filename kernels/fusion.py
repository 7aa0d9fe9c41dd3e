r"""The fusion equilibrium in one launch (schedule *step*: a launch per phase).

    c_i = W_m z_i + b_g                        once per solve                        `constant`
    s = sum_i M_i sigma(W_g z + c_i)           u = s z                               `gate`
    v = F (W_f u + b_f) + x_f                  f = GN(ReLU(v))       `injected`, `normalised`

(tail "norm_relu": f = ReLU(GN(v)); gate "identity": no sigma.) A program owns BM rows, as in
`kernels.modality`: both phases, the Anderson step, and again, until the rows have ended. Grid:
(ceil(R / BM), 1, 1 or G).

Scratch (packed, width W = G P, R' = R rounded up to BM), fp32: per row block 5 + 2 N planes (BM,
W), x_f, z, u, best_f, best_g, packed modalities, constants, and the solver's; gram (1 or G, R', M,
M); the rest as in `kernels.modality`. Weights (W, W); vectors (4, W): b_g, b_f, weight and bias
of GN. Unpacked: modalities (N, R, d), x_f, init, out (R, d) and F (R, d) in the dtype of the
features; gate mask M (N, R, 1 or d); modality_status int32 (N, R); status, steps int32, residual
fp32 (R); trace (R, max_steps, 2) fp32.
PHASE: 1 start, 2 constants, 3 to 5 a step, 6 end.
Source: arXiv 2306.16645, equations 6 and 7.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    affine,
    keep,
    ladder_product,
    load_true,
    product,
    relu,
    standardise,
    store_true,
    within_range,
)
from .resident import blank_of, held_from
from .schedule import SUMS, leave, meet, own_groups
from .solver import (
    NON_FINITE,
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

PHASES = (2, 3, 1)
"""How many phases are the start, a step, the end."""


@triton.jit
def constant(
    m, wm, vectors, group,
    W: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c_i [BM, P] of one group; m: packed rows of z_i."""
    bias = tl.load(vectors + group * P + tl.arange(0, P))
    return product(m, wm + group * P * W, W, W, BM, P, BK, PRECISION) + bias[None, :]


@triton.jit
def gate(
    p, constants, gate_mask, i, rows, begin, local, live, group, column, tile, stride,
    DIM: tl.constexpr, DG: tl.constexpr, SIGMOID: tl.constexpr, GATE_MASK: tl.constexpr,
):  # fmt: skip
    """(sigma(p + c_i), M_i) of modality i [BM, P]; M_i is 1 without a mask.

    constants: packed, `stride` elements from one modality to the next; GATE_MASK: 0, 1 or DIM.
    """
    a = p + tl.load(constants + i * stride + tile)
    if SIGMOID:
        a = 1.0 / (1.0 + tl.exp(-a))
    factor = tl.full(a.shape, 1.0, dtype=tl.float32)
    if GATE_MASK == 1:
        at = gate_mask + i * rows.to(tl.int64) + begin + local
        factor = factor * tl.load(at, mask=live, other=0.0).to(tl.float32)[:, None]
    elif GATE_MASK > 1:
        plane = gate_mask + i * rows.to(tl.int64) * DIM
        factor = load_true(plane, begin, local, live, group, column, DIM, DG)
    return a, factor


@triton.jit
def injection_tile(x, begin, local, live, group, column, DIM: tl.constexpr, DG: tl.constexpr):
    """x_f [BM, P]; ReLU would hide an infinite negative one: it becomes NaN."""
    value = load_true(x, begin, local, live, group, column, DIM, DG)
    return tl.where(tl.abs(value) < float("inf"), value, float("nan"))


@triton.jit
def injected(
    u, wf, lowf, delta, through, vectors, x_tile, factor, group, depth, kind,
    W: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, LADDER: tl.constexpr,
):  # fmt: skip
    """v [BM, P] of one group; factor: the tile of F, or 1; the rest: `ladder_product`."""
    bias = tl.load(vectors + W + group * P + tl.arange(0, P))
    v = ladder_product(
        u, wf, lowf, delta, through, group, depth, kind, W, BM, P, BK, PRECISION, LADDER
    )
    return (v + bias[None, :]) * factor + x_tile


@triton.jit
def normalised(v, vectors, group, W: tl.constexpr, DG: tl.constexpr, P: tl.constexpr,
               RELU_LAST: tl.constexpr):  # fmt: skip
    """f from v [BM, P], and xhat and rstd."""
    column = tl.arange(0, P)
    at = vectors + 2 * W + group * P + column
    if RELU_LAST:
        xhat, rstd = standardise(v, column, DG)
        f = relu(affine(xhat, tl.load(at), tl.load(at + W)))
    else:
        xhat, rstd = standardise(relu(v), column, DG)
        f = affine(xhat, tl.load(at), tl.load(at + W))
    return f, xhat, rstd


@triton.jit
def fusion_step(
    state,
    begin, local, column, live, first_group, last_group, x_rows, z, u, best_f, best_g,
    constants, f, g, anchors, deltas, counter, gate_mask, fusion_mask, status, steps, residual,
    trace, wg, wf, lowg, lowf, vectors, gram, partials, counters, saved, rows, max_steps, rtol,
    atol, ridge, mixing,
    N: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, M: tl.constexpr, SIGMOID: tl.constexpr, GATE_MASK: tl.constexpr,
    FUSION_MASK: tl.constexpr, RELU_LAST: tl.constexpr, INIT: tl.constexpr, TRACE: tl.constexpr,
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
    # From z = 0 there is no product: u is 0 whatever the gates are.
    depth = tl.where(tl.max(done, 0) == 0, 0, W)
    if INIT:
        depth = W + 0 * step
    kind = kind_of(exact, step, LADDER)
    tl.debug_barrier()
    if PHASE == 0 or PHASE == 3:
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]  # [BM, P]
            p = ladder_product(
                z, wg, lowg, deltas, anchors + BM * W, group, depth, kind, W, BM, P, BK,
                PRECISION, LADDER,
            )  # fmt: skip
            s = tl.zeros([BM, P], dtype=tl.float32)
            for i in range(0, N):
                a, factor = gate(
                    p, constants, gate_mask, i, rows, begin, local, live, group, column,
                    tile, BM * W, DIM, DG, SIGMOID, GATE_MASK,
                )  # fmt: skip
                s += a * factor
            value = s * tl.load(z + tile)
            keep(value, u, anchors + 2 * BM * W, deltas + BM * W, tile, kind, LADDER)
    meet(counter, meeting + 1, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 4:
        sums = no_sums(BM, M, RESIDENT)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            factor = tl.full([BM, P], 1.0, dtype=tl.float32)
            if FUSION_MASK:
                factor = load_true(fusion_mask, begin, local, live, group, column, DIM, DG)
            v = injected(
                u, wf, lowf, deltas + BM * W, anchors + 3 * BM * W, vectors,
                tl.load(x_rows + tile), factor, group, depth, kind, W, P, BM, BK,
                PRECISION, LADDER,
            )  # fmt: skip
            t, _, _ = normalised(v, vectors, group, W, DG, P, RELU_LAST)
            sums, t_own, change = record(held, t, z, f, g, group, step, sums, W, P, M, BM, RESIDENT)
        share_sums(partials, step, first_group, sums, G, M, BM, SPREAD, RESIDENT)
    meet(counter, meeting + 2, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 5:
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
    if PHASE == 5:
        store_rows(
            saved, counters, first_group, alive, running, best, improved_at, restarts,
            first, done, exact, step, BM,
        )  # fmt: skip
    return meeting, alive, running, best, improved_at, restarts, first, done, exact, step, held


@triton.jit
def fusion_solve_rows(
    block,
    modalities, x, modality_status, init, gate_mask, fusion_mask, out, status, steps, residual,
    trace, tolerance,
    wg, wf, lowg, lowf, wm, vectors,
    scratch, gram, partials, counters, saved,
    rows, padded_rows, max_steps, rtol, atol, ridge, mixing,
    N: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, M: tl.constexpr, SIGMOID: tl.constexpr, GATE_MASK: tl.constexpr,
    FUSION_MASK: tl.constexpr, RELU_LAST: tl.constexpr, STATUS: tl.constexpr, INIT: tl.constexpr,
    TOLERANCE: tl.constexpr, TRACE: tl.constexpr, RELATIVE: tl.constexpr,
    PRECISION: tl.constexpr, LADDER: tl.constexpr, COOPERATIVE: tl.constexpr,
    RESIDENT: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """The fusion solve of BM rows; arguments and tiles: the head of this file."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    begin = block * BM
    local = tl.arange(0, BM)  # [BM]
    column = tl.arange(0, P)  # [P]
    live = begin + local < rows
    first_group, last_group = own_groups(G)
    status, steps, residual = status + begin, steps + begin, residual + begin
    trace = trace + begin * max_steps * 2
    # One address, as in `kernels.modality`.
    scratch = scratch + begin * planes_of(5 + 2 * N, M, LADDER) * W
    x_rows, z, u = scratch, scratch + BM * W, scratch + 2 * BM * W
    best_f, best_g, packed = scratch + 3 * BM * W, scratch + 4 * BM * W, scratch + 5 * BM * W
    constants, f = packed + N * BM * W, packed + 2 * N * BM * W
    g, anchors, deltas = history_of(f, W, BM, M, LADDER)
    gram = gram + (first_group * padded_rows.to(tl.int64) + begin) * (M * M)
    partials, counter = partials + block * (2 * SUMS * G * BM), counters + block
    saved = saved + (block * G + first_group) * (SAVED * BM)
    if TOLERANCE:
        rtol = tl.load(tolerance).to(tl.float32)
    meeting = 1
    z_own = blank_of(BM, P, RESIDENT)

    if PHASE <= 1:
        report_nothing(status, steps, residual, live, first_group, BM)
        lost = local < 0
        if STATUS:
            # The fusion of a row that lost a modality has no answer, whatever is injected.
            for i in range(0, N):
                at = modality_status + i * rows.to(tl.int64) + begin + local
                lost = lost | (tl.load(at, mask=live, other=0) == NON_FINITE)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            start = tl.zeros([BM, P], dtype=tl.float32)
            if INIT:
                start = load_true(init, begin, local, live, group, column, DIM, DG)
            tl.store(z + tile, start)
            if LADDER == "half":
                tl.store(deltas + tile, start.to(tl.float16))
            if RESIDENT:
                z_own = start
            tl.store(best_f + tile, tl.where(tl.abs(start) < float("inf"), start, 0.0))
            value = injection_tile(x, begin, local, live, group, column, DIM, DG)
            value, _ = within_range(value, not RELU_LAST)
            tl.store(x_rows + tile, tl.where(lost[:, None], float("nan"), value))
            for i in range(0, N):
                plane = modalities + i * rows.to(tl.int64) * DIM
                value = load_true(plane, begin, local, live, group, column, DIM, DG)
                tl.store(packed + i * (BM * W) + tile, value)
        alive = live
        running, best, improved_at, restarts, first, done, exact, step = fresh(alive, BM, LADDER)
        if PHASE == 1:
            store_rows(
                saved, counters, first_group, alive, running, best, improved_at, restarts, first,
                done, exact, step, BM,
            )  # fmt: skip
    else:
        alive, running, best, improved_at, restarts, first, done, exact, step = load_rows(saved, BM)
    meet(counter, meeting, G, COOPERATIVE)
    if PHASE == 0 or PHASE == 2:
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            for i in range(0, N):
                c = constant(packed + i * (BM * W), wm, vectors, group, W, P, BM, BK, PRECISION)
                tl.store(constants + i * (BM * W) + tile, c)

    if PHASE == 0 or (PHASE > 2 and PHASE < 6):
        going = tl.max(alive.to(tl.int32), 0)
        state = (
            meeting, alive, running, best, improved_at, restarts, first, done, exact, step,
            held_from(z_own, M, BM, P, RESIDENT),
        )  # fmt: skip
        if RESIDENT:
            # Not `while`: with tiles to carry the compiler's layouts do not settle in one.
            for _turn in range(0, max_steps):
                if going > 0:
                    state = fusion_step(
                        state, begin, local, column, live, first_group, last_group, x_rows, z,
                        u, best_f, best_g, constants, f, g, anchors, deltas, counter, gate_mask,
                        fusion_mask, status, steps, residual, trace, wg, wf, lowg, lowf,
                        vectors, gram, partials, counters, saved, rows, max_steps, rtol, atol,
                        ridge, mixing, N, DIM, G, P, BM, BK, M, SIGMOID, GATE_MASK, FUSION_MASK,
                        RELU_LAST, INIT, TRACE, RELATIVE, PRECISION, LADDER, COOPERATIVE,
                        RESIDENT, PHASE,
                    )  # fmt: skip
                    going = tl.max(state[1].to(tl.int32), 0)
        else:
            while going > 0:
                state = fusion_step(
                    state, begin, local, column, live, first_group, last_group, x_rows, z, u,
                    best_f, best_g, constants, f, g, anchors, deltas, counter, gate_mask,
                    fusion_mask, status, steps, residual, trace, wg, wf, lowg, lowf, vectors,
                    gram, partials, counters, saved, rows, max_steps, rtol, atol, ridge, mixing,
                    N, DIM, G, P, BM, BK, M, SIGMOID, GATE_MASK, FUSION_MASK, RELU_LAST, INIT,
                    TRACE, RELATIVE, PRECISION, LADDER, COOPERATIVE, RESIDENT, PHASE,
                )  # fmt: skip
                going = tl.max(state[1].to(tl.int32), 0) if PHASE == 0 else going * 0
        meeting = state[0]

    if PHASE == 0 or PHASE == 6:
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            store_true(out, tl.load(best_f + tile), begin, local, live, group, column, DIM, DG)
    leave(counter, meeting, G, COOPERATIVE)
    if PHASE == 6:
        forget_ended(counters)


@triton.jit(
    do_not_specialize=["rows", "padded_rows", "max_steps"],
    do_not_specialize_on_alignment=["init"],
)
def fusion_solve_kernel(
    modalities, x, modality_status, init, gate_mask, fusion_mask, out, status, steps, residual,
    trace, tolerance,
    wg, wf, lowg, lowf, wm, vectors,
    scratch, gram, partials, counters, saved,
    rows, padded_rows, max_steps, rtol, atol, ridge, mixing,
    N: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, M: tl.constexpr, SIGMOID: tl.constexpr, GATE_MASK: tl.constexpr,
    FUSION_MASK: tl.constexpr, RELU_LAST: tl.constexpr, STATUS: tl.constexpr, INIT: tl.constexpr,
    TOLERANCE: tl.constexpr, TRACE: tl.constexpr, RELATIVE: tl.constexpr,
    PRECISION: tl.constexpr, LADDER: tl.constexpr, COOPERATIVE: tl.constexpr,
    RESIDENT: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """A row block, or in schedule cooperative several one after the other."""
    if COOPERATIVE:
        for block in range(tl.program_id(0), padded_rows // BM, tl.num_programs(0)):
            fusion_solve_rows(
                tl.zeros([], dtype=tl.int64) + block,
                modalities, x, modality_status, init, gate_mask, fusion_mask, out,
                status, steps, residual, trace, tolerance, wg, wf, lowg, lowf, wm,
                vectors, scratch, gram, partials, counters, saved, rows, padded_rows,
                max_steps, rtol, atol, ridge, mixing, N, DIM, G, P, BM, BK, M, SIGMOID,
                GATE_MASK, FUSION_MASK, RELU_LAST, STATUS, INIT, TOLERANCE, TRACE,
                RELATIVE, PRECISION, LADDER, COOPERATIVE, RESIDENT, PHASE,
            )  # fmt: skip
    else:
        fusion_solve_rows(
            tl.program_id(0).to(tl.int64),
            modalities, x, modality_status, init, gate_mask, fusion_mask, out,
            status, steps, residual, trace, tolerance, wg, wf, lowg, lowf, wm,
            vectors, scratch, gram, partials, counters, saved, rows, padded_rows,
            max_steps, rtol, atol, ridge, mixing, N, DIM, G, P, BM, BK, M, SIGMOID,
            GATE_MASK, FUSION_MASK, RELU_LAST, STATUS, INIT, TOLERANCE, TRACE,
            RELATIVE, PRECISION, LADDER, COOPERATIVE, RESIDENT, PHASE,
        )  # fmt: skip
