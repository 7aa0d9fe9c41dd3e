r"""Packed parameters of one block or of both, in one launch: what the programs read.

    forward    W, (J, K, out, in), for products x W^T            fp32
    vectors    (K, V, W)                                         fp32
    low        the one that iterates, for steps in 16 bits       bfloat16 or float16
    counters   of the schedules, 0 before and after a solve      int32
    backward   W^T, (J, K, in, out), for products x W            fp32

A program owns a tile [BT, BT] of a weight, or one vector of a modality and some counters. Padding
is zero (`kernels.layout`). The tensors of a block are views of one, in this order, so that
`deqfusion::pack` hands them to a solve as one tensor.

Parameters are packed at every solve and not kept: what tells that they changed, their version, is
not raised by fused optimizers, by replays of CUDA graphs, or by writes to `parameter.data`, and a
layer that goes on with old weights says nothing. At width 512 and N = 3 a pack writes 6 MB.
Source: none but the layout's, `kernels.layout`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import PACKED, Constants, Part
from .config import COUNTERS, Config
from .launch import launch
from .layout import Layout, packed_sizes


class Packed(NamedTuple):
    """As the head of this file has them; backward and low are empty if not asked for."""

    forward: Part
    vectors: Part
    low: Part
    counters: Part
    backward: Part

    @staticmethod
    @functools.cache
    def of(
        layout: Layout, jobs: int, count: int, vectors: int, low: str, backward: bool = False,
        buffer: int = PACKED,
    ) -> Packed:  # fmt: skip
        """Parts of the one tensor that holds all.

        layout, jobs, count, vectors, backward: as of `packed_sizes`; low: the format of 16 bits,
        "" if nothing is in its place.
        """
        width = layout.width
        shape = jobs, count, width, width
        none = 0, count, width, width
        sizes = packed_sizes(layout, jobs, count, vectors, backward)
        starts = [4 * start for start in itertools.accumulate(sizes, initial=0)]
        return Packed(
            Part(buffer, starts[0], shape), Part(buffer, starts[1], (count, vectors, width)),
            Part(buffer, starts[2], shape if low else none, getattr(torch, low or "bfloat16")),
            Part(buffer, starts[3], sizes[3:4], torch.int32),
            Part(buffer, starts[4], shape if backward else none),
        )  # fmt: skip

    def pair(
        self, cheap: bool, backward: bool = False
    ) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        """Weights of exact products, of `backward` or forward, and if asked for those of 16 bits,
        for which else the others stand.
        """
        full = self.backward if backward else self.forward
        return full.rows(), (self.low if cheap else full).rows()

    @property
    def numel(self) -> int:
        """Elements of the tensor, fp32."""
        return self.backward.end // 4


class Parameters(NamedTuple):
    """Two or three weights (K, d, d) and up to eight vectors (K, d) of a block; of K = 1 also
    without that dimension."""

    weights: Sequence[Tensor]
    vectors: Sequence[Tensor]

    @property
    def modalities(self) -> int:
        """K."""
        first = self.weights[0]
        return first.shape[0] if first.dim() == 3 else 1


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
    tl.store(forward + straight, value)
    if BACKWARD:
        tl.store(backward + turned, value)
    if LOW:
        tl.store(low + (turned if BACKWARD else straight), value.to(low.dtype.element_ty))


@triton.jit
def _block(
    w0, w1, w2, s0, s1, s2, v0, v1, v2, v3, v4, v5, v6, v7, forward, vectors, low, counters,
    backward, pid, k, j, count, programs,
    J: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    BT: tl.constexpr, LOW: tl.constexpr, COUNTERS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Program (pid, k, j) of a block; j: a weight, or J for vectors and counters."""
    W: tl.constexpr = G * P
    DG: tl.constexpr = DIM // G
    place = j * count + k
    if j == J:
        if k == 0:
            for start in range(pid * 256, COUNTERS, programs * 256):
                at = start + tl.arange(0, 256)
                tl.store(counters + at, at * 0, mask=at < COUNTERS)
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


