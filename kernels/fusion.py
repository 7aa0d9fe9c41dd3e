r"""The fusion equilibrium in one launch, schedule *row*.

    s = sum_i M_i sigma(W_g z + c_i)      u = s z      v = F (W_f u + b) + x_f
    f = GN(ReLU(v))                       (tail "norm_relu": ReLU(GN(v)); gate "identity": no sigma)

One program owns BM rows and runs their whole solve, like `kernels.modality`: both phases group by
group, the Anderson step, and again, until its rows have ended. Grid: (ceil(R / BM),).

Tensors, packed (`kernels.layout`, width D = G P): x_f, z, u, state, best_g (1, R', D) fp32, R' = R
rounded up to BM; constants c (N, R', D) fp32; gate mask M (N, R') or (N, R', D), fusion mask F
(1, R', D) fp32; history f, g (M, 1, R', D); weights (D, D) in their own dtype; vectors (D) fp32;
gram (1, R', M, M); status, steps int32 and residual fp32 (1, R').
Source: arXiv 2306.16645, equations 6 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
def fusion_row_kernel(
    x, z, u, state, best_g, f, g, gram, status, steps, residual, constants, gate_mask, fusion_mask,
    wg, wf, bf, nf, cf,
    rows, padded_rows, max_steps, rtol, atol, ridge, mixing, from_zero,
    N: tl.constexpr, G: tl.constexpr, DG: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, M: tl.constexpr, SIGMOID: tl.constexpr, GATE_MASK: tl.constexpr,
    FUSION_MASK: tl.constexpr, RELU_LAST: tl.constexpr, RELATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The fusion solve of BM rows; arguments and tiles: the head of this file."""
    D: tl.constexpr = G * P
    begin = tl.program_id(0).to(tl.int64) * BM
    local = tl.arange(0, BM)  # [BM]
    live = begin + local < rows
    running = live
    history = padded_rows.to(tl.int64) * D
    x, z, u = x + begin * D, z + begin * D, u + begin * D
    state, best_g = state + begin * D, best_g + begin * D
    f, g = f + begin * D, g + begin * D
    gram, status = gram + begin * (M * M), status + begin
    steps, residual = steps + begin, residual + begin
    constants = constants + begin * D
    column = tl.arange(0, P)
    best = tl.full([BM], float("inf"), dtype=tl.float32)
    improved_at = tl.zeros([BM], dtype=tl.int32)
    restarts = tl.zeros([BM], dtype=tl.int32)
    first = tl.zeros([BM], dtype=tl.int32)

    step = 0
    going = tl.max(running.to(tl.int32), 0)
    while going > 0:
        # From z = 0 there is no product: u is 0 whatever the gates are.
        depth = tl.where((step == 0) & (from_zero != 0), 0, D)
        for group in range(0, G):
            at = group * P + column  # [P]
            tile = local[:, None] * D + at[None, :]  # [BM, P]
            p = product(z, wg + group * P, depth, D, BM, P, BK, PRECISION)
            s = tl.zeros([BM, P], dtype=tl.float32)
            for i in range(0, N):
                a = p + tl.load(constants + i * history + tile)
                if SIGMOID:
                    a = 1.0 / (1.0 + tl.exp(-a))
                if GATE_MASK == 1:
                    a *= tl.load(gate_mask + i * padded_rows.to(tl.int64) + begin + local)[:, None]
                elif GATE_MASK == 2:
                    a *= tl.load(gate_mask + i * history + begin * D + tile)
                s += a
            tl.store(u + tile, s * tl.load(z + tile))
        tl.debug_barrier()
        g2 = tl.zeros([BM], dtype=tl.float32)
        f2 = tl.zeros([BM], dtype=tl.float32)
        dots = zeros(M, BM)
        for group in range(0, G):
            at = group * P + column
            tile = local[:, None] * D + at[None, :]
            t = product(u, wf + group * P, depth, D, BM, P, BK, PRECISION)
            t += tl.load(bf + at)[None, :]
            if FUSION_MASK:
                t *= tl.load(fusion_mask + begin * D + tile)
            t += tl.load(x + tile)
            if RELU_LAST:
                t = normalise(t, tl.load(nf + at), tl.load(cf + at), column, DG)
                t = tl.where(t == t, tl.maximum(t, 0.0), t)
            else:
                t = tl.where(t == t, tl.maximum(t, 0.0), t)
                t = normalise(t, tl.load(nf + at), tl.load(cf + at), column, DG)
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


def solve_fusion_row(
    constants: Tensor,
    injection: Tensor,
    parameters: Sequence[Tensor],
    groups: int,
    gate: str,
    tail: str,
    options: SolveOptions,
    config: RowConfig,
    init: Tensor | None = None,
    gate_mask: Tensor | None = None,
    fusion_mask: Tensor | None = None,
) -> RowSolution:
    """Solves for the fusion equilibrium of every row in one launch.

    Args:
        constants: (N, R, d), c_i = W_gz z_i + b_g.
        injection: (R, d), x_f.
        parameters: the gate's weight of z_f (d, d), the fusion weight (d, d), its bias, and
            weight and bias of the normalisation (d,).
        groups, gate, tail: as in the cell.
        options, config: of the solve and of the program.
        init: (R, d) or None (zeros), where to start.
        gate_mask: (N, R, 1 or d) or None, M_i; fusion_mask: (R, d) or None, F.

    Returns:
        The solution, K = 1.
    """
    count, rows, dim = constants.shape
    layout = Layout(dim, groups)
    start = None if init is None else init.unsqueeze(0)
    space = Workspace.new(injection, 1, rows, layout, options, config, start)
    gate_weight, weight, bias, norm, shift = parameters
    # ReLU would hide an infinite negative injection: such a row has no answer either.
    injection = torch.where(injection.isfinite(), injection, torch.nan)
    kind, factors = 0, space.present
    if gate_mask is not None and gate_mask.shape[-1] == 1:
        kind, factors = 1, space.z.new_zeros(count, space.size)
        factors[:, :rows] = gate_mask.squeeze(-1)
    elif gate_mask is not None:
        kind, factors = 2, space.packed(gate_mask)
    if rows:
        fusion_row_kernel[(space.programs,)](
            space.packed(injection.unsqueeze(0)), space.z, space.packed(), *space.outputs,
            space.packed(constants), factors,
            space.present if fusion_mask is None else space.packed(fusion_mask.unsqueeze(0)),
            layout.pack_weight(gate_weight.to(space.weight_dtype)),
            layout.pack_weight(weight.to(space.weight_dtype)), space.vector(bias),
            space.vector(norm), space.vector(shift),
            rows, space.size, options.max_steps, options.rtol, options.atol, options.ridge,
            options.mixing, int(init is None),
            N=count, G=groups, DG=layout.group, P=layout.padded, BM=config.rows,
            BK=min(config.depth, layout.padded), M=options.memory, SIGMOID=gate == "sigmoid",
            GATE_MASK=kind, FUSION_MASK=fusion_mask is not None, RELU_LAST=tail == "norm_relu",
            RELATIVE=options.relative, PRECISION=product_precision(options.precision),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return space.solution()
