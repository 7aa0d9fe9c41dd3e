"""Features so large that their squares overflow, in the programs, against fp64."""

import torch

from deqfusion import Anderson, Status
from deqfusion.kernels.config import SolveOptions
from deqfusion.kernels.primitives import LARGEST
from deqfusion.reference.cell import bound_of
from tests.kernels.problems import Problem, outcomes, tensors

TIGHT = SolveOptions(rtol=1e-5)


def test_the_bound_is_that_of_the_reference():
    """Which the programs do not import."""
    assert LARGEST.value == bound_of(torch.float32)


def test_features_whose_squares_overflow():
    """A modality of a row, and one of its groups in another row; gradients no smaller for it."""
    problem, sizes = Problem.new(), torch.ones(2, 3, 16)
    sizes[0, 1] = sizes[1, 2, :8] = 1e25
    problem.features *= sizes
    problem.injection = problem.features.sum(0)
    exact = problem.double().reference(Anderson(tol=1e-7, max_steps=200))
    states = exact["z"].state.float(), exact["zf"].state.float()
    got = problem.programs(TIGHT, states)
    true = tensors(exact)
    for name, (status, _) in outcomes(got).items():
        assert (status == Status.CONVERGED).all(), name
    found = tensors(got)
    for values in (found, true):
        values["dx"] = values["dx"] * sizes
        values["dxf"] = values["dxf"] * sizes.amax(0)
    for name, value in found.items():
        wanted = true[name].reshape(value.shape)
        for row, other in zip(value, wanted, strict=True):
            assert (row - other).norm() <= 1e-4 * wanted.norm(), name


def test_what_relu_takes_away_scales_nothing():
    """A channel of the injection far below zero; in a row, beside one far above in its group."""
    problem = Problem.new()
    problem.injection[1:, 0] = -1e25
    problem.injection[2, 1] = 1e20
    exact = problem.double().reference(Anderson(tol=1e-7, max_steps=200))
    states = exact["z"].state.float(), exact["zf"].state.float()
    found, true = tensors(problem.programs(TIGHT, states, blocks="fusion")), tensors(exact)
    for name in ("zf", "dxf", "dm"):
        wanted = true[name].reshape(found[name].shape)
        assert (found[name] - wanted).norm() <= 1e-4 * wanted.norm(), name
    # Beside the large one a channel is open or closed by itself.
    values = (t["dxf"].reshape(3, 16)[2, :8] for t in (found, true))
    found, true = (1e20 * t.double() for t in values)
    assert (found - true).norm() <= 1e-4 * true.norm()
