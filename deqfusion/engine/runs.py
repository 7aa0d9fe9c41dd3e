"""The folder of a training run: configuration, checkpoint, finished model, log.

    config.json              what was asked for last; written before anything else
    checkpoint.safetensors   parameters, best parameters, optimiser, history
    model.safetensors        the chosen epoch's parameters and buffers
    log.csv                  one row per epoch; tensorboard: the same as events

Only JSON and safetensors are read back, so that a checkpoint from elsewhere cannot execute code.
The header of a safetensors file holds a SHA-256 of its tensors, which is compared when they are
read: a flipped bit in a number is still a number. Files without one, written before there was one,
are read unchecked.
Every file is written beside its place and moved there in one step: a process killed at any moment
leaves the old file or the new one.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG_FORMAT = "deqfusion-run"
CONFIG_VERSION = 2
_TEMPORARY = ".tmp"
_DIGEST = "sha256:"


class CheckpointError(ValueError):
    """A run's folder or file is missing, damaged, or somebody else's.

    The message is one line with the file, what was found there and what was expected.
    """


class RunDirectory:
    """A run's folder; made by `open`.

    Attributes:
        path: the folder.
        config, checkpoint, model, log, metrics, curves: paths of its files; events: a folder.
        started: whether `open` started the run, rather than found it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.model = self.path / "model.safetensors"
        self.log = self.path / "log.csv"
        self.metrics = self.path / "metrics.json"
        self.curves = self.path / "curves.png"
        self.events = self.path / "tensorboard"
        self.started = False
        self._asked: dict[str, Any] = {}
        self._whole: RunDirectory | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        resume: bool,
        free: Collection[str] = ("epochs",),
        part_of: RunDirectory | None = None,
    ) -> RunDirectory:
        """Start a run in an empty folder, or go on with the one that is there.

        Args:
            path: the folder; made where it is missing.
            config: what the run is asked to do, JSON values. When resuming it must equal the
                stored one but for what is `free`; the stored one stays as it is until
                `write_config`.
            resume: continue the run in `path`, or start one where there is none yet.
            free: keys that a resumed run may have other values of.
            part_of: the run of several splits of which this one is a split.

        Raises:
            CheckpointError: the folder is a file, it holds something and `resume` is False, it
                holds something that is no run, or a run with another configuration.
        """
        run = cls(path)
        run._asked, run._whole = dict(config), part_of
        occupant = _occupant(run.path)
        if occupant == run.path and not resume:
            raise CheckpointError(f"{path}: is a file, expected a folder for the run")
        if occupant is not None and not resume:
            raise CheckpointError(
                f"{occupant}: already there, expected an empty --out folder "
                "(or --resume, to continue the run in it)"
            )
        if occupant is not None:
            _check_same(run.config, read_config(run.path), config, free)
            return run
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_config()
        run.started = True
        return run

    def write_config(self) -> None:
        """Store what the run is asked to do, and before it what the run that it is part of is.

        For a run that goes on: once its checkpoint is known to allow it.
        """
        if self._whole is not None:
            self._whole.write_config()
        asked = {"format": CONFIG_FORMAT, "version": CONFIG_VERSION, **self._asked}
        write_json(self.config, asked)

    def write_checkpoint(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint."""
        write_tensors(self.checkpoint, "checkpoint", tensors)

    def write_log(self, columns: Sequence[str], rows: Iterable[Sequence[float]]) -> None:
        """Write the whole CSV log, replacing what is there."""

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(_csv_row(row) for row in rows)

        write_atomically(self.log, write)

    def append_log(self, row: Sequence[float]) -> None:
        """Add one row to the CSV log."""
        with self.log.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(_csv_row(row))


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the `config.json` of a run.

    Raises:
        CheckpointError: there is none, or it is not one of this project's.
    """
    path = Path(folder) / "config.json"
    if path.parent.is_file():
        raise CheckpointError(
            f"{folder}: is a file, expected the folder of a run, such as {path.parent.parent}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file, expected the folder of a run") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error}), expected a run's") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: is JSON too deeply nested, expected a run's") from error
    if not isinstance(config, dict) or config.get("format") != CONFIG_FORMAT:
        raise CheckpointError(f'{path}: expected a JSON object with "format": "{CONFIG_FORMAT}"')
    if config.get("version") != CONFIG_VERSION:
        raise CheckpointError(
            f"{path}: got version {config.get('version')!r}, expected {CONFIG_VERSION}"
        )
    return config


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step."""
    temporary = path.with_name(path.name + _TEMPORARY)
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with a line end."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically as safetensors, marked as a `kind` ("checkpoint" or "model")."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    # One key: safetensors writes several in no fixed order, and equal models should be equal files.
    metadata = {"format": f"{_tensor_format(kind)} {_DIGEST}{_digest(whole)}"}
    write_atomically(path, lambda temporary: save_file(whole, temporary, metadata=metadata))


def read_tensors(path: Path, kind: str) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote.

    Raises:
        CheckpointError: the file is missing, cut short or altered, or not a `kind` of this project.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected the {kind} of a run")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be read ({reason}), expected a complete safetensors file"
        ) from error
    expected = _tensor_format(kind)
    got, _, stored = metadata.get("format", "").partition(" ")
    if got != expected:
        raise CheckpointError(f"{path}: got format {got!r} in its header, expected {expected!r}")
    digest = f"{_DIGEST}{_digest(tensors)}"
    # Without any: written before there were digests.
    if stored and stored != digest:
        raise CheckpointError(
            f"{path}: its tensors have {digest}, expected {stored} as in its header: "
            "the file was altered or damaged"
        )
    return tensors


def check_tensors(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Compare names, shapes and dtypes read from `path` with what is to be filled from them.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected or of another shape.
    """
    for name in expected:
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name!r} is missing, expected by this model")
    for name, tensor in tensors.items():
        if name not in expected:
            raise CheckpointError(f"{path}: tensor {name!r} is unknown to this model")
        got, want = describe(tensor), describe(expected[name])
        if got != want:
            raise CheckpointError(f"{path}: tensor {name!r} is {got}, expected {want}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {name!r} has NaN or inf, expected numbers")


def _tensor_format(kind: str) -> str:
    return f"deqfusion-{kind}-{CONFIG_VERSION}"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, whatever the order of the tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {describe(tensors[name])}\n".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(tensor: Tensor) -> str:
    """Return a tensor's dtype and shape, for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _csv_row(row: Sequence[float]) -> list[str]:
    # repr round-trips a float: equal curves are equal files.
    return [repr(value) for value in row]


def _occupant(folder: Path) -> Path | None:
    """What makes the folder unusable for a new run; leftovers of a killed write do not."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return folder
    entries = sorted(entry for entry in folder.iterdir() if entry.suffix != _TEMPORARY)
    return next(iter(entries), None)


def _check_same(
    path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any], free: Collection[str]
) -> None:
    # Through JSON, since a tuple comes back as a list.
    asked = json.loads(json.dumps(dict(asked)))
    for key in sorted((stored.keys() | asked.keys()) - {"format", "version", *free}):
        if stored.get(key) != asked.get(key):
            raise CheckpointError(
                f"{path}: the run has {key} = {stored.get(key)!r}, expected {asked.get(key)!r} "
                "to resume it"
            )
