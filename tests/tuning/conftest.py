"""A store of tuned entries of one's own, and programs with few ways to run."""

from __future__ import annotations

import pytest

from deqfusion import Anderson, Implicit
from deqfusion.kernels import tuning
from deqfusion.tuning import predict, search
from tests.tuning.problems import layer


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """An empty store of one's own: its folder."""
    monkeypatch.setenv("DEQFUSION_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path / "cache" / "configs"
    tuning.forget()


@pytest.fixture
def few(monkeypatch):
    """The programs on CPU tensors, with few ways to run them."""
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    from deqfusion.kernels import candidates

    monkeypatch.setattr(candidates, "ROWS", (16, 32))
    monkeypatch.setattr(candidates, "SCHEDULES", ("row",))
    monkeypatch.setattr(candidates, "DEPTHS", (16,))
    monkeypatch.setattr(candidates, "WARPS", (8,))
    monkeypatch.setattr(candidates, "STAGES", (2,))
    monkeypatch.setattr(predict, "MEMORIES", (0, 2))
    monkeypatch.setattr(search, "SAMPLES", 1)
    monkeypatch.setattr(search, "ROUNDS", 1)
    quick = Anderson(tol=0.05, memory=2)
    return layer(8, 1, num_groups=1, solver=quick, adjoint=Implicit(quick))