@triton.jit
def pack_kernel(
    w0, w1, w2, s0, s1, s2, v0, v1, v2, v3, v4, v5, v6, v7,
    forward, vectors, low, counters, backward,
    other_w0, other_w1, other_w2, other_s0, other_s1, other_s2,
    other_v0, other_v1, other_v2, other_v3, other_v4, other_v5, other_v6, other_v7,
    other_forward, other_vectors, other_low, other_counters, other_backward,
    J: tl.constexpr, V: tl.constexpr, OTHER_J: tl.constexpr, OTHER_V: tl.constexpr,
    DIM: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, LOW: tl.constexpr,
    COUNTERS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles or vectors, K, J + 1, and where there is another block, of K = 1, its J + 1).

    s0 to s2: the weights' row strides.
    """
    pid = tl.program_id(0)
    k = tl.program_id(1)
    j = tl.program_id(2)
    programs = tl.num_programs(0)
    if j <= J:
        _block(
            w0, w1, w2, s0, s1, s2, v0, v1, v2, v3, v4, v5, v6, v7, forward, vectors, low,
            counters, backward, pid, k, j, tl.num_programs(1), programs, J, V, DIM, G, P, BT, LOW,
            COUNTERS, BACKWARD,
        )  # fmt: skip
    elif k == 0:
        # Without another block there are no such programs.
        _block(
            other_w0, other_w1, other_w2, other_s0, other_s1, other_s2, other_v0, other_v1,
            other_v2, other_v3, other_v4, other_v5, other_v6, other_v7, other_forward,
            other_vectors, other_low, other_counters, other_backward, pid, k, j - (J + 1), 1,
            programs, OTHER_J, OTHER_V, DIM, G, P, BT, LOW, COUNTERS, BACKWARD,
        )  # fmt: skip


def packed(
    block: Parameters, layout: Layout, *, other: Parameters | None = None, low: str = "",
    backward: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Packs the parameters of a block, and of another with K = 1, and clears their counters.

    Weights whose rows are not evenly spaced and vectors are made contiguous. Returns one tensor
    for each block, of which `Packed.of` names the parts.
    """
    like, blocks = block.weights[0], (block,) if other is None else (block, other)
    shapes = tuple((len(b.weights), b.modalities, len(b.vectors)) for b in blocks)
    grid, constants, parts, shape = _how(layout, shapes, low, backward)
    flats = [like.new_empty(each.numel, dtype=torch.float32) for each in parts]
    arguments: list[Any] = []
    for place, (weights, vectors) in enumerate(blocks):
        _add(arguments, weights, vectors)
        arguments += parts[place]
    if other is None:
        arguments *= 2
    launch(pack_kernel, grid, tuple(arguments), constants, PACKING, shape, buffers=flats)
    return flats


PACKING = Config(warps=4)


def _add(arguments: list[Any], weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
    """Three weights, their row strides and eight vectors; the first stands for those missing."""
    kept, strides = [], []
    for w in weights:
        if w.is_contiguous():
            strides.append(w.shape[-1])
        else:
            # Half of the columns of a gate's weight is read as it lies; anything stranger is not.
            *outer, rows, columns = w.stride()
            if columns != 1 or (outer and outer[0] != w.shape[1] * rows):
                w, rows = w.contiguous(), w.shape[-1]
            strides.append(rows)
        kept.append(w)
    for _ in range(3 - len(kept)):
        kept.append(kept[0])
        strides.append(strides[0])
    arguments += kept
    arguments += strides
    arguments += [v.contiguous() for v in vectors]
    arguments += [vectors[0]] * (8 - len(vectors))


@functools.lru_cache(maxsize=256)
def _how(
    layout: Layout, shapes: tuple[tuple[int, int, int], ...], low: str, backward: bool
) -> tuple[tuple[int, int, int], Constants, tuple[Packed, ...], str]:
    """Grid, constants, parts of every block's tensor and words for errors.

    Args:
        shapes: J, K and V of the block, and of the other where there is one.
    """
    (jobs, count, vectors), (more_jobs, _, more_vectors) = (*shapes, (0, 1, 0))[:2]
    tile = 32 if layout.width % 32 == 0 else 16
    grid = (
        max((layout.width // tile) ** 2, vectors, more_vectors), count,
        jobs + 1 + (more_jobs + 1 if more_jobs else 0),
    )  # fmt: skip
    constants = Constants({
        "J": jobs, "V": vectors, "OTHER_J": more_jobs, "OTHER_V": more_vectors,
        "DIM": layout.dim, "G": layout.groups, "P": layout.padded, "BT": tile, "LOW": bool(low),
        "COUNTERS": COUNTERS, "BACKWARD": backward,
    })  # fmt: skip
    parts = tuple(
        Packed.of(layout, *each, low, backward, place) for place, each in enumerate(shapes)
    )
    return grid, constants, parts, f"{count} x {jobs} weights of {layout.dim}"
