"""The golden vectors through the Triton programs: the authors' code, in fp64.

Interpreted, a step of the cell is made of every file, and the fixed point and gradients there of
the smallest ones: an adjoint solve of a file of width 500 takes an hour there. On a device all.
"""

import pytest
import torch

from deqfusion import Anderson, DEQFusion, Implicit
from deqfusion.compat import export_official, load_official
from deqfusion.kernels import interpreted
from deqfusion.testing import golden_files, load_golden

DEVICE = "cpu" if interpreted() else "cuda"
SMALL = 20

pytestmark = [
    pytest.mark.skipif(
        not interpreted() and not torch.cuda.is_available(),
        reason="needs Triton's interpreter or a GPU that torch can use",
    ),
    pytest.mark.skipif(not golden_files(), reason="golden vectors not found: set DEQFUSION_GOLDEN"),
    # Some files are of the paper's equations, under the authors' names.
    pytest.mark.filterwarnings("ignore:fusion. got"),
]


def build(case, **solvers):
    options = case.options
    model = DEQFusion(
        case.dim, case.num_modalities, num_groups=options.num_groups, gate=options.gate,
        gate_input=options.gate_input, skip=options.skip, **solvers,
    )  # fmt: skip
    load_official(model, case.official)
    return model.to(DEVICE)


def features_of(case):
    return [x.float().to(DEVICE) for x in case.features]


@pytest.mark.parametrize("path", golden_files(), ids=lambda path: path.stem)
def test_step_of_the_cell(path, monkeypatch):
    case = load_golden(path)

    def step():
        start = case.state("z_rand").float().to(DEVICE)
        with torch.no_grad():
            eq = build(case, solver=Anderson(max_steps=1)).equilibrium(
                features_of(case), init=start
            )
        return eq.state.double().cpu()

    true = case.state("cell_z_rand_f64")
    monkeypatch.setenv("DEQFUSION_BACKEND", "reference")
    expected = step()
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    error, allowed = ((one - true).norm() / true.norm() for one in (step(), expected))
    assert error <= 2 * allowed + 1e-7


SOME = [path for path in golden_files() if DEVICE == "cuda" or load_golden(path).dim <= SMALL]
CALM = [path for path in SOME if DEVICE == "cuda" or "calm" in path.stem]


@pytest.mark.parametrize("path", CALM, ids=lambda path: path.stem)
def test_fixed_point(path, monkeypatch):
    """In rows where solvers reach it from zeros, within what the residual that is left stands for;
    there may be others."""
    case = load_golden(path)
    close = Anderson(tol=1e-4, max_steps=80, ladder="off")

    def solved():
        with torch.no_grad():
            return build(case, solver=close).equilibrium(features_of(case))

    monkeypatch.setenv("DEQFUSION_BACKEND", "reference")
    settled = solved().stats.converged.all(0).cpu()
    settled &= torch.as_tensor(case.arrays["dist_anderson200_to_star"] < 1e-6)
    if not settled.any():
        pytest.skip("of no row the reference reaches it from zeros")
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    eq = solved()
    assert eq.stats.converged.all(0).cpu()[settled].all()
    true = case.state("z_star_f64")[:, settled]
    error = (eq.state.double().cpu()[:, settled] - true).norm(dim=-1) / true.norm(dim=-1)
    assert error.max() <= 2e-4 / case.arrays["sigma_min_I_minus_J"].min()


@pytest.mark.parametrize("path", SOME, ids=lambda path: path.stem)
def test_gradients_at_the_fixed_point(path, monkeypatch):
    case = load_golden(path)

    def gradients():
        close = Anderson(tol=1e-6, max_steps=60, memory=8, ladder="off")
        model = build(case, solver=Anderson(max_steps=1), adjoint=Implicit(close))
        eq = model.equilibrium(features_of(case), init=case.state("z_star_f64").float().to(DEVICE))
        (eq.fused * case.arrays["w"].float().to(DEVICE)).sum().backward()
        exported = export_official(model, grad=True)
        return {name: g.double().cpu() for name, g in exported.items()}

    exact = case.official_grad
    # The residual that a row may be left with, and how much of an error it stands for.
    left = 1e-6 / case.arrays["sigma_min_I_minus_J"].min()
    monkeypatch.setenv("DEQFUSION_BACKEND", "reference")
    reference = gradients()
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    for name, gradient in gradients().items():
        size = exact[name].norm()
        error, allowed = ((g - exact[name]).norm() / size for g in (gradient, reference[name]))
        assert error <= 2 * allowed + left, (name, error, allowed)
