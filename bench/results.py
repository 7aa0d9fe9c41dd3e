"""Result files: written whole, and read only if they are what they should be."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 2
REQUIRED = {"suite": dict, "environment": dict, "device": str, "reference": str, "cases": list}
CASE = {"shape": list, "threads": int, "mode": str, "contenders": dict}


def write_json(result: dict[str, Any], path: Path) -> None:
    """Writes the result so that the file is either the old or the new one, whole."""
    write_text(json.dumps(result, indent=1) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Writes a text so that the file is either the old or the new one, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        # mkstemp's files are private; a report is for everyone who may read the folder.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ValueError: if it is no JSON, not a result of this benchmark, or of another format: names
            the file, what was found and what was expected.
        OSError: if it cannot be read, naming the file and what was expected.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise type(error)(
            f"{path}: cannot be read ({error.strerror}), expected a JSON file of deqfusion bench"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got no JSON ({error}), expected a result of bench") from error
    if not isinstance(result, dict) or "format" not in result:
        raise ValueError(f"{path}: got no format, expected a result of deqfusion bench")
    if result["format"] != FORMAT:
        raise ValueError(
            f"{path}: got format {result['format']!r}, expected {FORMAT} (not of deqfusion bench, "
            "or of another version)"
        )
    _has(result, REQUIRED, str(path))
    for index, case in enumerate(result["cases"]):
        where = f"{path}: cases[{index}]"
        if not isinstance(case, dict):
            raise ValueError(f"{where}: got {type(case).__name__}, expected an object")
        _has(case, CASE, where)
        if len(case["shape"]) != 3 or not all(type(size) is int for size in case["shape"]):
            raise ValueError(f"{where}: got shape {case['shape']}, expected three whole numbers")
        for name, entry in case["contenders"].items():
            _check_entry(entry, f"{where}: {name}")
    return result


def _has(value: dict[str, Any], fields: Mapping[str, type], where: str) -> None:
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(
                f"{where}: got {name} {str(value.get(name))[:40]!r}, expected a {kind.__name__}; "
                "this is no result of deqfusion bench"
            )


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("status"), str):
        raise ValueError(f"{where}: expected an object with a status")
    for summary in (entry.get("seconds"), entry.get("ratio")):
        if summary is None:
            continue
        numbers = (
            [summary.get(name) for name in ("p20", "median", "p80")]
            if isinstance(summary, dict)
            else []
        )
        if not numbers or not all(isinstance(n, int | float) and n > 0 for n in numbers):
            raise ValueError(f"{where}: got times {summary!r:.40}, expected p20, median and p80")


def machine(result: dict[str, Any]) -> dict[str, str]:
    """What makes figures comparable: processor, cores, and the GPU where one was measured."""
    env = result["environment"]
    gpu = env.get("gpu") or {}
    found = {"cpu": str(env.get("cpu")), "cores": str(env.get("cores"))}
    if result["device"] != "cpu":
        found["gpu"] = str(gpu.get("name"))
    return found


def describe(result: dict[str, Any]) -> str:
    """The machine and the software, in a line."""
    env = result["environment"]
    versions = env.get("versions") or {}
    where = ", ".join(
        f"{value} cores" if name == "cores" else value for name, value in machine(result).items()
    )
    return f"{where}, torch {versions.get('torch')}, {env.get('date')}"
