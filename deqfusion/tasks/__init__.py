"""Training tasks and the demonstration, and their commands.

A task's module has `RECIPES`, a dict from the task's name to its `Recipe`; one line in `TASKS`
makes it a command.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from typing import Any

from ..engine import Recipe, command

__all__ = ["TASKS", "get_recipe", "register_commands"]

#: Name of each task: the module of this package whose `RECIPES` has it.
TASKS: dict[str, str] = {
    "rosmap": "omics",
    "brca": "omics",
    "brca2012": "brca2012",
    "handwritten": "multiview",
    "cub": "multiview",
    "mmimdb": "mmimdb",
    "mosi": "mosi",
    "vqa": "vqa",
    "sunrgbd": "sunrgbd",
}


def get_recipe(name: str) -> Recipe:
    """Return the recipe of a task.

    Raises:
        ValueError: no task has this name.
    """
    if name not in TASKS:
        raise ValueError(f"task: got {name!r}, expected one of {', '.join(TASKS)}")
    return importlib.import_module(f"{__name__}.{TASKS[name]}").RECIPES[name]


def register_commands(subparsers: Any) -> None:
    """Add `demo`, `train TASK` and `evaluate` to the subparsers of an argument parser.

    Each sets the default `run`, a function of the parsed arguments that returns an exit code.
    """
    from . import demo

    parser = _add(subparsers, "demo", "train, compare and time fusions on handwritten digits")
    demo.add_arguments(parser)
    parser.set_defaults(run=demo.run)

    train = _add(subparsers, "train", "train a model on a task's data")
    tasks = train.add_subparsers(dest="task", metavar="TASK", required=True)
    for name in TASKS:
        recipe = get_recipe(name)
        parser = _add(tasks, name, recipe.help)
        command.add_train_arguments(parser, recipe)
        parser.set_defaults(run=functools.partial(command.run_train, recipe=recipe))

    parser = _add(subparsers, "evaluate", "evaluate a checkpoint on the test rows of a folder")
    command.add_evaluate_arguments(parser)
    parser.set_defaults(run=functools.partial(command.run_evaluate, get_recipe=get_recipe))


def _add(subparsers: Any, name: str, help_line: str) -> argparse.ArgumentParser:
    return subparsers.add_parser(name, help=help_line, description=help_line + ".")
