r"""How the groups of a row block share the work: schedules *row*, *cooperative* and *step*.

    row           one program evaluates all G groups of its BM rows, one after the other
    cooperative   G programs of one launch evaluate a group each, and meet between phases
    step          the same G programs, and a launch for every phase in place of the meetings

All run the same kernels, which are cut into phases at their meetings: `PHASE` 0 is the whole of a
kernel, any other number that phase alone. Where the groups are programs of their own (SPREAD), a
program owns group `tl.program_id(2)`, and what another group's program wrote may be read in the
next phase. A meeting of schedule *cooperative* is a counter per row block that only grows: every
program adds 1 (release) and waits until all G have (acquire). All programs of a meeting must be
resident at once, so the launch is cooperative and no larger than the device (`launch.py`).

Sums over channels go through `share` and `gather`: partial sums of every group in global memory,
added in the order of the groups by every program, so that all G take the same decisions, bit by bit
those of schedule *row* but where programs keep their history (`kernels.resident`). They are fp32,
[BM] each, and their partial sums (2, G, 10, BM) per row block, two meetings by turns.
Source: the phases of the solves, `kernels.modality` and its siblings.
"""

from __future__ import annotations

import triton
import triton.language as tl

SUMS = tl.constexpr(10)
"""Of a meeting: ||g||^2, ||f||^2 and up to eight products of residuals."""


@triton.jit
def own_groups(G: tl.constexpr):
    """First and last (exclusive) group of a program.

    From the grid and not from a constant: a loop over what is known to be one group would be undone
    by the compiler, and the addresses of its tiles kept in registers that there are not.
    """
    each = G // tl.num_programs(2)
    first = tl.program_id(2) * each
    return first, first + each


@triton.jit
def meet(counter, meeting, G: tl.constexpr, COOPERATIVE: tl.constexpr):
    """Waits until all programs of a row block are here for the `meeting`-th time (from 1)."""
    tl.debug_barrier()
    if COOPERATIVE:
        seen = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") + 1
        while seen < meeting * G:
            seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()


@triton.jit
def leave(counter, meetings, G: tl.constexpr, COOPERATIVE: tl.constexpr):
    """Clears the counter after so many meetings, as all programs have waited for the last one."""
    if COOPERATIVE:
        seen = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") + 1
        if seen == (meetings + 1) * G:
            tl.store(counter, 0)


@triton.jit
def share(partials, slot: tl.constexpr, value, group, BM: tl.constexpr):
    """Stores one group's part [BM] of sum number `slot`; partials: of one meeting, (G, 10, BM)."""
    tl.store(partials + (group * SUMS + slot) * BM + tl.arange(0, BM), value)


@triton.jit
def gather(partials, slot: tl.constexpr, BM: tl.constexpr, G: tl.constexpr):
    """Sum number `slot` [BM] over all groups, in their order."""
    total = tl.zeros([BM], dtype=tl.float32)
    for group in tl.static_range(G):
        total += tl.load(partials + (group * SUMS + slot) * BM + tl.arange(0, BM))
    return total


@triton.jit
def gather_largest(partials, slot: tl.constexpr, BM: tl.constexpr, G: tl.constexpr):
    """The largest over all groups of what they shared as sum number `slot`, at least 0: [BM]."""
    largest = tl.zeros([BM], dtype=tl.float32)
    for group in tl.static_range(G):
        value = tl.load(partials + (group * SUMS + slot) * BM + tl.arange(0, BM))
        largest = tl.maximum(largest, value)
    return largest
