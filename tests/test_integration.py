"""The layer inside what PyTorch offers: operators, compile, export, autocast, copies and DDP."""

import copy
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from deqfusion import (
    Anderson,
    Broyden,
    DEQFusion,
    Implicit,
    OneStep,
    Phantom,
    Picard,
    ToleranceSchedule,
    Unroll,
)
from deqfusion.testing import CellOptions, textbook_cell

DIM, COUNT = 16, 2
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ,
    reason="inductor needs a C++ compiler: install g++ or set CXX",
)


class Model(nn.Module):
    """Encoders, equilibrium fusion and a head, as a user would write them."""

    def __init__(self, dim: int = DIM, **options) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([nn.Linear(8, dim) for _ in range(COUNT)])
        self.fusion = DEQFusion(dim, COUNT, **options)
        self.head = nn.Linear(dim, 3)

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        features = [encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)]
        return self.head(self.fusion(features))


def some_inputs(batch: int) -> list[torch.Tensor]:
    """One input per modality; stacked, a batch of 2 would share its symbol with COUNT = 2."""
    return [torch.randn(batch, 8) for _ in range(COUNT)]


def tight(**options) -> dict:
    """Settings under which two runs agree far beyond the default tolerance."""
    solver = Anderson(tol=1e-6, max_steps=100, ladder="off")
    return {"solver": solver, "adjoint": Implicit(solver), **options}


