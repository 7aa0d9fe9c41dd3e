"""Holds the layer against the golden vectors: the authors' code in fp64, and its equations.

Solves that must agree with a stored fixed point start from it, because some of these random
cells have several. Their spectral radii reach 38, so the adjoint solves keep a long history.
"""

import math

import pytest
import torch

from deqfusion import Anderson, DEQFusion, Implicit, Picard
from deqfusion.compat import export_official, load_official
from deqfusion.testing import GoldenCase, golden_files, load_golden

FILES = golden_files()
pytestmark = [
    pytest.mark.skipif(
        not FILES,
        reason="golden vectors not found: set DEQFUSION_GOLDEN or place them in ../shared/golden",
    ),
    # Some files are of the paper's equations, under the authors' names.
    pytest.mark.filterwarnings("ignore:fusion. got"),
]


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return load_golden(request.param)


def build(case: GoldenCase, dtype: torch.dtype = torch.float64, **overrides) -> DEQFusion:
    """The layer that a golden file describes, with its parameters."""
    options = case.options
    fusion = DEQFusion(
        case.dim,
        case.num_modalities,
        num_groups=options.num_groups,
        gate=options.gate,
        gate_input=options.gate_input,
        skip=options.skip,
        **overrides,
    ).to(dtype)
    load_official(fusion, case.official)
    return fusion


def exact_solvers(case: GoldenCase) -> dict:
    """Solver settings that leave no visible error, with an adjoint history of up to d."""
    return {
        "solver": Anderson(tol=1e-12, memory=10, max_steps=400),
        "adjoint": Implicit(Anderson(tol=1e-12, memory=min(case.dim, 64), max_steps=1000)),
    }


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def test_parameters_load_and_export_bitwise(case):
    for dtype in (torch.float32, torch.float64):
        fusion = build(case, dtype)
        loaded = {name: value.clone() for name, value in fusion.state_dict().items()}
        assert loaded.keys() == case.parameters.keys()
        for name, expected in case.parameters.items():
            assert torch.equal(loaded[name], expected.to(dtype)), name
        exported = export_official(fusion)
        assert list(exported) == list(case.official)
        for name, expected in case.official.items():
            assert torch.equal(exported[name], expected.to(dtype)), name
        fusion.reset_parameters()
        load_official(fusion, exported)
        for name, expected in fusion.state_dict().items():
            assert torch.equal(loaded[name], expected), name


def test_cell_step(case):
    got = build(case).cell(case.state("z_rand"), case.features)
    assert relative_error(got, case.state("cell_z_rand_f64")) < 1e-11


def test_cell_vjp(case):
    if "v" not in case.arrays:
        pytest.skip("the d=500 files hold no cotangent")
    fusion = build(case)
    state = case.state("z_rand").requires_grad_()
    features = [feature.clone().requires_grad_() for feature in case.features]
    fusion.cell(state, features).backward(case.state("v"))

    assert relative_error(state.grad, case.state("cell_vjp_z_f64")) < 1e-11
    injection_grad = case.arrays["cell_vjp_xfuse_f64"]
    weights = fusion.injection_weight.detach()
    for i, feature in enumerate(features):
        # The file holds x_f fixed; here it is formed from the features.
        expected = case.arrays["cell_vjp_x_f64"][i] + weights[i] * injection_grad
        assert relative_error(feature.grad, expected) < 1e-11
    expected = torch.stack([(x * injection_grad).sum() for x in case.features])
    assert relative_error(fusion.injection_weight.grad, expected) < 1e-11
    assert fusion.injection_bias.grad.item() == pytest.approx(injection_grad.sum().item(), 1e-9)


def test_fixed_point(case):
    fusion = build(case, **exact_solvers(case))
    star = case.state("z_star_f64")
    with torch.no_grad():
        step = fusion.cell(star, case.features)
        equilibrium = fusion.equilibrium(case.features, init=star)
        again = fusion.cell(equilibrium.state, case.features)
    # (N+1, B): every block of every row, not an average over them.
    assert ((step - star).norm(dim=-1) / star.norm(dim=-1)).max() < 1e-11
    assert equilibrium.stats.residual.max() < 1e-11
    residual = (again - equilibrium.state).norm(dim=-1) / equilibrium.state.norm(dim=-1)
    assert residual.max() < 1e-11
    assert relative_error(equilibrium.state, star) < 1e-9
    assert (equilibrium.stats.status == 0).all()


