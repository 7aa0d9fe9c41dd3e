"""Training tasks and the demonstration, and their commands."""

from __future__ import annotations

import argparse
from typing import Any

from . import demo, rosmap
from .classifier import ClassifierOutput, MultimodalClassifier
from .engine import FitOptions, FitResult, Rows, TrainingDivergedError, fit
from .runs import CheckpointError, RunDirectory

__all__ = [
    "CheckpointError",
    "ClassifierOutput",
    "FitOptions",
    "FitResult",
    "MultimodalClassifier",
    "Rows",
    "RunDirectory",
    "TrainingDivergedError",
    "fit",
    "register_commands",
]

_TASKS = {"rosmap": (rosmap, "omics data in MOGONET's layout: ROSMAP, BRCA and others")}


def register_commands(subparsers: Any) -> None:
    """Add `demo`, `train TASK` and `evaluate` to the subparsers of an argument parser.

    Each sets the default `run`, a function of the parsed arguments that returns an exit code.
    """
    parser = _add(subparsers, "demo", "train, compare and time fusions on handwritten digits")
    demo.add_arguments(parser)
    parser.set_defaults(run=demo.run)

    train = _add(subparsers, "train", "train a model on a task's data")
    tasks = train.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, (module, help_line) in _TASKS.items():
        parser = _add(tasks, name, help_line)
        module.add_arguments(parser)
        parser.set_defaults(run=module.run)

    parser = _add(subparsers, "evaluate", "evaluate a checkpoint on the test rows of a folder")
    rosmap.add_evaluate_arguments(parser)
    parser.set_defaults(run=rosmap.run_evaluate)


def _add(subparsers: Any, name: str, help_line: str) -> argparse.ArgumentParser:
    return subparsers.add_parser(name, help=help_line, description=help_line + ".")
