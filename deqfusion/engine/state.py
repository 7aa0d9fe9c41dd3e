"""Everything that the next epoch depends on, and its checkpoint."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import Process, like, load_whole, whole, whole_state
from .recipe import Config, Recipe
from .runs import CheckpointError, RunDirectory, check_tensors, describe, read_tensors

logger = logging.getLogger(__name__)

_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
# Of a parameter, as the optimisers name it; a count is a number, the others are like the parameter.
_MOMENTS = {
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "adam": ("step", "exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
}
_COUNT, _SECOND = "step", "exp_avg_sq"


class State:
    """Model, optimiser, loss scale, best parameters and history.

    Args:
        recipe: the task.
        model: as it is wrapped; this changes its parameters.
        config: complete.
        process: this process.

    Attributes:
        history: a row of numbers per epoch; columns: their names, () before the first epoch.
        best: whole parameters and buffers of the best epoch, on the CPU.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, config: Config, process: Process) -> None:
        self.recipe, self.model, self.config, self.process = recipe, model, config, process
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        groups = recipe.parameter_groups(model, config)
        options: dict[str, Any] = {"weight_decay": config["weight_decay"]}
        if config["optimizer"] == "sgd":
            options |= {"momentum": config["momentum"], "nesterov": config["momentum"] > 0}
        self.rates = [config["learning_rate"] * group.pop("rate", 1.0) for group in groups]
        self.optimizer = _OPTIMIZERS[config["optimizer"]](groups, lr=self.rates[0], **options)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=config["amp"] == "float16")
        self.columns: tuple[str, ...] = ()
        self.history: list[list[float]] = []
        self.best = whole_state(model)

    def step(self, objective: Tensor, factor: float) -> float:
        """Step down the gradient of an objective; return the learning rate."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        self.scaler.scale(objective).backward()
        if self.config["clip_norm"] is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config["clip_norm"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.rates[0] * factor

    def add(self, row: Mapping[str, float]) -> None:
        """Add an epoch to the history, and keep its parameters where it is the best."""
        self.columns = tuple(row)
        self.history.append([float(value) for value in row.values()])
        if self.best_epoch == len(self.history):
            self.best = whole_state(self.model)

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, that is best by the recipe's selection; the first of equals."""
        name, way = self.recipe.selection
        column = self.columns.index(f"validation_{name}")
        values = [row[column] if way == "min" else -row[column] for row in self.history]
        return 1 + values.index(min(values))

    def is_over(self) -> bool:
        """Whether early stopping ends the run here."""
        patience = self.config["early_stopping"]
        return bool(patience and self.history and len(self.history) - self.best_epoch >= patience)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state as named tensors on the CPU; to be called by every process."""
        tensors = {f"model/{name}": value for name, value in whole_state(self.model).items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for parameter, moments in self.optimizer.state.items():
            prefix = f"optimizer/{self.names[parameter]}"
            tensors |= {
                f"{prefix}/{key}": whole(value)
                for key, value in moments.items()
                if isinstance(value, Tensor)
            }
        scale = self.scaler.state_dict()
        if scale:
            values = [scale["scale"], float(scale["_growth_tracker"])]
            tensors["scale"] = torch.tensor(values, dtype=torch.float64)
        columns = json.dumps(self.columns).encode()
        tensors["columns"] = torch.frombuffer(bytearray(columns), dtype=torch.uint8)
        tensors["history"] = torch.tensor(self.history, dtype=torch.float64)
        return tensors

    def read(self, run: RunDirectory) -> dict[str, Tensor] | None:
        """Read the checkpoint of a run, and check that it fits; None where there is none."""
        if not run.checkpoint.exists():
            return None
        tensors = read_tensors(run.checkpoint, "checkpoint")
        self._check(run.checkpoint, dict(tensors))
        logger.info("continuing %s after epoch %d", run.path, len(tensors["history"]))
        return tensors

    def restore(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Take the state from what `read` returned; None: stay as it is."""
        if tensors is None:
            return
        self.columns = tuple(json.loads(bytes(tensors["columns"].tolist())))
        self.history = tensors["history"].tolist()
        load_whole(self.model, _under("model/", tensors))
        self.best = _under("best/", tensors)
        found = _by_parameter(tensors)
        for parameter, name in self.names.items():
            if name in found:
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == _COUNT else like(parameter, value)
                    for key, value in found[name].items()
                }
        if "scale" in tensors:
            scale, tracker = tensors["scale"].tolist()
            state = self.scaler.state_dict()
            self.scaler.load_state_dict({**state, "scale": scale, "_growth_tracker": int(tracker)})

    def _check(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Refuse what is not the state of this model after some epochs."""
        history = tensors.pop("history", torch.empty(0, dtype=torch.float64))
        columns = _columns(path, tensors.pop("columns", torch.empty(0, dtype=torch.uint8)))
        width = len(columns)
        if history.dtype != torch.float64 or history.shape[1:] != (width,) or not len(history):
            raise CheckpointError(
                f"{path}: tensor 'history' is {describe(history)}, "
                f"expected float64 (epochs, {width})"
            )
        if len(history) > self.config["epochs"]:
            raise CheckpointError(
                f"{path}: epochs: got {self.config['epochs']}, expected at least the "
                f"{len(history)} that the run has"
            )
        _check_history(path, columns, history, f"validation_{self.recipe.selection[0]}")
        check_tensors(path, tensors, self._expected(tensors))
        for name, value in tensors.items():
            kind = name.rpartition("/")[2] if name.startswith("optimizer/") else ""
            minimum = {_COUNT: 1, _SECOND: 0}.get(kind, -math.inf)
            if value.numel() and (value < minimum).any():
                raise CheckpointError(
                    f"{path}: tensor {name!r} has {value.min().item():g}, "
                    f"expected numbers >= {minimum}"
                )

    def _expected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        held = self.model.state_dict()
        expected = {f"model/{name}": value for name, value in held.items()}
        expected |= {f"best/{name}": value for name, value in held.items()}
        found = _by_parameter(tensors)
        for parameter, name in self.names.items():
            # A parameter that no loss depends on has no moments.
            for key in _MOMENTS[self.config["optimizer"]] if name in found else ():
                value = torch.zeros(()) if key == _COUNT else parameter
                expected[f"optimizer/{name}/{key}"] = value
        if self.scaler.is_enabled():
            expected["scale"] = torch.zeros(2, dtype=torch.float64)
        return expected


def _columns(path: Path, stored: Tensor) -> list[str]:
    try:
        columns = json.loads(bytes(stored.to(torch.uint8).flatten().tolist()))
    except ValueError:
        columns = None
    if not isinstance(columns, list) or columns[:1] != ["epoch"] or "train_loss" not in columns:
        raise CheckpointError(
            f"{path}: tensor 'columns' is {describe(stored)}, "
            "expected the names of the history's columns"
        )
    return columns


def _check_history(path: Path, columns: list[str], history: Tensor, selected: str) -> None:
    """Refuse numbers that no training leaves behind; shape and dtype are right."""
    for name in ("epoch", "train_loss", selected):
        if name not in columns:
            raise CheckpointError(f"{path}: tensor 'columns' lacks {name!r}, expected it")
        values = history[:, columns.index(name)]
        if not values.isfinite().all():
            row = int(values.isfinite().logical_not().nonzero()[0])
            raise CheckpointError(
                f"{path}: tensor 'history' has {name} = {values[row].item()} in row {row + 1}, "
                "expected a finite number"
            )
    epochs = history[:, columns.index("epoch")].tolist()
    if epochs != list(range(1, len(epochs) + 1)):
        raise CheckpointError(
            f"{path}: tensor 'history' has epochs {', '.join(map(str, epochs[:5]))}, "
            f"expected 1 to {len(epochs)}"
        )


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for path, value in _under("optimizer/", tensors).items():
        name, _, key = path.rpartition("/")
        found.setdefault(name, {})[key] = value
    return found


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
