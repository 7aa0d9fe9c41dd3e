"""Small layers to tune, and a clock."""

from __future__ import annotations

import torch

from deqfusion import DEQFusion, ops
from deqfusion.tuning import autotune, search
from deqfusion.tuning.example import Example
from deqfusion.tuning.result import Tuned


class Clock:
    """Seconds that pass by one with every look at the clock."""

    def __init__(self, step: float = 1.0) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def layer(dim: int = 16, count: int = 2, **options) -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(dim, count, **{"num_groups": 2, **options})


def features(model: DEQFusion, rows: int = 20) -> torch.Tensor:
    return torch.randn(model.num_modalities, rows, model.dim).to(model.gate_bias)


def tune(model: DEQFusion, x: torch.Tensor, **options) -> Tuned:
    return autotune(model, x, **{"budget": 60, "progress": False, **options})


def timed(monkeypatch, seconds):
    """Ways take as long as `seconds` says; they solve all the same."""
    inner = Example.call

    def call(self, way):
        run = inner(self, way)
        names[id(run)] = run, way
        return run

    names = {}
    monkeypatch.setattr(Example, "call", call)
    monkeypatch.setattr(search.Search, "_time", lambda self, run, flush: seconds(names[id(run)][1]))


def compactions(monkeypatch) -> list[float]:
    """Of every solve by the CPU implementation from now on, in their order."""
    seen: list[float] = []
    inner = ops.solve.settings_of

    def recording(o, *rest):
        seen.append(o.compact_below)
        return inner(o, *rest)

    monkeypatch.setattr(ops.solve, "settings_of", recording)
    monkeypatch.setattr(ops.adjoint, "settings_of", recording)
    return seen
