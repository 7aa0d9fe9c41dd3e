"""Modality weights, spectral radius and penalty against their definitions."""

import pytest
import torch

from deqfusion import Anderson, DEQFusion
from deqfusion.testing import CellOptions, dense_jacobian, spectral_radius, textbook_cell

DIM, COUNT, BATCH = 8, 3, 6
EXACT = Anderson(tol=1e-11, max_steps=300)


def layer(**options) -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(DIM, COUNT, num_groups=2, solver=EXACT, **options).double()


def some_mask(*leading: int) -> torch.Tensor:
    mask = torch.rand(*leading, COUNT) < 0.4
    mask[..., 1] = False
    return mask


def some_features(*leading: int, **options) -> torch.Tensor:
    return torch.randn(COUNT, *leading, DIM, dtype=torch.float64, **options)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("gate_input", ["sum", "concat"])
@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
def test_modality_weights_are_the_mean_gates(gate, gate_input, masked):
    fusion = layer(gate=gate, gate_input=gate_input)
    mask = some_mask(BATCH) if masked else torch.zeros(BATCH, COUNT, dtype=torch.bool)
    eq = fusion.equilibrium(some_features(BATCH), mask=mask)
    expected = torch.zeros(COUNT, BATCH, dtype=torch.float64)
    for i, row in (~mask).t().nonzero().tolist():
        z_f, z_i = eq.fused[row], eq.modalities[i, row]
        seen = torch.cat((z_f, z_i)) if gate_input == "concat" else z_f + z_i
        a = fusion.gate_weight @ seen + fusion.gate_bias
        expected[i, row] = (a.sigmoid() if gate == "sigmoid" else a).abs().mean()
    torch.testing.assert_close(fusion.modality_weights(eq), expected / expected.sum(0))


def test_closed_gates_weigh_the_same():
    fusion = layer(gate="identity")
    with torch.no_grad():
        fusion.gate_weight.zero_()
        fusion.gate_bias.zero_()
    mask = torch.tensor([[False, False, True]]).expand(BATCH, COUNT)
    weights = fusion.modality_weights(fusion.equilibrium(some_features(BATCH), mask=mask))
    assert weights.unique(dim=1).flatten().tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("options", [{}, {"skip": True, "gate_input": "concat"}], ids=repr)
def test_spectral_radius_of_every_row(options, masked):
    fusion = layer(**options)
    features, mask = some_features(BATCH), some_mask(BATCH) if masked else None
    eq = fusion.equilibrium(features, mask=mask)
    # Elsewhere the joint map and the blocks have different Jacobians.
    settled = eq.stats.converged.all(0)
    assert settled.sum() >= BATCH - 2
    present = None if mask is None else ~mask

    def step_of_row(z, rows):
        return textbook_cell(
            fusion.state_dict(), z, list(features[:, rows]), CellOptions(num_groups=2, **options),
            present=None if present is None else present[rows],
        )  # fmt: skip

    expected = spectral_radius(dense_jacobian(step_of_row, eq.state.detach()))
    torch.testing.assert_close(fusion.spectral_radius(eq, features)[settled], expected[settled])
    assert expected.unique().numel() == BATCH


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_tokens_are_rows(masked):
    """(B, T) leading dimensions give what the same rows give in one batch."""
    fusion, features = layer(), some_features(4, 5)
    mask = some_mask(4, 5) if masked else None
    flat_features, flat_mask = features.flatten(1, 2), mask if mask is None else mask.flatten(0, 1)
    eq = fusion.equilibrium(features, mask=mask)
    flat = fusion.equilibrium(flat_features, mask=flat_mask)
    assert torch.equal(eq.state.flatten(1, 2), flat.state)
    radius = fusion.spectral_radius(eq, features)
    assert radius.shape == (4, 5)
    assert torch.equal(radius.flatten(), fusion.spectral_radius(flat, flat_features))
    weights = fusion.modality_weights(eq)
    assert weights.shape == (COUNT, 4, 5)
    assert torch.equal(weights.flatten(1), fusion.modality_weights(flat))
    penalties = []
    for solved, inputs in ((eq, features), (flat, flat_features)):
        torch.manual_seed(3)
        penalties.append(fusion.jacobian_penalty(solved, inputs))
    assert torch.equal(*penalties)
    cell = fusion.cell(eq.state, features, mask)
    assert torch.equal(cell.flatten(1, 2), fusion.cell(flat.state, flat_features, flat_mask))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gate": "identity", "skip": True}, {"gate_input": "concat", "tail": "norm_relu"}],
    ids=repr,
)
def test_penalty_and_its_gradient_equal_double_backward(options, masked):
    fusion, probes = layer(**options), 2
    features, mask = some_features(BATCH, requires_grad=True), some_mask(BATCH) if masked else None
    present = None if mask is None else ~mask
    with torch.no_grad():
        eq = fusion.equilibrium(features, mask=mask)
    torch.manual_seed(3)
    got = fusion.jacobian_penalty(eq, features, probes=probes)
    got.backward()

    leaves = {name: p.detach().clone().requires_grad_() for name, p in fusion.named_parameters()}
    inputs = features.detach().clone().requires_grad_()
    state = eq.state.detach().requires_grad_()
    step = textbook_cell(
        leaves, state, list(inputs), CellOptions(num_groups=2, **options), present=present
    )
    torch.manual_seed(3)
    expected = torch.zeros((), dtype=torch.float64)
    for _ in range(probes):
        v = torch.randn_like(state)
        if present is not None:
            v[:-1] *= present.t().unsqueeze(-1)
        # J v as the derivative of u -> J^T u in the direction v.
        u = torch.zeros_like(step, requires_grad=True)
        (back,) = torch.autograd.grad(step, state, u, create_graph=True)
        (jv,) = torch.autograd.grad(back, u, v, create_graph=True)
        expected = expected + jv.square().sum() / (probes * state.numel())
    expected.backward()
    torch.testing.assert_close(got, expected)
    close = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(features.grad, inputs.grad, **close)
    for name, parameter in fusion.named_parameters():
        got, wanted = (torch.zeros_like(p) if p.grad is None else p.grad
                       for p in (parameter, leaves[name]))  # fmt: skip
        torch.testing.assert_close(got, wanted, **close)


@pytest.mark.parametrize("size", [1e12, 1e20, 1e37])
def test_penalty_with_a_row_of_huge_features(size):
    """Its variance overflows in fp32; the others' penalty and the gradients are what they are."""
    fusion, features = layer().float(), some_features(BATCH).float()
    features[1, 2] = size * torch.randn(DIM)
    features.requires_grad_()
    eq = fusion.equilibrium(features)
    torch.manual_seed(3)
    penalty = fusion.jacobian_penalty(eq, features)
    penalty.backward()
    # A row without an equilibrium counts as 0.
    with torch.no_grad():
        gone = features.detach().clone()
        gone[1, 2] = torch.nan
        torch.manual_seed(3)
        expected = fusion.jacobian_penalty(eq, gone)
    rest = penalty.detach() - expected
    assert 0.0 <= rest < 10 * expected
    gradients = [features.grad, *(p.grad for p in fusion.parameters() if p.grad is not None)]
    assert all(gradient.isfinite().all() for gradient in gradients)
