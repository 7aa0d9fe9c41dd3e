"""The operators on the Triton programs, interpreted, behind `DEQFUSION_BACKEND=triton`."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deqfusion import Anderson, Broyden, DEQFusion, Implicit, OneStep, Phantom, Picard, ops
from deqfusion.compat import export_official, load_official
from deqfusion.kernels import interpreted, launch
from deqfusion.testing import golden_files, load_golden

pytestmark = pytest.mark.skipif(
    not interpreted(), reason="compiled programs run on a device: tests/gpu has their tests"
)
SMALL = [path for path in golden_files() if path.stem.split("_d")[-1].split("_")[0] in ("16", "20")]
FEW = Anderson(max_steps=3)


@pytest.fixture
def triton_backend(monkeypatch):
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")


def layer(**options):
    torch.manual_seed(1)
    options = {"num_groups": 1, "solver": FEW, "adjoint": Implicit(FEW), **options}
    return DEQFusion(8, 1, **options)


def outcome(model, features, gradient):
    """The output and all gradients of a layer."""
    model.zero_grad()
    features = [x.clone().requires_grad_() for x in features]
    out = model(features)
    out.backward(gradient)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return out.detach(), {**grads, **{f"x{i}": x.grad for i, x in enumerate(features)}}


@pytest.mark.parametrize("adjoint", [Implicit(FEW), Phantom(3, 0.6), OneStep(), Implicit(Picard())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_equals_the_reference(monkeypatch, adjoint, dtype):
    model = layer(adjoint=adjoint).to(dtype)
    features, gradient = [torch.randn(3, 8, dtype=dtype)], torch.randn(3, 8, dtype=dtype)
    expected = outcome(model, features, gradient)
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    got = outcome(model, features, gradient)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    scale = max(g.abs().max() for g in expected[1].values())
    for name, value in expected[1].items():
        assert got[1][name].dtype == value.dtype
        assert (got[1][name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.skipif(not SMALL, reason="golden vectors not found: set DEQFUSION_GOLDEN")
@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_golden_vectors(path, monkeypatch):
    """A step of the cell, and gradients at the fixed point, from the authors' code in fp64."""
    case = load_golden(path)
    options = case.options

    def build(**solvers):
        model = DEQFusion(
            case.dim, case.num_modalities, num_groups=options.num_groups, gate=options.gate,
            gate_input=options.gate_input, skip=options.skip, **solvers,
        )  # fmt: skip
        load_official(model, case.official)
        return model

    features = [x.float() for x in case.features]

    def step():
        with torch.no_grad():
            eq = build(solver=Anderson(max_steps=1)).equilibrium(
                features, init=case.state("z_rand").float()
            )
        return eq.state.double()

    def gradients():
        close = Anderson(tol=1e-6, max_steps=60, memory=8, ladder="off")
        model = build(solver=Anderson(max_steps=1), adjoint=Implicit(close))
        eq = model.equilibrium(features, init=case.state("z_star_f64").float())
        (eq.fused * case.arrays["w"].float()).sum().backward()
        return {name: g.double() for name, g in export_official(model, grad=True).items()}

    true, expected, reference = case.state("cell_z_rand_f64"), step(), gradients()
    exact = case.official_grad
    # The residual that a row may be left with, and how much of an error it stands for.
    left = 1e-6 / case.arrays["sigma_min_I_minus_J"].min()
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    error, allowed = ((one - true).norm() / true.norm() for one in (step(), expected))
    assert error <= 2 * allowed + 1e-7
    for name, gradient in gradients().items():
        size = exact[name].norm()
        error, allowed = ((g - exact[name]).norm() / size for g in (gradient, reference[name]))
        assert error <= 2 * allowed + left, (name, error, allowed)


@pytest.mark.usefixtures("triton_backend")
def test_opcheck():
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "deqfusion":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    model = layer(dropout=0.2).train()
    with Record():
        model([torch.randn(2, 8)]).sum().backward()
    assert len({call[0] for call in calls}) == 7
    for func, args, kwargs in calls:
        results = torch.library.opcheck(func, args, kwargs)
        assert set(results.values()) == {"SUCCESS"}, (func, results)


