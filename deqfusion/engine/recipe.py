"""What a task tells the engine: data, model, loss and metrics. The engine knows nothing else of it.

A task is a `Recipe`, in a file of its own in `deqfusion.tasks`. The engine calls

    config               the options, the engine's and the task's, merged and checked
    load(dir, config)    reads the data: splits, and facts that a model is built from
    build(config+facts)  the model, from the configuration alone, so that a stored run can be read
    prepare(...)         fits normalisers or loads pretrained weights, once, before a new run
    objective, predict   one batch, in training and in evaluation
    metrics              of all predictions of a split

A configuration is a flat mapping from name to JSON value: the engine's fields
(`options.ENGINE_FIELDS`), the recipe's `fields`, and the facts that `load` returned. It is stored
as `config.json` and checked against the same kinds when it is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from ..module import DEQFusion
from ..solution import Equilibrium
from .kinds import Kind

Config = Mapping[str, Any]


class OptionError(ValueError):
    """An option does not fit the data; raised by `Recipe.load`, and said with the option's place.

    Args:
        name: the option.
        message: what was got and expected.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name, self.message = name, message


class Objective(NamedTuple):
    """What a batch gives in training.

    Attributes:
        loss: (), the mean over the batch's samples, without the Jacobian penalty.
        equilibrium: the fusion's solution, for its steps, its share of converged rows and the
            penalty; None where the fusion solves nothing.
        features: what was fused, N tensors (..., dim); with `equilibrium`.
        fusion: the layer that solved; with `equilibrium`.
    """

    loss: Tensor
    equilibrium: Equilibrium | None = None
    features: Sequence[Tensor] | None = None
    fusion: DEQFusion | None = None


