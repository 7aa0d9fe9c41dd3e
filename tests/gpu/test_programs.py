"""The programs on a device. Without one these are skipped; `bash bench/gpu_check.sh` runs them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deqfusion import Anderson, DEQFusion, Implicit, Phantom, Status, functional
from deqfusion.kernels import launch
from deqfusion.kernels.config import SCHEDULES
from deqfusion.kernels.launch import ran, using

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch can use"
)
SOLVER = Anderson(tol=1e-5, ladder="off")
# A few steps where rows without an attracting equilibrium would magnify roundings.
FEW = Anderson(tol=1e-9, max_steps=4, ladder="off")


def layer(dim=128, count=2, **options):
    torch.manual_seed(0)
    options = {"solver": SOLVER, "adjoint": Implicit(SOLVER), **options}
    return DEQFusion(dim, count, **options).cuda()


def result(model, features, gradient, mask=None):
    """The equilibrium, and the fused output's gradients by everything."""
    model.zero_grad()
    features = features.clone().requires_grad_()
    torch.manual_seed(1)  # of dropout
    eq = model.equilibrium(features, mask=mask)
    eq.fused.backward(gradient)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return eq, {**grads, "features": features.grad}


def compare(model, rows, monkeypatch, tolerance=1e-3, mask=None):
    """Programs against the reference on the same device.

    Of rows that do not converge, rounding decides where they are: they get no gradient.
    """
    features = torch.randn(model.num_modalities, rows, model.dim, device="cuda")
    gradient = torch.randn(rows, model.dim, device="cuda")
    with monkeypatch.context() as patch:
        patch.setenv("DEQFUSION_BACKEND", "reference")
        torch.manual_seed(1)
        with torch.no_grad():
            stats = model.equilibrium(features, mask=mask).stats
        settled = stats.converged.all(0) | (model.solver.max_steps == FEW.max_steps)
        assert settled.sum() > 0.9 * rows
        gradient[~settled] = 0.0
        expected = result(model, features, gradient, mask)
    got = result(model, features, gradient, mask)
    ours, theirs = got[0].stats, expected[0].stats
    assert torch.equal(ours.status[:, settled], theirs.status[:, settled])
    if model.solver.ladder == "off":
        assert (ours.steps - theirs.steps)[:, settled].abs().max() <= 1
    states = (eq.state[:, settled] for eq, _ in (got, expected))
    torch.testing.assert_close(*states, rtol=tolerance, atol=tolerance)
    scale = max(g.abs().max() for g in expected[1].values())
    for name, value in expected[1].items():
        assert (got[1][name] - value).abs().max() <= tolerance * scale, name


OPTIONS = [
    {}, {"skip": True, "solver": FEW}, {"gate": "identity", "solver": FEW},
    {"gate_input": "concat", "tail": "norm_relu"}, {"num_groups": 1}, {"dropout": 0.2},
    {"solver": Anderson(tol=1e-5)}, {"solver": Anderson(tol=1e-3, memory=0, ladder="off")},
    {"solver": Anderson(tol=1e-5, memory=8, ladder="off")}, {"adjoint": Phantom(3, 0.6)},
]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_schedules_and_options(schedule, options, monkeypatch):
    with using(schedule):
        compare(layer(**options), 50, monkeypatch)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_missing_modalities(schedule, monkeypatch):
    mask = torch.zeros(50, 2, dtype=torch.bool, device="cuda")
    mask[::3, 0] = mask[1::3, 1] = True
    with using(schedule):
        compare(layer(), 50, monkeypatch, mask=mask)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_that_are_not_finite(schedule):
    model, features = layer(), torch.randn(2, 40, 128, device="cuda")
    with torch.no_grad(), using(schedule):
        clean = model.equilibrium(features)
        features[0, 7, 3], features[1, 9, 5] = torch.nan, torch.inf
        spoiled = model.equilibrium(features)
    lost = torch.zeros(40, dtype=torch.bool, device="cuda")
    lost[7] = lost[9] = True
    assert (spoiled.stats.status[-1, lost] == Status.NON_FINITE).all()
    assert torch.equal(spoiled.stats.status[:, ~lost], clean.stats.status[:, ~lost])
    assert torch.equal(spoiled.state[:, ~lost], clean.state[:, ~lost])


@pytest.mark.parametrize("dim", [500, 512, 768])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_widths(schedule, dim, monkeypatch):
    with using(schedule):
        compare(layer(dim, solver=Anderson(tol=1e-4)), 64, monkeypatch, 5e-3)


def test_more_row_blocks_than_the_device_holds_programs(monkeypatch):
    with using("cooperative"), ran() as configs:
        compare(layer(64, solver=FEW), 20000, monkeypatch)
    assert {config.schedule for config in configs} == {"cooperative"}


def test_what_does_not_fit_together_runs_in_schedule_row(monkeypatch):
    monkeypatch.setattr(launch, "resident", lambda *_: 1)
    with using("cooperative"), ran() as configs:
        compare(layer(64, solver=FEW), 40, monkeypatch)
    assert {config.schedule for config in configs} == {"row"}


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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cuda_graph_of_a_training_step(schedule):
    """Forward and backward, captured together as PyTorch's notes on graphs do it."""
    model = layer()
    features = torch.randn(2, 64, 128, device="cuda")
    with using(schedule):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                model(features).sum().backward()
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(features).sum().backward()
        features.copy_(torch.randn_like(features))
        graph.replay()
        got = {name: p.grad.clone() for name, p in model.named_parameters()}
        expected = result(model, features, torch.ones(64, 128, device="cuda"))[1]
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


class Recorder(TorchDispatchMode):
    """Collects the library's operator calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "deqfusion":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_opcheck():
    model = layer(dropout=0.2).train()
    with Recorder() as recorder:
        model(torch.randn(2, 18, 128, device="cuda")).sum().backward()
    assert len({func for func, _, _ in recorder.calls}) == 7
    for func, args, kwargs in recorder.calls:
        results = torch.library.opcheck(func, args, kwargs)
        assert set(results.values()) == {"SUCCESS"}, (func, results)


def test_export():
    model, features = layer().eval(), [torch.randn(5, 128, device="cuda") for _ in range(2)]
    batch = torch.export.Dim("batch", min=2, max=256)
    with torch.no_grad():
        program = torch.export.export(model, (features,), dynamic_shapes=([{0: batch}] * 2,))
        more = [torch.randn(33, 128, device="cuda") for _ in range(2)]
        torch.testing.assert_close(program.module()(more), model(more))


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
    torch.testing.assert_close(out, expected[0].fused)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("backward", "gibibytes"), [(False, 56), (True, 120)])
def test_offsets_beyond_31_bits(backward, gibibytes):
    """The histories of these solves, five times rows x width, have more than 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free memory on the device")
    rows, dim = 1 << 20, 512
    solver = Anderson(tol=1e-2)
    model = layer(dim, 1, solver=solver, adjoint=Implicit(solver)).requires_grad_(False)
    features = torch.randn(1, rows, dim, device="cuda", requires_grad=backward)
    few = features.detach()[:, -16:].clone().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        last, whole = model(few), model(features)
        torch.testing.assert_close(whole[-16:], last, rtol=1e-3, atol=1e-3)
        if backward:
            whole.sum().backward()
            last.sum().backward()
            expected = few.grad
            torch.testing.assert_close(features.grad[:, -16:], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sanitizer(schedule, monkeypatch):
    """Small, for compute-sanitizer, and right without it."""
    with using(schedule):
        compare(layer(20, 2, num_groups=2, solver=FEW), 18, monkeypatch)
