"""The configurations that a tuner may try, the most promising by the cost model first.

The model knows schedules, rows of a tile and evaluations kept; of depth, warps and stages it only
knows that they should be as the shipped ones are, which were chosen by what they compile to: each
that is not is a reason to try something else before.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from .config import SCHEDULES, Config, shipped
from .cost import Device, predict
from .layout import Layout

ROWS = (16, 32, 64, 128)
DEPTHS = (16, 32, 64, 128)
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)

TILE_REGISTERS = 64
"""Of a thread for one tile of fp32; programs hold several, so that more cannot but spill."""

UNTRIED = 1.1
"""Factor on the predicted time for every field that is not the shipped configuration's."""


@dataclass(frozen=True)
class Candidate:
    """A configuration, the memory of the solver, and the predicted seconds of a solve.

    changes: fields that the model does not know and that are not the shipped configuration's.
    """

    config: Config
    memory: int
    seconds: float
    changes: int

    @property
    def rank(self) -> float:
        """The predicted seconds, and more for every change."""
        return float(self.seconds * UNTRIED**self.changes)


def candidates(
    solve: str, rows: int, layout: Layout, modalities: int, device: Device, *, low: bool,
    steps: Mapping[int, int], shared: int | None = None, half: bool = False,
) -> list[Candidate]:  # fmt: skip
    """What to try for a problem, best first.

    Args:
        solve: one of `kernels.tuning.SOLVES`.
        rows, layout, modalities: R, widths and N.
        device: constants.
        low: whether most products are of 16 bits, as `cost.predict` takes it.
        steps: evaluations to the tolerance by memory m: what is searched, and what a solve takes.
        shared: bytes of shared memory that a program may have; None: unknown.
        half: whether steps multiply in float16, as `config.shipped` takes it.

    Returns:
        Without those that cannot run: tiles beyond the shared memory or the registers.
    """
    block, _, kind = solve.partition(" ")
    adjoint = kind == "adjoint"
    known = {
        "adjoint": adjoint, "capability": device.capability, "padded": layout.padded, "half": half,
    }  # fmt: skip
    found = []
    for schedule, bm, bk, warps, stages, (memory, count) in itertools.product(
        SCHEDULES, ROWS, DEPTHS, WARPS, STAGES, steps.items()
    ):
        config = Config(schedule, bm, bk, warps, stages)
        tiles = bm * min(bk, layout.padded) + min(bk, layout.padded) * layout.padded
        if bk > max(16, layout.padded) or bm * layout.padded > TILE_REGISTERS * 32 * warps:
            continue
        if shared is not None and 4 * tiles * stages > shared:
            continue
        p = predict(
            block, rows, layout.dim, modalities, device, config, groups=layout.groups,
            memory=memory, low=low, adjoint=adjoint, steps=count,
        )  # fmt: skip
        usual = shipped(schedule, **known)  # type: ignore[arg-type]
        changes = sum(
            getattr(config, name) != min(getattr(usual, name), max(16, layout.padded))
            for name in ("depth", "warps", "stages")
        )
        found.append(Candidate(config, memory, p.solve, changes))
    return sorted(found, key=lambda c: c.rank)
