"""Every fusion on a task: test metrics, and what their training takes.

All fusions have the same encoders, data, epochs and seeds; the epoch, and with `--choose` other
options, are chosen on validation samples for every fusion and seed alike. A seed draws parameters,
the validation part and, where the task has them, splits or folds, of which the mean is taken; on a
task's own test samples the seeds share these.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..engine.options import ENGINE_FIELDS
from .base import Analysis
from .comparison import (
    agreement,
    by_name,
    by_task,
    comparison_notes,
    headline,
    in_order,
    metric_rows,
    over_tasks,
    readable,
    verdict,
)
from .records import Record
from .settings import Job, Setting
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FUSIONS = (
    "deq",
    "concat",
    "sum",
    "gated",
    "tensor",
    "attention",
    "weight_tied:1",
    "weight_tied:10",
)
BASE = "deq"


class Fusions(Analysis):
    """Test metrics and training time of every fusion."""

    name = "fusions"
    help = "train every fusion on a task, and compare test metrics and training time"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_fusions(parser)

    def jobs(self, setting: Setting, args: argparse.Namespace) -> list[Job]:
        return fusion_jobs(setting, args)

    def tables(self, records: Sequence[Record]) -> list[Table]:
        tables = []
        for task, of_task in by_task(in_order(records, FUSIONS)).items():
            rows, shown = metric_rows(task, of_task, BASE)
            shown |= {"training_seconds": ("training, s", ".1f"), "steps": ("steps", ".1f")}
            columns = {"name": ("fusion", ""), **shown}
            notes = verdict(rows, BASE) + agreement(of_task, rows)
            notes += comparison_notes(task, of_task, BASE)
            tables.append(Table(task, rows, columns, notes))
        return tables

    def summary(self, tables: Sequence[Table]) -> str:
        return over_tasks({table.title: table.rows for table in tables}, BASE)

    def picture(self, records: Sequence[Record]) -> Figure:
        from ..plots import score_panels

        panels = {}
        for task, of_task in by_task(in_order(records, FUSIONS)).items():
            metric = headline(of_task)
            values = by_name(of_task, "test", metric)
            title = f"{task}: test {readable(metric)}"
            panels[title] = {name: list(found.values()) for name, found in values.items()}
        return score_panels(panels, highlight=BASE)


ANALYSIS = Fusions()


def add_fusions(parser: argparse.ArgumentParser) -> None:
    """Add the option that says which fusions."""
    parser.add_argument(
        "--fusions",
        nargs="+",
        type=ENGINE_FIELDS["fusion"].kind,
        default=list(FUSIONS),
        metavar="FUSION",
        help=f"default {' '.join(FUSIONS)}",
    )


def fusion_jobs(setting: Setting, args: argparse.Namespace) -> list[Job]:
    """Return a job for every seed and fusion."""
    if "fusion" in setting.options:
        raise ValueError(f"fusion: got {setting.options['fusion']!r}, expected --fusions")
    names = dict.fromkeys(args.fusions)
    return [Job(name, seed, {"fusion": name}) for seed in setting.seeds for name in names]
