"""Truncated gradients: what `Phantom` and `OneStep` compute, term by term."""

import pytest
import torch

from deqfusion import Anderson, DEQFusion, Implicit, OneStep, Phantom
from deqfusion.reference.cell import fusion_cell, gate_constants, modality_cell

DIM, COUNT, BATCH = 8, 2, 5


def neumann(output, point, gradient, steps, damping):
    """damping * sum_{j < steps} ((1 - damping) I + damping J^T)^j gradient."""
    term, total = gradient, torch.zeros_like(gradient)
    for _ in range(steps):
        total = total + damping * term
        (back,) = torch.autograd.grad(output, point, term, retain_graph=True)
        term = (1 - damping) * term + damping * back
    return total


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("joint", [False, True], ids=["split", "joint"])
@pytest.mark.parametrize(
    ("adjoint", "steps", "damping"),
    [
        (OneStep(), 1, 1.0),
        (Phantom(), 5, 0.5),
        (Phantom(3, 0.25), 3, 0.25),
        (Phantom(4, 1), 4, 1.0),
    ],
    ids=repr,
)
def test_the_gradient_is_a_truncated_neumann_sum(adjoint, steps, damping, joint, masked):
    torch.manual_seed(0)
    solver = Anderson(tol=1e-12, max_steps=300)
    fusion = DEQFusion(
        DIM, COUNT, num_groups=2, solver=solver, adjoint=adjoint, joint=joint
    ).double()
    mask = torch.zeros(BATCH, COUNT, dtype=torch.bool)
    mask[1, 0] = masked
    features = torch.randn(COUNT, BATCH, DIM, dtype=torch.float64, requires_grad=True)
    # From any point: a truncated sum does not need the point to be an equilibrium.
    eq = fusion.equilibrium(features, mask=mask)
    to_modalities, to_fused = torch.randn_like(eq.modalities), torch.randn_like(eq.fused)
    torch.autograd.backward((eq.modalities, eq.fused), (to_modalities, to_fused))

    present = (~mask).t().unsqueeze(-1).double()
    x = features.detach().clone().requires_grad_()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in fusion.named_parameters()}
    of_modalities, of_fusion = (
        type(p)(*(leaves[next(n for n, q in fusion.named_parameters() if q is t)] for t in p))
        for p in (fusion.modality_parameters, fusion.fusion_parameters)
    )
    z, fused = (t.detach().clone().requires_grad_() for t in (eq.modalities, eq.fused))
    weight, bias = leaves["injection_weight"], leaves["injection_bias"]
    injection = (weight[:, None, None] * present * x).sum(0) + bias
    constants = gate_constants(z, of_fusion, fusion.options)
    out = fusion_cell(fused, constants, injection, of_fusion, fusion.options, present)
    last = neumann(out, fused, to_fused, steps, damping)
    inputs = [z, x, weight, bias, *of_fusion]
    from_fusion = torch.autograd.grad(out, inputs, last, retain_graph=True)
    out = modality_cell(z, x, of_modalities, fusion.options) * present
    first = neumann(out, z, (to_modalities + from_fusion[0]) * present, steps, damping)
    from_modalities = torch.autograd.grad(out, [x, *of_modalities], first)

    expected = {id(t): g for t, g in zip(inputs, from_fusion, strict=True)}
    expected.update(zip(map(id, of_modalities), from_modalities[1:], strict=True))
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(features.grad, from_fusion[1] + from_modalities[0], **close)
    for name, parameter in fusion.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[id(leaves[name])], **close)


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(), OneStep()], ids=str)
@pytest.mark.parametrize("joint", [False, True])
def test_double_backward_is_an_error(adjoint, joint):
    """Also where the first gradient is by the features and the incoming one requires none."""
    fusion = DEQFusion(8, 2, adjoint=adjoint, joint=joint)
    features = torch.randn(2, 3, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(fusion(features).sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(), OneStep()], ids=str)
def test_no_way_around_that_error(adjoint):
    """A second gradient may be asked for by something that the first one only passed through."""
    encoder, fusion = torch.nn.Linear(4, 8), DEQFusion(8, 2, adjoint=adjoint)
    x = torch.randn(3, 4, requires_grad=True)

    def first():
        fused = fusion([encoder(x), encoder(x).tanh()])
        return torch.autograd.grad(fused.pow(3).sum(), x, create_graph=True)[0]

    of_fusion = fusion.modality_parameters.weight1
    for place in (encoder.weight, x, of_fusion, fusion.gate_weight):
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(first().norm(), place)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        first().square().sum().backward(inputs=list(encoder.parameters()))
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.functional.hessian(lambda a: fusion([a, a]).square().sum(), encoder(x))
    assert first().isfinite().all()