@pytest.mark.usefixtures("triton_backend")
def test_fullgraph_compile_and_export():
    model = layer()
    features, gradient = [torch.randn(3, 8)], torch.randn(3, 8)
    expected = outcome(model, features, gradient)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    model.zero_grad()
    out = compiled(features)
    out.backward(gradient)
    assert torch.equal(out, expected[0])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[1][name])
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (features,), dynamic_shapes=([{0: batch}],))
        more = [torch.randn(5, 8)]
        assert torch.equal(program.module()(more), model(more))


@pytest.mark.usefixtures("triton_backend")
def test_launches(monkeypatch):
    """Four launches forward, eight backward; what else PyTorch runs are views."""
    launched = []
    real = launch.launch

    def counted(kernel, *arguments, **options):
        launched.append(kernel.__name__)
        return real(kernel, *arguments, **options)

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert func.namespace == "deqfusion" or name in VIEWS, func
            return func(*args, **(kwargs or {}))

    for module in ("injection", "launch", "packing", "solves"):
        monkeypatch.setattr(f"deqfusion.kernels.{module}.launch", counted)
    model, gradient = layer(), torch.randn(2, 8)
    features = [torch.randn(2, 8, requires_grad=True)]
    with Operations():
        out = model(features)
        assert launched == [
            "inject_kernel", "pack_kernel", "modality_solve_kernel", "fusion_solve_kernel",
        ]  # fmt: skip
        launched.clear()
        out.backward(gradient)
    assert launched == [
        "pack_kernel", "fusion_adjoint_kernel", "parameter_gradients_kernel",
        "pack_kernel", "modality_adjoint_kernel", "parameter_gradients_kernel",
        "inject_adjoint_kernel", "inject_sums_kernel",
    ]  # fmt: skip


VIEWS = {"view", "reshape", "unbind", "detach", "alias", "_unsafe_view", "unsqueeze", "squeeze"}


@pytest.mark.usefixtures("triton_backend")
def test_changed_parameters_are_seen():
    """Fused optimizers change parameters without raising their version."""
    model, features = layer(), [torch.randn(2, 8)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    before = model(features)
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(model(features), before)


@pytest.mark.usefixtures("triton_backend")
def test_what_the_programs_do_not_have():
    features = [torch.randn(2, 8)]
    schedules = r"schedules row, cooperative, step\) have"
    with pytest.raises(
        ValueError, match=rf"solver: got Broyden, .*{schedules} Anderson and Picard"
    ):
        layer(solver=Broyden())(features)
    with pytest.raises(ValueError, match=rf"dtype: got torch.float64, .*{schedules} float32"):
        layer().double()([features[0].double()])
    with pytest.raises(ValueError, match="memory: got 9, expected 0 to 8"):
        layer(solver=Anderson(memory=9))(features)


def test_which_implementation(monkeypatch):
    assert ops.implementation("cpu") == "reference"
    assert ops.implementation("cuda") == "triton"
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    assert ops.implementation("cpu") == "triton"
    assert ops.implementation("cpu", "joint_equilibrium") == "reference"
    monkeypatch.setenv("DEQFUSION_BACKEND", "reference")
    assert ops.implementation("cuda") == "reference"
    monkeypatch.setenv("DEQFUSION_BACKEND", "numpy")
    with pytest.raises(ValueError, match="DEQFUSION_BACKEND: got 'numpy', expected one of auto"):
        ops.implementation("cpu")


def test_cpu_tensors_without_the_interpreter():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = "import torch, deqfusion; deqfusion.DEQFusion(8, 1)([torch.randn(2, 8)])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**environment, "DEQFUSION_BACKEND": "triton"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "got CPU tensors, expected CUDA ones, or TRITON_INTERPRET=1" in done.stderr


def test_errors_of_a_launch():
    """A program that cannot be compiled is named; any other error is noted and let through."""
    from triton.runtime.errors import OutOfResources

    from deqfusion.kernels.config import Config

    class Kernel:
        __name__ = "some_kernel"

        def __init__(self, error):
            self.error = error

        def __getitem__(self, grid):
            def run(*arguments, **options):
                raise self.error

            return run

    x = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"some_kernel with Config.* cannot be compiled for cpu"):
        launch.launch(Kernel(OutOfResources(2, 1, "shared memory")), (1,), (x,), {}, Config(), "")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        launch.launch(
            Kernel(torch.OutOfMemoryError("no")), (1,), (x,), {}, Config(), "2 x 3 rows of 8"
        )
    assert "2 x 3 rows of 8" in caught.value.__notes__[0]
