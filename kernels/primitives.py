r"""Device functions that every program is composed of: products, GroupNorm and its VJP, tiles.

Tiles are BM rows by one padded group of P columns (`kernels.layout`), of which the first DG are
true; accumulators and statistics are fp32.

    product          acc = sum_k a[rows, k] W[group, k]                               [BM, P]
    standardise      xhat = (x - mean) rstd,   rstd = 1 / sqrt(var + eps)             [BM, P], [BM]
    within_range     c x,   c = min(1, 2^40 / max |x|)                                [BM, P], [BM]
    standardise_vjp  N(v) = rstd (v - mean(v) - xhat mean(v xhat))                    [BM, P]

`PRECISION` of a product: "ieee", "tf32", "tf32x3" for fp32 operands; "low" rounds both operands to
bfloat16, and "rounded" does so for the interpreter, whose bfloat16 products are wrong (Triton 3.7.1
multiplies the bit patterns); "half" has operands in float16. Variance is that of the centred
values, over the true channels.
Source: Y. Wu and K. He, "Group normalization", ECCV 2018.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-5)
LARGEST = tl.constexpr(2.0**40)
NEAR = tl.constexpr(0)
ANCHORED = tl.constexpr(1)
EXACT = tl.constexpr(2)


def interpreted() -> bool:
    """Whether the programs run in Triton's interpreter."""
    return not isinstance(product, triton.JITFunction)


@triton.jit
def product(
    a, w, depth, W: tl.constexpr, BM: tl.constexpr, P: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM rows times one group of a packed weight's outputs, each a row of its own: [BM, P].

    a: the program's first row, of W channels; w: the group's first output (both scalar pointers;
    offsets from them fit 32 bits); depth: channels to sum (0: none).
    """
    acc = tl.zeros([BM, P], dtype=tl.float32)
    k = tl.arange(0, BK)
    rows = tl.arange(0, BM)[:, None] * W
    outputs = tl.arange(0, P)[:, None] * W
    for start in range(0, depth, BK):
        left = tl.load(a + (rows + (start + k)[None, :]))  # [BM, BK]
        # Summed channels next to one another, as matrix instructions take them in 32 bits.
        right = tl.trans(tl.load(w + (outputs + (start + k)[None, :])))  # [BK, P]
        if PRECISION == "half":
            acc = tl.dot(left, right, acc)
        elif PRECISION == "low":
            acc = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16), acc)
        elif PRECISION == "rounded":
            left = left.to(tl.bfloat16).to(tl.float32)
            right = right.to(tl.bfloat16).to(tl.float32)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        else:
            acc = tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def ladder_product(
    a, w, low, delta, through, group, depth, kind, W: tl.constexpr, BM: tl.constexpr,
    P: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, LADDER: tl.constexpr,
):  # fmt: skip
    """`product` of a and w, or with a LADDER (its cheap precision, "" for none) by `kind`:

    NEAR      through + delta low
    ANCHORED  a w, kept in through
    EXACT     a w

    LADDER "half" has no such kinds: delta is a in float16, and every product delta low.

    w, low: the first output of all; delta, through: rows of W channels as a, of `keep` and here.
    """
    if LADDER == "":
        acc = product(a, w + group * P * W, depth, W, BM, P, BK, PRECISION)
    elif LADDER == "half":
        acc = product(delta, low + group * P * W, depth, W, BM, P, BK, LADDER)
    else:
        acc = tl.zeros([BM, P], dtype=tl.float32)
        if kind == NEAR:
            acc = product(delta, low + group * P * W, depth, W, BM, P, BK, LADDER)
        else:
            acc = product(a, w + group * P * W, depth, W, BM, P, BK, PRECISION)
        # Masked, and not in the branches: there the compiler spilled.
        tile = tl.arange(0, BM)[:, None] * W + (group * P + tl.arange(0, P))[None, :]
        every = tl.zeros([BM, P], dtype=tl.int32) + kind
        acc += tl.load(through + tile, mask=every == NEAR, other=0.0)
        tl.store(through + tile, acc, mask=every == ANCHORED)
    return acc


@triton.jit
def keep(value, plane, origin, delta, tile, kind, LADDER: tl.constexpr):
    """Stores a factor's tile [BM, P] for `ladder_product`: in its plane, and on the ladder as the
    origin, or less that in bfloat16; with LADDER "half" in float16 and nowhere else.

    A factor takes its difference from what it was in the last ANCHORED evaluation.
    """
    if LADDER == "half":
        tl.store(delta + tile, value.to(tl.float16))
    else:
        tl.store(plane + tile, value)
    if LADDER != "" and LADDER != "half":
        every = tl.zeros(value.shape, dtype=tl.int32) + kind
        apart = value - tl.load(origin + tile, mask=every == NEAR, other=0.0)
        tl.store(delta + tile, apart.to(tl.bfloat16), mask=every == NEAR)
        tl.store(origin + tile, value, mask=every == ANCHORED)


@triton.jit
def standardise(x, column, DG: tl.constexpr):
    """(xhat [BM, P], rstd [BM]) of a tile; xhat is 0 in padded columns."""
    true = column < DG  # [P]
    x = tl.where(true[None, :], x, 0.0)
    centred = tl.where(true[None, :], x - (tl.sum(x, 1) / DG)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / DG + EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def within_range(x, RELU: tl.constexpr):
    """x [BM, P] times a factor of every row, at most 1, so that no square overflows; the factor.

    N(v) of what it is added to is that of the product times the factor: rstd takes it. RELU:
    whether the squares are those of ReLU(x), so that what is negative scales nothing.
    """
    largest = tl.max(x, 1) if RELU else tl.max(tl.abs(x), 1)
    factor = tl.where(largest > LARGEST, LARGEST / largest, 1.0)
    return x * factor[:, None], factor


@triton.jit
def standardise_vjp(v, xhat, rstd, column, DG: tl.constexpr):
    """N(v) [BM, P] at a point given by xhat and rstd; v is 0 in padded columns, and so is N(v)."""
    true = column < DG
    mean = (tl.sum(v, 1) / DG)[:, None]
    along = (tl.sum(v * xhat, 1) / DG)[:, None]
    return tl.where(true[None, :], (v - mean - xhat * along) * rstd[:, None], 0.0)


@triton.jit
def affine(xhat, weight, bias):
    """xhat weight + bias; weight and bias [P] are 0 in padded columns."""
    return xhat * weight[None, :] + bias[None, :]


@triton.jit
def relu(x):
    """max(x, 0), and NaN where x is."""
    return tl.where(x == x, tl.maximum(x, 0.0), x)


@triton.jit
def load_true(pointer, begin, local, live, group, column, DIM: tl.constexpr, DG: tl.constexpr):
    """One group of BM rows from `begin` (int64) of an unpacked tensor (rows, DIM): [BM, P] in fp32.

    0 in rows that are not live and in padded columns.
    """
    offset = local[:, None] * DIM + (group * DG + column)[None, :]
    mask = live[:, None] & (column < DG)[None, :]
    return tl.load(pointer + begin * DIM + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_true(
    pointer, value, begin, local, live, group, column, DIM: tl.constexpr, DG: tl.constexpr
):
    """Stores a tile into an unpacked tensor (rows, DIM), rounded to its dtype."""
    offset = local[:, None] * DIM + (group * DG + column)[None, :]
    mask = live[:, None] & (column < DG)[None, :]
    tl.store(pointer + begin * DIM + offset, value.to(pointer.dtype.element_ty), mask=mask)
