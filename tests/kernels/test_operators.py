"""The operators on the Triton programs, interpreted, behind `DEQFUSION_BACKEND=triton`."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deqfusion import Anderson, Broyden, DEQFusion, Implicit, OneStep, Phantom, Picard, ops
from deqfusion.kernels import compiled, interpreted, launch

pytestmark = pytest.mark.skipif(
    not interpreted(), reason="compiled programs run on a device: tests/gpu has their tests"
)
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
def test_layer_equals_the_reference(monkeypatch, adjoint):
    model = layer(adjoint=adjoint)
    features, gradient = [torch.randn(3, 8)], torch.randn(3, 8)
    expected = outcome(model, features, gradient)
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    got = outcome(model, features, gradient)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    scale = max(g.abs().max() for g in expected[1].values())
    for name, value in expected[1].items():
        assert (got[1][name] - value).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_errs_as_the_reference_does(monkeypatch, dtype):
    """Against fp64, with the parameters and features that the dtype has."""
    model = layer(adjoint=Implicit(FEW)).to(dtype)
    features, gradient = [torch.randn(3, 8, dtype=dtype)], torch.randn(3, 8, dtype=dtype)
    exact = layer(adjoint=Implicit(FEW)).double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    truth = outcome(exact, [x.double() for x in features], gradient.double())
    expected = outcome(model, features, gradient)
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    got = outcome(model, features, gradient)

    def error(result, name):
        value, true = result[1][name], truth[1][name]
        assert value.dtype == dtype
        return (value.double() - true).norm() / true.norm()

    # The worst of all: of a single number, twice an error is chance.
    allowed = 2 * max(error(expected, name) for name in truth[1])
    for name in truth[1]:
        assert error(got, name) <= allowed, name
    errors = [(result[0].double() - truth[0]).norm() for result in (got, expected)]
    assert errors[0] <= 2 * errors[1]


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
    # Before anything is launched: to pack so much takes minutes in the interpreter.
    with pytest.raises(ValueError, match=r"dim 2100 in 1 groups: .*row, cooperative, step\) have"):
        DEQFusion(2100, 1, num_groups=1)([torch.randn(1, 2100)])
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


def test_errors_of_a_launch(monkeypatch):
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

        def warmup(self, *arguments, **options):
            raise self.error

    x, named = torch.zeros(1), r"some_kernel with Config.* cannot be compiled for cpu: .*reference"
    for error in (
        OutOfResources(2, 1, "shared memory"), RuntimeError("PassManager::run failed"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc"]),
    ):  # fmt: skip
        with pytest.raises(launch.NotCompiled, match=named):
            launch.launch(Kernel(error), (1,), (x,), {}, Config(), "")
        # Cooperative launches ask first how many programs can be resident.
        with pytest.raises(launch.NotCompiled, match=named):
            launch.resident(Kernel(error), (x,), {}, Config("cooperative"), torch.device("cpu"))
    # So does what Triton compiles to talk to the driver, before any program.
    with monkeypatch.context() as patch:

        def no_driver():
            raise FileNotFoundError("cuda.h")

        active = SimpleNamespace(get_current_device=no_driver)
        patch.setattr(compiled, "driver", SimpleNamespace(active=active))
        patch.setattr(compiled, "interpreted", lambda: False)
        with pytest.raises(launch.NotCompiled, match=named):
            launch.launch(Kernel(None), (1,), (x,), {}, Config(), "")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        launch.launch(
            Kernel(torch.OutOfMemoryError("no")), (1,), (x,), {}, Config(), "2 x 3 rows of 8"
        )
    assert "2 x 3 rows of 8" in caught.value.__notes__[0]
