r"""What a solve starts from, in one launch, and its gradients, in two.

    x    = the features stacked, 0 where a modality is absent                      (N, R, d)
    x_f  = sum_i w_i x_i + b, NaN in rows without a modality                       (R, d)

    dx_i = dL/dx_i + w_i dL/dx_f, 0 where absent        dw_i = <dL/dx_f, x_i>      db = sum dL/dx_f

The first program of both owns a tile of rows and channels, or all channels of some rows; sums over
all rows are those of the row blocks, added in their order by a second launch: no atomics. A row
whose dL/dx_f is 0 adds nothing, even where x is NaN. Sums are fp32.
Source: arXiv 2306.16645, equation 7.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Constants
from .config import INJECTION, INJECTION_TILES
from .launch import launch

POINTERS = 8
"""Modalities that come as tensors of their own; more are stacked first."""


@triton.jit(
    do_not_specialize=["rows"], do_not_specialize_on_alignment=[f"f{i}" for i in range(POINTERS)]
)
def inject_kernel(
    f0, f1, f2, f3, f4, f5, f6, f7, present, weight, bias, x, injected, rows,
    N: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, STACKED: tl.constexpr,
    PRESENT: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks, tiles of channels); STACKED: f0 holds all features (N, R, d)."""
    begin = tl.program_id(0).to(tl.int64) * BM
    local = tl.arange(0, BM)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    live = begin + local < rows
    inside = live[:, None] & (column < DIM)[None, :]
    tile = local[:, None] * DIM + column[None, :]
    pointers = (f0, f1, f2, f3, f4, f5, f6, f7)
    total = tl.zeros([BM, BD], dtype=tl.float32) + tl.load(bias).to(tl.float32)
    some = local < 0
    for i in tl.static_range(N):
        plane = (i * rows.to(tl.int64) + begin) * DIM
        there = inside
        if PRESENT:
            at = present + i * rows.to(tl.int64) + begin + local
            here = tl.load(at, mask=live, other=0) != 0
            some = some | here
            there = inside & here[:, None]
        if STACKED:
            value = tl.load(f0 + plane + tile, mask=there, other=0.0)
        else:
            value = tl.load(pointers[i] + begin * DIM + tile, mask=there, other=0.0)
        tl.store(x + plane + tile, value, mask=inside)
        total += tl.load(weight + i).to(tl.float32) * value.to(tl.float32)
    if PRESENT:
        total = tl.where(some[:, None], total, float("nan"))
    target = injected + begin * DIM + tile
    tl.store(target, total.to(injected.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def inject_adjoint_kernel(
    gradient, injected_gradient, x, present, weight, out, sums, rows,
    N: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks,); sums (row blocks, N + 1): of the weights, then of the bias."""
    block = tl.program_id(0).to(tl.int64)
    begin = block * BM
    local = tl.arange(0, BM)
    live = begin + local < rows
    sums += block * (N + 1)
    some = live
    if PRESENT:
        some = local < 0
        for i in range(0, N):
            at = present + i * rows.to(tl.int64) + begin + local
            some = some | (tl.load(at, mask=live, other=0) != 0)
    constant = tl.zeros([BM], dtype=tl.float32)
    for i in range(0, N):
        w = tl.load(weight + i).to(tl.float32)
        here = live
        if PRESENT:
            at = present + i * rows.to(tl.int64) + begin + local
            here = live & (tl.load(at, mask=live, other=0) != 0)
        along = tl.zeros([BM], dtype=tl.float32)
        plane = (i * rows.to(tl.int64) + begin) * DIM
        for start in range(0, DIM, BD):
            column = start + tl.arange(0, BD)
            inside = live[:, None] & (column < DIM)[None, :]
            tile = local[:, None] * DIM + column[None, :]
            d = tl.load(injected_gradient + begin * DIM + tile, mask=inside, other=0.0)
            d = tl.where(some[:, None], d.to(tl.float32), 0.0)
            features = tl.load(x + plane + tile, mask=inside, other=0.0).to(tl.float32)
            along += tl.sum(tl.where(d == 0.0, 0.0, d * features), 1)
            if i == 0:
                constant += tl.sum(d, 1)
            value = tl.load(gradient + plane + tile, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(here[:, None], value + w * d, 0.0)
            tl.store(out + plane + tile, value.to(out.dtype.element_ty), mask=inside)
        tl.store(sums + i, tl.sum(along, 0))
    tl.store(sums + N, tl.sum(constant, 0))


@triton.jit(do_not_specialize=["blocks"])
def inject_sums_kernel(sums, weight, bias, blocks, N: tl.constexpr, BM: tl.constexpr):
    """Grid: (N + 1,): one sum over the row blocks."""
    i = tl.program_id(0)
    total = tl.zeros([BM], dtype=tl.float32)
    for start in range(0, blocks, BM):
        block = start + tl.arange(0, BM)
        total += tl.load(sums + block.to(tl.int64) * (N + 1) + i, mask=block < blocks, other=0.0)
    value = tl.sum(total, 0)
    if i < N:
        tl.store(weight + i, value.to(weight.dtype.element_ty))
    else:
        tl.store(bias, value.to(bias.dtype.element_ty))


def inject(
    features: Sequence[Tensor], present: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Stacked features (N, R, d) and x_f (R, d).

    Args:
        features: N of (R, d), of one float dtype up to fp32.
        present: bool (N, R) or None.
        weight: (N,); bias: (1,).
    """
    count, (rows, dim), like = len(features), features[0].shape, features[0]
    x, injected = like.new_empty(count, rows, dim), like.new_empty(rows, dim)
    if rows == 0:
        return x, injected
    stacked = count > POINTERS
    pointers = [torch.stack(tuple(features))] if stacked else [f.contiguous() for f in features]
    grid, constants, shape = _how(count, rows, dim, stacked, present is not None)
    launch(
        inject_kernel, grid,
        (
            *pointers, *([pointers[0]] * (POINTERS - len(pointers))),
            like if present is None else present.contiguous().view(torch.int8),
            weight.contiguous(), bias, x, injected, rows,
        ),
        constants, INJECTION, shape,
    )  # fmt: skip
    return x, injected


@functools.lru_cache(maxsize=1024)
def _how(
    count: int, rows: int, dim: int, stacked: bool, present: bool
) -> tuple[tuple[int, int], Constants, str]:
    """Grid, constants and words for errors."""
    constants = Constants(
        {"N": count, "DIM": dim, **INJECTION_TILES, "STACKED": stacked, "PRESENT": present}
    )
    grid = -(-rows // INJECTION_TILES["BM"]), -(-dim // INJECTION_TILES["BD"])
    return grid, constants, f"{count} x {rows} rows of {dim}"


def inject_adjoint(
    gradient: Tensor, injected_gradient: Tensor, x: Tensor, present: Tensor | None, weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the features (N, R, d), of weight (N,) and of bias (1,).

    Args:
        gradient: (N, R, d), dL/dx; injected_gradient: (R, d), dL/dx_f.
        x, present, weight, bias: of `inject`.
    """
    count, rows, dim = x.shape
    x = x.contiguous()
    features = torch.empty_like(x)
    found = torch.empty_like(weight), torch.empty_like(bias)
    blocks = -(-rows // INJECTION_TILES["BM"])
    sums = x.new_empty(blocks, count + 1, dtype=torch.float32)
    constants, of_sums, shape = _how_adjoint(count, rows, dim, present is not None)
    if rows > 0:
        launch(
            inject_adjoint_kernel, (blocks,),
            (
                gradient.contiguous(), injected_gradient.contiguous(), x,
                x if present is None else present.contiguous().view(torch.int8),
                weight.contiguous(), features, sums, rows,
            ),
            constants, INJECTION, shape,
        )  # fmt: skip
    launch(
        inject_sums_kernel, (count + 1,), (sums, *found, blocks), of_sums, INJECTION, shape
    )  # fmt: skip
    return features, *found


@functools.lru_cache(maxsize=1024)
def _how_adjoint(
    count: int, rows: int, dim: int, present: bool
) -> tuple[Constants, Constants, str]:  # fmt: skip
    """Constants of both programs, and words for errors."""
    constants = Constants({"N": count, "DIM": dim, "PRESENT": present, **INJECTION_TILES})
    return constants, Constants({"N": count, "BM": 128}), f"{count} x {rows} rows of {dim}"
