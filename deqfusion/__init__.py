"""Deep equilibrium multimodal fusion (arXiv 2306.16645).

    from deqfusion import DEQFusion

    fusion = DEQFusion(dim=256, num_modalities=3)
    fused = fusion([audio, image, text])        # each (..., 256) -> (..., 256)

Importing this package needs no GPU and no Triton, and initialises neither.
"""

from deqfusion.adjoint import Implicit, OneStep, Phantom, Unroll
from deqfusion.module import DEQFusion
from deqfusion.solution import ConvergenceError, Equilibrium, SolveStats, Status
from deqfusion.solvers import Anderson, Broyden, Picard, ToleranceSchedule
from deqfusion.tuning import autotune

__version__ = "0.1.0"

__all__ = [
    "Anderson",
    "Broyden",
    "ConvergenceError",
    "DEQFusion",
    "Equilibrium",
    "Implicit",
    "OneStep",
    "Phantom",
    "Picard",
    "SolveStats",
    "Status",
    "ToleranceSchedule",
    "Unroll",
    "__version__",
    "autotune",
]
