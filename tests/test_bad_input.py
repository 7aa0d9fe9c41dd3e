"""What wrong input gets: an error that names it, or the right result. Never silence."""

import numpy as np
import pytest
import torch

from deqfusion import (
    Anderson,
    Broyden,
    DEQFusion,
    Implicit,
    Phantom,
    Picard,
    Status,
    ToleranceSchedule,
    Unroll,
    functional,
)
from deqfusion.solution import ConvergenceError, SolveStats

DIM, COUNT, BATCH = 16, 2, 6


@pytest.fixture
def fusion() -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(DIM, COUNT)


def features(*, count=COUNT, batch=BATCH, dim=DIM, **kwargs) -> torch.Tensor:
    return torch.randn(count, batch, dim, **kwargs)


def assert_names(error: pytest.ExceptionInfo, *fragments: str) -> None:
    """An error must name the argument, what was got and what was expected, on one line."""
    message = str(error.value)
    for fragment in fragments:
        assert fragment in message, message
    assert "expected" in message, message
    assert "\n" not in message


@pytest.mark.parametrize("as_list", [False, True], ids=["tensor", "list"])
class TestFeatures:
    def call(self, fusion, values, as_list):
        return fusion(list(values) if as_list else values)

    def test_wrong_width(self, fusion, as_list):
        with pytest.raises(ValueError, match="expected") as error:
            self.call(fusion, features(dim=DIM + 4), as_list)
        assert_names(error, "features", str(DIM + 4), str(DIM))

    def test_wrong_count(self, fusion, as_list):
        with pytest.raises(ValueError, match="expected") as error:
            self.call(fusion, features(count=COUNT + 3), as_list)
        assert_names(error, "features", str(COUNT + 3), str(COUNT))

    def test_integers(self, fusion, as_list):
        with pytest.raises(TypeError) as error:
            self.call(fusion, torch.ones(COUNT, BATCH, DIM, dtype=torch.int64), as_list)
        assert_names(error, "features", "int64")

    def test_empty_batch(self, fusion, as_list):
        values = features(batch=0).requires_grad_()
        fused = self.call(fusion, values, as_list)
        assert fused.shape == (0, DIM)
        fused.sum().backward()
        assert values.grad.shape == values.shape
        for parameter in fusion.parameters():
            assert parameter.grad is None or not parameter.grad.any()

    def test_another_device(self, fusion, as_list):
        with pytest.raises(ValueError, match="expected") as error:
            self.call(fusion, features(device="meta"), as_list)
        assert_names(error, "meta", "cpu")


def test_features_of_different_shapes(fusion):
    with pytest.raises(ValueError, match="expected") as error:
        fusion([torch.randn(BATCH, DIM), torch.randn(BATCH + 1, DIM)])
    assert_names(error, "features", str(BATCH), str(BATCH + 1))


def test_features_on_mixed_devices(fusion):
    with pytest.raises(ValueError, match="expected") as error:
        fusion([torch.randn(BATCH, DIM), torch.randn(BATCH, DIM, device="meta")])
    assert_names(error, "features", "meta", "cpu")


def test_features_of_mixed_dtypes(fusion):
    with pytest.raises((TypeError, ValueError)) as error:
        fusion([torch.randn(BATCH, DIM), torch.randn(BATCH, DIM, dtype=torch.float64)])
    assert_names(error, "features", "float64")


