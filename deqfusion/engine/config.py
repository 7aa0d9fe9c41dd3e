"""A run's configuration: defaults, a stored run, a TOML file and arguments merged, and checked."""

from __future__ import annotations

import reprlib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .kinds import Kind, WholeNumber
from .options import ENGINE_FIELDS, idle_options
from .recipe import Config, Field, Recipe
from .runs import CheckpointError, read_config

_OF_FORMAT = ("format", "version")


def fields_of(recipe: Recipe, options: Config | None = None) -> dict[str, Field]:
    """Return the options of a task, its own and the engine's, with the task's defaults.

    Args:
        recipe: the task.
        options: what was asked for, where defaults depend on it.
    """
    defaults = recipe.defaults_for({} if options is None else options)
    fields = {**recipe.fields, **ENGINE_FIELDS}
    return {
        name: replace(field, default=defaults.get(name, field.default))
        for name, field in fields.items()
    }


def complete(recipe: Recipe, options: Mapping[str, Any]) -> dict[str, Any]:
    """Add defaults to options, without facts.

    Args:
        recipe: the task.
        options: values by name; unknown ones are kept, for `fault` to name.

    Returns:
        A configuration. The default penalty is 0 where the fusion has no equilibrium.
    """
    config = {name: field.default for name, field in fields_of(recipe, options).items()}
    weight = config["jacobian_weight"] or 0.0
    config |= {"task": recipe.name, **options}
    if options.get("jacobian_weight") is None:
        config["jacobian_weight"] = weight if config["fusion"] == "deq" else 0.0
    return config


def checked(recipe: Recipe, options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete options, for use as a library.

    Raises:
        ValueError: names an option that is unknown, of another kind, or does not fit the others.
    """
    config = complete(recipe, options)
    found = fault(recipe, config, facts=False)
    if found is not None:
        raise ValueError(f"{found[0]}: {found[1]}")
    return config


def fault(recipe: Recipe, config: Config, *, facts: bool = True) -> tuple[str, str] | None:
    """Return the first key that is not as it should be, and what was got and expected; or None.

    Args:
        recipe: the task.
        config: a complete configuration.
        facts: whether what `load` returns must be there.
    """
    kinds: dict[str, Kind] = {name: field.kind for name, field in fields_of(recipe).items()}
    known = ["task", *kinds, *recipe.facts]
    if "task" not in config:
        return "task", f"is missing, expected {recipe.name!r}"
    if config["task"] != recipe.name:
        return "task", f"got {reprlib.repr(config['task'])}, expected {recipe.name!r}"
    if facts:
        kinds |= recipe.facts
    for key, kind in kinds.items():
        if key not in config:
            return key, f"is missing, expected {kind.expected}"
        if not kind.accepts(config[key]):
            return key, f"got {reprlib.repr(config[key])}, expected {kind.expected}"
    repeats = recipe.repeats(config)
    kind = WholeNumber(0, repeats - 1)
    if "split" in config and not (repeats and kind.accepts(config["split"])):
        expected = kind.expected if repeats else "none, as the run has one model"
        return "split", f"got {reprlib.repr(config['split'])}, expected {expected}"
    unknown = sorted(config.keys() - {*known, "split"})
    if unknown:
        return reprlib.repr(unknown[0]), f"is unknown, expected only {', '.join(known)}"
    return _engine_fault(config) or recipe.fault(config)


def without_effect(
    recipe: Recipe, config: Config, asked: Collection[str]
) -> tuple[str, str] | None:
    """Return the first of some options that others leave without effect, and what was got; or None.

    Only what somebody asked for in this run: defaults, and what an analysis gives to all fusions
    alike, may well have none.

    Args:
        recipe: the task.
        config: complete, without fault.
        asked: names of the options.
    """
    idle = {**idle_options(config), **recipe.idle_options(config)}
    for name in fields_of(recipe):
        if name in idle and name in asked:
            cause, value = idle[name], config[idle[name]]
            why = f"without {cause}" if value is None else f"with {cause} {value!r}"
            return name, (
                f"got {config[name]!r} {why}, where it has no effect, expected it left out"
            )
    return None


def _engine_fault(config: Config) -> tuple[str, str] | None:
    fusion, dim = config["fusion"], config["dim"]
    if fusion.startswith(("deq", "weight_tied")) and dim % config["num_groups"]:
        return "dim", (
            f"got {dim}, expected a multiple of {config['num_groups']} for fusion "
            f"{fusion!r}, whose normalisations have {config['num_groups']} groups"
        )
    if fusion == "attention" and dim % config["heads"]:
        return "dim", f"got {dim}, expected a multiple of the {config['heads']} heads"
    if config["jacobian_weight"] and fusion != "deq":
        return "jacobian_weight", (
            f"got {config['jacobian_weight']:g} with fusion {fusion!r}, "
            "expected 0 for a fusion without equilibrium"
        )
    if config["amp"] == "float16" and config["strategy"] == "fsdp":
        return "amp", "got 'float16' with strategy 'fsdp', expected 'bfloat16' or 'off'"
    if config["tol_start"] is not None and config["tol_start"] < config["tol"]:
        return "tol_start", f"got {config['tol_start']:g}, expected at least tol {config['tol']:g}"
    return None


def read_run(folder: str | Path, recipe: Recipe) -> dict[str, Any]:
    """Read the `config.json` of a run of a task, with every value of its kind.

    Raises:
        CheckpointError: there is none, or it is not one of this project's, or of another task, or
            it names a value that no run has.
    """
    config = read_config(folder)
    for key in _OF_FORMAT:
        del config[key]
    found = fault(recipe, config)
    if found is not None:
        key, what = found
        raise CheckpointError(f"{Path(folder) / 'config.json'}: {key}: {what}")
    return config


def read_toml(path: Path, recipe: Recipe) -> dict[str, Any]:
    """Read options from a TOML file: `name = value`, in tables of any name or none.

    Raises:
        ValueError: no such file, no TOML, or an option that the task does not have; names the file.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}), expected TOML") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not TOML ({error})") from error
    options: dict[str, Any] = {}
    for key, value in content.items():
        for name, inner in value.items() if isinstance(value, dict) else [(key, value)]:
            if name in options:
                raise ValueError(f"{path}: {name}: is given twice, expected once")
            options[name] = inner
    if options.pop("task", recipe.name) != recipe.name:
        raise ValueError(f"{path}: task: is another one, expected {recipe.name!r}")
    fields = fields_of(recipe)
    for name, value in options.items():
        if name not in fields:
            raise ValueError(
                f"{path}: {reprlib.repr(name)}: is unknown, expected only {', '.join(fields)}"
            )
        # TOML has no null.
        options[name] = None if value == "none" else value
        kind = fields[name].kind
        if not kind.accepts(options[name]):
            raise ValueError(f"{path}: {name}: got {reprlib.repr(value)}, expected {kind.expected}")
    return options
