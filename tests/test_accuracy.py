"""Step counts and residuals of the default cell, as the project promises them.

Residuals are verified by the textbook cell in fp64, never read from the solver under test.
"""

import pytest
import torch

from deqfusion import Anderson, Broyden, DEQFusion, Implicit, OneStep, Phantom, Picard, Status
from deqfusion.functional import fusion_adjoint, modality_adjoint
from deqfusion.testing import CellOptions, textbook_cell

BATCH, DIM, COUNT = 64, 300, 3
SEEDS = range(5)


def layer_and_features(seed: int, **options) -> tuple[DEQFusion, torch.Tensor]:
    torch.manual_seed(seed)
    return DEQFusion(DIM, COUNT, **options), torch.randn(COUNT, BATCH, DIM)


def verified_residual(
    fusion: DEQFusion, state: torch.Tensor, features: torch.Tensor, **options
) -> torch.Tensor:
    """||f(z) - z|| / ||f(z)|| in fp64, per row, of each block or of the whole state."""
    parameters = {name: value.detach().double() for name, value in fusion.state_dict().items()}
    z = state.detach().double()
    step = textbook_cell(parameters, z, list(features.double()), CellOptions(**options))
    if fusion.joint:
        step, z = (v.transpose(0, 1).flatten(1) for v in (step, z))
    return (step - z).norm(dim=-1) / step.norm(dim=-1)


@pytest.mark.parametrize(
    ("skip", "tol", "modality_bound", "fusion_bound"),
    [
        (False, 1e-3, 11, 15),
        (False, 1e-4, 15, 20),
        (True, 1e-3, 18, None),
        (True, 1e-4, 25, None),
    ],
)
def test_median_steps(skip, tol, modality_bound, fusion_bound):
    for seed in SEEDS:
        fusion, features = layer_and_features(seed, skip=skip, solver=Anderson(tol=tol))
        with torch.no_grad():
            equilibrium = fusion.equilibrium(features)
        stats = equilibrium.stats
        assert (stats.status == Status.CONVERGED).all()
        assert stats.residual.max() <= tol
        steps = stats.steps.double()
        assert steps[:-1].median() <= modality_bound, f"seed {seed}"
        if fusion_bound is not None:
            assert steps[-1].median() <= fusion_bound, f"seed {seed}"


@pytest.mark.parametrize("ladder", ["auto", "off"])
@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
def test_residual_of_the_returned_state(ladder, tol):
    for skip in (False, True):
        fusion, features = layer_and_features(
            0, skip=skip, solver=Anderson(tol=tol, max_steps=100, ladder=ladder)
        )
        with torch.no_grad():
            equilibrium = fusion.equilibrium(features)
        assert (equilibrium.stats.status == Status.CONVERGED).all()
        assert verified_residual(fusion, equilibrium.state, features, skip=skip).max() <= tol


@pytest.mark.parametrize("solver", [Anderson, Picard, Broyden])
@pytest.mark.parametrize("joint", [False, True], ids=["split", "joint"])
def test_every_solver_reaches_the_same_fixed_point(solver, joint):
    fusion, features = layer_and_features(1, solver=solver(tol=1e-10, max_steps=300), joint=joint)
    fusion, features = fusion.double(), features.double()[:, :8]
    with torch.no_grad():
        equilibrium = fusion.equilibrium(features)
    assert (equilibrium.stats.status == Status.CONVERGED).all()
    assert verified_residual(fusion, equilibrium.state, features).max() <= 1e-10
    reference = DEQFusion(DIM, COUNT, solver=Anderson(tol=1e-12, max_steps=300)).double()
    reference.load_state_dict(fusion.state_dict())
    with torch.no_grad():
        star = reference.equilibrium(features).state
    assert ((equilibrium.state - star).norm(dim=-1) / star.norm(dim=-1)).max() < 1e-8


def test_solve_stops_where_it_says():
    """A row that ran out of steps says so, with the steps taken and the residual it has."""
    fusion, features = layer_and_features(2, solver=Anderson(tol=1e-4, max_steps=4))
    with torch.no_grad():
        equilibrium = fusion.equilibrium(features)
    assert (equilibrium.stats.status == Status.MAX_STEPS).all()
    assert (equilibrium.stats.steps == 4).all()
    assert (equilibrium.stats.residual > 1e-4).all()
    assert equilibrium.state.isfinite().all()


def test_adjoint_steps_do_not_depend_on_the_gradients_scale():
    """Averaging a loss divides the gradient by the batch; the backward solve must not notice."""
    for seed in SEEDS:
        fusion, features = layer_and_features(seed)
        with torch.no_grad():
            equilibrium = fusion.equilibrium(features)
            injection = fusion.injection_bias + torch.einsum(
                "n,nbd->bd", fusion.injection_weight, features
            )
            direction = torch.randn(COUNT, BATCH, DIM)
            steps = {}
            for scale in (1.0, 1e-3, 1e-6):
                *_, modality = modality_adjoint(
                    scale * direction,
                    equilibrium.modalities,
                    features,
                    fusion.modality_parameters,
                )
                *_, last = fusion_adjoint(
                    scale * direction[0],
                    equilibrium.fused,
                    equilibrium.modalities,
                    injection,
                    fusion.fusion_parameters,
                )
                for stats in (modality, last):
                    assert (stats.status == Status.CONVERGED).all()
                steps[scale] = torch.cat([modality.steps.flatten(), last.steps])
            assert steps[1.0].max() > 5
            for scale in (1e-3, 1e-6):
                assert (steps[scale] - steps[1.0]).abs().max() <= 1, f"seed {seed}, {scale}"


def test_scaled_gradient_gives_the_scaled_result():
    """The backward solve is invariant to the gradient's scale, which averaging makes small."""
    fusion, features = layer_and_features(3)
    inputs = features.clone().requires_grad_()
    fused = fusion(inputs)
    direction = torch.randn_like(fused)
    leaves = [inputs, *fusion.parameters()]
    plain = torch.autograd.grad(fused, leaves, direction, retain_graph=True)
    scaled = torch.autograd.grad(fused, leaves, direction * 2.0**-20)
    # A power of two scales exactly: any difference is the solver's doing.
    for expected, got in zip(plain, scaled, strict=True):
        error = (got * 2.0**20 - expected).norm() / expected.norm()
        assert error < 1e-5


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(), OneStep()], ids=repr)
def test_gradient_approximations_point_the_right_way(adjoint):
    fusion, features = layer_and_features(4, solver=Anderson(tol=1e-4), adjoint=adjoint)
    exact = DEQFusion(
        DIM,
        COUNT,
        solver=Anderson(tol=1e-10, max_steps=300),
        adjoint=Implicit(Anderson(tol=1e-10, max_steps=300)),
    ).double()
    exact.load_state_dict(fusion.state_dict())
    direction = torch.randn(BATCH, DIM)
    inputs = features.clone().requires_grad_()
    fusion(inputs).backward(direction)
    precise = features.double().requires_grad_()
    exact(precise).backward(direction.double())
    got, expected = inputs.grad.double().flatten(), precise.grad.flatten()
    if isinstance(adjoint, Implicit):
        assert (got - expected).norm() / expected.norm() < 0.02
    else:
        assert torch.cosine_similarity(got, expected, dim=0) > 0.5
