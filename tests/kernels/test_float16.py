"""Steps in float16 ("medium", and features of 16 bits), interpreted, against fp32."""

import functools
from dataclasses import replace

import pytest
import torch

from deqfusion import Anderson, Status
from deqfusion.kernels.config import Config, SolveOptions
from tests.kernels.problems import Problem, outcomes, tensors

HALF = SolveOptions(precision="half")


@pytest.mark.parametrize(
    ("schedule", "masked"), [("row", True), ("step", False), ("cooperative", False)]
)
def test_steps_in_float16(schedule, masked):
    """To 1e-3 the steps of fp32, in all solves; errors within those of float16's factors."""
    groups = 1 if schedule == "cooperative" else 2
    problem, masks = Problem.new(num_groups=groups), {}
    if masked:
        masks["init"] = torch.randn(2, 3, 16)
        masks["fusion_mask"] = torch.bernoulli(torch.full((3, 16), 0.8)) / 0.8
    exact = problem.reference(Anderson(tol=1e-7, max_steps=200), **masks)
    states = exact["z"].state, exact["zf"].state
    expected = problem.reference(Anderson(tol=1e-3), states=states, **masks)
    got = problem.programs(HALF, states, Config(schedule, depth=16), **masks)
    for name, (status, steps) in outcomes(got).items():
        assert (status == Status.CONVERGED).all(), name
        assert (steps - outcomes(expected)[name][1]).abs().max() <= 1, name
    size, error = {}, {}
    for kind, answer in (("half", got), ("fp32", expected)):
        for name, value in tensors(answer).items():
            true = tensors(exact)[name].reshape(value.shape)
            size[name] = true.norm()
            error[kind, name] = (value - true).norm()
    for name in size:
        # Twice what the tolerance leaves, and what rounding factors and weights does.
        assert error["half", name] <= 2 * error["fp32", name] + 2e-3 * size[name], name


def test_a_step_in_float16_rounds_factors_and_weights():
    """One evaluation, against PyTorch's with the same roundings; not what fp32 products give."""
    problem = Problem.new(64, 1, 16, num_groups=4)
    once = {"max_steps": 1}
    init = torch.randn(1, 16, 64)
    masks, solver = {"init": init}, Anderson(tol=1e-9, ladder="off", **once)
    states = init, init[0]
    got = problem.programs(replace(HALF, rtol=1e-9, **once), states, **masks)
    fp32 = problem.reference(solver, states=states, **masks)
    linear = torch.nn.functional.linear

    def rounded(x, weight, bias=None):
        return linear(x.half().float(), weight.half().float(), bias)

    p = problem.layer.modality_parameters
    with torch.no_grad():
        norm = functools.partial(torch.nn.functional.group_norm, num_groups=4, eps=1e-5)
        x = problem.features[0]
        h = norm(rounded(init[0], p.weight1[0], p.bias1[0]), weight=p.norm1_weight[0],
                 bias=p.norm1_bias[0]).relu()  # fmt: skip
        t = norm(rounded(h, p.weight2[0], p.bias2[0]) + x, weight=p.norm2_weight[0],
                 bias=p.norm2_bias[0])  # fmt: skip
        z = norm(t.relu(), weight=p.norm3_weight[0], bias=p.norm3_bias[0])
    # A factor next to a boundary may round to the other side.
    torch.testing.assert_close(got["z"].state[0], z, rtol=0, atol=2e-3)
    close = (got["z"].state[0] - z).abs() < 1e-5
    assert close.float().mean() > 0.9
    assert ((fp32["z"].state[0] - z).abs() < 1e-5).float().mean() < 0.5


def test_gradients_in_float16_scale():
    """Gradients far below float16's range take the same steps, and stay as exact."""
    problem = Problem.new(count=1)
    states = problem.features, problem.injection
    large = problem.programs(HALF, states)
    problem.gradient *= 1e-20
    small = problem.programs(HALF, states)
    for name in ("back", "fused_back"):
        assert torch.equal(large[name][-1].steps, small[name][-1].steps)
        torch.testing.assert_close(small[name][0] * 1e20, large[name][0], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-5, 1e9])
def test_truncated_gradients_are_of_any_size(scale):
    """They are not scaled to 1, and would vanish or overflow in float16."""
    problem = Problem.new(count=1)
    problem.gradient *= scale
    states = problem.features, problem.injection
    few = {"truncated": True, "max_steps": 3, "mixing": 0.5, "rtol": 0.0}
    full = problem.programs(SolveOptions(**few), states)
    got = problem.programs(replace(HALF, **few), states)
    for name in ("back", "fused_back"):
        torch.testing.assert_close(got[name][0], full[name][0], rtol=2e-3, atol=1e-6 * scale)


def test_factors_beyond_float16_are_not_finite():
    """A weight beyond its range ends every row, and its status says so."""
    problem = Problem.new(count=1)
    with torch.no_grad():
        problem.layer.modality_parameters.weight1[0, 0, 0] = 1e5
    states = problem.features, problem.injection
    exact = problem.programs(SolveOptions(), states, blocks="modality")["z"]
    assert (exact.status == Status.CONVERGED).all()
    got = problem.programs(HALF, states, blocks="modality")["z"]
    assert (got.status == Status.NON_FINITE).all()
    assert got.state.isfinite().all()