class Samples(Protocol):
    """The samples of one split, numbered from 0."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batch(self, indices: Tensor) -> Any:
        """Collate samples.

        Args:
            indices: int64 (B,), in any order.

        Returns:
            Nested tuples, lists and dicts of CPU tensors. What is drawn at random, such as
            augmentation, is drawn from torch's CPU generator, which the engine seeds per batch.
        """
        ...


class Splits(NamedTuple):
    """Samples to train on, to choose the epoch by, and to report; no row is in two of them."""

    train: Samples
    validation: Samples
    test: Samples | None = None


@dataclass(frozen=True)
class Field:
    """An option: as an argument `--name-with-dashes`, in TOML and in `config.json` the name.

    Attributes:
        kind: what it may be; converts an argument's text.
        default: its value where nobody gives one, of that kind.
        help: of the command line; the default is added to it.
        group: heading that it is listed under.
        fixed: whether a run that is resumed must have the value that it began with.
    """

    kind: Kind
    default: Any
    help: str
    group: str = "task"
    fixed: bool = True


class Recipe(ABC):
    """A task. Instances hold no state: everything is in the configuration, data and model.

    Class attributes:
        name: as in `deqfusion train NAME`.
        help: one line for the command line, without a full stop.
        fields: the task's own options.
        defaults: defaults of the engine's fields that differ for this task; that of
            `jacobian_weight` is taken for fusion "deq", others have no penalty unless asked to.
        facts: what each fact that `load` returns may be; all of them, in a stored configuration.
        selection: metric of the validation split that chooses the epoch, and which way is better.
        least_samples: that a process's part of a batch must have in training.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    fields: ClassVar[Mapping[str, Field]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}
    facts: ClassVar[Mapping[str, Kind]] = {}
    selection: ClassVar[tuple[str, Literal["max", "min"]]] = ("loss", "min")
    least_samples: ClassVar[int] = 1

    def repeats(self, config: Config) -> int:
        """How many models a run trains, on splits or folds of their own; 0: one on the given split.

        With more, `load` gets a configuration with `split`, 0 to `repeats` - 1, and mean and
        standard error of the test metrics are reported.
        """
        return 0

    def load_repeats(
        self, data_dir: Path, config: Config
    ) -> Sequence[tuple[Splits, dict[str, Any]]]:
        """Return what `load` returns for every split; all of it is kept until the run ends.

        For a task that reads its files once for all of them. Raises as `load` does.
        """
        splits = range(self.repeats(config))
        return [self.load(data_dir, {**config, "split": split}) for split in splits]

    def fault(self, config: Config) -> tuple[str, str] | None:
        """Return an option that does not fit the others, and what was got and expected; or None.

        Every value is of its kind. Called before and after `load`: facts may be missing.
        """
        return None

    def idle_options(self, config: Config) -> Mapping[str, str]:
        """Return options that others leave without effect, each with the one to blame.

        Beside those of `options.idle_options`, which every task has.
        """
        return {}

    def defaults_for(self, options: Config) -> Mapping[str, Any]:
        """Return defaults, given the options that were asked for; here always `defaults`.

        For a task whose hosts were published with schedules of their own.
        """
        return self.defaults

    @abstractmethod
    def load(self, data_dir: Path, config: Config) -> tuple[Splits, dict[str, Any]]:
        """Read the data.

        Args:
            data_dir: the folder.
            config: the options; in evaluation also the facts of the run that is evaluated.

        Returns:
            The splits, and JSON facts for `build` such as widths and classes, with
            `data_sha256`: a run is not resumed on other data.

        Raises:
            DataError: a file is missing or not what it should be, a split is empty.
            OptionError: an option does not fit the data.
        """

    @abstractmethod
    def build(self, config: Config) -> nn.Module:
        """Make an untrained model from options and facts alone; no files, no pretrained weights.

        Everything that inference needs is in its state: normalisers are buffers. The fusion is
        made by `options.configured_fusion`. Also called under `torch.device("meta")`.
        """

    def prepare(self, model: nn.Module, splits: Splits, config: Config) -> None:
        """Fill what is not learned, such as normalisers, from training samples, before a new run.

        Not called for a run that is resumed or evaluated: the state has it.
        """
        return None

    @abstractmethod
    def objective(self, model: nn.Module, batch: Any) -> Objective:
        """Loss of a batch of training samples, by the model in training mode.

        Args:
            model: on the device that computes; call it, or its parts.
            batch: what `Samples.batch` returned, on the same device.
        """

    @abstractmethod
    def predict(self, model: nn.Module, batch: Any) -> Any:
        """What `metrics` needs of a batch, by the model in evaluation mode, without gradients.

        Args:
            model, batch: as in `objective`.

        Returns:
            Nested tuples, lists and dicts of tensors; the engine moves them to the CPU.
        """

    @abstractmethod
    def metrics(self, outputs: Sequence[Any]) -> dict[str, float]:
        """Metrics of a split, that of `selection` among them; NaN where one is not defined.

        Args:
            outputs: of `predict`, batch by batch, in the order of the samples.
        """

    def parameter_groups(self, model: nn.Module, config: Config) -> list[dict[str, Any]]:
        """Return groups for the optimiser: `params`, and `rate`, a factor on the learning rate.

        Unless a task says otherwise, parameters under a module named `fusion` have
        `fusion_rate`, all others 1.
        """
        rate = config.get("fusion_rate", 1.0)
        if rate == 1.0:
            return [{"params": list(model.parameters()), "rate": 1.0}]
        fusion = [p for name, p in model.named_parameters() if _in_fusion(name)]
        others = [p for name, p in model.named_parameters() if not _in_fusion(name)]
        groups = [{"params": others, "rate": 1.0}, {"params": fusion, "rate": rate}]
        return [group for group in groups if group["params"]]

    def shards(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield submodules that `--strategy fsdp` gathers one by one, such as blocks of an encoder.

        Each is called as a module, by forward. The rest of the model is gathered as a whole.
        """
        return iter(())


def _in_fusion(name: str) -> bool:
    return "fusion" in name.split(".")[:-1]
