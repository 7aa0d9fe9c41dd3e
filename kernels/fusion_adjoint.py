r"""Gradients of the fusion equilibrium in one launch (schedules *row* and *cooperative*).

    lambda = g + J^T lambda,      r = N(lambda w) [v > 0]       y = (F r) W_f
                                  J^T lambda = y s + (y t) W_g

with s = sum_i M_i a_i and t = z* sum_i M_i a_i' saved at z* (a_i' the derivative of the gate: a_i
(1 - a_i), or 1 for the identity); tail "norm_relu": r = N(lambda w [f > 0]). A program owns BM rows
and works as in `kernels.modality_adjoint`. It ends with dL/dx_f = r, with dL/dz_i = dc_i W_m where
dc_i = y z* M_i a_i', and with what the parameter gradients are made of (`kernels.gradients`): the
factors F r, u = s z* of dW_f, y t, z* of dW_g and dc_i, z_i of dW_m, and the sums over its rows of
sum_i dc_i, F r, lambda xhat, lambda (behind the ReLU).

Scratch (packed, W = G P, R' = R rounded up to BM), fp32: unit gradient, z, gate W_g z*, s, t, y s,
xhat, open (behind the ReLU), best_f, best_g (R', W); rstd (R', G); scale (R'); constants
(N, R', W); left, right (2 + N, R', W) the factors in the order above; history, gram, partials and
counters as in `kernels.fusion`; sums (ceil(R / BM), 4, 1, W). Weights forward and, for products
with W itself, backward. Unpacked: gradient, state, x_f, dx (R, d); modalities, dm (N, R, d).
Source: implicit function theorem; S. Bai et al., "Deep equilibrium models", NeurIPS 2019.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fusion import constant, gate, injected, injection_tile, normalised
from .primitives import affine, ladder_product, load_true, product, standardise_vjp, store_true
from .schedule import gather, meet, own_groups, share
from .solver import NON_FINITE, exchange, finish, fresh, no_sums, record


@triton.jit
def back(
    gradient, xhat, rstd, open_, vectors, tile, local, group,
    W: tl.constexpr, G: tl.constexpr, DG: tl.constexpr, P: tl.constexpr, RELU_LAST: tl.constexpr,
):  # fmt: skip
    """(gradient behind the affine part, xhat, r before F or the ReLU's mask) of one group."""
    column = tl.arange(0, P)
    at = vectors + 2 * W + group * P + column
    weight = tl.load(at)
    hat = tl.load(xhat + tile)
    if RELU_LAST:
        gradient = tl.where(affine(hat, weight, tl.load(at + W)) > 0.0, gradient, 0.0)
    r = standardise_vjp(
        gradient * weight[None, :], hat, tl.load(rstd + local * G + group), column, DG
    )
    return gradient, hat, r * tl.load(open_ + tile)


@triton.jit(do_not_specialize=["rows", "padded_rows", "max_steps"])
def fusion_adjoint_kernel(
    gradient, state, solved, modalities, x, gate_mask, fusion_mask, dm, dx, status, steps, residual,
    wg, wf, wm, bg, bf, bm, lowbg, lowbf, vectors,
    unit, z, through, s, t, ys, xhat, open_, best_f, best_g, rstd, constants, scale, left, right,
    sums, f, g, gram, partials, counters,
    rows, padded_rows, max_steps, rtol, atol, ridge, mixing,
    N: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, M: tl.constexpr, SIGMOID: tl.constexpr, GATE_MASK: tl.constexpr,
    FUSION_MASK: tl.constexpr, RELU_LAST: tl.constexpr, TRUNCATED: tl.constexpr,
    RELATIVE: tl.constexpr, PRECISION: tl.constexpr, LADDER: tl.constexpr,
    COOPERATIVE: tl.constexpr,
):  # fmt: skip
    """The adjoint of BM rows; arguments and tiles: the head of this file."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    block = tl.program_id(0).to(tl.int64)
    begin = block * BM
    local = tl.arange(0, BM)  # [BM]
    column = tl.arange(0, P)  # [P]
    live = begin + local < rows
    first_group, last_group = own_groups(G)
    history = padded_rows.to(tl.int64) * W
    status, steps, residual = status + begin, steps + begin, residual + begin
    unit, z, through = unit + begin * W, z + begin * W, through + begin * W
    s, t = s + begin * W, t + begin * W
    ys, xhat, open_ = ys + begin * W, xhat + begin * W, open_ + begin * W
    best_f, best_g, rstd = best_f + begin * W, best_g + begin * W, rstd + begin * G
    constants, f, g = constants + begin * W, f + begin * W, g + begin * W
    gram = gram + (first_group * padded_rows.to(tl.int64) + begin) * (M * M)
    partials, counter = partials + block * (20 * G * BM), counters + block
    r_rows, u_rows = left + begin * W, right + begin * W
    yt_rows, z_rows = r_rows + history, u_rows + history
    dc_rows, m_rows = yt_rows + history, z_rows + history
    scale = scale + begin
    alive = live & (tl.load(solved + begin + local, mask=live, other=0) != NON_FINITE)
    keep = alive
    if first_group == 0:
        tl.store(status + local, local * 0, mask=live)
        tl.store(steps + local, local * 0, mask=live)
        tl.store(residual + local, tl.zeros([BM], dtype=tl.float32), mask=live)

    # z* and z_i of the rows that take part, and the largest element of their gradients.
    largest = tl.zeros([BM], dtype=tl.float32)
    for group in range(first_group, last_group):
        tile = local[:, None] * W + (group * P + column)[None, :]
        tl.store(z_rows + tile, load_true(state, begin, local, keep, group, column, DIM, DG))
        for i in range(0, N):
            plane = modalities + i * rows.to(tl.int64) * DIM
            value = load_true(plane, begin, local, keep, group, column, DIM, DG)
            tl.store(m_rows + i * history + tile, value)
        value = load_true(gradient, begin, local, keep, group, column, DIM, DG)
        size = tl.max(tl.where(value == value, tl.abs(value), float("inf")), 1)
        largest = tl.maximum(largest, size)
    if COOPERATIVE:
        share(partials, 0, largest, first_group, BM)
    meeting = 1
    meet(counter, meeting, G, COOPERATIVE)
    if COOPERATIVE:
        for group in range(0, G):
            largest = tl.maximum(largest, tl.load(partials + group * 10 * BM + local))
    divisor = tl.where(largest > 0.0, largest, 1.0)
    total = tl.zeros([BM], dtype=tl.float32)
    for group in range(first_group, last_group):
        tile = local[:, None] * W + (group * P + column)[None, :]
        value = load_true(gradient, begin, local, keep, group, column, DIM, DG) / divisor[:, None]
        total += tl.sum(value * value, 1)
        p = product(z_rows, wg + group * P, W, W, BM, P, BK, PRECISION)
        tl.store(through + tile, p)
        for i in range(0, N):
            c = constant(m_rows + i * history, wm, vectors, group, W, P, BM, BK, PRECISION)
            tl.store(constants + i * history + tile, c)
        tl.debug_barrier()
        opened = tl.zeros([BM, P], dtype=tl.float32)
        slope = tl.zeros([BM, P], dtype=tl.float32)
        for i in range(0, N):
            a, factor = gate(
                p, constants, gate_mask, i, rows, begin, local, keep, group, column, tile, history,
                DIM, DG, SIGMOID, GATE_MASK,
            )  # fmt: skip
            opened += a * factor
            if SIGMOID:
                slope += a * (1.0 - a) * factor
            else:
                slope += factor
        z_tile = tl.load(z_rows + tile)
        tl.store(s + tile, opened)
        tl.store(t + tile, slope * z_tile)
        tl.store(u_rows + tile, opened * z_tile)
    if COOPERATIVE:
        share(partials, 1, total, first_group, BM)
    meet(counter, meeting + 1, G, COOPERATIVE)
    if COOPERATIVE:
        total = gather(partials, 1, BM, G)
    norm = tl.sqrt(total)
    whole = largest * norm
    norm = tl.where(norm > 0.0, norm, 1.0)
    if TRUNCATED:
        # Nothing is compared with a residual of unit size: the gradient as it is.
        divisor = divisor * 0.0 + 1.0
        norm = norm * 0.0 + 1.0
        whole = whole * 0.0 + 1.0
    else:
        alive = alive & (largest > 0.0)
    # Every group's program writes the same; rows that take no part are 0 at the end.
    tl.store(scale + local, tl.where(keep, whole, 0.0))
    for group in range(first_group, last_group):
        tile = local[:, None] * W + (group * P + column)[None, :]
        value = load_true(gradient, begin, local, keep, group, column, DIM, DG)
        tl.store(unit + tile, value / divisor[:, None] / norm[:, None])
        tl.store(z + tile, tl.zeros([BM, P], dtype=tl.float32))
        tl.store(best_f + tile, tl.zeros([BM, P], dtype=tl.float32))
        factor = tl.full([BM, P], 1.0, dtype=tl.float32)
        if FUSION_MASK:
            factor = load_true(fusion_mask, begin, local, keep, group, column, DIM, DG)
        x_tile = injection_tile(x, begin, local, keep, group, column, DIM, DG)
        v = injected(
            u_rows, wf, wf, vectors, x_tile, factor, group, W, 1, W, P, BM, BK, PRECISION, ""
        )
        _, hat, deviation = normalised(v, vectors, group, W, DG, P, RELU_LAST)
        tl.store(xhat + tile, hat)
        tl.store(rstd + local * G + group, deviation)
        if RELU_LAST:
            tl.store(open_ + tile, tl.full([BM, P], 1.0, dtype=tl.float32))
        else:
            tl.store(open_ + tile, tl.where(v > 0.0, 1.0, 0.0))
    tl.debug_barrier()
    meeting += 1

    best, improved_at, restarts, first, done = fresh(BM)
    running = alive
    exact = 1
    if LADDER != "":
        exact = tl.where(max_steps > 1, 0, 1)
    step = 0
    going = tl.max(alive.to(tl.int32), 0)
    while going > 0:
        depth = tl.where(tl.max(done, 0) == 0, 0, W)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]  # [BM, P]
            _, _, r = back(
                tl.load(z + tile), xhat, rstd, open_, vectors, tile, local, group, W, G, DG, P,
                RELU_LAST,
            )  # fmt: skip
            if FUSION_MASK:
                r *= load_true(fusion_mask, begin, local, keep, group, column, DIM, DG)
            tl.store(r_rows + tile, r)
        meet(counter, meeting + 1, G, COOPERATIVE)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            y = ladder_product(
                r_rows, bf + group * P, lowbf + group * P, depth, exact, W, BM, P, BK, PRECISION,
                LADDER,
            )  # fmt: skip
            tl.store(ys + tile, y * tl.load(s + tile))
            tl.store(yt_rows + tile, y * tl.load(t + tile))
        meet(counter, meeting + 2, G, COOPERATIVE)
        g2, f2, dots = no_sums(BM)
        for group in range(first_group, last_group):
            tile = local[:, None] * W + (group * P + column)[None, :]
            value = ladder_product(
                yt_rows, bg + group * P, lowbg + group * P, depth, exact, W, BM, P, BK, PRECISION,
                LADDER,
            )  # fmt: skip
            value += tl.load(ys + tile) + tl.load(unit + tile)
            g2, f2, dots = record(value, z, f, g, history, tile, step, g2, f2, dots, M)
        g2, f2, dots = exchange(
            partials, counter, meeting + 3, step, first_group, g2, f2, dots, G, M, BM, COOPERATIVE
        )
        alive, running, best, improved_at, restarts, first, done, exact, step = finish(
            z, best_f, best_g, f, g, history, gram, status, steps, residual, residual, g2, f2,
            dots, step, max_steps, alive, running, best, improved_at, restarts, first, done, exact,
            rtol, atol, ridge, mixing, first_group, last_group, W, P, M, BM, RELATIVE, LADDER,
            False, TRUNCATED,
        )  # fmt: skip
        tl.debug_barrier()
        meeting += 3
        step += 1
        going = tl.max(alive.to(tl.int32), 0)

    # The final VJP, with lambda in place of its unit.
    tl.debug_barrier()
    whole = tl.load(scale + local)
    for group in range(first_group, last_group):
        tile = local[:, None] * W + (group * P + column)[None, :]
        solution = tl.load(best_f + tile) * whole[:, None]
        behind, hat, r = back(
            solution, xhat, rstd, open_, vectors, tile, local, group, W, G, DG, P, RELU_LAST
        )
        store_true(dx, r, begin, local, live, group, column, DIM, DG)
        if FUSION_MASK:
            r *= load_true(fusion_mask, begin, local, keep, group, column, DIM, DG)
        tl.store(r_rows + tile, r)
        row = sums + block * 4 * W + group * P + column
        tl.store(row + W, tl.sum(r, 0))
        tl.store(row + 2 * W, tl.sum(behind * hat, 0))
        tl.store(row + 3 * W, tl.sum(behind, 0))
    meet(counter, meeting + 1, G, COOPERATIVE)
    for group in range(first_group, last_group):
        tile = local[:, None] * W + (group * P + column)[None, :]
        y = product(r_rows, bf + group * P, W, W, BM, P, BK, PRECISION)
        tl.store(yt_rows + tile, y * tl.load(t + tile))
        p = tl.load(through + tile)
        yz = y * tl.load(z_rows + tile)
        change = tl.zeros([P], dtype=tl.float32)
        for i in range(0, N):
            a, factor = gate(
                p, constants, gate_mask, i, rows, begin, local, keep, group, column, tile, history,
                DIM, DG, SIGMOID, GATE_MASK,
            )  # fmt: skip
            dc = yz * factor
            if SIGMOID:
                dc *= a * (1.0 - a)
            tl.store(dc_rows + i * history + tile, dc)
            change += tl.sum(dc, 0)
        tl.store(sums + block * 4 * W + group * P + column, change)
    meet(counter, meeting + 2, G, COOPERATIVE)
    for group in range(first_group, last_group):
        for i in range(0, N):
            value = product(dc_rows + i * history, bm + group * P, W, W, BM, P, BK, PRECISION)
            plane = dm + i * rows.to(tl.int64) * DIM
            store_true(plane, value, begin, local, live, group, column, DIM, DG)