class Recorder(TorchDispatchMode):
    """Collects the library's operator calls with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "deqfusion":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def registered_operators() -> set[str]:
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name for schema in schemas if schema.name.startswith("deqfusion::")}


OPERATOR_SETTINGS = {
    "default": {},
    "skip": {"skip": True, "gate": "identity"},
    "concat": {"gate_input": "concat", "tail": "norm_relu"},
    "dropout": {"dropout": 0.3},
    "joint": {"joint": True},
    "picard": {"solver": Picard(), "adjoint": Implicit(Picard())},
    "broyden": {"solver": Broyden(), "adjoint": Implicit(Broyden())},
    "phantom": {"adjoint": Phantom()},
    "one_step": {"adjoint": OneStep()},
    "unroll": {"adjoint": Unroll(2)},
}


def record(
    options: dict, masked: bool = False, dtype=torch.float32, trace: bool = False
) -> list[tuple]:
    torch.manual_seed(0)
    fusion = DEQFusion(DIM, COUNT, **options).to(dtype)
    features = torch.randn(COUNT, 5, DIM, dtype=dtype, requires_grad=True)
    mask = None
    if masked:
        mask = torch.zeros(5, COUNT, dtype=torch.bool)
        mask[0, 0] = True
    with Recorder() as recorder:
        fusion.equilibrium(features, mask=mask, trace=trace).fused.sum().backward()
    return recorder.calls


def test_solves_are_operators_and_never_steps():
    """A solve is one operator call, however many steps it takes."""
    few = record({"solver": Anderson(tol=1e-1)})
    many = record({"solver": Anderson(tol=1e-6, max_steps=100)})
    assert [call[0] for call in few] == [call[0] for call in many]
    assert few


def test_every_registered_operator_is_exercised():
    called = {
        call[0]._schema.name
        for options in OPERATOR_SETTINGS.values()
        for call in record(options, masked=True)
    }
    assert registered_operators() == called


@pytest.mark.parametrize("setting", OPERATOR_SETTINGS)
def test_opcheck(setting):
    calls = record(OPERATOR_SETTINGS[setting], masked=True)
    if setting in ("default", "joint"):
        calls += record(OPERATOR_SETTINGS[setting], trace=True)
    for func, args, kwargs in calls:
        results = torch.library.opcheck(
            func,
            args,
            kwargs,
            test_utils=(
                "test_schema",
                "test_autograd_registration",
                "test_faketensor",
                "test_aot_dispatch_dynamic",
            ),
        )
        assert set(results.values()) == {"SUCCESS"}, (func, results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_other_dtypes(dtype):
    for func, args, kwargs in record({}, dtype=dtype):
        torch.library.opcheck(func, args, kwargs)


def gradients(model: nn.Module, call, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    call(inputs).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(got: dict, expected: dict, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    for name in expected:
        assert (got[name] - expected[name]).abs().max() < tolerance * scale, name


@pytest.mark.parametrize(
    "setting", ["default", "skip", "concat", "dropout", "joint", "phantom", "one_step", "unroll"]
)
def test_fullgraph_compile_with_dynamic_batch(setting):
    """One graph, no break, no recompilation between 2 and 64 rows, forward and backward."""
    torch._dynamo.reset()
    model = Model(**tight(**OPERATOR_SETTINGS[setting])).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    # Not 2 first: one symbol would stand for the batch and for the two modalities of `inputs`.
    for batch in (3, 2, 17, 64):
        inputs = some_inputs(batch)
        torch.manual_seed(1)
        got = gradients(model, compiled, inputs)
        # The first call also compiles an empty graph, for the iteration over `inputs`.
        graphs = [graph for graph in counter.graphs if len(graph.graph.nodes)]
        assert len(graphs) == 1, f"recompiled at batch {batch}"
        if setting == "dropout":
            continue  # a compiled graph draws other random numbers from the same seed
        assert torch.allclose(compiled(inputs), model(inputs), rtol=1e-4, atol=1e-5)
        assert_close(got, gradients(model, model, inputs), 1e-4)


@pytest.mark.parametrize("setting", ["default", "joint"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_fullgraph_compile_without_gradients(setting, context):
    torch._dynamo.reset()
    model = Model(**tight(**OPERATOR_SETTINGS[setting])).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = some_inputs(5)
    with context():
        torch.testing.assert_close(compiled(inputs), model(inputs), rtol=0, atol=0)
    assert compiled(inputs).requires_grad


def test_compile_with_mask_and_statistics():
    torch._dynamo.reset()
    fusion = DEQFusion(DIM, COUNT)

    def solve(features, mask):
        equilibrium = fusion.equilibrium(features, mask=mask)
        return equilibrium.fused, equilibrium.stats.status, equilibrium.stats.steps

    compiled = torch.compile(solve, backend="aot_eager", fullgraph=True, dynamic=True)
    features = torch.randn(COUNT, 6, DIM)
    mask = torch.rand(6, COUNT) < 0.3
    mask[:, 0] = False
    for got, expected in zip(compiled(features, mask), solve(features, mask), strict=True):
        assert torch.allclose(got.double(), expected.double(), atol=1e-5)


@needs_compiler
def test_inductor():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(**tight())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for batch in (33, 2, 64):
        inputs = some_inputs(batch)
        got = gradients(model, compiled, inputs)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert_close(got, gradients(model, model, inputs), 1e-4)


@needs_compiler
def test_inductor_with_the_jacobian_penalty():
    """Sums over a whole batch are where it guards on a size."""
    torch._dynamo.reset()
    model = Model(32, **tight())

    def penalty(inputs):
        features = [encoder(x) for encoder, x in zip(model.encoders, inputs, strict=True)]
        equilibrium = model.fusion.equilibrium(features)
        return equilibrium.fused.mean() + model.fusion.jacobian_penalty(equilibrium, features)

    compiled = torch.compile(penalty, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for batch in (7, 2, 64):
        compiled(some_inputs(batch)).backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, batch


def test_activation_checkpointing():
    torch.manual_seed(0)
    model, inputs = Model(**tight()), some_inputs(5)
    expected = gradients(model, model, inputs)

    def checkpointed(given):
        return checkpoint(model, given, use_reentrant=False)

    assert_close(gradients(model, checkpointed, inputs), expected, 1e-6)


def exported(model: Model) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2, max=256)
    inputs = some_inputs(4)
    return torch.export.export(model.eval(), (inputs,), dynamic_shapes=([{0: batch}] * COUNT,))


def test_export():
    model = Model(**tight())
    program = exported(model)
    for batch in (2, 50):
        inputs = some_inputs(batch)
        assert torch.allclose(program.module()(inputs), model(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("setting", ["default", "joint", "unroll"])
def test_exported_programs_are_saved_and_loaded(setting, strict, tmp_path):
    torch._dynamo.reset()
    fusion = DEQFusion(DIM, 3, **tight(**OPERATOR_SETTINGS[setting])).eval()
    dynamic = ({1: torch.export.Dim("batch", min=2, max=256)},)
    example = (torch.randn(3, 5, DIM),)
    program = torch.export.export(fusion, example, dynamic_shapes=dynamic, strict=strict)
    torch.export.save(program, tmp_path / "fusion.pt2")
    loaded = torch.export.load(tmp_path / "fusion.pt2").module()
    features = torch.randn(3, 9, DIM)
    assert torch.allclose(loaded(features), fusion(features), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_aot_inductor(tmp_path):
    model = Model(**tight())
    with torch.no_grad():
        program = exported(model)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        for batch in (2, 50):
            inputs = some_inputs(batch)
            assert torch.allclose(loaded(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_autocast():
    model = Model(dim=128)
    # Features of about unit variance: the blocks contract, and every row converges.
    inputs = [2 * x for x in some_inputs(32)]
    expected = model(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(inputs)
        features = torch.stack([e(x) for e, x in zip(model.encoders, inputs, strict=True)])
        assert features.dtype == torch.bfloat16
        stats = model.fusion.equilibrium(features).stats
    assert stats.converged.all()
    assert stats.residual.dtype == torch.float32
    assert (got.float() - expected).norm() < 0.05 * expected.norm()
    got.float().square().sum().backward()
    outside = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Autocast must not reach into the solves, their adjoints, or the penalty.
        model(inputs).float().square().sum().backward()
        equilibrium = model.fusion.equilibrium(features)
        assert model.fusion.cell(equilibrium.state, features).dtype == torch.float32
        unrolled = copy.deepcopy(model.fusion)
        unrolled.adjoint = Unroll(2)
        steps = unrolled.equilibrium(features).state
    torch.testing.assert_close(steps, unrolled.equilibrium(features.float()).state)
    torch.testing.assert_close(equilibrium.state, model.fusion.equilibrium(features.float()).state)
    for name, parameter in model.named_parameters():
        assert outside[name].dtype == torch.float32
        assert outside[name].isfinite().all(), name
        assert (parameter.grad - outside[name]).norm() <= 0.02 * outside[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_layer(dtype):
    """Half-precision parameters and features: at most twice the error that rounding explains."""
    torch.manual_seed(0)
    fusion = DEQFusion(64, COUNT).to(dtype)
    exact = DEQFusion(64, COUNT, solver=Anderson(tol=1e-10, max_steps=300)).double()
    exact.load_state_dict(fusion.state_dict())
    features = torch.randn(COUNT, 16, 64).to(dtype)
    fused = fusion(features)
    assert fused.dtype == dtype
    with torch.no_grad():
        expected = exact(features.double())
        # The same equilibrium by plain iteration in plain PyTorch at this precision.
        parameters = dict(fusion.state_dict())
        state = torch.zeros(COUNT + 1, 16, 64, dtype=dtype)
        for _ in range(60):
            state = textbook_cell(parameters, state, list(features), CellOptions())
    plain = (state[-1].double() - expected).norm()
    tolerance = 1e-3 * expected.norm()  # what the solver's own tolerance allows
    assert (fused.double() - expected).norm() <= 2 * plain + tolerance
    fused.float().sum().backward()
    for parameter in fusion.parameters():
        assert parameter.grad.dtype == dtype
        assert parameter.grad.isfinite().all()


def test_functional_call():
    model = DEQFusion(DIM, COUNT)
    other = DEQFusion(DIM, COUNT)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    features = torch.randn(COUNT, 5, DIM)
    values = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    got = functional_call(model, values, (features,))
    expected = other(features)
    assert torch.equal(got, expected)
    assert not torch.allclose(got, model(features), rtol=1e-2)
    got.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in other.named_parameters():
        assert torch.equal(values[name].grad, parameter.grad), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("options", OPERATOR_SETTINGS.values(), ids=OPERATOR_SETTINGS)
def test_copies(options, tmp_path):
    fusion = DEQFusion(DIM, COUNT, **options).eval()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    features = torch.randn(COUNT, 5, DIM)
    expected = fusion(features)
    for made in (copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion))):
        assert torch.equal(made(features), expected)
        assert repr(made) == repr(fusion)
        with torch.no_grad():
            made.fusion_weight.zero_()
        assert torch.equal(fusion(features), expected)

    fresh = DEQFusion(DIM, COUNT, **options).eval()
    fresh.load_state_dict(fusion.state_dict())
    assert torch.equal(fresh(features), expected)
    save_file(fusion.state_dict(), tmp_path / "layer.safetensors")
    stored = DEQFusion(DIM, COUNT, **options).eval()
    stored.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(stored(features), expected)


def test_copy_of_an_equilibrium_layer_after_a_backward_pass():
    fusion = DEQFusion(DIM, COUNT)
    features = torch.randn(COUNT, 5, DIM)
    fusion(features).sum().backward()
    made = copy.deepcopy(fusion)
    assert torch.equal(made(features), fusion(features))


DDP = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from deqfusion import Anderson, DEQFusion, Implicit

rank, rendezvous, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
solver = Anderson(tol=1e-10, max_steps=200)
torch.manual_seed(0)
fusion = DEQFusion(16, 2, solver=solver, adjoint=Implicit(solver)).double()
features = torch.randn(2, 12, 16, dtype=torch.float64)
if rank == 1:  # DDP starts every process from the parameters of the first
    fusion.reset_parameters()
model = DistributedDataParallel(fusion)
model(features[:, rank * 6 : rank * 6 + 6]).square().mean().backward()
if rank == 0:
    torch.save({name: p.grad for name, p in fusion.named_parameters()}, out)
dist.barrier()
dist.destroy_process_group()
"""


