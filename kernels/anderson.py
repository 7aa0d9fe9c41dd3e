r"""Anderson mixing of a block of rows on the device: Gram row, small solve, next iterate.

    H_ij = <g_i, g_j>,   (H + ridge tr(H) / n I) a = 1,   a <- a / sum a
    z_next = beta sum_j a_j f_j + (1 - beta) sum_j a_j (f_j - g_j)

A program owns BM rows. The history of the last M evaluations is twice M planes (rows, W) in global
memory, slot s holding the evaluation of step s mod M; only the Gram row of the newest is computed.
What there is one of per row and slot is a tile [BM, 8], the most slots that there are. The Gram
matrix (rows, M, M) is kept beside the history, its lower half read into registers, a vector over
rows per entry, and eliminated there, unrolled, without pivoting (it is symmetric, and positive
definite up to rounding): a pivot that rounding leaves at or below 0 takes its entry out of the
mixture. Entries from before `first` (a restart) are out likewise. All of it is fp32. M of 0 and 1
are plain iteration.

Source: H. F. Walker and P. Ni, "Anderson acceleration for fixed-point iterations", 2011.
Differences: (1) one Gram row per step; (2) a ridge relative to the mean diagonal; (3) per-row
histories.
"""

from __future__ import annotations

import triton
import triton.language as tl

SLOTS = tl.constexpr(8)


@triton.jit
def valid(slot, step, first, M: tl.constexpr):
    """Whether a slot holds, after the evaluation of `step`, one that counts for each row [BM]."""
    held = step - (step - slot + M) % M
    return (held >= first) & (held >= 0)


@triton.jit
def column_of(tile, slot):
    """Column `slot` [BM] of a tile [BM, 8]."""
    return tl.sum(tl.where((tl.arange(0, SLOTS) == slot)[None, :], tile, 0.0), 1)


@triton.jit
def with_column(tile, slot, value):
    """The tile [BM, 8] with value [BM] added to column `slot`."""
    return tile + tl.where((tl.arange(0, SLOTS) == slot)[None, :], value[:, None], 0.0)


@triton.jit
def remember(gram, dots, step, M: tl.constexpr, BM: tl.constexpr):
    """Stores dots [BM, 8] as row and column of the newest slot; gram: of the program's rows."""
    newest = step % M
    rows = gram + tl.arange(0, BM)[:, None] * (M * M)
    slot = tl.arange(0, SLOTS)[None, :]
    there = (slot < M) & (tl.arange(0, BM)[:, None] >= 0)
    tl.store(rows + (newest * M + slot), dots, mask=there)
    tl.store(rows + (slot * M + newest), dots, mask=there)


@triton.jit
def mixture(gram, step, first, ridge, M: tl.constexpr, BM: tl.constexpr, RELATIVE: tl.constexpr):
    """Weights a [BM, 8] of the history slots after the evaluation of `step`.

    gram: of the program's rows; first [BM]: the first step that counts.
    """
    gram_rows = gram + tl.arange(0, BM) * (M * M)
    a = ()
    counts = ()
    for i in tl.static_range(M):
        counts = counts + (valid(i, step, first, M),)
        for j in tl.static_range(M):
            if j <= i:
                both = counts[i] & counts[j]
                a = a + (tl.load(gram_rows + i * M + j, mask=both, other=0.0),)
    solved, sound = solution(a, counts, ridge, M, BM, RELATIVE)
    newest = step % M
    weights = tl.zeros([BM, SLOTS], dtype=tl.float32)
    for j in tl.static_range(M):
        plain = tl.where(newest == j, 1.0, 0.0)
        weights = with_column(weights, j, tl.where(sound, solved[j], plain))
    return weights


@triton.jit
def solution(a, counts, ridge, M: tl.constexpr, BM: tl.constexpr, RELATIVE: tl.constexpr):
    """Weights (M of [BM]) that sum to 1, and whether there are any, [BM].

    a: the lower half of the Gram matrix, row by row, 0 where an entry does not count; counts: for
    each entry, whether it does.
    """
    number = tl.zeros([BM], dtype=tl.float32)
    trace = tl.zeros([BM], dtype=tl.float32)
    b = ()
    for i in tl.static_range(M):
        number += counts[i].to(tl.float32)
        trace += a[i * (i + 1) // 2 + i]
        b = b + (counts[i].to(tl.float32),)
    shift = ridge * trace / tl.maximum(number, 1.0) if RELATIVE else trace * 0.0 + ridge
    # L D L^T: column p of the lower half is replaced by L, and b by the solution of L y = b.
    inverses = ()
    for p in tl.static_range(M):
        pivot = a[p * (p + 1) // 2 + p] + shift
        inverse = tl.where(counts[p] & (pivot > 0.0), 1.0 / pivot, 0.0)
        inverses = inverses + (inverse,)
        later_a = ()
        later_b = ()
        for i in tl.static_range(M):
            if i > p:
                factor = a[i * (i + 1) // 2 + p] * inverse
                later_b = later_b + (b[i] - factor * b[p],)
            else:
                factor = inverse
                later_b = later_b + (b[i],)
            for j in tl.static_range(M):
                if j <= i:
                    if i > p and j > p:
                        later_a = later_a + (
                            a[i * (i + 1) // 2 + j] - factor * a[j * (j + 1) // 2 + p],
                        )
                    else:
                        later_a = later_a + (a[i * (i + 1) // 2 + j],)
        a = later_a
        b = later_b
    # Back substitution, from the last entry: a_p = (y_p - sum_{i>p} H_ip a_i) / d_p.
    solved = ()
    total = tl.zeros([BM], dtype=tl.float32)
    for q in tl.static_range(M):
        value = b[M - 1 - q]
        for i in tl.static_range(q):
            value -= a[(M - 1 - i) * (M - i) // 2 + M - 1 - q] * solved[i]
        value *= inverses[M - 1 - q]
        solved = solved + (value,)
        total += value
    weights = ()
    for j in tl.static_range(M):
        weights = weights + (solved[M - 1 - j] / total,)
    return weights, (total != 0.0) & (total - total == 0.0)
