"""Difference norms of trained models against solver steps, block by block.

    deq               a model trained as such, by its solver: modalities first, then the fusion
    deq, plain steps  the same model, by steps of the joint map from z = 0
    weight_tied:K     a model trained through K such steps, iterated as far

A block's norms are those of all held-out rows together, absolute ||f(z) - z|| / sqrt(rows) and
relative ||f(z) - z|| / ||f(z)||, as in the paper's figure; a row that its solver has stopped keeps
its last ones. One row that does not converge keeps such a norm up however many have converged, so
the share of rows below 0.01 is there too.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..adjoint import Unroll
from ..engine import Recipe, RunDirectory
from ..engine.kinds import WholeNumber
from ..module import DEQFusion
from ..solvers import Anderson, Solver
from .base import Analysis
from .comparison import by_task, in_order
from .models import Solved, batches, held_out, modality_names, short, solved, trained
from .records import Record, succeeded
from .settings import Job, Setting
from .statistics import band, summary
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..plots import Band

_PLAIN, _FUSION = "deq, plain steps", "fusion"
#: The paper's mark, and its step.
_MARK, _STEP = 0.01, 20
# Far below it, and above the rounding of float32.
_TOL = 1e-6


class Convergence(Analysis):
    """Residuals against steps."""

    name = "convergence"
    help = "residuals of trained models against solver steps, deq beside weight-tied steps"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--steps",
            type=WholeNumber(_STEP, 1000),
            default=50,
            help="steps to trace (default 50)",
        )
        parser.add_argument(
            "--tied",
            type=WholeNumber(1, 1000),
            default=10,
            metavar="K",
            help="steps that the weight-tied model is trained through (default 10)",
        )

    def arguments(self, args: argparse.Namespace) -> dict[str, Any]:
        return {"steps": args.steps}

    def jobs(self, setting: Setting, args: argparse.Namespace) -> list[Job]:
        if "fusion" in setting.options:
            raise ValueError(f"fusion: got {setting.options['fusion']!r}, expected none (--tied)")
        names = ("deq", f"weight_tied:{args.tied}")
        return [Job(name, seed, {"fusion": name}) for seed in setting.seeds for name in names]

    def inspect(
        self,
        setting: Setting,
        args: argparse.Namespace,
        recipe: Recipe,
        config: dict[str, Any],
        run: RunDirectory,
    ) -> Mapping[str, Any]:
        model, splits = trained(recipe, setting, config, run)
        found = [solved(recipe, model, batch) for batch in batches(held_out(splits), config)]
        names = [f"modality {n}" for n in modality_names(config, len(found[0].features))]
        names.append(_FUSION)
        own = (
            _tied(args.steps) if config["fusion"] != "deq" else {"solver": _solver(found[0], args)}
        )
        curves = {config["fusion"]: own}
        if config["fusion"] == "deq":
            curves[_PLAIN] = _tied(args.steps)
        return {
            "blocks": names,
            "curves": {
                name: dict(zip(names, _blocks([_trace(part, how) for part in found]), strict=True))
                for name, how in curves.items()
            },
        }

    def tables(self, records: Sequence[Record]) -> list[Table]:
        shown = {
            "name": ("solved by", ""),
            "block": ("block", ""),
            "models": ("models", ""),
            "reached": (f"steps to {_MARK:g}", ".1f"),
            "reaching": ("models that reach it", ".0%"),
            "relative": (f"at step {_STEP}", ".2g"),
            "below": (f"rows below {_MARK:g} there", ".1%"),
            "last": ("at the last step", ".2g"),
        }
        notes = [
            "Mean ± standard error over models, of each seed and split; steps of those that reach "
            "it. In deq, the fusion's steps begin when the modalities have ended."
        ]
        tables = []
        for task, of_task in by_task(records).items():
            title = f"{task}: relative difference norm of {_held(of_task)} held-out rows"
            tables.append(Table(title, _rows(task, of_task), shown, [*notes, _penalty(of_task)]))
        return tables

    def picture(self, records: Sequence[Record]) -> Figure:
        from ..plots import band_panels

        panels: dict[str, dict[str, Band]] = {}
        blocks = 0
        for task, of_task in by_task(records).items():
            curves = _curves(of_task)
            blocks = max(blocks, len(curves[0][1]))
            for kind in ("relative", "absolute"):
                for block in curves[0][1]:
                    title = f"{task}, {block}: {kind}"
                    panels[title] = {
                        name: _band([found[block][kind] for n, found in curves if n == name])
                        for name in dict.fromkeys(name for name, _ in curves)
                    }
        return band_panels(
            panels,
            xlabel="steps",
            ylabel="difference norm",
            log=True,
            columns=blocks,
            marks={title: _MARK for title in panels if title.endswith("relative")},
        )


ANALYSIS = Convergence()


def _solver(found: Solved, args: argparse.Namespace) -> Solver:
    """The layer's own solver, to a tolerance that no row is stopped by before it is of interest."""
    own = replace(found.fusion.solver, tol=_TOL, max_steps=args.steps)
    return replace(own, ladder="off") if isinstance(own, Anderson) else own


