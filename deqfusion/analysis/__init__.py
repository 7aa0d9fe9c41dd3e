"""Analyses of trained models: `deqfusion analyze NAME`, each a table and a picture.

settings    what an analysis is asked for; records: what a run gave, kept as soon as it is done
statistics  paired tests; comparison: by test metrics; tables: as text, Markdown and CSV
base        what an analysis is
report      tables in Markdown, from the records alone

An analysis's module has `ANALYSIS`; one line in `ANALYSES` makes it a command. All of them train by
`engine.train`, in jobs that differ in options and seed: a job whose record is there is not run
again, so that an analysis can be interrupted and continued, and divided among processes.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from .base import Analysis, add_common_arguments, run_analysis

__all__ = ["ANALYSES", "get_analysis", "register_commands"]

#: Name of each analysis, which is its module's.
ANALYSES = ("fusions", "ablation", "convergence", "importance", "cost", "stability")


def get_analysis(name: str) -> Analysis:
    """Return an analysis by its name, one of `ANALYSES`."""
    analysis: Analysis = importlib.import_module(f"{__name__}.{name}").ANALYSIS
    return analysis


def register_commands(subparsers: Any) -> None:
    """Add `analyze NAME` to the subparsers of an argument parser.

    Each sets the default `run`, a function of the parsed arguments that returns an exit code.
    """
    help_line = "compare fusions and look into trained models, each a table and a picture"
    analyze = subparsers.add_parser("analyze", help=help_line, description=help_line + ".")
    names = analyze.add_subparsers(dest="analysis", metavar="NAME", required=True)
    for name in ANALYSES:
        analysis = get_analysis(name)
        parser = names.add_parser(name, help=analysis.help, description=analysis.help + ".")
        add_common_arguments(parser, analysis)
        analysis.add_arguments(parser)
        parser.set_defaults(run=functools.partial(run_analysis, analysis=analysis))
