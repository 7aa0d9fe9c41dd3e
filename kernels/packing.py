r"""Packed parameters of a block, in one launch: what the programs read.

    forward    W^T, (J, K, in, out), for products x W^T          fp32
    backward   W, (J, K, out, in), for products x W              fp32
    low        the one that iterates, for the ladder's steps     bfloat16
    vectors    (K, V, W)                                         fp32
    counters   as many as asked for, 0                           int32

A program owns a tile [BT, BT] of a weight, or one vector of a modality and some counters of the
schedule. Padding is zero (`kernels.layout`).

Parameters are packed at every solve and not kept: what tells that they changed, their version, is
not raised by fused optimizers, by replays of CUDA graphs, or by writes to `parameter.data`, and a
layer that goes on with old weights says nothing. At width 512 and N = 3 a pack writes 6 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Config
from .launch import launch
from .layout import Layout


class Packed(NamedTuple):
    """As the head of this file has them; backward and low are empty if not asked for."""

    forward: Tensor
    backward: Tensor
    low: Tensor
    vectors: Tensor
    counters: Tensor


@triton.jit
def _weight(
    w, stride, forward, backward, low, k, place, rows, columns,
    DIM: tl.constexpr, DG: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
    BACKWARD: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    true = (rows % P < DG)[:, None] & (columns % P < DG)[None, :]
    out_row = (rows // P) * DG + rows % P
    out_column = (columns // P) * DG + columns % P
    source = k.to(tl.int64) * DIM * stride + out_row[:, None] * stride + out_column[None, :]
    value = tl.load(w + source, mask=true, other=0.0).to(tl.float32)  # [out, in]
    base = place.to(tl.int64) * (W * W)
    straight = base + rows[:, None] * W + columns[None, :]
    turned = base + columns[None, :] * W + rows[:, None]
    tl.store(forward + turned, value)
    if BACKWARD:
        tl.store(backward + straight, value)
    if LOW:
        tl.store(low + (straight if BACKWARD else turned), value.to(tl.bfloat16))


@triton.jit(do_not_specialize=["counts"])
def pack_kernel(
    w0, w1, w2, s0, s1, s2, v0, v1, v2, v3, v4, v5, v6, v7, forward, backward, low, vectors,
    counters, counts,
    J: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    BT: tl.constexpr, BACKWARD: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles or vectors, K, J + 1); s0 to s2: the weights' row strides."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    pid = tl.program_id(0)
    k = tl.program_id(1)
    j = tl.program_id(2)
    place = j * tl.num_programs(1) + k
    if j == J:
        if k == 0:
            for start in range(pid * 256, counts, tl.num_programs(0) * 256):
                at = start + tl.arange(0, 256)
                tl.store(counters + at, at * 0, mask=at < counts)
        column = tl.arange(0, P)
        sources = (v0, v1, v2, v3, v4, v5, v6, v7)
        for group in range(0, G):
            at = k.to(tl.int64) * DIM + group * DG + column
            for v in tl.static_range(V):
                here = (column < DG) & (pid == v)
                value = tl.load(sources[v] + at, mask=here, other=0.0).to(tl.float32)
                target = vectors + (k * V + v).to(tl.int64) * W + group * P + column
                tl.store(target, value, mask=(column >= 0) & (pid == v))
    elif pid < (W // BT) * (W // BT):
        rows = (pid // (W // BT)) * BT + tl.arange(0, BT)
        columns = (pid % (W // BT)) * BT + tl.arange(0, BT)
        if j == 0:
            _weight(
                w0, s0, forward, backward, low, k, place, rows, columns, DIM, DG, P, W, BACKWARD,
                LOW,
            )  # fmt: skip
        elif j == 1:
            _weight(
                w1, s1, forward, backward, low, k, place, rows, columns, DIM, DG, P, W, BACKWARD,
                LOW,
            )  # fmt: skip
        else:
            _weight(
                w2, s2, forward, backward, low, k, place, rows, columns, DIM, DG, P, W, BACKWARD,
                LOW,
            )  # fmt: skip


def packed(
    weights: Sequence[Tensor], vectors: Sequence[Tensor], layout: Layout, backward: bool,
    low: bool, counts: int = 0,
) -> Packed:  # fmt: skip
    """Packs two or three weights (K, d, d) and up to eight vectors (K, d), and clears counters.

    The weights' columns must be next to each other; vectors are made contiguous.
    """
    count, width, like = weights[0].shape[0], layout.width, weights[0]
    shape = len(weights), count, width, width
    forward = like.new_empty(shape, dtype=torch.float32)
    back = like.new_empty(shape if backward else 0, dtype=torch.float32)
    cheap = like.new_empty(shape if low else 0, dtype=torch.bfloat16)
    stack = like.new_empty(count, len(vectors), width, dtype=torch.float32)
    counters = like.new_empty(counts, dtype=torch.int32)
    # Half of the columns of a gate's weight is read as it lies; anything stranger is copied.
    weights = [
        w if w.stride(2) == 1 and w.stride(0) == w.shape[1] * w.stride(1) else w.contiguous()
        for w in weights
    ]
    vectors = [v.contiguous() for v in vectors]
    more = [*weights, *([weights[0]] * (3 - len(weights)))]
    tile = 32 if width % 32 == 0 else 16
    launch(
        pack_kernel, (max((width // tile) ** 2, len(vectors)), count, len(weights) + 1),
        (
            *more, *(w.stride(1) for w in more), *vectors,
            *([vectors[0]] * (8 - len(vectors))), forward, back, cheap, stack, counters, counts,
        ),
        {
            "J": len(weights), "V": len(vectors), "DIM": layout.dim, "G": layout.groups,
            "P": layout.padded, "BT": tile, "BACKWARD": backward, "LOW": low,
        },
        Config(warps=4), f"{count} x {len(weights)} weights of {layout.dim}",
    )  # fmt: skip
    return Packed(forward, back, cheap, stack, counters)