@pytest.mark.parametrize("wrong", [None, 3, "features", [1.0, 2.0], [None, None]], ids=repr)
def test_features_that_are_no_tensors(fusion, wrong):
    with pytest.raises(TypeError) as error:
        fusion(wrong)
    assert_names(error, "features")


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "fragments"),
    [
        ((10, 2), {}, ValueError, ("10", "4")),
        ((16, 2), {"num_groups": 5}, ValueError, ("num_groups", "16", "5")),
        ((16, 2), {"num_groups": 0}, ValueError, ("num_groups", "0")),
        ((0, 2), {}, ValueError, ("dim", "0")),
        ((16, 0), {}, ValueError, ("num_modalities", "0")),
        ((16.0, 2), {}, TypeError, ("dim", "16.0")),
        ((16, "2"), {}, TypeError, ("num_modalities", "'2'")),
        ((16, 2), {"gate": "tanh"}, ValueError, ("gate", "tanh", "sigmoid", "identity")),
        ((16, 2), {"gate_input": "both"}, ValueError, ("gate_input", "both", "sum", "concat")),
        ((16, 2), {"tail": "norm"}, ValueError, ("tail", "norm", "relu_norm", "norm_relu")),
        ((16, 2), {"skip": "yes"}, TypeError, ("skip", "yes")),
        ((16, 2), {"joint": 2}, TypeError, ("joint", "2")),
        ((16, 2), {"dropout": 1.5}, ValueError, ("dropout", "1.5")),
        ((16, 2), {"dropout": -0.1}, ValueError, ("dropout", "-0.1")),
        ((16, 2), {"dropout": "0.1"}, TypeError, ("dropout", "0.1")),
        ((16, 2), {"solver": "anderson"}, TypeError, ("solver", "anderson", "Anderson")),
        ((16, 2), {"solver": None}, TypeError, ("solver", "None")),
        ((16, 2), {"solver": Anderson}, TypeError, ("solver", "Anderson")),
        ((16, 2), {"adjoint": "implicit"}, TypeError, ("adjoint", "implicit", "Implicit")),
        ((16, 2), {"adjoint": Anderson()}, TypeError, ("adjoint", "Anderson")),
        ((16, 2), {"dtype": torch.int32}, TypeError, ("dtype", "torch.int32", "torch.float32")),
        ((16, 2), {"dtype": "float32"}, TypeError, ("dtype", "'float32'", "torch.float32")),
        ((np.float64(16), 2), {}, TypeError, ("dim", "16.0")),
    ],
)
def test_layer_options(arguments, options, kind, fragments):
    with pytest.raises(kind) as error:
        DEQFusion(*arguments, **options)
    assert_names(error, *fragments)


def test_numbers_of_numpy():
    sixteen, two = np.int64(16), np.int32(2)
    solver = Anderson(max_steps=np.int64(30), memory=two)
    adjoint = Implicit(Broyden(max_steps=sixteen, memory=two))
    fusion = DEQFusion(sixteen, two, num_groups=two, solver=solver, adjoint=adjoint)
    assert type(fusion.dim) is type(fusion.num_modalities) is int
    fusion(features()).sum().backward()
    DEQFusion(16, 2, adjoint=Phantom(steps=two))(features()).sum().backward()


def test_unknown_option():
    with pytest.raises(TypeError, match="f_max_iter"):
        DEQFusion(16, 2, f_max_iter=3)


@pytest.mark.parametrize("solver", [Anderson, Picard, Broyden])
@pytest.mark.parametrize(
    ("options", "kind", "name"),
    [
        ({"tol": 0}, ValueError, "tol"),
        ({"tol": -1e-3}, ValueError, "tol"),
        ({"tol": float("nan")}, ValueError, "tol"),
        ({"tol": float("inf")}, ValueError, "tol"),
        ({"tol": "1e-3"}, TypeError, "tol"),
        ({"atol": -1.0}, ValueError, "atol"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"max_steps": 2.5}, TypeError, "max_steps"),
    ],
)
def test_solver_options(solver, options, kind, name):
    with pytest.raises(kind) as error:
        solver(**options)
    assert_names(error, name, str(next(iter(options.values()))))


@pytest.mark.parametrize(
    ("make", "kind", "fragments"),
    [
        (lambda: Anderson(memory=-1), ValueError, ("memory", "-1")),
        (lambda: Anderson(ridge=-1.0), ValueError, ("ridge", "-1.0")),
        (lambda: Anderson(ridge_mode="abs"), ValueError, ("ridge_mode", "abs", "relative")),
        (lambda: Anderson(mixing=0.0), ValueError, ("mixing", "0.0")),
        (lambda: Anderson(ladder="on"), ValueError, ("ladder", "on", "auto", "off")),
        (lambda: Picard(damping=0.0), ValueError, ("damping", "0.0")),
        (lambda: Broyden(memory=0), ValueError, ("memory", "0")),
        (lambda: Implicit(solver="anderson"), TypeError, ("solver", "anderson")),
        (lambda: Phantom(steps=0), ValueError, ("steps", "0")),
        (lambda: Phantom(damping=2.0), ValueError, ("damping", "2.0")),
        (lambda: Unroll(0), ValueError, ("steps", "0")),
        (lambda: ToleranceSchedule(1e-3, 1e-1, 5), ValueError, ("end", "0.1", "start = 0.001")),
    ],
)
def test_solver_and_adjoint_values(make, kind, fragments):
    with pytest.raises(kind) as error:
        make()
    assert_names(error, *fragments)


