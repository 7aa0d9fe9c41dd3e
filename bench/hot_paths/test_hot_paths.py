"""The hot paths, for pytest-benchmark: `pytest bench --benchmark-json=FILE`.

These are to be held against their own past (`--benchmark-compare`); `deqfusion bench` compares with
others. Every case checks what it timed. Plain `pytest` does not collect this folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from deqfusion import Anderson, DEQFusion, Implicit

pytest.importorskip("pytest_benchmark", reason="pip install 'deqfusion[dev]'")

TOL = 1e-3
SHAPES = [(16, 64, 2), (64, 128, 3), (256, 256, 2)]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Layer:
    """A layer and its features on a device.

    Args:
        shape: rows, width, modalities.
        device: "cpu" or "cuda".
    """

    def __init__(self, shape: tuple[int, int, int], device: str) -> None:
        rows, dim, count = shape
        torch.manual_seed(0)
        solver = Anderson(tol=TOL)
        self.fusion = DEQFusion(dim, count, solver=solver, adjoint=Implicit(solver)).to(device)
        self.features = torch.randn(count, rows, dim).to(device).requires_grad_(True)
        self.cotangent = torch.randn(rows, dim).to(device)
        self.device = device

    def timed(self, benchmark: Any, function: Callable[[], Any]) -> Any:
        """Times a function to the end of the device's work, and gives what it returned last."""

        def run() -> Any:
            found = function()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return found

        run()
        return benchmark(run)

    def residual(self, state: Tensor) -> float:
        """Of the worst row and block."""
        with torch.no_grad():
            image = self.fusion.cell(state, self.features)
        return float(((image - state).norm(dim=-1) / image.norm(dim=-1)).max())


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One thread, unless OMP_NUM_THREADS says otherwise: figures compare from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]))
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where a case runs."""
    return str(request.param)


@pytest.fixture(params=SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def layer(request: pytest.FixtureRequest, device: str) -> Layer:
    """A layer of a shape, with features, on the device."""
    return Layer(request.param, device)


def test_forward(benchmark: Any, layer: Layer) -> None:
    """Both solves, without gradients."""
    with torch.no_grad():
        found = layer.timed(benchmark, lambda: layer.fusion.equilibrium(layer.features))
    assert layer.residual(found.state) <= TOL


def test_forward_backward(benchmark: Any, layer: Layer) -> None:
    """A training step of the layer alone."""

    def step() -> Tensor:
        layer.fusion.zero_grad(set_to_none=True)
        layer.features.grad = None
        fused = layer.fusion(layer.features)
        (fused * layer.cotangent).sum().backward()
        return fused

    layer.timed(benchmark, step)
    assert layer.features.grad is not None
    assert layer.features.grad.isfinite().all()
    assert all(p.grad is not None for p in layer.fusion.parameters())


def test_cell_step(benchmark: Any, layer: Layer) -> None:
    """One step of the joint map."""
    state = torch.zeros(len(layer.features) + 1, *layer.features.shape[1:], device=layer.device)
    with torch.no_grad():
        found = layer.timed(benchmark, lambda: layer.fusion.cell(state, layer.features))
    assert found.shape == state.shape


def test_adjoint(benchmark: Any, layer: Layer) -> None:
    """The backward pass alone: both adjoint solves and the last VJP."""
    fused = layer.fusion(layer.features)

    def adjoint() -> Tensor:
        (gradient,) = torch.autograd.grad(fused, layer.features, layer.cotangent, retain_graph=True)
        return gradient

    found = layer.timed(benchmark, adjoint)
    assert found.isfinite().all()
    assert float(found.norm()) > 0
