r"""Gradients of the parameters from what the adjoint programs leave, in one launch.

    dW_o = sum_j left_j^T right_j           over the jobs j of output o, (d, d)
    dv   = sum_b sums_b                     over row blocks b, for every vector parameter, (d)

A weight's program owns a tile [BO, BI] of one output and sums over all rows, in their order; a
vector's program owns BV columns of one vector and sums over the row blocks, in their order. No
atomics: the result is the same at every run.

Outputs: for the modality blocks K of W_1, then K of W_2, with one job each; for the fusion block
W_f (job 0), then the gate's weight: jobs 1 (y t, z*) and, where one weight serves both inputs, 2 to
N + 1 (dc_i, z_i), which otherwise make the right half of a (d, 2 d) weight.

Packed fp32 (width W = G P, R' rows): left, right (jobs, R', W); sums (blocks, V, K, W). Unpacked,
in the parameters' dtype: weights a and b, vectors v0 to v7 (K, d). Products are in `PRECISION`,
as those of the solves, and accumulated in fp32; sums are fp32.
Source: the chain rule on arXiv 2306.16645, equations 3 to 7, at the equilibrium.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight_tile(
    left, right, a, b, padded_rows, output, tile,
    JOBS: tl.constexpr, SPLIT: tl.constexpr, SHARED: tl.constexpr, FUSION: tl.constexpr,
    DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile [BO, BI] number `tile` of a weight's gradient."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    outward = (tile // (W // BI)) * BO + tl.arange(0, BO)  # [BO]
    inward = (tile % (W // BI)) * BI + tl.arange(0, BI)  # [BI]
    stop = output + 1
    if FUSION:
        # The gate's weight takes the rest of the jobs, or where it has two the second one does.
        last = 1 if SHARED else 2
        stop = tl.where(output == last, JOBS, stop)
    acc = tl.zeros([BO, BI], dtype=tl.float32)
    row = tl.arange(0, BR)
    for job in range(output, stop):
        base = padded_rows.to(tl.int64) * W * job
        for at in range(0, padded_rows, BR):
            rows = base + (at + row).to(tl.int64)[:, None] * W
            there = (at + row < padded_rows)[:, None]
            x = tl.load(left + (rows + outward[None, :]), mask=there, other=0.0)  # [BR, BO]
            y = tl.load(right + (rows + inward[None, :]), mask=there, other=0.0)  # [BR, BI]
            acc = tl.dot(tl.trans(x), y, acc, input_precision=PRECISION)
    out_row = (outward // P) * DG + outward % P
    out_column = (inward // P) * DG + inward % P
    true = (outward % P < DG)[:, None] & (inward % P < DG)[None, :]
    acc = acc.to(a.dtype.element_ty)
    if output < SPLIT:
        first = a + output.to(tl.int64) * (DIM * DIM)
        tl.store(first + (out_row[:, None] * DIM + out_column[None, :]), acc, mask=true)
    elif FUSION:
        wide: tl.constexpr = DIM if SHARED else 2 * DIM
        half = b + (output - SPLIT) * DIM
        tl.store(half + (out_row[:, None] * wide + out_column[None, :]), acc, mask=true)
    else:
        second = b + (output - SPLIT).to(tl.int64) * (DIM * DIM)
        tl.store(second + (out_row[:, None] * DIM + out_column[None, :]), acc, mask=true)


@triton.jit
def vector_columns(
    sums, vectors, blocks, columns, part,
    V: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Columns [BV] number `part` of all vectors' gradients; all are of one vector."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    column = part * BV + tl.arange(0, BV)  # [BV]
    total = tl.zeros([BV], dtype=tl.float32)
    for block in range(0, blocks):
        total += tl.load(sums + columns.to(tl.int64) * block + column)
    each = columns // V
    vector = part * BV // each
    column -= vector * each
    inside = column % W
    where = (column // W) * DIM + (inside // P) * DG + inside % P
    for v in tl.static_range(V):
        value = total.to(vectors[v].dtype.element_ty)
        tl.store(vectors[v] + where, value, mask=(inside % P < DG) & (vector == v))


@triton.jit(do_not_specialize=["padded_rows", "blocks", "columns"])
def parameter_gradients_kernel(
    left, right, sums, a, b, v0, v1, v2, v3, v4, v5, v6, v7, padded_rows, blocks, columns,
    JOBS: tl.constexpr, SPLIT: tl.constexpr, SHARED: tl.constexpr, FUSION: tl.constexpr,
    OUTPUTS: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs below OUTPUTS * (W / BO) * (W / BI) are tiles of weights, the rest of vectors.

    columns: V * K * W, of a row block's sums; JOBS: in all; SPLIT: outputs in a; SHARED: one weight
    for both inputs of the gate.
    """
    TILES: tl.constexpr = (G * P // BO) * (G * P // BI)
    pid = tl.program_id(0)
    if pid < OUTPUTS * TILES:
        weight_tile(
            left, right, a, b, padded_rows, pid // TILES, pid % TILES, JOBS, SPLIT, SHARED, FUSION,
            DIM, G, P, BO, BI, BR, PRECISION,
        )  # fmt: skip
    else:
        vectors = (v0, v1, v2, v3, v4, v5, v6, v7)
        vector_columns(sums, vectors, blocks, columns, pid - OUTPUTS * TILES, V, DIM, G, P, BV)
