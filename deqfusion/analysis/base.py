"""What an analysis is, and how each becomes a command."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..engine import Recipe, RunDirectory
from ..engine.distributed import device_of
from ..engine.kinds import WholeNumber
from ..engine.runs import write_atomically, write_json
from ..ops import checked_implementation
from .records import FORMAT, VERSION, Record, read_records, run_jobs
from .settings import WHOLE, Job, Setting, part_of, setting_of
from .tables import Table, json_rows, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Analysis(ABC):
    """An analysis: which runs it needs, what it looks at in each, and what it says of all.

    Class attributes:
        name: as in `deqfusion analyze NAME`.
        help: one line for the command line, without a full stop.
    """

    name: ClassVar[str]
    help: ClassVar[str]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the analysis's own options."""
        return None

    def arguments(self, args: argparse.Namespace) -> dict[str, Any]:
        """Return what a record depends on beside names, seeds and options: JSON values."""
        return {}

    @abstractmethod
    def jobs(self, setting: Setting, args: argparse.Namespace) -> list[Job]:
        """Return the runs that the analysis is made of, the first seed's first.

        Raises:
            ValueError: options of the analysis that do not fit the task.
        """

    def recipe(self, setting: Setting, args: argparse.Namespace, job: Job) -> Recipe:
        """Return what trains a job: the task, or one that differs from it in more than options."""
        return setting.recipe

    def inspect(
        self,
        setting: Setting,
        args: argparse.Namespace,
        recipe: Recipe,
        config: dict[str, Any],
        run: RunDirectory,
    ) -> Mapping[str, Any]:
        """Return what a record has of a trained model beside its metrics.

        Args:
            setting, args: of the analysis.
            recipe: what trained it.
            config: of the model, with facts and split.
            run: the folder of its finished run.
        """
        return {}

    @abstractmethod
    def tables(self, records: Sequence[Record]) -> list[Table]:
        """Say what records have, of one task or several; some seeds may be missing."""

    def summary(self, tables: Sequence[Table]) -> str:
        """Say what several tables have in common, in a paragraph; empty where there is nothing."""
        return ""

    @abstractmethod
    def picture(self, records: Sequence[Record]) -> Figure:
        """Draw what records have; at least one run of them succeeded.

        Raises:
            ValueError: what there is, of a part of the runs, cannot be drawn yet.
        """


def add_common_arguments(parser: argparse.ArgumentParser, analysis: Analysis) -> None:
    """Add the options that all analyses have."""
    parser.add_argument("--task", required=True, help="a task of `deqfusion train`")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder of the data")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="folder of the results; runs that are there are not repeated, and those of other "
        "tasks are tabulated with them",
    )
    parser.add_argument(
        "--seeds",
        type=WholeNumber(1, 1000),
        default=5,
        metavar="COUNT",
        help="seeds 0 to COUNT - 1 (default 5)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the task, as train has it; may be repeated",
    )
    parser.add_argument("--config", type=Path, help="TOML file of options; --set goes before it")
    parser.add_argument(
        "--choose",
        action="append",
        default=[],
        nargs="+",
        metavar=("NAME", "VALUE"),
        help="an option and its values, of which the validation metric chooses one for every run",
    )
    parser.add_argument(
        "--part",
        type=part_of,
        default=WHOLE,
        metavar="K/OF",
        help="run only the K-th of OF shares of the runs, beside the processes of the others",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def run_analysis(args: argparse.Namespace, analysis: Analysis) -> int:
    """Train what has no record yet, then write table and picture of all records in `--out`.

    Returns:
        0, or 1 where no run of the task has succeeded.

    Raises:
        DataError: the data folder is not what it should be.
        RecordError, CheckpointError: `--out` holds runs of other options or data, or damaged ones.
        ValueError: options that are unknown or do not fit together, or a `DEQFUSION_BACKEND` that
            cannot run.
    """
    setting = setting_of(args)
    checked_implementation(device_of({"device": "auto", **setting.options}))
    jobs = analysis.jobs(setting, args)
    missing = run_jobs(
        analysis.name,
        setting,
        jobs,
        arguments=analysis.arguments(args),
        recipe_of=lambda job: analysis.recipe(setting, args, job),
        inspect=lambda *model: analysis.inspect(setting, args, *model),
    )
    records = read_records(setting.out, analysis.name)
    if missing:
        print(f"{missing} of {len(jobs)} runs are not done yet: the table is of the others")
    own = [record for record in records if record["task"] == setting.recipe.name]
    diverged = sum(not record["splits"] for record in own)
    if diverged:
        print(f"{diverged} runs of {setting.recipe.name} diverged")
    if diverged == len(own):
        print(f"no run of {setting.recipe.name} has succeeded")
        return 1
    print(write_results(analysis, setting.out, records, complete=not missing), end="")
    print(f"results: {setting.out / analysis.name}.txt, .csv, .json, .png")
    return 0


def write_results(
    analysis: Analysis, out: Path, records: Sequence[Record], *, complete: bool = True
) -> str:
    """Write table and picture, which may be missing where `records` are not complete.

    Returns:
        The table as text.
    """
    from ..plots import save_png

    tables = analysis.tables(records)
    text = "\n".join(table.text() for table in tables)
    stem = out / analysis.name
    write_atomically(stem.with_suffix(".txt"), lambda path: path.write_text(text, encoding="utf-8"))
    write_csv(stem.with_suffix(".csv"), tables)
    write_json(
        stem.with_suffix(".json"),
        {
            "format": FORMAT,
            "version": VERSION,
            "analysis": analysis.name,
            "tables": [{"title": table.title, "rows": json_rows(table)} for table in tables],
            "records": list(records),
        },
    )
    try:
        figure = analysis.picture(records)
    except ValueError:
        if complete:
            raise
    else:
        write_atomically(stem.with_suffix(".png"), lambda path: save_png(figure, path))
    return text
