"""What the demonstration trains, and what it measured: between `demo` and its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FUSIONS = ("deq", "weight_tied:10", "weight_tied:3", "weight_tied:1", "gated", "concat", "sum")


@dataclass(frozen=True)
class DemoOptions:
    """What the demonstration trains.

    Attributes:
        fusions: names for `build_fusion`.
        seeds: each draws split, corruption and parameters.
        learning_rates: every model is trained with each; the validation loss chooses.
        epochs, batch_size, dropout, dim: of every model alike.
        tol: of the equilibrium.
        jacobian_weight: of the Jacobian penalty; for "deq" only, the others have no equilibrium.
        noise: of the corrupted modality, in standard deviations.
    """

    fusions: Sequence[str] = FUSIONS
    seeds: Sequence[int] = (0, 1, 2)
    epochs: int = 25
    batch_size: int = 128
    learning_rates: Sequence[float] = (5e-3, 1e-2)
    dropout: float = 0.2
    dim: int = 64
    tol: float = 1e-3
    jacobian_weight: float = 5.0
    noise: float = 3.0


@dataclass
class Comparison:
    """What the comparison measured.

    Attributes:
        options: what was trained.
        runs: one record per fusion and seed: `fusion`, `seed`, `accuracy`, `f1_macro`,
            `learning_rate`, `best_epoch`, `parameters`, `step_seconds`, `steps`, `converged` (the
            last two NaN for a fusion without a solve).
        weights: "before training", "after training" -> (N, N) mean modality weights on test rows;
            row: the noisy modality, column: whose weight. Mean over seeds.
        traces: solver -> (rows, steps) relative residuals of the trained model's joint state.
    """

    options: DemoOptions
    runs: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    traces: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def values(self, name: str, column: str) -> list[float]:
        """Return one column of a fusion's runs, by seed."""
        return [run[column] for run in self.runs if run["fusion"] == name]
