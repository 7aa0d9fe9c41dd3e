"""The fusion program of schedule *row*, interpreted, against the CPU implementation."""

import itertools

import pytest
import torch

from deqfusion import Anderson, DEQFusion, Status, functional
from deqfusion.kernels.config import RowConfig, SolveOptions
from deqfusion.kernels.fusion import solve_fusion_row
from deqfusion.reference.cell import gate_constants, gate_weights

DIM, ROWS, COUNT = 64, 9, 3
CONFIG = RowConfig(rows=16, depth=16)


def both(options, *, dim=DIM, groups=4, gate="sigmoid", gate_input="sum", tail="relu_norm",
         change=None, **extra):  # fmt: skip
    """(CPU solution, program's solution) of the same problem."""
    torch.manual_seed(0)
    solver = Anderson(
        tol=options.rtol, atol=options.atol, max_steps=options.max_steps, memory=options.memory,
        mixing=options.mixing, ladder="off",
    )  # fmt: skip
    fusion = DEQFusion(dim, COUNT, num_groups=groups, gate=gate, gate_input=gate_input, tail=tail)
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        modalities, injection = torch.randn(COUNT, ROWS, dim), 3 * torch.randn(ROWS, dim)
        if change is not None:
            change(injection)
        p, cell = fusion.fusion_parameters, fusion.options
        expected = functional.fusion_equilibrium(
            modalities, injection, p, cell=cell, solver=solver, **extra
        )
        weights = (gate_weights(p, cell)[0], p.weight, p.bias, p.norm_weight, p.norm_bias)
        got = solve_fusion_row(
            gate_constants(modalities, p, cell), injection, weights, groups, gate, tail, options,
            CONFIG, **extra,
        )  # fmt: skip
    return expected, got


def agree(expected, got, tolerance):
    assert torch.equal(got.status[0], expected.status)
    assert (got.steps[0] - expected.steps).abs().max() <= 1
    error = (got.state[0] - expected.state).norm(dim=-1)
    assert (error <= tolerance * expected.state.norm(dim=-1)).all()


@pytest.mark.parametrize(
    ("gate", "gate_input", "tail"),
    itertools.product(["sigmoid", "identity"], ["sum", "concat"], ["relu_norm", "norm_relu"]),
)
def test_options(gate, gate_input, tail):
    # The identity gate has rows without an attracting equilibrium: a few steps show the map.
    steps = 50 if gate == "sigmoid" else 4
    options = SolveOptions(rtol=1e-4 if gate == "sigmoid" else 1e-9, max_steps=steps)
    expected, got = both(options, gate=gate, gate_input=gate_input, tail=tail)
    agree(expected, got, 1e-4)
    assert (got.status == (Status.CONVERGED if gate == "sigmoid" else Status.MAX_STEPS)).all()


@pytest.mark.parametrize(("dim", "groups", "memory"), [(40, 4, 0), (72, 3, 8), (48, 1, 2)])
def test_widths_and_memories(dim, groups, memory):
    agree(*both(SolveOptions(memory=memory, rtol=1e-4), dim=dim, groups=groups), 1e-4)


@pytest.mark.parametrize("width", [1, DIM])
def test_masks(width):
    torch.manual_seed(2)
    masks = {
        "gate_mask": torch.bernoulli(torch.full((COUNT, ROWS, width), 0.6)) / 0.6,
        "fusion_mask": torch.bernoulli(torch.full((ROWS, DIM), 0.8)) / 0.8,
    }
    agree(*both(SolveOptions(rtol=1e-4), **masks), 1e-4)


def test_warm_start():
    agree(*both(SolveOptions(), init=torch.randn(ROWS, DIM)), 1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(value):
    def spoil(injection):
        injection[4, 7] = value

    expected, got = both(SolveOptions(), change=spoil)
    agree(expected, got, 1e-4)
    assert got.status[0, 4] == Status.NON_FINITE
    assert not got.state[0, 4].any()
