"""Finite-difference checks in fp64 of the whole layer, for every combination of its options.

Cells are scaled so that they contract: at default initialisation and d = 8 some have no stable
fixed point, and a finite difference across two fixed points proves nothing. Groups hold four
channels; with two, a group's normalised values are always +1 and -1 and every gradient through
it is nearly zero. All parameters form one vector, so that a check needs few solves.
"""

import itertools

import pytest
import torch
from torch.func import functional_call

from deqfusion import Anderson, DEQFusion, Implicit, Unroll
from deqfusion.testing import CellOptions, dense_jacobian, implicit_gradient, textbook_cell

DIM = 8
BATCH = 2
TIGHT = Anderson(tol=1e-12, memory=10, max_steps=400)
COMBINATIONS = list(
    itertools.product(
        ["sigmoid", "identity"],
        ["sum", "concat"],
        [False, True],
        ["relu_norm", "norm_relu"],
        [1, 2, 3],
        [False, True],
        [0.0, 0.3],
    )
)


class Whole(torch.nn.Module):
    """The layer as a function of features, with one dropout mask whatever the call."""

    def __init__(self, fusion: DEQFusion, mask: torch.Tensor | None) -> None:
        super().__init__()
        self.fusion = fusion
        self.mask = mask

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(11)
        return self.fusion.equilibrium(features, mask=self.mask).state


def contracting(count: int, seed: int = 0, **options) -> DEQFusion:
    """A layer whose parameters are random and whose map contracts."""
    torch.manual_seed(seed)
    options.setdefault("num_groups", 2)
    options.setdefault("solver", TIGHT)
    options.setdefault("adjoint", Implicit(TIGHT))
    fusion = DEQFusion(DIM, count, **options).double()
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.startswith(("norm3", "fusion_norm", "gate")):
                parameter.mul_(0.15)
    return fusion


def missing_mask(count: int) -> torch.Tensor:
    """Row 0 lacks the first modality, unless it is the only one."""
    mask = torch.zeros(BATCH, count, dtype=torch.bool)
    mask[0, 0] = count > 1
    return mask


def check(fusion: DEQFusion, count: int, mask: torch.Tensor | None) -> None:
    whole = Whole(fusion, mask)
    named = dict(whole.named_parameters())
    sizes = [parameter.numel() for parameter in named.values()]
    flat = torch.cat([p.detach().flatten() for p in named.values()]).requires_grad_()
    torch.manual_seed(5)
    features = torch.randn(count, BATCH, DIM, dtype=torch.float64, requires_grad=True)

    def layer(vector: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        parts = vector.split(sizes)
        values = {
            name: part.reshape(named[name].shape) for name, part in zip(named, parts, strict=True)
        }
        return functional_call(whole, values, (inputs,))

    with torch.no_grad():
        torch.manual_seed(11)
        stats = fusion.equilibrium(features, mask=mask).stats
    assert (stats.status == 0).all(), "the cell must contract for the check to mean anything"
    assert torch.autograd.gradcheck(layer, (flat, features), fast_mode=True, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("gate", "gate_input", "skip", "tail"),
    [
        pytest.param(*options, id="-".join(map(str, options)))
        for options in dict.fromkeys(combination[:4] for combination in COMBINATIONS)
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_layer(gate, gate_input, skip, tail, count):
    for masked, dropout in itertools.product([False, True], [0.0, 0.3]):
        fusion = contracting(
            count, gate=gate, gate_input=gate_input, skip=skip, tail=tail, dropout=dropout
        )
        check(fusion.train(), count, missing_mask(count) if masked else None)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_groups(num_groups):
    check(contracting(2, seed=7, num_groups=num_groups), 2, None)


def test_joint_solve():
    check(contracting(2, joint=True), 2, None)


def test_slow_mode_entry_by_entry():
    """Every entry of the Jacobian, where the fast mode checks random projections."""
    fusion = contracting(2)
    torch.manual_seed(5)
    features = torch.randn(2, 1, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: fusion.equilibrium(x).fused, (features,), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("gate_input", ["sum", "concat"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_implicit_gradient_equals_the_dense_solution(gate_input, masked):
    """The block-triangular adjoint equals (I - J^T)^-1 of the joint map, modalities included."""
    count = 3
    fusion = contracting(count, gate_input=gate_input)
    options = CellOptions(gate_input=gate_input, num_groups=2)
    mask = missing_mask(count) if masked else None
    torch.manual_seed(5)
    features = torch.randn(count, BATCH, DIM, dtype=torch.float64)
    inputs = features.clone().requires_grad_()
    state = fusion.equilibrium(inputs, mask=mask).state
    cotangent = torch.randn_like(state)
    state.backward(cotangent)

    parameters = {name: p.detach() for name, p in fusion.named_parameters()}
    present = torch.ones(BATCH, count, dtype=torch.bool) if mask is None else ~mask

    def step_of_row(z, rows):
        return textbook_cell(parameters, z, list(features[:, rows]), options, present=present[rows])

    star = state.detach()
    assert (step_of_row(star, torch.arange(BATCH)) - star).abs().max() < 1e-10
    jacobian = dense_jacobian(step_of_row, star)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    leaf_features = features.clone().requires_grad_()
    expected = implicit_gradient(
        lambda z: textbook_cell(leaves, z, list(leaf_features), options, present=present),
        star,
        jacobian,
        cotangent,
        [leaf_features, *leaves.values()],
    )
    scale = max(gradient.abs().max().item() for gradient in expected)
    got = [inputs.grad, *(p.grad for p in fusion.parameters())]
    for gradient, reference in zip(got, expected, strict=True):
        assert (gradient - reference).abs().max().item() < 1e-9 * scale


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("steps", [1, 3])
def test_unroll_equals_differentiating_the_textbook_steps(steps, masked):
    count = 2
    fusion = contracting(count, adjoint=Unroll(steps))
    torch.manual_seed(5)
    features = torch.randn(count, BATCH, DIM, dtype=torch.float64)
    inputs = features.clone().requires_grad_()
    mask = missing_mask(count) if masked else None
    present = None if mask is None else ~mask
    got_state = fusion.equilibrium(inputs, mask=mask).state
    cotangent = torch.randn_like(got_state)
    got_state.backward(cotangent)

    leaves = {n: p.detach().clone().requires_grad_() for n, p in fusion.named_parameters()}
    leaf_features = features.clone().requires_grad_()
    state = torch.zeros(count + 1, BATCH, DIM, dtype=torch.float64)
    for _ in range(steps):
        state = textbook_cell(
            leaves, state, list(leaf_features), CellOptions(num_groups=2), present=present
        )
    assert torch.allclose(got_state, state, rtol=1e-12, atol=1e-12)
    state.backward(cotangent)
    assert torch.allclose(inputs.grad, leaf_features.grad, rtol=1e-9, atol=1e-11)
    for name, parameter in fusion.named_parameters():
        expected = leaves[name].grad
        got = parameter.grad
        if got is None or expected is None:
            assert not (got is not None and got.any())
            assert not (expected is not None and expected.any())
            continue
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-11), name
