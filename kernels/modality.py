r"""The N modality equilibria in one launch, schedule *row*.

    h = ReLU(GN_1(W_1 z + b_1))      t = GN_2(W_2 h + b_2 + x) (+ z)      f = GN_3(ReLU(t))

One program owns BM rows of one modality and runs their whole solve: both phases group by group,
the Anderson step, and again, until its rows have ended. z, h and the history go through global
memory (scratch of the rows' own, which stays in L2); weights are streamed. Grid: (ceil(R / BM), N).

Tensors, packed (`kernels.layout`, width D = G P): x, z, h, state, best_g (N, R', D) fp32, R' = R
rounded up to BM; history f, g (M, N, R', D) fp32; weights (N, D, D) in their own dtype; vectors
(N, D) fp32; gram (N, R', M, M) fp32; status, steps int32 and residual fp32 (N, R').
Source: arXiv 2306.16645, equations 3 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .anderson import zeros
from .config import RowConfig, SolveOptions
from .layout import Layout
from .primitives import normalise, product, product_precision
from .rows import RowSolution, Workspace
from .solver import finish, record


@triton.jit(do_not_specialize=["rows", "max_steps"])
def modality_row_kernel(
    x, z, h, state, best_g, f, g, gram, status, steps, residual, present,
    w1, b1, n1, c1, w2, b2, n2, c2, n3, c3,
    rows, padded_rows, max_steps, rtol, atol, ridge, mixing, from_zero,
    G: tl.constexpr, DG: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    M: tl.constexpr, SKIP: tl.constexpr, RELATIVE: tl.constexpr,
    PRESENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The solve of BM rows of a modality; arguments and tiles: the head of this file."""
    D: tl.constexpr = G * P
    k = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * BM
    local = tl.arange(0, BM)  # [BM]
    live = begin + local < rows
    own = k * padded_rows + begin
    running = live
    if PRESENT:
        running = running & (tl.load(present + own + local, mask=live, other=0) != 0)
    history = tl.num_programs(1).to(tl.int64) * padded_rows * D
    x, z, h = x + own * D, z + own * D, h + own * D
    state, best_g = state + own * D, best_g + own * D
    f, g = f + own * D, g + own * D
    gram, status = gram + own * (M * M), status + own
    steps, residual = steps + own, residual + own
    w1, w2 = w1 + k * D * D, w2 + k * D * D
    b1, n1, c1, b2, n2 = b1 + k * D, n1 + k * D, c1 + k * D, b2 + k * D, n2 + k * D
    c2, n3, c3 = c2 + k * D, n3 + k * D, c3 + k * D
    column = tl.arange(0, P)
    best = tl.full([BM], float("inf"), dtype=tl.float32)
    improved_at = tl.zeros([BM], dtype=tl.int32)
    restarts = tl.zeros([BM], dtype=tl.int32)
    first = tl.zeros([BM], dtype=tl.int32)

    step = 0
    going = tl.max(running.to(tl.int32), 0)
    while going > 0:
        # From z = 0 the first product is none.
        depth = tl.where((step == 0) & (from_zero != 0), 0, D)
        for group in range(0, G):
            at = group * P + column  # [P]
            u = product(z, w1 + group * P, depth, D, BM, P, BK, PRECISION)
            u += tl.load(b1 + at)[None, :]
            u = normalise(u, tl.load(n1 + at), tl.load(c1 + at), column, DG)
            u = tl.where(u == u, tl.maximum(u, 0.0), u)
            tl.store(h + (local[:, None] * D + at[None, :]), u)
        tl.debug_barrier()
        g2 = tl.zeros([BM], dtype=tl.float32)
        f2 = tl.zeros([BM], dtype=tl.float32)
        dots = zeros(M, BM)
        for group in range(0, G):
            at = group * P + column
            tile = local[:, None] * D + at[None, :]  # [BM, P]
            t = product(h, w2 + group * P, D, D, BM, P, BK, PRECISION)
            t += tl.load(b2 + at)[None, :] + tl.load(x + tile)
            t = normalise(t, tl.load(n2 + at), tl.load(c2 + at), column, DG)
            if SKIP:
                t += tl.load(z + tile)
            t = tl.where(t == t, tl.maximum(t, 0.0), t)
            t = normalise(t, tl.load(n3 + at), tl.load(c3 + at), column, DG)
            g2, f2, dots = record(t, z, f, g, history, tile, step, live, g2, f2, dots, M)
        tl.debug_barrier()
        running, best, improved_at, restarts, first = finish(
            z, state, best_g, f, g, history, gram, status, steps, residual, g2, f2, dots, step,
            max_steps, running, best, improved_at, restarts, first, rtol, atol, ridge, mixing,
            G, P, M, BM, RELATIVE,
        )  # fmt: skip
        tl.debug_barrier()
        step += 1
        going = tl.max(running.to(tl.int32), 0)


def solve_modality_row(
    x: Tensor,
    parameters: Sequence[Tensor],
    groups: int,
    skip: bool,
    options: SolveOptions,
    config: RowConfig,
    init: Tensor | None = None,
    present: Tensor | None = None,
) -> RowSolution:
    """Solves for the N modality equilibria of every row in one launch.

    Args:
        x: (N, R, d) features, any float dtype; computed in fp32.
        parameters: weight1, bias1, norm1_weight, norm1_bias, weight2, bias2, norm2_weight,
            norm2_bias, norm3_weight, norm3_bias; weights (N, d, d), the others (N, d).
        groups: G of the normalisations.
        skip: adds z to t.
        options, config: of the solve and of the program.
        init: (N, R, d) or None (zeros), where to start.
        present: bool (N, R) or None; absent modalities keep state 0, status CONVERGED, 0 steps.

    Returns:
        The solution. Rows whose first evaluation is not finite keep the start.
    """
    count, rows, dim = x.shape
    layout = Layout(dim, groups)
    space = Workspace.new(x, count, rows, layout, options, config, init, present)
    weight1, bias1, norm1, shift1, weight2, bias2, norm2, shift2, norm3, shift3 = parameters
    if rows:
        modality_row_kernel[space.programs, count](
            space.packed(x), space.z, space.packed(), *space.outputs, space.present,
            layout.pack_weight(weight1.to(space.weight_dtype)), space.vector(bias1),
            space.vector(norm1), space.vector(shift1),
            layout.pack_weight(weight2.to(space.weight_dtype)), space.vector(bias2),
            space.vector(norm2), space.vector(shift2), space.vector(norm3), space.vector(shift3),
            rows, space.size, options.max_steps, options.rtol, options.atol, options.ridge,
            options.mixing, int(init is None),
            G=groups, DG=layout.group, P=layout.padded, BM=config.rows,
            BK=min(config.depth, layout.padded), M=options.memory, SKIP=skip,
            RELATIVE=options.relative, PRESENT=present is not None,
            PRECISION=product_precision(options.precision),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return space.solution()
