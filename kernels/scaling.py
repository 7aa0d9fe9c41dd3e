"""Each row's incoming gradient divided by its norm, so that the sizes of a solve are those of 1.

    divisor = max |g|        norm = ||g / divisor||        unit = g / divisor / norm

Two divisions, as the square of a small gradient underflows: lambda is `whole` = divisor norm times
what the unit gradient leads to. A truncated solve compares nothing with a size, and keeps g.

A program owns BM rows, and of these all groups or its own (`kernels.schedule`); tiles [BM, P] in
fp32, scalars of a row [BM].
Source: linearity of lambda = g + J^T lambda.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def largest_of(value):
    """max |value| of the rows of a tile [BM, P]: [BM], infinite where one is not a number."""
    return tl.max(tl.where(value == value, tl.abs(value), float("inf")), 1)


@triton.jit
def divisor_of(largest):
    """What a row is divided by first: its largest element, 1 where that is 0."""
    return tl.where(largest > 0.0, largest, 1.0)


@triton.jit
def scales(largest, total, TRUNCATED: tl.constexpr):
    """divisor, norm and whole [BM]; total: sum of (g / divisor)^2 over a row."""
    if TRUNCATED:
        divisor = tl.zeros_like(largest) + 1.0
        norm = divisor
        whole = divisor
    else:
        divisor = divisor_of(largest)
        size = tl.sqrt(total)
        norm = tl.where(size > 0.0, size, 1.0)
        whole = largest * size
    return divisor, norm, whole
