"""Empty batches and rows that are not finite, under every backward mode and way of solving."""

import pytest
import torch

from deqfusion import (
    Anderson,
    Broyden,
    DEQFusion,
    Implicit,
    OneStep,
    Phantom,
    Picard,
    Status,
    Unroll,
    functional,
)
from deqfusion.reference import iterate, solve

DIM, COUNT, BATCH = 16, 2, 6
WAYS = {
    "implicit": {},
    "phantom": {"adjoint": Phantom()},
    "one_step": {"adjoint": OneStep()},
    "unroll": {"adjoint": Unroll(3)},
    "joint": {"joint": True},
    "joint_phantom": {"joint": True, "adjoint": Phantom()},
}


def layer(**options) -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(DIM, COUNT, **options)


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def way(request) -> dict:
    return request.param


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 5)], ids=str)
def test_empty_batch(way, masked, warm, leading):
    fusion = layer(**way, dropout=0.1)
    features = torch.randn(COUNT, *leading, DIM, requires_grad=True)
    mask = torch.zeros(*leading, COUNT, dtype=torch.bool) if masked else None
    eq = fusion.equilibrium(features, mask=mask, trace=True)
    if warm:
        eq = fusion.equilibrium(features, init=eq, mask=mask, trace=True)
    assert eq.fused.shape == (*leading, DIM)
    assert eq.modalities.shape == (COUNT, *leading, DIM)
    assert eq.stats.status.shape == eq.stats.residual.shape == (COUNT + 1, *leading)
    assert eq.stats.trace.shape[:-1] == (COUNT + 1, *leading)
    eq.stats.raise_for_status()
    (eq.fused.sum() + fusion.jacobian_penalty(eq, features)).backward()
    assert features.grad.shape == features.shape
    for parameter in fusion.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    assert fusion.spectral_radius(eq, features).shape == leading
    assert fusion.modality_weights(eq).shape == (COUNT, *leading)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("given", [False, True], ids=["summed", "given injection"])
def test_a_row_that_is_not_finite_is_as_if_absent(way, bad, given):
    """Its fusion has no answer, whatever is injected; gradients are those of the other rows."""
    tight = Anderson(tol=1e-6, max_steps=100)
    fusion = layer(**{"solver": tight, "adjoint": Implicit(tight), **way})
    features = torch.randn(COUNT, BATCH, DIM)
    features[0, 3, 5] = bad
    injection = torch.randn(BATCH, DIM) if given else None
    kept = torch.arange(BATCH) != 3
    results = []
    for rows in (torch.arange(BATCH), kept.nonzero().squeeze(1)):
        fusion.zero_grad()
        inputs = features[:, rows].clone().requires_grad_()
        injected = None if injection is None else injection[rows].clone().requires_grad_()
        eq = fusion.equilibrium(inputs, injection=injected)
        # Over all rows: what the loss makes of a row without an answer must not spread.
        eq.fused.square().sum().backward()
        results.append((eq, inputs.grad, injected, [p.grad for p in fusion.parameters()]))
    (eq, inputs, injected, grads), (alone, inputs_alone, injected_alone, grads_alone) = results

    expected = torch.tensor([Status.NON_FINITE, Status.CONVERGED, Status.NON_FINITE])
    if fusion.joint:
        expected[:] = Status.NON_FINITE
    if isinstance(fusion.adjoint, Unroll):
        # Which of the others have settled after three steps is not the point here.
        expected[1] = eq.stats.status[1, 3]
        assert expected[1] != Status.NON_FINITE
    assert eq.stats.status[:, 3].tolist() == expected.tolist()
    assert not eq.fused[3].any()
    assert torch.equal(eq.stats.status[:, kept], alone.stats.status)
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(eq.state[:, kept], alone.state, **close)
    torch.testing.assert_close(inputs[:, kept], inputs_alone, **close)
    assert not inputs[:, 3].any()
    if given:
        torch.testing.assert_close(injected.grad[kept], injected_alone.grad, **close)
        assert not injected.grad[3].any()
    for got, wanted in zip(grads, grads_alone, strict=True):
        torch.testing.assert_close(got, wanted, **close)


def test_an_absent_modality_is_no_lost_one():
    """Absent in one row, not finite in another: only the latter has no answer."""
    fusion = layer()
    features = torch.randn(COUNT, BATCH, DIM)
    features[0, 1:3] = torch.nan
    mask = torch.zeros(BATCH, COUNT, dtype=torch.bool)
    mask[1, 0] = True
    eq = fusion.equilibrium(features, mask=mask, injection=torch.randn(BATCH, DIM))
    lost = eq.stats.status == Status.NON_FINITE
    assert lost[-1].tolist() == [False, False, True, False, False, False]
    assert lost.sum() == 2