def test_ddp_gives_the_single_process_gradients(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this build of PyTorch has no gloo")
    rendezvous, out = tmp_path / "rendezvous", tmp_path / "gradients.pt"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), str(rendezvous), str(out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()

    solver = Anderson(tol=1e-10, max_steps=200)
    torch.manual_seed(0)
    fusion = DEQFusion(16, 2, solver=solver, adjoint=Implicit(solver)).double()
    features = torch.randn(2, 12, 16, dtype=torch.float64)
    fusion(features).square().mean().backward()
    got = torch.load(out, weights_only=True)
    assert_close(got, {name: p.grad for name, p in fusion.named_parameters()}, 1e-9)


def test_checkpoints_cross_between_a_schedule_and_a_constant_tolerance():
    scheduled = DEQFusion(DIM, COUNT, solver=Anderson(tol=ToleranceSchedule(1e-1, 1e-3, 10)))
    scheduled.solver_progress += 7
    constant = DEQFusion(DIM, COUNT)
    constant.load_state_dict(scheduled.state_dict())
    back = DEQFusion(DIM, COUNT, solver=Anderson(tol=ToleranceSchedule(1e-1, 1e-3, 10)))
    back.load_state_dict(constant.state_dict())
    assert back.solver_progress == 0
    assert torch.equal(back.modality_weight1, scheduled.modality_weight1)
    back.load_state_dict(scheduled.state_dict())
    assert back.solver_progress == 7


def test_the_solver_may_be_replaced():
    scheduled = Anderson(tol=ToleranceSchedule(1e-1, 1e-3, 10))
    fusion, features = DEQFusion(DIM, COUNT), torch.randn(COUNT, 3, DIM)
    names = list(fusion.state_dict())
    fusion.solver = scheduled
    fusion(features)
    assert fusion.solver_progress == 1
    fusion.solver = Anderson(tol=ToleranceSchedule(1e-2, 1e-4, 10))
    assert fusion.solver_progress == 1
    fusion.solver = Picard()
    assert list(fusion.state_dict()) == names
    fusion.load_state_dict(fusion.state_dict())
    fusion(features)
    with pytest.raises(TypeError, match="solver: got 'anderson', expected an instance of one of"):
        fusion.solver = "anderson"
    assert fusion.solver == Picard()
    built = DEQFusion(DIM, COUNT, solver=scheduled)
    built.solver = Anderson()
    built.load_state_dict(built.state_dict())
    assert copy.deepcopy(built).solver == pickle.loads(pickle.dumps(built)).solver == Anderson()
