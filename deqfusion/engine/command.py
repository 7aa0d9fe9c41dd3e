"""`deqfusion train TASK` and `deqfusion evaluate`, for any recipe."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..ops import checked_implementation
from .config import complete, fault, fields_of, read_run, read_toml, without_effect
from .distributed import LostProcessError, device_of, processes
from .kinds import Switch, choices
from .logs import writes_events
from .options import ENGINE_FIELDS
from .recipe import Config, OptionError, Recipe
from .run import (
    Loaded,
    evaluate_loaded,
    first_model,
    json_values,
    load,
    open_run,
    train_loaded,
)
from .runs import CheckpointError, RunDirectory, read_config
from .training import TrainingDivergedError


def add_train_arguments(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """Add the options of `deqfusion train TASK`."""
    files = parser.add_argument_group("files")
    files.add_argument("--data-dir", required=True, type=Path, help="folder of the data")
    files.add_argument("--out", required=True, type=Path, help="folder of the run; must be empty")
    files.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out, with its options (--epochs may change, but for schedule "
        "cosine); start it where there is none",
    )
    files.add_argument(
        "--config", type=Path, help="TOML file of options, `name = value`; arguments go before it"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    groups: dict[str, Any] = {"files": files}
    for name, field in fields_of(recipe).items():
        if field.group not in groups:
            groups[field.group] = parser.add_argument_group(field.group)
        options: dict[str, Any] = {"type": field.kind}
        if isinstance(field.kind, Switch):
            options = {"action": argparse.BooleanOptionalAction}
        else:
            options["metavar"] = name.rpartition("_")[2].upper()
        texts = choices(field.kind)
        one_of = f"; {texts}" if texts else ""
        text = f"{field.help}{one_of} (default {_as_argument(name, field.default)})"
        groups[field.group].add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **options,
        )


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deqfusion evaluate`."""
    parser.add_argument("--checkpoint", required=True, type=Path, help="folder of a finished run")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder of the data")
    parser.add_argument(
        "--device", type=ENGINE_FIELDS["device"].kind, default="auto", help="default auto"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run_train(args: argparse.Namespace, recipe: Recipe) -> int:
    """Train, evaluate on the test samples, and write everything to `--out`.

    Returns:
        0, or 1 where the loss became NaN or inf or another process of the run ended.

    Raises:
        DataError: the data folder is not what it should be.
        CheckpointError: `--out` holds a run that cannot be, or should not be, continued.
        ValueError: options that do not fit together, or a `DEQFUSION_BACKEND` that cannot run.
    """
    config, place, asked = _options(args, recipe)
    _refuse(place, fault(recipe, config, facts=False))
    _refuse(place, without_effect(recipe, config, asked))
    first = True
    try:
        with processes(config) as process:
            first = process.first
            checked_implementation(process.device)
            # All of this before anything is written.
            try:
                loaded = load(recipe, args.data_dir, config)
                for part, _ in loaded.parts:
                    _refuse(place, fault(recipe, part))
                _check_memory(recipe, loaded.config, place("dim"))
                model = first_model(recipe, loaded, args.out, process)
            except OptionError as error:
                raise ValueError(f"{place(error.name)}: {error.message}") from error
            run = process.of_first(lambda: _open(args, recipe, loaded))
            if first and run.started and not args.quiet and not writes_events():
                print(
                    "deqfusion: no TensorBoard events, as the package tensorboard is missing "
                    "(pip install 'deqfusion[tensorboard]'); curves are in log.csv and curves.png",
                    file=sys.stderr,
                )
            metrics = train_loaded(recipe, loaded, model, run, process, progress=not args.quiet)
            if process.first:
                _print_metrics(loaded, metrics, run)
    except TrainingDivergedError as error:
        if first:
            print(f"deqfusion: {error}", file=sys.stderr)
        return 1
    except LostProcessError as error:
        print(f"deqfusion: {error}; --resume continues {args.out}", file=sys.stderr)
        return 1
    return 0


def run_evaluate(args: argparse.Namespace, get_recipe: Callable[[str], Recipe]) -> int:
    """Print the metrics of a finished run on the test samples of a folder, as text or as JSON.

    Args:
        args: of `add_evaluate_arguments`.
        get_recipe: gives a task's recipe, or raises ValueError.

    Returns:
        0.

    Raises:
        CheckpointError: the run is missing, unfinished, damaged, or somebody else's.
        DataError: the data folder is not what it should be, or does not fit the model.
        ValueError: a `DEQFUSION_BACKEND` that cannot run.
    """
    checked_implementation(device_of({"device": args.device}))
    run = RunDirectory(args.checkpoint)
    stored = read_config(run.path)
    if "task" not in stored:
        raise CheckpointError(f"{run.config}: task: is missing, expected a task's name")
    try:
        recipe = get_recipe(str(stored["task"]))
    except ValueError as error:
        raise CheckpointError(f"{run.config}: {error}") from error
    config = read_run(run.path, recipe)
    repeats = recipe.repeats(config)
    if repeats and "split" not in config:
        raise CheckpointError(
            f"{run.config}: a run of {repeats} splits, expected one of its split_... folders"
        )
    splits, facts = recipe.load(args.data_dir, config)
    for name, value in facts.items():
        if name != "data_sha256" and config[name] != value:
            raise CheckpointError(
                f"{run.config}: the run has {name} = {config[name]}, expected {value} as in "
                f"{args.data_dir}"
            )
    single = {**config, "device": args.device, "strategy": "single"}
    with processes(single) as process:
        metrics = evaluate_loaded(recipe, run, single, splits, process)
    rows = "test rows"
    if "split" in config and facts["data_sha256"] == config["data_sha256"]:
        rows = f"test rows of split {config['split']}"
    if args.json:
        print(json.dumps({"rows": rows, **json_values(metrics)}, indent=2))
    else:
        print(_table(rows, metrics))
    return 0


def _options(
    args: argparse.Namespace, recipe: Recipe
) -> tuple[dict[str, Any], Callable[[str], str], set[str]]:
    """Options from arguments, file, stored run and defaults, where each came from, and those of
    which somebody wants something: all arguments, and in a file, which may list everything, those
    that are not as they would be anyway."""
    fields = fields_of(recipe)
    stored: dict[str, Any] = {}
    # A file in place of the folder is refused here, before its lack of options is made up for.
    if args.resume and (args.out.is_file() or RunDirectory(args.out).config.exists()):
        stored = {k: v for k, v in read_run(args.out, recipe).items() if k in fields}
    given = read_toml(args.config, recipe) if args.config is not None else {}
    in_file = set(given)
    given |= {name: value for name, value in vars(args).items() if name in fields}
    if given.get("fusion", stored.get("fusion")) != stored.get("fusion"):
        # That the run has another fusion is the error to report, not its penalty.
        stored.pop("jacobian_weight", None)

    def place(key: str) -> str:
        if key not in fields or (key in stored and key not in given):
            return f"{args.out / 'config.json'}: {key}" if stored else key
        if key in in_file and key not in vars(args):
            return f"{args.config}: {key}"
        return f"--{key.replace('_', '-')}"

    config = complete(recipe, {**stored, **given})
    usual = fields_of(recipe, config)
    asked = {n for n in given if n in vars(args) or given[n] != usual[n].default}
    return config, place, asked


def _refuse(place: Callable[[str], str], found: tuple[str, str] | None) -> None:
    if found is not None:
        raise ValueError(f"{place(found[0])}: {found[1]}")


def _check_memory(recipe: Recipe, config: Config, place: str) -> None:
    with torch.device("meta"):
        model = recipe.build(config)
    # Parameters, the best ones, gradients and two moments; reserved, not written to.
    numbers = 5 * sum(parameter.numel() for parameter in model.parameters())
    try:
        torch.empty(numbers, dtype=torch.float32)
    except RuntimeError as error:
        raise ValueError(
            f"{place}: got {config['dim']}, which takes {4 * numbers / 2**30:.1f} GiB in "
            "training, expected a model that fits into memory"
        ) from error


def _open(args: argparse.Namespace, recipe: Recipe, loaded: Loaded) -> RunDirectory:
    run = open_run(recipe, args.out, loaded.config, resume=args.resume)
    if args.resume and run.started:
        # A mistyped folder looks like this too, so it is said even where nothing else is.
        message = f"deqfusion: nothing to resume in {args.out}: starting a new run"
        print(message, file=sys.stderr)
    return run


def _print_metrics(loaded: Loaded, metrics: Mapping[str, Any], run: RunDirectory) -> None:
    if not loaded.repeated:
        shown = {k: v for k, v in metrics.items() if not isinstance(v, (dict, int))}
        shown.pop("training_seconds")
        print(_table("test", {k: math.nan if v is None else v for k, v in shown.items()}))
    else:
        count = len(loaded.parts)
        train, validation, test = loaded.parts[0][1]
        tested = f", {len(test)} test" if test is not None else ""
        numbers = f"{len(train)} training, {len(validation)} validation{tested} samples"
        print(f"{count} split{'s' if count > 1 else ''}: {numbers}")
        for name, values in metrics.items():
            if values["mean"] is None:
                continue
            error = values["standard_error"]
            spread = "" if error is None else f", standard error {error:.3f}"
            print(f"{name:>16}  {values['mean']:.3f}{spread}")
    print(f"run: {run.path}")


def _table(name: str, metrics: Mapping[str, float]) -> str:
    cells = "  ".join(f"{metric} {value:.3f}" for metric, value in metrics.items())
    return f"{name}: {cells}"


def _as_argument(name: str, default: Any) -> str:
    if name == "jacobian_weight":
        return f"{default:g} for deq, else 0" if default else "0"
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return ",".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)