def _tied(steps: int) -> dict[str, Any]:
    return {"adjoint": Unroll(steps)}


@torch.no_grad()
def _trace(part: Solved, how: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Relative and absolute norms (N+1, rows, steps) of every row and step, NaN when it stopped."""
    fusion, options = part.fusion, part.fusion.options
    layer = DEQFusion(
        fusion.dim,
        fusion.num_modalities,
        num_groups=options.num_groups,
        gate=options.gate,
        gate_input=options.gate_input,
        skip=options.skip,
        tail=options.tail,
        **how,
    )
    layer.load_state_dict(fusion.state_dict())
    features = [x.reshape(-1, fusion.dim).float() for x in part.features]
    stats = layer.eval().equilibrium(features, trace=True).stats
    assert stats.trace is not None
    assert stats.absolute_trace is not None
    return stats.trace.double(), stats.absolute_trace.double()


def _blocks(traces: Sequence[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Of every block its norms by step, and the share of rows whose relative one is below."""
    steps = max(relative.shape[-1] for relative, _ in traces)
    relative, absolute = (
        np.concatenate([_carried(t.numpy(), steps) for t in parts], axis=1)
        for parts in zip(*traces, strict=True)
    )
    # Where nothing changed any more the size is the last one known.
    size = np.divide(absolute, relative, out=np.full_like(absolute, np.nan), where=relative > 0)
    size[..., 0] = np.nan_to_num(size[..., 0], nan=1.0)
    size = _carried(size, steps)
    blocks = []
    for r, a, s in zip(relative, absolute, size, strict=True):
        change, whole = (np.sqrt((values**2).mean(axis=0)) for values in (a, s))
        blocks.append(
            {
                "absolute": short(change),
                "relative": short(change / whole),
                "below": short((r < _MARK).mean(axis=0)),
                "rows": len(r),
            }
        )
    return blocks


def _carried(values: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """(blocks, rows, steps), with a row's last value in place of NaN."""
    known = np.isfinite(values)
    last = np.maximum.accumulate(np.where(known, np.arange(values.shape[-1]), 0), axis=-1)
    filled = np.take_along_axis(values, last, axis=-1)
    return np.pad(filled, ((0, 0), (0, 0), (0, steps - filled.shape[-1])), mode="edge")


def _curves(records: Sequence[Record]) -> list[tuple[str, dict[str, Any]]]:
    """Name and blocks, in their order, of every curve of every seed and split."""
    return [
        (name, {block: blocks[block] for block in split["more"]["blocks"]})
        for record in in_order(succeeded(records), ("deq",))
        for split in record["splits"]
        for name, blocks in split["more"]["curves"].items()
    ]


def _held(records: Sequence[Record]) -> int:
    _, blocks = _curves(records)[0]
    return int(blocks[_FUSION]["rows"])


def _penalty(records: Sequence[Record]) -> str:
    """Say the penalty: a large one makes any map contract."""
    options = [r["candidates"][r["chosen"]]["options"] for r in succeeded(records)]
    weights = sorted({o["jacobian_weight"] for o in options if o["fusion"] == "deq"})
    return f"Jacobian penalty of deq: {', '.join(f'{weight:g}' for weight in weights) or 'none'}."


def _rows(task: str, records: Sequence[Record]) -> list[dict[str, Any]]:
    curves = _curves(records)
    rows = []
    for name in dict.fromkeys(name for name, _ in curves):
        own = [blocks for n, blocks in curves if n == name]
        for block in own[0]:
            relative = [np.array(blocks[block]["relative"]) for blocks in own]
            under = [np.flatnonzero(values < _MARK) for values in relative]
            row: dict[str, Any] = {"task": task, "name": name, "block": block, "models": len(own)}
            row |= summary("reached", [1.0 + found[0] for found in under if len(found)])
            row["reaching"] = float(np.mean([len(found) > 0 for found in under]))
            row |= summary("relative", [values[_STEP - 1] for values in relative])
            row |= summary("below", [blocks[block]["below"][_STEP - 1] for blocks in own])
            row |= summary("last", [values[-1] for values in relative])
            rows.append(row)
    return rows


def _band(values: Sequence[Sequence[float]]) -> Band:
    mean, low, high = band(np.array(values), log=True)
    return np.arange(1.0, len(mean) + 1.0), mean, low, high
