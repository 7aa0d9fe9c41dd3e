"""What an analysis is asked for: a task, its data and options, seeds, and where results go."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..engine import Recipe, checked
from ..engine.config import fields_of, read_toml
from ..tasks import get_recipe

# What every run of an analysis gets from the analysis itself.
_OWN = ("seed", "strategy")


class Part(NamedTuple):
    """The jobs of one of several processes: the share `number`, from 1, `of` so many."""

    number: int
    of: int


WHOLE = Part(1, 1)


@dataclass(frozen=True)
class Job:
    """One training run of an analysis, of each of the setting's candidates.

    Attributes:
        name: what is compared, such as a fusion.
        seed: of the run.
        options: what differs from the setting's options.
    """

    name: str
    seed: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """What an analysis is asked for.

    Attributes:
        recipe: the task.
        data: folder of the data.
        out: folder of the results.
        options: of the task and the engine, where they differ from the defaults.
        candidates: further options, of which the validation metric chooses one for every run.
        seeds: of the runs.
        part: which of the jobs are run here.
        progress: show a bar.
    """

    recipe: Recipe
    data: Path
    out: Path
    options: Mapping[str, Any]
    candidates: Sequence[Mapping[str, Any]] = ({},)
    seeds: Sequence[int] = range(5)
    part: Part = WHOLE
    progress: bool = False

    def configs(self, job: Job) -> list[dict[str, Any]]:
        """Complete configurations of a job, one for each candidate that makes a difference.

        Raises:
            ValueError: an option is unknown, of another kind, or does not fit the others.
        """
        configs: list[dict[str, Any]] = []
        for candidate in self.candidates:
            asked = {**self.options, **candidate, **job.options, "seed": job.seed}
            if asked.get("fusion", "deq") != "deq":
                # The penalty is of deq alone, whatever the others are compared with.
                asked["jacobian_weight"] = 0.0
            config = checked(self.recipe, asked)
            if config not in configs:
                configs.append(config)
        return configs


def setting_of(args: argparse.Namespace) -> Setting:
    """Make a setting of the arguments that all analyses have.

    Raises:
        ValueError: the task is unknown, or an option of it is, or is of another kind.
    """
    recipe = get_recipe(args.task)
    options = {} if args.config is None else read_toml(args.config, recipe)
    options |= dict(option_of(recipe, "--set", text) for text in args.set)
    candidates = itertools.product(*(_choices(recipe, texts) for texts in args.choose))
    for name in _OWN:
        if name in options:
            raise ValueError(f"{name}: got {options[name]!r}, expected only other options")
    return Setting(
        recipe,
        args.data_dir,
        args.out,
        options,
        [dict(pairs) for pairs in candidates],
        range(args.seeds),
        args.part,
        not args.quiet,
    )


def part_of(text: str) -> Part:
    """Parse an argument `K/OF`."""
    number, slash, count = text.partition("/")
    found = slash and all(t.isascii() and t.isdigit() and len(t) < 5 for t in (number, count))
    part = Part(int(number), int(count)) if found else Part(0, 0)
    if not 1 <= part.number <= part.of:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected K/OF with K from 1 to OF")
    return part


def _choices(recipe: Recipe, texts: Sequence[str]) -> list[tuple[str, Any]]:
    name, *values = texts
    if len(values) < 2:
        raise ValueError(f"--choose {name}: got {len(values)} values, expected at least 2")
    return [option_of(recipe, "--choose", f"{name}={value}") for value in values]


def option_of(recipe: Recipe, argument: str, text: str) -> tuple[str, Any]:
    """The option that `name=value` stands for.

    Raises:
        ValueError: the task has no such option, or it is of another kind; names `argument`.
    """
    name, equals, value = text.partition("=")
    name = name.replace("-", "_")
    fields = fields_of(recipe)
    if not equals or name not in fields:
        raise ValueError(
            f"{argument}: got {text!r}, expected NAME=VALUE with an option of "
            f"{recipe.name}: {', '.join(fields)}"
        )
    try:
        return name, fields[name].kind(value)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{argument} {name}: {error}") from error