@pytest.mark.parametrize("joint", [False, True], ids=["split", "joint"])
def test_gradients(case, joint):
    if joint and (case.dim > 64 or case.meta["B"] > 8):
        pytest.skip("the joint adjoint is checked on the smaller cases")
    settings = exact_solvers(case)
    if joint:
        memory = min((case.num_modalities + 1) * case.dim, 150)
        settings["adjoint"] = Implicit(Anderson(tol=1e-12, memory=memory, max_steps=1000))
    fusion = build(case, joint=joint, **settings)
    features = [feature.clone().requires_grad_() for feature in case.features]
    fused = fusion.equilibrium(features, init=case.state("z_star_f64")).fused
    loss = (case.arrays["w"] * fused).sum()
    assert loss.item() == pytest.approx(case.arrays["loss_f64"].item(), rel=1e-9)
    loss.backward()

    scale = max(grad.abs().max().item() for grad in case.official_grad.values())
    got = export_official(fusion, grad=True)
    assert got.keys() == case.official_grad.keys()
    for name, expected in case.official_grad.items():
        assert (got[name] - expected).abs().max().item() < 1e-8 * scale, name
    input_grads = [case.arrays[f"grad_x_{i}_f64"] for i in range(case.num_modalities)]
    scale = max(grad.abs().max().item() for grad in input_grads)
    for feature, expected in zip(features, input_grads, strict=True):
        assert (feature.grad - expected).abs().max().item() < 1e-8 * scale


def test_jacobian_penalty_expectation(case):
    fusion = build(case)
    with torch.no_grad():
        equilibrium = fusion.equilibrium(case.features, init=case.state("z_star_f64"))
    torch.manual_seed(7)
    draws = torch.stack(
        [fusion.jacobian_penalty(equilibrium, case.features, probes=1).detach() for _ in range(300)]
    )
    exact = case.arrays["jac_fro2"].sum() / case.state("z_star_f64").numel()
    standard_error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - exact) < 3 * standard_error
    # A wide interval would prove nothing.
    assert standard_error < 0.1 * exact


def test_spectral_radius(case):
    fusion = build(case)
    with torch.no_grad():
        equilibrium = fusion.equilibrium(case.features, init=case.state("z_star_f64"))
    torch.manual_seed(0)
    got = fusion.spectral_radius(equilibrium, case.features)
    assert got.shape == case.arrays["rho"].shape
    assert ((got - case.arrays["rho"]).abs() / case.arrays["rho"]).max() < 0.01


def test_solve_from_zero_reaches_the_fixed_point(case):
    """Each solver reaches z* on the rows where the files say that its kind of iteration does."""
    plain = case.arrays["dist_plain400_to_star"] < 1e-8
    accelerated = case.arrays["dist_anderson200_to_star"] < 1e-8
    solvers = [
        (Picard(tol=1e-13, max_steps=2000), plain),
        (Anderson(tol=1e-12, memory=6, max_steps=400), accelerated),
    ]
    if case.meta["calm"] or case.dim == 500:
        assert plain.all()
        solvers.append((Anderson(tol=1e-12, max_steps=400), plain))
    if not (plain | accelerated).any():
        pytest.skip("the file says that no row of this case is reached from zero")
    star = case.state("z_star_f64")
    for solver, rows in solvers:
        # The joint solve of the widest cases takes seconds and adds nothing to the narrow ones.
        for joint in (False, True) if case.dim < 500 else (False,):
            fusion = build(case, solver=solver, joint=joint)
            with torch.no_grad():
                state = fusion.equilibrium(case.features).state
            distance = (state - star).movedim(1, 0).flatten(1).norm(dim=1)
            distance = distance / star.movedim(1, 0).flatten(1).norm(dim=1)
            assert (distance[rows] < 1e-8).all(), (solver, joint, distance)


def test_anderson_trace_matches_the_authors_solver(case):
    """Eight evaluations of the joint solve with an absolute ridge are the authors' algorithm."""
    steps = len(case.arrays["anderson8_abs_trace"])
    solver = Anderson(
        tol=1e-30, max_steps=steps, memory=6, ridge=1e-4, ridge_mode="absolute", ladder="off"
    )
    fusion = build(case, solver=solver, joint=True)
    with torch.no_grad():
        equilibrium = fusion.equilibrium(case.features, trace=True)
    trace = equilibrium.stats.absolute_trace
    # Under `joint` the blocks are one problem: whichever way the trace is stored, a row's
    # residual must be counted once.
    per_row = trace[0] if torch.equal(trace[0], trace[-1]) else trace.norm(dim=0)
    got = per_row.norm(dim=0)
    expected = case.arrays["anderson8_abs_trace"]
    assert got.shape == expected.shape
    assert ((got - expected).abs() / expected).max() < 1e-6
