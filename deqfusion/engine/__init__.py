"""Training, generic over tasks.

recipe       what a task tells the engine
kinds        what an option may be; options: those that every task has; config: merged, checked
samples      data in memory; seeds: of what is drawn at random
training     the loop; state: what a checkpoint holds; schedules; logs
distributed  one process or several
runs         the folder of a run; run: a task from data to that folder, and read back
command      `deqfusion train TASK` and `deqfusion evaluate`
"""

from .config import checked, complete
from .distributed import LostProcessError, Process, leave
from .options import ENGINE_FIELDS, configured_fusion
from .recipe import Config, Field, Objective, OptionError, Recipe, Samples, Splits
from .run import read_model, train
from .runs import CheckpointError, RunDirectory
from .samples import TensorSamples, data_sha256
from .seeds import seed_of
from .training import FitResult, Trainer, TrainingDivergedError, fit

__all__ = [
    "ENGINE_FIELDS",
    "CheckpointError",
    "Config",
    "Field",
    "FitResult",
    "LostProcessError",
    "Objective",
    "OptionError",
    "Process",
    "Recipe",
    "RunDirectory",
    "Samples",
    "Splits",
    "TensorSamples",
    "Trainer",
    "TrainingDivergedError",
    "checked",
    "complete",
    "configured_fusion",
    "data_sha256",
    "fit",
    "leave",
    "read_model",
    "seed_of",
    "train",
]
