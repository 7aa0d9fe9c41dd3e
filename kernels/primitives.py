r"""Device functions that every program is composed of: a product and a GroupNorm of one group.

Tiles are BM rows by one padded group of P columns; accumulators and statistics are fp32.

    product          acc = sum_k a[rows, k] W^T[k, group]            [BM, P]
    normalise        (x - mean) / sqrt(var + eps) over the true channels, times weight plus bias

`PRECISION` of a product: "ieee", "tf32", "tf32x3" for fp32 operands; "low" rounds both operands to
bfloat16, and "rounded" does so for the interpreter, whose bfloat16 products are wrong (Triton 3.7.1
multiplies the bit patterns). Variance is that of the centred values. Layout: `kernels.layout`.
Source: Y. Wu and K. He, "Group normalization", ECCV 2018.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-5)


def product_precision(precision: str) -> str:
    """What `product` is told for an option of `kernels.config.PRECISIONS`."""
    interpreted = not isinstance(product, triton.JITFunction)
    return "rounded" if precision == "low" and interpreted else precision


@triton.jit
def product(
    a, w, depth, W: tl.constexpr, BM: tl.constexpr, P: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a W^T for BM rows and one group of columns: [BM, P].

    a: the program's first row, of W channels; w: row 0 of the group's columns in a packed weight
    (both scalar pointers; offsets from them fit 32 bits); depth: channels to sum (0: none).
    """
    acc = tl.zeros([BM, P], dtype=tl.float32)
    k = tl.arange(0, BK)
    rows = tl.arange(0, BM)[:, None] * W
    columns = tl.arange(0, P)[None, :]
    for start in range(0, depth, BK):
        left = tl.load(a + (rows + (start + k)[None, :]))  # [BM, BK]
        right = tl.load(w + ((start + k)[:, None] * W + columns))  # [BK, P]
        if PRECISION == "low":
            acc = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16), acc)
        elif PRECISION == "rounded":
            left = left.to(tl.bfloat16).to(tl.float32)
            right = right.to(tl.bfloat16).to(tl.float32)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        else:
            acc = tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def normalise(x, weight, bias, column, DG: tl.constexpr):
    """GroupNorm of a tile [BM, P] whose true columns are the first DG; 0 in the others."""
    true = column < DG  # [P]
    x = tl.where(true[None, :], x, 0.0)
    centred = tl.where(true[None, :], x - (tl.sum(x, 1) / DG)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / DG + EPS)
    # Weight and bias are 0 in padded columns.
    return centred * rstd[:, None] * weight[None, :] + bias[None, :]