@pytest.mark.parametrize(
    ("mask", "kind", "fragments"),
    [
        (torch.ones(BATCH, COUNT + 1, dtype=torch.bool), ValueError, ("mask", "(6, 3)", "(6, 2)")),
        (torch.ones(COUNT, BATCH, dtype=torch.bool), ValueError, ("mask", "(2, 6)", "(6, 2)")),
        (torch.ones(BATCH, COUNT, dtype=torch.bool), ValueError, ("mask", "no modality")),
        ([[False, True]] * BATCH, TypeError, ("mask", "list")),
    ],
)
def test_mask(fusion, mask, kind, fragments):
    with pytest.raises(kind) as error:
        fusion.equilibrium(features(), mask=mask)
    assert_names(error, *fragments)


def test_mask_with_one_row_empty(fusion):
    mask = torch.zeros(BATCH, COUNT, dtype=torch.bool)
    mask[3] = True
    with pytest.raises(ValueError, match="expected") as error:
        fusion.equilibrium(features(), mask=mask)
    assert_names(error, "mask", "no modality", "1")


def test_mask_with_one_row_empty_in_a_compiled_layer(fusion):
    mask = torch.zeros(BATCH, COUNT, dtype=torch.bool)
    mask[3] = True
    torch._dynamo.reset()
    compiled = torch.compile(fusion, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="expected") as error:
        compiled(features(), mask=mask)
    assert_names(error, "mask: got a row with no modality present", "at least one per row")


