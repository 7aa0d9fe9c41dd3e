r"""The loop on a CPU: rows that ended are dropped, and far from a solution products are cheap.

Rules of when a row ends: `deqfusion.reference.iterate`. Here the flags of the rows are read (in
NumPy, whose small operations cost a fraction of torch's): the loop ends with the last row, and
rows that ended leave the work once a quarter of them has (compaction).

Precision ladder: a row's evaluations are exact (in the precision of the features) or near (with
bfloat16 products of differences from the row's last exact one, its anchor; see `LadderBlock`). The
first is exact, and from zeros costs no product of all rows. Then they are near until the residual

- has fallen to `FLOOR` times that at the anchor, where rounding begins to count: the next is exact
  and the new anchor;
- is within `REACH` of the tolerance, so that the next is likely to meet it;
- stalls, or is not finite, or the last exact step gained nothing; or the next step is the last.

Only exact evaluations end a row or become its best iterate. Rows that come to an exact evaluation
wait, each at its own step, until no row is left to be evaluated near, and take it together:
products of both kinds are then as large as they can be. Every choice is made row by row, and
work is never cut to fewer than `MIN_ROWS` rows (below, libraries change their order of summation;
a batch of fewer is filled up by the caller), so that a row's answer does not depend on the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from deqfusion.reference.accelerate import Accelerator
from deqfusion.reference.iterate import (
    AT_MAX_STEPS,
    CONVERGED,
    MAX_RESTARTS,
    NON_FINITE,
    PATIENCE,
    RISE,
    STAGNATED,
    Anchor,
    Block,
    LadderBlock,
    Outcome,
    Settings,
    damped,
    new_outcome,
)
from deqfusion.reference.product import take_rows

Array = np.ndarray[Any, Any]

MIN_ROWS = 16
STRIDE = 32
"""Rows in work are a multiple of this, or `MIN_ROWS`: a library keeps code of its own for every
size of a product that it meets, and making and keeping it costs more than the rows filled in."""
COMPACT_BELOW = 0.75
KEEP_FROM = 0.6
FLOOR = 1e-2
REACH = 2.5
STALL = 2
"""Near steps without a residual 10 % lower, after which the next is exact."""


def fixed_point(
    block: Block,
    start: Tensor | None,
    accelerator: Accelerator,
    settings: Settings,
    active: Tensor | None,
    trace: Tensor | None,
    example: Tensor,
) -> Outcome:
    """Solves z = f(z) for every row; arguments as `fixed_point_masked` takes them.

    With `settings.ladder` the block must be a `LadderBlock`.
    """
    outcome = new_outcome(block.shape, start, active, example)
    if outcome.state.numel():
        _Loop(block, start, accelerator, settings, active, trace, outcome).run()
    return outcome


def rounded(rows: int) -> int:
    """Rows in work for so many that must be: at least `MIN_ROWS`, above in steps of `STRIDE`."""
    return MIN_ROWS if rows <= MIN_ROWS else -(-rows // STRIDE) * STRIDE


class _Waiting(NamedTuple):
    """Rows that wait for an exact evaluation: `numbers` (K, S) into tensors of an earlier step."""

    numbers: Tensor
    chosen: Array
    figures: Array
    z: Tensor
    best_f: Tensor
    best_g: Tensor
    accelerator: Accelerator


class _Loop:
    """The rows in work: flags and figures (K, S) in NumPy, tensors (K, S, d).

    Figures, per row: `step` evaluations taken, `best` residual and the step `improved_at` which it
    fell, `restarts`; of the ladder the residual `at_anchor`, the `least` since and when it
    `fell_at`; and `origin`, the row's number in the outcome.
    """

    FIGURES = (
        "step", "best", "improved_at", "restarts", "at_anchor", "least", "fell_at", "origin",
    )  # fmt: skip

    def __init__(
        self,
        block: Block,
        start: Tensor | None,
        accelerator: Accelerator,
        settings: Settings,
        active: Tensor | None,
        trace: Tensor | None,
        outcome: Outcome,
    ) -> None:
        self.whole, self.settings, self.outcome = block, settings, outcome
        self.block, self.z, self.accelerator = block, start, accelerator
        self.rtol = float(settings.rtol)
        self.trace = None if trace is None else trace.numpy()
        blocks, count = outcome.status.shape
        self.figures = np.zeros((len(self.FIGURES), blocks, count))
        self.figures[self.FIGURES.index("best")] = np.inf
        self.figures[self.FIGURES.index("origin")] = np.arange(count)
        self.running = np.ones((blocks, count), bool) if active is None else active.numpy().copy()
        self.best_f: Tensor | None = None
        self.best_g: Tensor | None = None
        self.exact = True
        self.anchor: Anchor | None = None
        self.waiting: list[_Waiting] = []

    def figure(self, name: str) -> Array:
        """A view of one figure, (K, S)."""
        return self.figures[self.FIGURES.index(name)]

    def run(self) -> None:
        """Steps until no row runs and none waits."""
        with np.errstate(all="ignore"):
            while self.settings.max_steps and (self.running.any() or self.load()):
                self.advance()

    def advance(self) -> None:
        """One evaluation of every row in work, and what follows from it."""
        z = self.z
        self.f = self.evaluate(z)
        self.g = self.f if z is None else self.f - z
        gn = torch.linalg.vector_norm(self.g, dim=-1).numpy()
        fn = torch.linalg.vector_norm(self.f, dim=-1).numpy()
        # What is not running keeps figures that no rule looks at.
        limits = np.finfo(fn.dtype)
        relative = np.minimum(gn / np.maximum(fn, limits.tiny), limits.max)
        goal = self.settings.atol + self.rtol * fn
        self.figure("step")[:] += 1
        if self.trace is not None:
            k, s = self.running.nonzero()
            at = self.figure("origin")[k, s].astype(int), self.figure("step")[k, s].astype(int) - 1
            self.trace[k, at[0], at[1], 0], self.trace[k, at[0], at[1], 1] = gn[k, s], fn[k, s]
        finite = np.isfinite(gn) & np.isfinite(fn)
        self.judge(relative, gn <= goal, finite)
        if not self.running.any():
            return
        lost = self.running & ~finite
        if self.settings.restart:
            lost |= self.running & (relative > RISE * self.figure("best"))
        # A row sent back to its best iterate leaves its anchor, and what fell since, behind.
        next_exact = lost | self.choose_precision(relative, gn <= REACH * goal, finite)
        if self.running.mean() < COMPACT_BELOW:
            index = self.compact()
            next_exact, lost = (np.take_along_axis(x, index, 1) for x in (next_exact, lost))
        self.z = self.accelerator.propose(self.z, self.f, self.g)
        if lost.any():
            self.restart(lost)
        self.divide(next_exact)

    def evaluate(self, z: Tensor | None) -> Tensor:
        """f(z), of all rows in work in the same precision."""
        if not self.settings.ladder or z is None:
            return self.block(z)
        block = cast(LadderBlock, self.block)
        if not self.exact:
            return block.near(z, self.anchor)
        f, self.anchor = block.anchored(z)
        return f

    def judge(self, relative: Array, met: Array, finite: Array) -> None:
        """Keeps the best iterates of an exact evaluation, and ends rows."""
        if not self.exact:
            return
        running, step, best = self.running, self.figure("step"), self.figure("best")
        met = met & finite
        improved = running & finite & (met | (relative < best))
        self.keep_best(improved)
        best[improved] = relative[improved]
        self.figure("improved_at")[improved] = step[improved]
        stagnant = step - self.figure("improved_at") >= PATIENCE
        hopeless = ~finite & ((self.figure("restarts") >= MAX_RESTARTS) | np.isinf(best))
        ended = running & (met | stagnant | hopeless | (step >= self.settings.max_steps))
        if not ended.any():
            return
        code = np.where(stagnant, STAGNATED, AT_MAX_STEPS)
        code = np.where(met, CONVERGED, np.where(hopeless, NON_FINITE, code))
        self.finish(ended, code)
        self.running = running & ~ended

    def keep_best(self, improved: Array) -> None:
        """Updates the best iterate; where every running row improved, by reference."""
        if self.best_f is None or self.best_g is None or (improved | ~self.running).all():
            # At the first evaluation there is nothing better; where it is not finite, `best` says.
            self.best_f, self.best_g = self.f, self.g
        elif improved.any():
            rows = torch.from_numpy(improved).unsqueeze(-1)
            self.best_f = torch.where(rows, self.f, self.best_f)
            self.best_g = torch.where(rows, self.g, self.best_g)

    def finish(self, ended: Array, code: Array) -> None:
        """Writes the results of the rows that ended where they came from."""
        assert self.best_f is not None
        count = self.outcome.status.shape[1]
        k, s = ended.nonzero()
        origin = self.figure("origin")[k, s].astype(int)
        self.outcome.status.numpy()[k, origin] = code[k, s]
        self.outcome.steps.numpy()[k, origin] = self.figure("step")[k, s]
        known = np.isfinite(self.figure("best")[k, s])
        k, s, origin = k[known], s[known], origin[known]
        self.outcome.residual.numpy()[k, origin] = self.figure("best")[k, s]
        source = torch.from_numpy(k * ended.shape[1] + s)
        values = self.best_f.flatten(0, 1).index_select(0, source)
        self.outcome.state.flatten(0, 1).index_copy_(
            0, torch.from_numpy(k * count + origin), values
        )

    def choose_precision(self, relative: Array, reached: Array, finite: Array) -> Array:
        """Which rows' next evaluation is exact, (K, S)."""
        if not self.settings.ladder:
            return self.running
        step, at_anchor, least = (self.figure(name) for name in ("step", "at_anchor", "least"))
        fell_at = self.figure("fell_at")
        # An exact step that gained nothing is followed by exact ones until one does.
        exact = self.exact & (relative > self.figure("best"))
        if self.exact:
            at_anchor[:] = relative
            least[:] = np.inf
        fell = relative < 0.9 * least
        least[fell] = relative[fell]
        fell_at[fell] = step[fell]
        stalled = step - fell_at >= STALL
        exact |= reached | stalled | ~finite | (relative <= FLOOR * at_anchor)
        exact |= step + 1 >= self.settings.max_steps
        return exact

    def restart(self, lost: Array) -> None:
        """Damped steps from the best iterates of the rows lost, their history forgotten.

        After the third restart a residual that rises is let be; one that is not finite ends.
        """
        restarts = self.figure("restarts")
        lost = lost & (restarts < MAX_RESTARTS)
        if not lost.any():
            return
        restarts[lost] += 1
        assert self.z is not None
        assert self.best_f is not None
        assert self.best_g is not None
        rows = torch.from_numpy(lost)
        self.accelerator.restart(rows)
        count = torch.from_numpy(np.maximum(restarts, 1)).to(self.z.dtype)
        self.z = torch.where(rows.unsqueeze(-1), damped(self.best_f, self.best_g, count), self.z)

    def divide(self, exact: Array) -> None:
        """Goes on with the rows that are next evaluated near, if any, the others waiting."""
        exact = exact & self.running
        near = self.running & ~exact
        if near.any():
            if exact.any():
                self.wait(exact)
                self.running = near
                if near.mean() < COMPACT_BELOW:
                    self.compact()
            self.exact = False
        elif self.waiting:
            self.wait(exact)
            self.running = near
        else:
            self.exact = True

    def wait(self, rows: Array) -> None:
        """Puts rows aside: many by keeping what they are selected from, few by copying them."""
        assert self.z is not None
        assert self.best_f is not None
        assert self.best_g is not None
        index = np.argsort(~rows, axis=1, kind="stable")[:, : rows.sum(1).max()]
        numbers, history = torch.from_numpy(index), self.accelerator.snapshot()
        tensors = self.z, self.best_f, self.best_g
        if index.shape[1] < KEEP_FROM * rows.shape[1]:
            tensors = (take_rows(tensors[0], numbers), take_rows(tensors[1], numbers),
                       take_rows(tensors[2], numbers))  # fmt: skip
            history.take(numbers)
            numbers = torch.arange(index.shape[1]).expand(len(index), -1)
        chosen = np.take_along_axis(rows, index, 1)
        figures = np.take_along_axis(self.figures, index[None], 2)
        self.waiting.append(_Waiting(numbers, chosen, figures, *tensors, history))

    def load(self) -> bool:
        """Takes all rows that wait into work, for an exact evaluation; False if there are none."""
        if not self.waiting:
            return False
        groups, self.waiting = self.waiting, []
        # All blocks get the same number of rows, some not running.
        waiting = sum(group.numbers.shape[1] for group in groups)
        missing = rounded(waiting) - waiting
        if missing:
            last = groups[-1]
            groups.append(
                last._replace(
                    numbers=last.numbers[:, :1].expand(-1, missing),
                    chosen=np.zeros((len(last.chosen), missing), bool),
                    figures=np.repeat(last.figures[:, :, :1], missing, 2),
                )
            )

        def gather(name: str) -> Tensor:
            return torch.cat([take_rows(getattr(g, name), g.numbers) for g in groups], 1)

        self.z, self.best_f, self.best_g = gather("z"), gather("best_f"), gather("best_g")
        self.figures = np.concatenate([group.figures for group in groups], 2)
        self.running = np.concatenate([group.chosen for group in groups], 1)
        self.accelerator = self.accelerator.join([(g.accelerator, g.numbers) for g in groups])
        self.block = self.whole.take(torch.from_numpy(self.figure("origin").astype(int)))
        self.anchor, self.exact = None, True
        return True

    def compact(self) -> Array:
        """Drops rows that do not run, as far as the fullest of the blocks allows.

        Returns:
            The numbers (K, S) of the rows kept.
        """
        left = rounded(int(self.running.sum(1).max()))
        if left >= self.running.shape[1]:
            left = self.running.shape[1]
            return np.tile(np.arange(left), (len(self.running), 1))
        kept = np.argsort(~self.running, axis=1, kind="stable")[:, :left]
        index = torch.from_numpy(kept)
        self.running = np.take_along_axis(self.running, kept, 1)
        self.figures = np.take_along_axis(self.figures, kept[None], 2)
        assert self.best_f is not None
        assert self.best_g is not None
        same = self.best_f is self.f
        self.f, self.g = take_rows(self.f, index), take_rows(self.g, index)
        self.best_f = self.f if same else take_rows(self.best_f, index)
        self.best_g = self.g if same else take_rows(self.best_g, index)
        self.z = None if self.z is None else take_rows(self.z, index)
        if self.anchor is not None:
            self.anchor = tuple(take_rows(t, index) for t in self.anchor)
        self.block = self.block.take(index)
        self.accelerator.take(index)
        return kept
