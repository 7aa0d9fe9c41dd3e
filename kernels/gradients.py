r"""Gradients of the parameters from what the adjoint programs leave: products, and one launch.

    dW_o = sum_j left_j^T right_j           over the jobs j of output o, (d, d)
    dv   = sum_b sums_b                     over row blocks b, for every vector parameter, (d)

Products of transposed fp32 factors are what Triton is slow at (it copies them four bytes at a
time), and what BLAS libraries are for: `weight_products`. The kernel takes the padding out of them
and sums the vectors: a program owns a tile [BO, BI] of one output, or BV columns of one vector,
over the row blocks in their order, without atomics: the same at every run, as far as the products
are (on CUDA: with `CUBLAS_WORKSPACE_CONFIG`).

Outputs: for the modality blocks K of W_1, then K of W_2, with one job each; for the fusion block
W_f (job 0), then the gate's weight: jobs 1 (y t, z*) and, where one weight serves both inputs, 2 to
N + 1 (dc_i, z_i), which otherwise make the right half of a (d, 2 d) weight.

Packed fp32 (width W = G P, R' rows): left, right (jobs, R', W); products (outputs, W, W); sums
(blocks, V, K, W). Unpacked, in the parameters' dtype: weights a and b, vectors v0 to v7 (K, d).
Products follow `torch.get_float32_matmul_precision()`, sums are fp32.
Source: the chain rule on arXiv 2306.16645, equations 3 to 7, at the equilibrium.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def weight_products(left: Tensor, right: Tensor, fusion: bool, shared: bool) -> Tensor:
    """Padded gradients of the weights, (outputs, W, W); shared: one weight for both gate inputs."""
    if not fusion:
        return torch.bmm(left.mT, right)
    alone, width = 1 if shared else 2, left.shape[-1]
    products = left.new_empty(alone + 1, width, width)
    for job in range(alone):
        torch.mm(left[job].T, right[job], out=products[job])
    rest = left[alone:].reshape(-1, width), right[alone:].reshape(-1, width)
    torch.mm(rest[0].T, rest[1], out=products[alone])
    return products


@triton.jit
def weight_tile(
    products, a, b, output, tile,
    SPLIT: tl.constexpr, SHARED: tl.constexpr, FUSION: tl.constexpr,
    DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Tile [BO, BI] number `tile` of a weight's gradient."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    outward = (tile // (W // BI)) * BO + tl.arange(0, BO)  # [BO]
    inward = (tile % (W // BI)) * BI + tl.arange(0, BI)  # [BI]
    true = (outward % P < DG)[:, None] & (inward % P < DG)[None, :]
    padded = products + output.to(tl.int64) * (W * W)
    value = tl.load(padded + (outward[:, None] * W + inward[None, :]), mask=true, other=0.0)
    value = value.to(a.dtype.element_ty)
    out_row = (outward // P) * DG + outward % P
    out_column = (inward // P) * DG + inward % P
    if output < SPLIT:
        first = a + output.to(tl.int64) * (DIM * DIM)
        tl.store(first + (out_row[:, None] * DIM + out_column[None, :]), value, mask=true)
    elif FUSION:
        wide: tl.constexpr = DIM if SHARED else 2 * DIM
        half = b + (output - SPLIT) * DIM
        tl.store(half + (out_row[:, None] * wide + out_column[None, :]), value, mask=true)
    else:
        second = b + (output - SPLIT).to(tl.int64) * (DIM * DIM)
        tl.store(second + (out_row[:, None] * DIM + out_column[None, :]), value, mask=true)


@triton.jit
def vector_columns(
    sums, vectors, blocks, columns, part,
    V: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BV: tl.constexpr,
    BB: tl.constexpr,
):  # fmt: skip
    """Columns [BV] number `part` of all vectors' gradients, BB row blocks at a time."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    column = part * BV + tl.arange(0, BV)  # [BV]
    block = tl.arange(0, BB)[:, None]
    total = tl.zeros([BB, BV], dtype=tl.float32)
    for start in range(0, blocks, BB):
        at = (start + block).to(tl.int64) * columns + column[None, :]
        total += tl.load(sums + at, mask=(start + block < blocks) & (column >= 0)[None, :], other=0)
    total = tl.sum(total, 0)
    each = columns // V
    # All columns of a part are of one vector.
    vector = part * BV // each
    column -= vector * each
    inside = column % W
    where = (column // W) * DIM + (inside // P) * DG + inside % P
    for v in tl.static_range(V):
        value = total.to(vectors[v].dtype.element_ty)
        tl.store(vectors[v] + where, value, mask=(inside % P < DG) & (vector == v))


@triton.jit(do_not_specialize=["blocks", "columns"])
def parameter_gradients_kernel(
    products, sums, a, b, v0, v1, v2, v3, v4, v5, v6, v7, blocks, columns,
    SPLIT: tl.constexpr, SHARED: tl.constexpr, FUSION: tl.constexpr, OUTPUTS: tl.constexpr,
    V: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BO: tl.constexpr,
    BI: tl.constexpr, BV: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Programs below OUTPUTS * (W / BO) * (W / BI) are tiles of weights, the rest of vectors.

    columns: V * K * W, of a row block's sums; SPLIT: outputs in a; SHARED: one weight for both
    inputs of the gate.
    """
    TILES: tl.constexpr = (G * P // BO) * (G * P // BI)
    pid = tl.program_id(0)
    if pid < OUTPUTS * TILES:
        weight_tile(
            products, a, b, pid // TILES, pid % TILES, SPLIT, SHARED, FUSION, DIM, G, P, BO, BI
        )
    else:
        vectors = (v0, v1, v2, v3, v4, v5, v6, v7)
        vector_columns(sums, vectors, blocks, columns, pid - OUTPUTS * TILES, V, DIM, G, P, BV, BB)
