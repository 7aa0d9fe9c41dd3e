"""Training of a classifier with the best epoch chosen on validation rows, resumable bit for bit.

A checkpoint holds everything that the next epoch depends on: parameters, the best ones so far,
Adam's moments, the random state and the history. Batches of an epoch are drawn from seed and
epoch alone. A run that was killed and resumed therefore has the loss curve of one that was not.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.classifier import MultimodalClassifier
from ..module import DEQFusion
from ..solution import Equilibrium
from .runs import (
    CheckpointError,
    RunDirectory,
    check_tensors,
    describe,
    read_tensors,
    write_tensors,
)

logger = logging.getLogger(__name__)

HISTORY_COLUMNS = (
    "epoch",
    "train_loss",
    "validation_loss",
    "validation_accuracy",
    "steps",
    "converged",
    "step_seconds",
)
_EPOCH, _VALIDATION_LOSS = HISTORY_COLUMNS.index("epoch"), HISTORY_COLUMNS.index("validation_loss")
# NaN for a fusion without a solve.
_OF_SOLVES = [HISTORY_COLUMNS.index(name) for name in ("steps", "converged")]


class TrainingDivergedError(RuntimeError):
    """The loss became NaN or inf; the message says in which epoch."""


class Rows(NamedTuple):
    """Rows to train or test on: modalities, each float (rows, width_i), and labels (rows,)."""

    inputs: tuple[Tensor, ...]
    labels: Tensor


@dataclass(frozen=True)
class FitOptions:
    """How to train.

    Attributes:
        epochs: passes over the training rows, >= 1.
        learning_rate, weight_decay: of Adam (decoupled decay).
        batch_size: rows per step; None: all of them.
        seed: of dropout and batches; initial parameters are the caller's.
        jacobian_weight: of the Jacobian penalty in the loss; only for an equilibrium fusion.
        clip_norm: largest norm of a step's gradient. Where a row's Jacobian comes near to 1, its
            implicit gradient grows without bound and would drown the other rows'.
    """

    epochs: int
    learning_rate: float
    weight_decay: float = 0.0
    batch_size: int | None = None
    seed: int = 0
    jacobian_weight: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs: got {self.epochs}, expected a number >= 1")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: got {self.learning_rate}, expected a number > 0")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected a number >= 1 or None")
        if not self.clip_norm > 0.0:
            raise ValueError(f"clip_norm: got {self.clip_norm}, expected a number > 0")
        for name in ("weight_decay", "jacobian_weight"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}: got {value}, expected a number >= 0")


@dataclass(frozen=True)
class FitResult:
    """What a training run gave.

    Attributes:
        history: one row per epoch, columns `HISTORY_COLUMNS`; `steps` and `converged` (mean steps
            and share of converged rows over all blocks in training) are NaN without a solve.
        best_epoch: the epoch (from 1) with the lowest validation loss, whose parameters the model
            has now.
    """

    history: np.ndarray
    best_epoch: int

    @property
    def validation_loss(self) -> float:
        """Of the best epoch."""
        return float(self.history[:, _VALIDATION_LOSS].min())


def fit(
    model: MultimodalClassifier,
    train: Rows,
    validation: Rows,
    options: FitOptions,
    *,
    run: RunDirectory | None = None,
    progress: str | None = None,
) -> FitResult:
    """Train and leave the model with the parameters of the best epoch.

    Args:
        model: trained in place.
        train: rows to learn from.
        validation: rows that choose the epoch; no others are seen.
        options: how to train.
        run: where to checkpoint after each epoch and to log; a checkpoint there is continued.
        progress: label of a progress bar; None for none.

    Returns:
        FitResult.

    Raises:
        CheckpointError: the checkpoint in `run` is damaged or of another model.
        TrainingDivergedError: the loss became NaN or inf.
        ValueError: a Jacobian penalty for a fusion that has no Jacobian.
    """
    check_penalty(model, options.jacobian_weight)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        state = _State(model, options)
        if run is not None:
            if run.checkpoint.exists():
                state.restore(run)
            run.write_config()
            run.write_log(HISTORY_COLUMNS, state.history)
        epochs = range(len(state.history), options.epochs)
        bar = tqdm(
            epochs,
            desc=progress,
            initial=len(state.history),
            total=options.epochs,
            disable=progress is None,
            unit="epoch",
            dynamic_ncols=True,
            # A log file needs fewer lines than a terminal.
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )
        with bar:
            for epoch in bar:
                row = state.epoch(epoch, train, validation)
                bar.set_postfix(_postfix(row))
                if run is not None:
                    write_tensors(run.checkpoint, "checkpoint", state.tensors())
                    run.append_log(row)
        best_epoch = state.finish()
    return FitResult(np.array(state.history), best_epoch)


def check_penalty(model: MultimodalClassifier, weight: float) -> None:
    """Refuse a Jacobian penalty for a fusion that has no Jacobian.

    Raises:
        ValueError: `weight` is not 0 and the fusion is not a `DEQFusion`.
    """
    if weight and not isinstance(model.fusion, DEQFusion):
        raise ValueError(
            f"jacobian_weight: got {weight} with {type(model.fusion).__name__}, "
            "expected 0 for a fusion without equilibrium"
        )


class _State:
    """Everything that the next epoch depends on."""

    def __init__(self, model: MultimodalClassifier, options: FitOptions) -> None:
        self.model = model
        self.options = options
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.history: list[list[float]] = []
        self.best = _copy(model)

    def epoch(self, epoch: int, train: Rows, validation: Rows) -> list[float]:
        """Train one epoch, judge it on the validation rows, and return its row of the history."""
        self.model.train()
        batches = _batches(len(train.labels), epoch, self.options)
        losses, solves = [], []
        started = time.perf_counter()
        for rows in batches:
            batch = Rows(tuple(view[rows] for view in train.inputs), train.labels[rows])
            loss, solve = self._step(batch)
            losses.append(loss * len(rows))
            solves.append(solve)
        seconds = (time.perf_counter() - started) / len(batches)
        train_loss = sum(losses) / len(train.labels)
        validation_loss, accuracy = _judge(self.model, validation)
        if not math.isfinite(train_loss + validation_loss):
            raise TrainingDivergedError(
                f"epoch {epoch + 1}: training and validation loss are {train_loss} and "
                f"{validation_loss}, expected finite ones; try a learning rate below "
                f"{self.options.learning_rate:g}"
            )
        steps, converged = np.mean(solves, axis=0)
        row = [epoch + 1, train_loss, validation_loss, accuracy, steps, converged, seconds]
        if not self.history or validation_loss < self._best_row()[_VALIDATION_LOSS]:
            self.best = _copy(self.model)
        self.history.append([float(value) for value in row])
        return self.history[-1]

    def _step(self, batch: Rows) -> tuple[float, tuple[float, float]]:
        output = self.model(batch.inputs)
        loss = nn.functional.cross_entropy(output.logits, batch.labels)
        objective = loss
        if self.options.jacobian_weight:
            penalty = cast(DEQFusion, self.model.fusion).jacobian_penalty(
                cast(Equilibrium, output.equilibrium), output.features
            )
            objective = loss + self.options.jacobian_weight * penalty
        self.optimizer.zero_grad()
        objective.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.optimizer.step()
        return loss.item(), _solve_summary(output.equilibrium)

    def _best_row(self) -> list[float]:
        return min(self.history, key=lambda row: row[_VALIDATION_LOSS])

    def finish(self) -> int:
        """Give the model its best parameters and return their epoch."""
        self.model.load_state_dict(self.best)
        return int(self._best_row()[_EPOCH])

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state as named tensors."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in moments.items()}
        tensors["random"] = torch.get_rng_state()
        tensors["history"] = torch.tensor(self.history, dtype=torch.float64)
        return tensors

    def restore(self, run: RunDirectory) -> None:
        """Take the state from a checkpoint; nothing is changed where it does not fit."""
        path = run.checkpoint
        tensors = read_tensors(path, "checkpoint")
        history = tensors.pop("history", torch.empty(0, dtype=torch.float64))
        width = len(HISTORY_COLUMNS)
        if (
            history.dtype != torch.float64
            or history.ndim != 2
            or history.shape[1] != width
            or not len(history)
        ):
            raise CheckpointError(
                f"{path}: tensor 'history' is {describe(history)}, "
                f"expected float64 (epochs, {width})"
            )
        if len(history) > self.options.epochs:
            raise CheckpointError(
                f"{path}: epochs: got {self.options.epochs}, expected at least the {len(history)} "
                "that the run has"
            )
        check_tensors(path, tensors, self._expected())
        _check_values(path, tensors, history)
        self.history = history.tolist()
        self.model.load_state_dict(_under("model/", tensors))
        self.best = _under("best/", tensors)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimizer/", tensors).items():
            index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        torch.set_rng_state(tensors["random"])
        logger.info("continuing %s after epoch %d", run.path, len(self.history))

    def _expected(self) -> dict[str, Tensor]:
        parameters = self.model.state_dict()
        expected = {f"model/{name}": value for name, value in parameters.items()}
        expected |= {f"best/{name}": value for name, value in parameters.items()}
        for index, parameter in enumerate(self.model.parameters()):
            expected[f"optimizer/{index}/step"] = torch.zeros(())
            expected[f"optimizer/{index}/exp_avg"] = parameter
            expected[f"optimizer/{index}/exp_avg_sq"] = parameter
        expected["random"] = torch.get_rng_state()
        return expected


def _check_values(path: Path, tensors: Mapping[str, Tensor], history: Tensor) -> None:
    """Refuse numbers that no training leaves behind; names, shapes and dtypes are right."""
    usable = history.isfinite()
    usable[:, _OF_SOLVES] |= history[:, _OF_SOLVES].isnan()
    if not usable.all():
        row, column = usable.logical_not().nonzero()[0].tolist()
        raise CheckpointError(
            f"{path}: tensor 'history' has {HISTORY_COLUMNS[column]} = "
            f"{history[row, column].item()} in row {row + 1}, expected a finite number"
        )
    epochs = history[:, _EPOCH].tolist()
    if epochs != list(range(1, len(epochs) + 1)):
        raise CheckpointError(
            f"{path}: tensor 'history' has epochs {', '.join(map(str, epochs[:5]))}, "
            f"expected 1 to {len(epochs)}"
        )
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            minimum = 1 if name.endswith("/step") else 0
            if not name.endswith("/exp_avg") and (value < minimum).any():
                raise CheckpointError(
                    f"{path}: tensor {name!r} has {value.min().item():g}, "
                    f"expected numbers >= {minimum}"
                )
    try:
        torch.Generator().set_state(tensors["random"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: tensor 'random' is no random state ({str(error).splitlines()[0]}), "
            "expected one of torch's"
        ) from error


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _batches(rows: int, epoch: int, options: FitOptions) -> list[Tensor]:
    if options.batch_size is None or options.batch_size >= rows:
        return [torch.arange(rows)]
    # SeedSequence mixes the two numbers, so that neighbouring seeds share no order.
    mixed = int(np.random.SeedSequence([options.seed, epoch]).generate_state(1)[0])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(mixed))
    return list(order.split(options.batch_size))


@torch.no_grad()
def _judge(model: MultimodalClassifier, rows: Rows) -> tuple[float, float]:
    """Loss and accuracy without dropout."""
    model.eval()
    logits = model(rows.inputs).logits
    loss = nn.functional.cross_entropy(logits, rows.labels).item()
    return loss, (logits.argmax(dim=-1) == rows.labels).double().mean().item()


def _solve_summary(equilibrium: Equilibrium | None) -> tuple[float, float]:
    if equilibrium is None:
        return math.nan, math.nan
    stats = equilibrium.stats
    return stats.steps.double().mean().item(), stats.converged.double().mean().item()


def _postfix(row: list[float]) -> dict[str, str]:
    named = dict(zip(HISTORY_COLUMNS, row, strict=True))
    postfix = {
        "loss": f"{named['train_loss']:.3f}",
        "val_acc": f"{named['validation_accuracy']:.3f}",
    }
    if not math.isnan(named["steps"]):
        postfix |= {"steps": f"{named['steps']:.1f}", "converged": f"{named['converged']:.0%}"}
    return postfix
