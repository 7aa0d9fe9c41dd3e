"""A row is its own problem: its answer does not depend on what it is batched with."""

import itertools

import pytest
import torch

from deqfusion import Anderson, Broyden, DEQFusion, Implicit, Picard, Status
from deqfusion.reference import solve as solve_module

BATCH, DIM, COUNT = 48, 64, 3


def solve(fusion: DEQFusion, features: torch.Tensor):
    with torch.no_grad():
        return fusion.equilibrium(features)


def assert_same_rows(alone, together, tolerance: float) -> None:
    """Compares (state, steps, status) row by row."""
    assert torch.equal(alone[1], together[1])
    assert torch.equal(alone[2], together[2])
    error = (alone[0] - together[0]).norm(dim=-1) / together[0].norm(dim=-1)
    assert error.max() < tolerance


def parts(equilibrium, rows=slice(None)):
    stats = equilibrium.stats
    return equilibrium.state[:, rows], stats.steps[:, rows], stats.status[:, rows]


@pytest.fixture(
    params=itertools.product([Anderson, Picard, Broyden], [False, True]),
    ids=lambda param: f"{param[0].__name__}{'-joint' * param[1]}",
)
def layer(request):
    torch.manual_seed(3)
    solver, joint = request.param
    return DEQFusion(DIM, COUNT, solver=solver(tol=1e-3, max_steps=60), joint=joint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_alone_in_a_batch_and_in_any_order(layer, dtype):
    fusion = layer.to(dtype)
    # Rounding differs with the shape of a product; a solve damps it like any other perturbation.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    features = torch.randn(COUNT, BATCH, DIM, dtype=dtype)
    together = solve(fusion, features)

    order = torch.randperm(BATCH)
    shuffled = solve(fusion, features[:, order])
    assert_same_rows(parts(shuffled), parts(together, order), tolerance)
    for size in (1, 5, 16):
        for start in range(0, BATCH, 11):
            rows = torch.arange(start, min(start + size, BATCH))
            part = solve(fusion, features[:, rows])
            assert_same_rows(parts(part), parts(together, rows), tolerance)


@pytest.mark.parametrize(
    ("dtype", "ladder", "tolerance"),
    [
        (torch.float64, "auto", 1e-12),
        (torch.float32, "off", 1e-5),
        # A last bit decides how a value rounds to bfloat16, so the ladder's first steps pass on
        # more of it: a tenth of the solver's own tolerance.
        (torch.float32, "auto", 1e-4),
    ],
)
def test_gradient_of_a_row_does_not_depend_on_its_neighbours(monkeypatch, dtype, ladder, tolerance):
    torch.manual_seed(3)
    # The ladder begins at width 256, here on any processor.
    monkeypatch.setattr(solve_module, "bfloat16_instructions", lambda: "some")
    dim = 256 if ladder == "auto" else DIM
    solver = Anderson(ladder=ladder)
    fusion = DEQFusion(dim, COUNT, solver=solver, adjoint=Implicit(solver)).to(dtype)
    features = torch.randn(COUNT, BATCH, dim, dtype=dtype)
    direction = torch.randn(BATCH, dim, dtype=dtype)

    def gradient(rows):
        inputs = features[:, rows].clone().requires_grad_()
        fusion(inputs).backward(direction[rows])
        return inputs.grad

    together = gradient(torch.arange(BATCH))
    order = torch.randperm(BATCH)
    for rows in (order, torch.arange(7), torch.tensor([20])):
        got, expected = gradient(rows), together[:, rows]
        assert ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < tolerance


def test_hard_and_easy_rows_share_a_batch():
    """Rows at their fixed point stop at once beside rows that start from zero."""
    torch.manual_seed(3)
    fusion = DEQFusion(DIM, COUNT, solver=Anderson(tol=1e-4))
    features = torch.randn(COUNT, BATCH, DIM)
    cold = solve(fusion, features)
    init = cold.state.clone()
    init[:, ::2] = 0
    with torch.no_grad():
        warm = fusion.equilibrium(features, init=init)
    assert (warm.stats.status == Status.CONVERGED).all()
    assert torch.equal(warm.stats.steps[:, ::2], cold.stats.steps[:, ::2])
    assert (warm.stats.steps[:-1, 1::2] <= 2).all()
    error = (warm.state - cold.state)[:, ::2].norm(dim=-1) / cold.state[:, ::2].norm(dim=-1)
    assert error.max() < 1e-5


def test_leading_dimensions_are_rows():
    torch.manual_seed(3)
    fusion = DEQFusion(DIM, COUNT)
    features = torch.randn(COUNT, 4, 12, DIM)
    nested, flat = solve(fusion, features), solve(fusion, features.flatten(1, 2))
    assert nested.fused.shape == (4, 12, DIM)
    assert nested.modalities.shape == (COUNT, 4, 12, DIM)
    assert nested.stats.steps.shape == nested.stats.status.shape == (COUNT + 1, 4, 12)
    assert torch.equal(nested.state.flatten(1, 2), flat.state)
    assert torch.equal(nested.stats.steps.flatten(1), flat.stats.steps)
    row = solve(fusion, features[:, 0, 0])
    assert row.fused.shape == (DIM,)
    assert row.stats.status.shape == (COUNT + 1,)
    assert (row.fused - nested.fused[0, 0]).norm() < 1e-5 * row.fused.norm()


def test_features_as_a_sequence_or_one_tensor():
    torch.manual_seed(3)
    fusion = DEQFusion(DIM, COUNT)
    features = torch.randn(COUNT, 6, DIM)
    expected = solve(fusion, features).fused
    assert torch.equal(solve(fusion, list(features)).fused, expected)
    assert torch.equal(solve(fusion, tuple(features)).fused, expected)
    strided = torch.randn(6, DIM, COUNT).copy_(features.permute(1, 2, 0)).permute(2, 0, 1)
    assert not strided.is_contiguous()
    error = (solve(fusion, strided).fused - expected).norm(dim=-1)
    assert (error < 1e-5 * expected.norm(dim=-1)).all()


def test_a_missing_modality_changes_nothing():
    """What stands in the place of a missing feature, NaN included, is not read."""
    torch.manual_seed(3)
    fusion = DEQFusion(DIM, COUNT)
    features = torch.randn(COUNT, 6, DIM)
    mask = torch.zeros(6, COUNT, dtype=torch.bool)
    mask[::2, 1] = True
    with torch.no_grad():
        expected = fusion.equilibrium(features, mask=mask).fused
        everything = fusion.equilibrium(features).fused
    assert torch.equal(expected[1::2], everything[1::2])
    assert not torch.allclose(expected[::2], everything[::2], rtol=0.1)
    for junk in (1e4, float("nan")):
        spoiled = features.clone()
        spoiled[1, ::2] = junk
        inputs = spoiled.requires_grad_()
        equilibrium = fusion.equilibrium(inputs, mask=mask)
        assert (equilibrium.fused - expected).norm() < 1e-5 * expected.norm()
        assert (equilibrium.stats.status[-1] == Status.CONVERGED).all()
        equilibrium.fused.sum().backward()
        assert inputs.grad.isfinite().all()
        assert not inputs.grad[1, ::2].any()


def test_masked_layer_equals_a_layer_without_the_modality():
    torch.manual_seed(3)
    fusion = DEQFusion(DIM, 3, solver=Anderson(tol=1e-11, max_steps=300)).double()
    smaller = DEQFusion(DIM, 2, solver=Anderson(tol=1e-11, max_steps=300)).double()
    keep = [0, 2]
    state = {}
    for name, value in fusion.state_dict().items():
        per_modality = name.startswith(("modality", "norm1", "norm2", "norm3", "injection_weight"))
        state[name] = value[keep] if per_modality else value
    smaller.load_state_dict(state)
    features = torch.randn(3, 6, DIM, dtype=torch.float64)
    mask = torch.tensor([False, True, False]).expand(6, 3)
    with torch.no_grad():
        got = fusion.equilibrium(features, mask=mask).fused
        expected = smaller(features[keep])
    assert (got - expected).norm() < 1e-9 * expected.norm()


def test_an_equilibrium_remembers_what_was_missing():
    torch.manual_seed(3)
    fusion = DEQFusion(DIM, COUNT)
    features = torch.randn(COUNT, 6, DIM)
    mask = torch.zeros(6, COUNT, dtype=torch.bool)
    mask[::2, 1] = True
    with torch.no_grad():
        eq = fusion.equilibrium(features, mask=mask)
        assert torch.equal(fusion.modality_weights(eq), fusion.modality_weights(eq, mask))
        assert not fusion.modality_weights(eq)[1, ::2].any()
        radius = fusion.spectral_radius(eq, features)
        assert torch.equal(radius, fusion.spectral_radius(eq, features, mask=mask))
        torch.manual_seed(0)
        penalty = fusion.jacobian_penalty(eq, features)
        torch.manual_seed(0)
        assert torch.equal(penalty, fusion.jacobian_penalty(eq, features, mask=mask))
