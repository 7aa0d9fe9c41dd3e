"""The programs on a device. Without one these are skipped; `bash bench/gpu_check.sh` runs them."""

import pytest
import torch

from deqfusion import Anderson, DEQFusion, Implicit, Status, functional
from deqfusion.kernels.config import SCHEDULES
from deqfusion.kernels.launch import using

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch can use"
)
SOLVER = Anderson(tol=1e-5, ladder="off")


def layer(dim=128, count=2, **options):
    torch.manual_seed(0)
    options = {"solver": SOLVER, "adjoint": Implicit(SOLVER), **options}
    return DEQFusion(dim, count, **options).cuda()


def result(model, features, gradient):
    """The output and all gradients."""
    model.zero_grad()
    features = features.clone().requires_grad_()
    out = model(features)
    out.backward(gradient)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return out.detach(), {**grads, "features": features.grad}


def compare(model, rows, monkeypatch, tolerance=1e-3):
    """Programs against the reference on the same device."""
    features = torch.randn(model.num_modalities, rows, model.dim, device="cuda")
    gradient = torch.randn(rows, model.dim, device="cuda")
    got = result(model, features, gradient)
    with monkeypatch.context() as patch:
        patch.setenv("DEQFUSION_BACKEND", "reference")
        expected = result(model, features, gradient)
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    scale = max(g.abs().max() for g in expected[1].values())
    for name, value in expected[1].items():
        assert (got[1][name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "options",
    [{}, {"skip": True}, {"gate_input": "concat", "tail": "norm_relu"}, {"num_groups": 1},
     {"solver": Anderson(tol=1e-5)}],
    ids=str,
)  # fmt: skip
def test_schedules_and_options(schedule, options, monkeypatch):
    with using(schedule):
        compare(layer(**options), 50, monkeypatch)


@pytest.mark.parametrize("dim", [500, 512, 768])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_widths(schedule, dim, monkeypatch):
    with using(schedule):
        compare(layer(dim, solver=Anderson(tol=1e-4)), 64, monkeypatch, 5e-3)


def test_too_many_programs_for_the_device_run_in_schedule_row(monkeypatch):
    with using("cooperative"):
        compare(layer(64), 20000, monkeypatch)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_packed_parameters_serve_more_than_one_solve(schedule):
    """The last program that leaves a meeting's counter clears it."""
    model = layer(solver=Anderson(tol=1e-3))
    x = torch.randn(2, 50, 128, device="cuda")
    packed, _ = functional.pack(
        model.modality_parameters, model.fusion_parameters, model.options, model.solver
    )
    with torch.no_grad(), using(schedule):
        first, second, third = (
            functional.modality_equilibrium(
                x, model.modality_parameters, cell=model.options, solver=model.solver,
                packed=packed,
            ).state
            for _ in range(3)
        )  # fmt: skip
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_precisions(precision, monkeypatch):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        compare(layer(solver=Anderson(tol=5e-3)), 64, monkeypatch, 5e-2)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = layer(solver=Anderson(tol=1e-3)).to(dtype)
    features = torch.randn(2, 40, 128, device="cuda", dtype=dtype)
    eq = model.equilibrium(features)
    assert eq.fused.dtype == dtype
    assert (eq.stats.status == Status.CONVERGED).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cuda_graph(schedule):
    """A replay reads the features and the parameters as they are then."""
    model = layer()
    features = torch.randn(2, 64, 128, device="cuda")
    with torch.no_grad(), using(schedule):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                model(features)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(features)
        features.copy_(torch.randn_like(features))
        model.modality_weight1.mul_(0.9)
        graph.replay()
        torch.testing.assert_close(out, model(features))


def test_a_fused_optimizer_is_seen():
    """It changes parameters without raising their version."""
    model = layer()
    features = torch.randn(2, 33, 128, device="cuda")
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    before = model(features)
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(model(features), before)


def test_compile_fullgraph():
    model = layer()
    features = torch.randn(2, 33, 128, device="cuda")
    expected = result(model, features, torch.ones(33, 128, device="cuda"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    model.zero_grad()
    out = compiled(features)
    out.sum().backward()
    torch.testing.assert_close(out, expected[0])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[1][name], rtol=1e-3, atol=1e-4)


def test_offsets_beyond_31_bits():
    """The history of this solve has more than 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free memory on the device")
    rows, dim = 1 << 19, 512
    model = layer(dim, 1, solver=Anderson(tol=1e-2))
    features = torch.randn(1, rows, dim, device="cuda")
    with torch.no_grad():
        last = model(features[:, -16:])
        torch.testing.assert_close(model(features)[-16:], last, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sanitizer(schedule, monkeypatch):
    """Small, for compute-sanitizer, and right without it."""
    with using(schedule):
        compare(layer(20, 2, num_groups=2), 18, monkeypatch)
