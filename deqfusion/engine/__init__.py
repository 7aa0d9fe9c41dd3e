"""Training, generic over tasks.

recipe     what a task tells the engine
kinds      what an option may be; options: those that every task has
samples    data in memory
training   the loop; runs: the folder that it writes
"""

from .options import ENGINE_FIELDS, configured_fusion
from .recipe import Config, Field, Objective, Recipe, Samples, Splits
from .runs import CheckpointError, RunDirectory
from .samples import TensorSamples, data_sha256
from .training import FitOptions, FitResult, Rows, TrainingDivergedError, fit

__all__ = [
    "ENGINE_FIELDS",
    "CheckpointError",
    "Config",
    "Field",
    "FitOptions",
    "FitResult",
    "Objective",
    "Recipe",
    "Rows",
    "RunDirectory",
    "Samples",
    "Splits",
    "TensorSamples",
    "TrainingDivergedError",
    "configured_fusion",
    "data_sha256",
    "fit",
]