@pytest.mark.parametrize("options", [{}, {"joint": True}, {"adjoint": Unroll(2)}], ids=repr)
def test_mask_with_one_row_empty_where_nobody_looks(monkeypatch, options):
    """On a GPU the check would wait for the device; there the row has no fusion instead."""
    monkeypatch.setattr("deqfusion.validation._some_present", lambda rows: None)
    fusion, values = DEQFusion(DIM, COUNT, **options), features()
    mask = torch.zeros(BATCH, COUNT, dtype=torch.bool)
    mask[3] = True
    others = torch.arange(BATCH) != 3
    eq = fusion.equilibrium(values, mask=mask)
    assert eq.stats.status[-1, 3] == Status.NON_FINITE
    assert not eq.fused[3].any()
    assert (eq.stats.status[-1, others] != Status.NON_FINITE).all()
    torch.testing.assert_close(eq.fused[others], fusion(values[:, others]), rtol=1e-4, atol=1e-5)
    (eq.fused.sum() + fusion.jacobian_penalty(eq, values)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


@pytest.mark.parametrize("options", [{}, {"joint": True}, {"adjoint": Unroll(9)}], ids=repr)
def test_rows_of_init_that_are_not_finite_start_from_zero(options):
    torch.manual_seed(0)
    fusion, values = DEQFusion(DIM, COUNT, **options), features()
    init = torch.randn(COUNT + 1, BATCH, DIM)
    cleared = init.clone()
    for block, row, value in ((0, 3, float("nan")), (COUNT, 4, float("inf"))):
        init[block, row, 5] = value
        cleared[block, row] = 0
    got, expected = fusion.equilibrium(values, init=init), fusion.equilibrium(values, init=cleared)
    assert torch.equal(got.state, expected.state)
    assert torch.equal(got.stats.status, expected.stats.status)
    assert (got.stats.status != Status.NON_FINITE).all()


@pytest.mark.parametrize(
    ("init", "kind"),
    [
        (torch.zeros(COUNT, BATCH, DIM), ValueError),
        (torch.zeros(COUNT + 1, BATCH, DIM + 1), ValueError),
        (torch.zeros(COUNT + 1, BATCH, DIM, dtype=torch.int32), TypeError),
        ("zeros", TypeError),
    ],
)
def test_init(fusion, init, kind):
    with pytest.raises(kind) as error:
        fusion.equilibrium(features(), init=init)
    assert_names(error, "init")


def test_cell_state(fusion):
    with pytest.raises(ValueError, match="expected") as error:
        fusion.cell(torch.zeros(COUNT, BATCH, DIM), features())
    assert_names(error, "state", str((COUNT, BATCH, DIM)), str((COUNT + 1, BATCH, DIM)))


def test_grad_inside_no_grad(fusion):
    values = features().requires_grad_()
    with torch.no_grad():
        fused = fusion(values)
    assert not fused.requires_grad
    assert torch.equal(fused, fusion(values).detach())
    with torch.inference_mode():
        assert torch.equal(fusion(values), fused)


def test_frozen_parameters_and_plain_features(fusion):
    fusion.requires_grad_(False)
    assert not fusion(features()).requires_grad
    values = features().requires_grad_()
    fusion(values).sum().backward()
    assert values.grad.isfinite().all()


def test_single_row(fusion):
    values = features(batch=1).requires_grad_()
    fused = fusion(values)
    assert fused.shape == (1, DIM)
    fused.sum().backward()
    assert values.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("joint", [False, True], ids=["split", "joint"])
@pytest.mark.parametrize("solver", [Anderson(), Picard(), Broyden()], ids=repr)
def test_rows_that_are_not_finite(bad, joint, solver):
    torch.manual_seed(0)
    fusion = DEQFusion(DIM, COUNT, solver=solver, joint=joint)
    clean = features()
    spoiled = clean.clone()
    spoiled[1, 2, 5] = bad
    others = torch.tensor([0, 1, 3, 4, 5])

    inputs = spoiled.clone().requires_grad_()
    equilibrium = fusion.equilibrium(inputs)
    # The fusion block reads every modality, so it is spoiled along with modality 1.
    assert equilibrium.stats.status[1, 2] == Status.NON_FINITE
    assert equilibrium.stats.status[-1, 2] == Status.NON_FINITE
    assert (equilibrium.stats.status[:, others] != Status.NON_FINITE).all()

    reference_inputs = clean.clone().requires_grad_()
    reference = fusion.equilibrium(reference_inputs)
    difference = (equilibrium.state - reference.state)[:, others].norm(dim=-1)
    assert (difference < 1e-5 * reference.state[:, others].norm(dim=-1)).all()
    assert torch.equal(equilibrium.stats.steps[:, others], reference.stats.steps[:, others])

    equilibrium.fused[others].sum().backward()
    got = inputs.grad[:, others]
    reference.fused[others].sum().backward()
    expected = reference_inputs.grad[:, others]
    assert got.isfinite().all()
    assert (got - expected).norm() < 1e-4 * expected.norm()
    for name, parameter in fusion.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_loss_over_all_rows_keeps_the_others_gradients(fusion):
    """A mean over the batch must not carry one row's NaN into the other rows' gradients."""
    spoiled = features()
    spoiled[0, 2] = float("nan")
    inputs = spoiled.requires_grad_()
    fusion(inputs).sum().backward()
    others = torch.tensor([0, 1, 3, 4, 5])
    assert inputs.grad[:, others].isfinite().all()


def test_non_finite_parameters(fusion):
    with torch.no_grad():
        fusion.fusion_weight[0, 0] = float("nan")
        equilibrium = fusion.equilibrium(features())
    assert (equilibrium.stats.status[:-1] == Status.CONVERGED).all()
    assert (equilibrium.stats.status[-1] == Status.NON_FINITE).all()


def test_raise_for_status(fusion):
    fusion.equilibrium(features()).stats.raise_for_status()
    spoiled = features()
    spoiled[1, 2:4] = float("nan")
    with pytest.raises(ConvergenceError) as error:
        fusion.equilibrium(spoiled).stats.raise_for_status()
    message = str(error.value)
    assert message.endswith(
        "NON_FINITE in 2 of 6 rows of modality 1, 2 of 6 rows of fusion: NaN or inf: check "
        "features and parameters"
    )
    assert "max_steps" not in message
    hurried = DEQFusion(DIM, COUNT, solver=Anderson(tol=1e-6, max_steps=2))
    with pytest.raises(ConvergenceError, match=r"raise max_steps or loosen tol$"):
        hurried.equilibrium(features()).stats.raise_for_status()
    # Every status has its advice, once.
    status = torch.tensor([[0, 1, 2, 3], [1, 1, 0, 0]], dtype=torch.int32)
    with pytest.raises(ConvergenceError) as error:
        SolveStats(status, status, torch.full((2, 4), 0.25)).raise_for_status()
    assert str(error.value) == (
        "MAX_STEPS in 1 of 4 rows of modality 0 (residual 2.5e-01), 2 of 4 rows of fusion "
        "(residual 2.5e-01): raise max_steps or loosen tol; STAGNATED in 1 of 4 rows of modality 0 "
        "(residual 2.5e-01): the map does not contract there, or tol is below the dtype's "
        "rounding; NON_FINITE in 1 of 4 rows of modality 0: NaN or inf: check features and "
        "parameters"
    )


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 1e30])
def test_extreme_but_finite_features(fusion, value):
    values = torch.full((COUNT, BATCH, DIM), value).requires_grad_()
    equilibrium = fusion.equilibrium(values)
    assert equilibrium.state.isfinite().all()
    assert (equilibrium.stats.status != Status.NON_FINITE).all()
    equilibrium.fused.sum().backward()
    assert values.grad.isfinite().all()


