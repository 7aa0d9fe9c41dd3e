"""Training with the best epoch chosen on validation samples, resumable bit for bit.

A checkpoint holds everything that the next epoch depends on: parameters, the best ones so far, the
optimiser's moments, the loss scale and the history. Whatever is random in an epoch, order, dropout
and augmentation, is drawn from seed and epoch alone, and so is the learning rate. A run that was
killed and resumed therefore has the curve of one that was not, on however many processes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from .distributed import Process, device_of, load_whole
from .logs import Log
from .recipe import Config, Recipe, Samples, Splits
from .runs import RunDirectory
from .schedules import rate_factor
from .seeds import mixed
from .state import State

_AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: Means over an epoch's samples; steps and share of converged rows are NaN without a solve.
_MEANS = ("train_loss", "penalty", "steps", "converged")
# Where a stream of random numbers begins: of parameters, order, batches and dropout.
_ORDER, _BATCHES, _MODEL = range(3)


class TrainingDivergedError(RuntimeError):
    """The loss became NaN or inf; the message says in which epoch."""


@dataclass(frozen=True)
class FitResult:
    """What a training run gave.

    Attributes:
        columns: names of the history's columns: `epoch`, `train_loss`, `penalty`, `steps` and
            `converged` (means over samples; NaN without a solve), `validation_NAME` of each metric,
            `learning_rate` at the epoch's end, `step_seconds` (the mean) and `seconds` (in
            training).
        history: one row per epoch.
        best_epoch: the epoch (from 1) that is best by the recipe's `selection`, whose parameters
            the model has now.
    """

    columns: tuple[str, ...]
    history: np.ndarray
    best_epoch: int

    def column(self, name: str) -> np.ndarray:
        """Return one column, by epoch."""
        return self.history[:, self.columns.index(name)]

    @property
    def validation(self) -> dict[str, float]:
        """Validation metrics of the best epoch."""
        return {
            name.removeprefix("validation_"): float(value)
            for name, value in zip(self.columns, self.history[self.best_epoch - 1], strict=True)
            if name.startswith("validation_")
        }


class Trainer:
    """A model, how it is trained, and the processes that train it.

    Args:
        recipe: the task.
        model: trained in place, on `process.device`; its initial parameters are the caller's.
        config: complete, as `config.checked` returns it.
        process: this process; None: the only one, on the device that `config` names.

    Raises:
        ValueError: a `strategy` of several processes without `process`.
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, config: Config, process: Process | None = None
    ) -> None:
        self.recipe, self.model, self.config = recipe, model, config
        if process is None and config["strategy"] != "single":
            raise ValueError(
                f"strategy: got {config['strategy']!r} without a process, expected 'single', or "
                "training by `train` under torchrun"
            )
        self.process = Process(device_of(config)) if process is None else process
        model.to(self.process.device)
        step = _Step(recipe, model, config)
        if config["compile"]:
            model.compile()
        self._step = self.process.wrap(step, recipe, model)

    def fit(
        self,
        splits: Splits,
        *,
        run: RunDirectory | None = None,
        progress: str | None = None,
    ) -> FitResult:
        """Train, and leave the model with the parameters of the best epoch.

        Args:
            splits: of which training and validation samples are seen, no others.
            run: where to checkpoint after each epoch and to log; a checkpoint there is continued.
            progress: label of a progress bar; None for none.

        Returns:
            FitResult.

        Raises:
            CheckpointError: the checkpoint in `run` is damaged or of another model.
            TrainingDivergedError: the loss became NaN or inf.
            LostProcessError: another process of the run ended.
        """
        config, process = self.config, self.process
        state = State(self.recipe, self.model, config, process)
        first = process.first
        with ExitStack() as stack:
            stack.enter_context(_own_random_state(process.device))
            stack.enter_context(_determinism(config["deterministic"]))
            if run is not None:
                state.restore(process.of_first(lambda: state.read(run)))
                if first:
                    run.write_config()
            log = Log(self.recipe.selection[0], run if first else None, progress if first else None)
            stack.enter_context(log.opened(state.columns, state.history, config["epochs"]))
            for epoch in range(len(state.history), config["epochs"]):
                if state.is_over():
                    break
                row = self._epoch(epoch, splits, state, log)
                state.add(row)
                if run is not None and first:
                    run.write_checkpoint(state.tensors())
                elif run is not None:
                    state.tensors()
                log.add(state.columns, state.history[-1])
            load_whole(self.model, state.best)
        return FitResult(state.columns, np.array(state.history), state.best_epoch)

    def evaluate(self, samples: Samples) -> dict[str, float]:
        """Return the recipe's metrics of a split, by the model as it is, in every process."""
        size = self.config["batch_size"] or max(len(samples), 1)
        batches = list(torch.arange(len(samples)).split(size))
        rank, world = self.process.rank, self.process.world
        # As many calls in every process: with "fsdp" each call is one of all of them.
        rounds = math.ceil(len(batches) / world)
        own = [batches[min(rank + i * world, len(batches) - 1)] for i in range(rounds)]
        self._step.eval()
        with torch.no_grad(), _determinism(self.config["deterministic"]):
            outputs = [
                pytree.tree_map_only(Tensor, lambda tensor: tensor.cpu(), self._step(batch))
                for batch in self._loaded(samples, own, 0)
            ]
        gathered = self.process.gather(outputs)
        ordered = [gathered[i % world][i // world] for i in range(len(batches))]
        return self.recipe.metrics(ordered)

    def _epoch(self, epoch: int, splits: Splits, state: State, log: Log) -> Mapping[str, float]:
        """Train one epoch, judge it on the validation samples, and return its row."""
        config, process = self.config, self.process
        batches = _batches(len(splits.train), epoch, config)
        shares = [process.share(rows, self.recipe.least_samples) for rows in batches]
        torch.manual_seed(mixed(config["seed"], epoch, process.rank, _MODEL))
        self._step.train()
        sums = torch.zeros(len(_MEANS), dtype=torch.float64, device=process.device)
        started = time.perf_counter()
        loaded = self._loaded(splits.train, [rows for rows, _ in shares], epoch)
        for number, (batch, (_, weight)) in enumerate(
            zip(log.batches(loaded, len(batches)), shares, strict=True)
        ):
            factor = rate_factor(epoch, number, len(batches), config)
            objective, means = self._step(batch)
            rate = state.step(objective * weight, factor)
            sums += means * (weight * len(batches[number]) / process.world)
        means = (process.total(sums) / len(splits.train)).tolist()
        seconds = time.perf_counter() - started
        process.share_buffers(self.model)
        row = {"epoch": epoch + 1, **dict(zip(_MEANS, means, strict=True))}
        self._refuse_divergence(epoch, "training loss", row["train_loss"])
        metrics = self.evaluate(splits.validation)
        selection = self.recipe.selection[0]
        self._refuse_divergence(epoch, f"validation {selection}", metrics[selection])
        row |= {f"validation_{name}": value for name, value in metrics.items()}
        row |= {"learning_rate": rate, "step_seconds": seconds / len(batches), "seconds": seconds}
        return row

    def _refuse_divergence(self, epoch: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"epoch {epoch + 1}: {name} is {value}, expected a finite number; try a learning "
                f"rate below {self.config['learning_rate']:g}"
            )

    def _loaded(self, samples: Samples, batches: Sequence[Tensor], epoch: int) -> Iterator[Any]:
        """Batches on the device, each drawn with a random state of its own."""
        seeds = [
            mixed(self.config["seed"], epoch, self.process.rank, _BATCHES, number)
            for number in range(len(batches))
        ]
        data = _Batches(samples, batches, seeds)
        device, workers = self.process.device, self.config["workers"]
        source: Any = map(data.__getitem__, range(len(data)))
        if workers:
            source = DataLoader(
                data,
                batch_size=None,
                num_workers=workers,
                pin_memory=device.type == "cuda",
                # It would draw a number from the model's stream.
                generator=torch.Generator(),
            )
        for batch in source:
            yield pytree.tree_map_only(
                Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch
            )


def fit(
    recipe: Recipe,
    model: nn.Module,
    splits: Splits,
    config: Config,
    *,
    run: RunDirectory | None = None,
    progress: str | None = None,
) -> FitResult:
    """Train a model in this process; see `Trainer` and `Trainer.fit`."""
    return Trainer(recipe, model, config).fit(splits, run=run, progress=progress)


class _Step(nn.Module):
    """What is called, and wrapped for several processes: objective and means, or predictions."""

    def __init__(self, recipe: Recipe, model: nn.Module, config: Config) -> None:
        super().__init__()
        self.recipe, self.model = recipe, model
        self.weight: float = config["jacobian_weight"]
        self.amp = _AMP.get(config["amp"])

    def forward(self, batch: Any) -> Any:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.amp, enabled=self.amp is not None):
            if not self.training:
                return self.recipe.predict(self.model, batch)
            loss, equilibrium, features, fusion = self.recipe.objective(self.model, batch)
        objective, penalty, solve = loss, 0.0 * loss.detach(), [math.nan, math.nan]
        if self.weight:
            if equilibrium is None or features is None or fusion is None:
                raise ValueError(
                    f"jacobian_weight: got {self.weight} for an objective without equilibrium, "
                    "expected 0"
                )
            # Features of an autocast encoder may be narrower than the fusion's parameters.
            with torch.autocast(device, self.amp, enabled=self.amp is not None):
                penalty = fusion.jacobian_penalty(equilibrium, features)
            objective = loss + self.weight * penalty
        means = torch.stack([loss.detach().double(), penalty.detach().double()])
        if equilibrium is None:
            return objective, torch.cat([means, means.new_tensor(solve)])
        stats = equilibrium.stats
        solved = torch.stack([stats.steps.double().mean(), stats.converged.double().mean()])
        return objective, torch.cat([means, solved])


class _Batches(Dataset[Any]):
    """The batches of an epoch by number, for a `DataLoader`."""

    def __init__(self, samples: Samples, batches: Sequence[Tensor], seeds: Sequence[int]) -> None:
        self.samples, self.batches, self.seeds = samples, batches, seeds

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        # The model's stream goes on as if nothing had been drawn here.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seeds[number])
            return self.samples.batch(self.batches[number])


def _batches(samples: int, epoch: int, config: Config) -> list[Tensor]:
    """The samples of each step of an epoch, of all processes together."""
    size = config["batch_size"]
    if size is None or size >= samples:
        return [torch.arange(samples)]
    drawn = torch.Generator().manual_seed(mixed(config["seed"], epoch, _ORDER))
    order = torch.randperm(samples, generator=drawn)
    return list(order.split(size))


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Leave the caller's random state as it is."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Refuse operators whose results differ from run to run, where that is wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if wanted:
        # cuBLAS reads it when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