@pytest.mark.parametrize("size", [1e10, 1e19, 1e20, 1e30])
@pytest.mark.parametrize("tail", ["relu_norm", "norm_relu"])
def test_features_whose_squares_overflow(way, tail, size):
    """The states, statuses and gradients of float64, in rows beside others of the usual size."""
    tight = Anderson(tol=1e-5, max_steps=100)
    way = {"solver": tight, "adjoint": Implicit(tight), "tail": tail, **way}
    fusion = layer(**way)
    features, direction = torch.randn(COUNT, BATCH, DIM), torch.randn(BATCH, DIM)
    sizes = torch.ones(COUNT, BATCH, 1)
    sizes[0, 1] = sizes[:, 2] = size
    # One group of four that is large, which the others do not feel.
    groups = torch.ones(COUNT, BATCH, DIM)
    groups[1, 4, :4] = size
    sizes = sizes * groups
    results = []
    for dtype in (torch.float32, torch.float64):
        fusion = fusion.to(dtype)
        fusion.zero_grad()
        inputs = (features * sizes).to(dtype).requires_grad_()
        eq = fusion.equilibrium(inputs)
        eq.fused.backward(direction.to(dtype))
        state = torch.cat((eq.modalities, eq.fused.unsqueeze(0))).detach()
        stepped = fusion.cell(state, inputs.detach())
        # In units of 1 / |x| a gradient is as large in every row.
        got = inputs.grad * sizes
        parameters = [p.grad for p in fusion.parameters()]
        results.append((eq.stats.status, [state, stepped, got, *parameters]))
    (status, values), (expected, true) = results
    assert torch.equal(status, expected)
    for value, wanted in zip(values, true, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("size", [2e12, 1e20, 1e30])
def test_what_relu_takes_away_scales_nothing(way, size):
    """One channel far below zero, beside others of the usual size in its group."""
    tight = Anderson(tol=1e-6, max_steps=100)
    fusion = layer(**{"solver": tight, "adjoint": Implicit(tight), **way})
    # With features so large every row converges.
    features, direction = 3 * torch.randn(COUNT, BATCH, DIM), torch.randn(BATCH, DIM)
    features[0, :, 0] = -size
    # A row that is scaled, beside those that are not.
    features[0, 1, 5] = size
    results = []
    for dtype in (torch.float32, torch.float64):
        fusion = fusion.to(dtype)
        inputs = features.to(dtype, copy=True).requires_grad_()
        eq = fusion.equilibrium(inputs)
        eq.fused.backward(direction.to(dtype))
        state = torch.cat((eq.modalities, eq.fused.unsqueeze(0))).detach()
        results.append((eq.fused.detach(), fusion.cell(state, inputs.detach()), inputs.grad))
    for value, wanted in zip(*results, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=2e-3, atol=2e-3)


def test_what_is_beside_a_large_number_is_open_or_closed_by_itself(way):
    """In a group that is scaled a channel's sign is that of all of it, not of the product alone."""
    tight = Anderson(tol=1e-6, max_steps=100)
    fusion = layer(**{"solver": tight, "adjoint": Implicit(tight), **way})
    features, direction = torch.randn(COUNT, BATCH, DIM), torch.randn(BATCH, DIM)
    injection = 3 * torch.randn(BATCH, DIM)
    injection[:, 0] = 1e20
    results = []
    for dtype in (torch.float32, torch.float64):
        fusion = fusion.to(dtype)
        injected = injection.to(dtype, copy=True).requires_grad_()
        fusion.equilibrium(features.to(dtype), injection=injected).fused.backward(
            direction.to(dtype)
        )
        results.append(injected.grad[:, :4] * 1e20)
    found, wanted = results
    torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", ["auto", "masked"])
@pytest.mark.parametrize("solver", [Anderson(), Picard(), Broyden()], ids=repr)
def test_an_adjoint_that_expands_falls_back_on_its_gradient(solver, backend, monkeypatch):
    """A constant row of features has no variance, and a derivative a hundred times too large."""
    if backend == "masked":
        monkeypatch.setattr(solve, "fixed_point", iterate.fixed_point_masked)
    features, direction = torch.randn(COUNT, BATCH, DIM), torch.randn(COUNT, BATCH, DIM)
    features[0, 1] = -1e9
    fusion = layer()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        eq = fusion.equilibrium(features)
    one, full = (
        functional.modality_adjoint(
            direction, eq.modalities, features, fusion.modality_parameters, cell=fusion.options,
            adjoint=adjoint,
        )
        for adjoint in (OneStep(), Implicit(solver))
    )  # fmt: skip
    status = full[2].status
    assert status[0, 1] != Status.CONVERGED
    assert (status[1] == Status.CONVERGED).all()
    assert full[0][0, 1].norm() <= 2 * one[0][0, 1].norm()
    assert full[2].residual[0, 1] <= 1
