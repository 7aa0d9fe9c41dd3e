r"""The loop on a CPU: rows that ended are dropped, and far from a solution products are cheap.

Rules of when a row ends: `deqfusion.reference.iterate`. Here the flags of the rows are read (in
NumPy, whose small operations cost a fraction of torch's): the loop ends with the last row, and
rows that ended leave the work once enough of them have (compaction).

Precision ladder: evaluations are exact (in the precision of the features) or near (with bfloat16
products of differences from the last exact evaluation, the anchor; see `LadderBlock`). All rows
begin together, near but for the first evaluation (from zeros it costs no product of all rows), the
fifth, the eleventh, the seventeenth and so on: an anchor closer by makes smaller errors. A row
leaves for exact evaluations

- when its residual is within `REACH` of the tolerance, so that the next should meet it;
- when it is lost (not finite, or sent back to its best iterate), or the next step is its last.

It waits, without its history, until all have left; then all go on together, by exact evaluations
alone. Nearly all end with the first of them, so that products of both kinds are as large as can be.
Only exact evaluations end a row or become its best iterate. Every choice depends on the row alone
and on evaluations counted from the beginning, and work is never cut to fewer than `MIN_ROWS` rows
(below, libraries change their order of summation; a batch of fewer is filled up by the caller): a
row's answer does not depend on the batch.
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
REACH = 2.0
FIRST_ANCHOR, ANCHOR_EVERY = 4, 6
"""Evaluations on the ladder, from 0, that are exact: 0, FIRST_ANCHOR, every ANCHOR_EVERY after."""


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


class _Left(NamedTuple):
    """Rows that left the ladder, of all blocks alike; some, where not `chosen` (K, S), fill up."""

    chosen: Array
    figures: Array
    z: Tensor
    best_f: Tensor
    best_g: Tensor


class _Loop:
    """The rows in work: flags and figures (K, S) in NumPy, tensors (K, S, d).

    Figures, per row: `step` evaluations taken, `best` residual and the step `improved_at` which it
    fell, `restarts`, and `origin`, the row's number in the outcome.
    """

    FIGURES = ("step", "best", "improved_at", "restarts", "origin")

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
        self.ladder, self.evaluations = settings.ladder, 0
        self.anchor: Anchor | None = None
        self.left: list[_Left] = []

    def figure(self, name: str) -> Array:
        """A view of one figure, (K, S)."""
        return self.figures[self.FIGURES.index(name)]

    @property
    def exact(self) -> bool:
        """Whether the next evaluation is exact."""
        since = self.evaluations - FIRST_ANCHOR
        return not self.ladder or self.evaluations == 0 or since % ANCHOR_EVERY == 0

    def run(self) -> None:
        """Steps until no row runs and none has left the ladder."""
        with np.errstate(all="ignore"):
            while self.settings.max_steps and (self.running.any() or self.go_on()):
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
        if self.exact:
            self.judge(relative, gn <= goal, finite, gn <= self.settings.most)
        self.evaluations += 1
        if not self.running.any():
            return
        lost = self.running & ~finite
        if self.settings.restart:
            rising = (relative > RISE * self.figure("best")) & (
                self.figure("restarts") < MAX_RESTARTS
            )
            lost |= self.running & rising
        leaving = np.zeros_like(lost)
        if self.ladder:
            last = self.figure("step") + 1 >= self.settings.max_steps
            leaving = self.running & (lost | last | (gn <= REACH * goal))
        if self.running.mean() < self.settings.compact_below:
            index = self.compact()
            leaving, lost = (np.take_along_axis(x, index, 1) for x in (leaving, lost))
        self.z = self.accelerator.propose(self.z, self.f, self.g)
        if lost.any():
            self.restart(lost)
        if leaving.any():
            self.leave(leaving)

    def evaluate(self, z: Tensor | None) -> Tensor:
        """f(z), of all rows in work in the same precision."""
        if not self.ladder or z is None:
            return self.block(z)
        block = cast(LadderBlock, self.block)
        if not self.exact:
            return block.near(z, self.anchor)
        f, self.anchor = block.anchored(z)
        return f

    def judge(self, relative: Array, met: Array, finite: Array, sound: Array) -> None:
        """Keeps the best iterates of an exact evaluation, if `sound`, and ends rows."""
        running, step, best = self.running, self.figure("step"), self.figure("best")
        met = met & finite
        nearer = running & finite & (met | (relative < best))
        improved = nearer & (met | sound | np.isinf(best))
        self.figure("improved_at")[nearer] = step[nearer]
        self.keep_best(improved)
        best[improved] = relative[improved]
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

    def leave(self, rows: Array) -> None:
        """Takes rows off the ladder."""
        index = np.argsort(~rows, axis=1, kind="stable")[:, : rows.sum(1).max()]
        self.left.append(
            _Left(
                np.take_along_axis(rows, index, 1),
                np.take_along_axis(self.figures, index[None], 2),
                *self._rows(index),
            )
        )
        self.running = self.running & ~rows
        if self.running.any() and self.running.mean() < self.settings.compact_below:
            self.compact()

    def go_on(self) -> bool:
        """Takes the rows that left the ladder into work; False if there are none."""
        if not self.left:
            return False
        left, self.left = self.left, []
        self.running = np.concatenate([group.chosen for group in left], 1)
        self.figures = np.concatenate([group.figures for group in left], 2)
        self.z, self.best_f, self.best_g = (
            torch.cat([getattr(group, name) for group in left], 1)
            for name in ("z", "best_f", "best_g")
        )
        # All blocks get the same number of rows, some not running.
        index = np.argsort(~self.running, axis=1, kind="stable")
        size = min(rounded(int(self.running.sum(1).max())), self.outcome.status.shape[1])
        missing = max(size - index.shape[1], 0)
        index = np.concatenate([index[:, :size], np.repeat(index[:, -1:], missing, 1)], 1)
        self.running = np.take_along_axis(self.running, index, 1)
        self.running[:, size - missing :] = False
        self.figures = np.take_along_axis(self.figures, index[None], 2)
        self.z, self.best_f, self.best_g = self._rows(index)
        self.block = self.whole.take(torch.from_numpy(self.figure("origin").astype(int)))
        self.accelerator, self.anchor, self.ladder = self.accelerator.fresh(), None, False
        return True

    def _rows(self, index: Array) -> tuple[Tensor, Tensor, Tensor]:
        """The next iterates, best iterates and their residuals of rows (K, S)."""
        assert self.z is not None
        assert self.best_f is not None
        assert self.best_g is not None
        numbers = torch.from_numpy(index)
        return (take_rows(self.z, numbers), take_rows(self.best_f, numbers),
                take_rows(self.best_g, numbers))  # fmt: skip

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