def test_spectral_radius_of_a_zero_jacobian(fusion):
    """A cell that does not depend on its state has radius 0, not NaN from a zero vector."""
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            if name.startswith(("modality_weight", "fusion_weight", "gate_weight")):
                parameter.zero_()
    values = features()
    radius = fusion.spectral_radius(fusion.equilibrium(values), values)
    assert radius.shape == (BATCH,)
    assert (radius == 0).all()


def test_nothing_is_printed_or_logged(fusion, capfd, caplog):
    spoiled = features()
    spoiled[0, 0] = float("nan")
    fusion(spoiled).nansum().backward()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not caplog.records


@pytest.mark.parametrize("adjoint", [Implicit(), Unroll(3)], ids=["implicit", "unroll"])
def test_gradients_beside_a_row_that_is_not_finite(adjoint):
    """Its state and gradient are 0, the parameters' gradients those of the other rows alone."""
    torch.manual_seed(0)
    fusion = DEQFusion(16, 2, adjoint=adjoint)
    features = torch.randn(2, 6, 16)
    features[0, 3] = torch.nan
    others = torch.arange(6) != 3
    grads = []
    for rows in (torch.arange(6), others.nonzero().squeeze(1)):
        fusion.zero_grad()
        inputs = features[:, rows].clone().requires_grad_()
        eq = fusion.equilibrium(inputs)
        kept = others[rows]
        loss = eq.fused[kept].square().sum() + fusion.jacobian_penalty(eq, inputs) * 0
        loss.backward()
        assert inputs.grad[:, ~kept].eq(0).all()
        assert eq.fused[~kept].eq(0).all()
        assert (eq.stats.status[-1][~kept] == Status.NON_FINITE).all()
        grads.append([parameter.grad for parameter in fusion.parameters()])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("field", ["gate", "gate_input", "tail"])
def test_functions_refuse_unknown_options(field):
    fusion = DEQFusion(16, 2)
    cell = fusion.options._replace(**{field: "Identity"})
    x = torch.randn(2, 3, 16)
    with pytest.raises(ValueError, match=f"{field}: got 'Identity', expected one of"):
        functional.modality_equilibrium(x, fusion.modality_parameters, cell=cell)
    with pytest.raises(ValueError, match=f"{field}: got 'Identity', expected one of"):
        functional.fusion_equilibrium(x, x[0], fusion.fusion_parameters, cell=cell)


@pytest.mark.parametrize("injection", [torch.zeros(3, 16, dtype=torch.long), [0.0]])
def test_injection_of_another_type(injection):
    fusion = DEQFusion(16, 2)
    with pytest.raises(TypeError, match=r"injection: got .*, expected a floating-point tensor"):
        fusion.equilibrium(torch.randn(2, 3, 16), injection=injection)


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom()], ids=["implicit", "phantom"])
def test_double_backward_is_refused(adjoint):
    fusion = DEQFusion(16, 2, adjoint=adjoint)
    x = torch.randn(2, 3, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(fusion(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


def test_what_needs_an_equilibrium_says_so():
    fusion = DEQFusion(16, 2)
    x = torch.randn(2, 3, 16)
    expected = "eq: got Tensor, expected what `fusion.equilibrium` returns"
    for call in (fusion.jacobian_penalty, fusion.spectral_radius):
        with pytest.raises(TypeError, match=expected):
            call(fusion(x), x)
    with pytest.raises(TypeError, match=expected):
        fusion.modality_weights(fusion(x))


@pytest.mark.parametrize("rows", [2, 3, 6])
@pytest.mark.parametrize("count", [2, 3])
def test_features_as_separate_arguments(count, rows):
    fusion = DEQFusion(16, count)
    names = ", ".join(f"x{index + 1}" for index in range(count))
    with pytest.raises((TypeError, ValueError)) as error:
        fusion(*torch.randn(count, rows, 16))
    assert f"pass a list: fusion([{names}])" in str(error.value)


def test_one_feature_in_place_of_all():
    message = (
        r"features: got one tensor of shape \(6, 16\), which has 6 modalities, expected 5; "
        r"for features, pass a list: fusion\(\[x1, x2, \.\.\., x5\]\)"
    )
    with pytest.raises(ValueError, match=message):
        DEQFusion(16, 5)(torch.randn(6, 16))
