"""What the functional interface and the measurements of an equilibrium refuse."""

from contextlib import suppress

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from deqfusion import Anderson, DEQFusion, Implicit, Status, Unroll, functional

DIM, COUNT, BATCH = 16, 2, 6


@pytest.fixture
def fusion() -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(DIM, COUNT)


def arguments(name: str, fusion: DEQFusion) -> dict:
    """Arguments that the function `name` takes."""
    x, row = torch.randn(COUNT, BATCH, DIM), torch.randn(BATCH, DIM)
    modality, fused = fusion.modality_parameters, fusion.fusion_parameters
    return {
        "modality_equilibrium": {"x": x, "parameters": modality},
        "modality_adjoint": {"x": x, "z": x, "gradient": x, "parameters": modality},
        "fusion_equilibrium": {"modalities": x, "injection": row, "parameters": fused},
        "fusion_adjoint": {
            "modalities": x, "injection": row, "z": row, "gradient": row, "parameters": fused,
        },
        "joint_equilibrium": {
            "x": x, "injection": row, "modality_parameters": modality, "fusion_parameters": fused,
        },
    }[name]  # fmt: skip


FUNCTIONS = (
    "modality_equilibrium", "modality_adjoint", "fusion_equilibrium", "fusion_adjoint",
    "joint_equilibrium",
)  # fmt: skip


# Dimensions that no other argument fixes: the rows of x, and how many modalities are fused.
FREE = {
    ("modality_equilibrium", "x"): 1,
    ("fusion_equilibrium", "modalities"): 0,
    ("fusion_adjoint", "modalities"): 0,
}


def wrong_tensors(good: torch.Tensor, free: int | None) -> list:
    """Integers, another type, a rank and every dimension that does not fit."""
    fixed = [k for k in range(good.dim()) if k != free]
    wider = [torch.cat((good, good.narrow(k, 0, 1)), k) for k in fixed]
    return [good.long(), good.tolist(), good[0], *wider]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_tensor_is_checked(fusion, name):
    """One argument at a time is wrong; some fit nothing, others do not fit the other arguments."""
    function, good = getattr(functional, name), arguments(name, fusion)
    function(**good)
    for key, value in good.items():
        if not isinstance(value, torch.Tensor):
            continue
        for wrong in wrong_tensors(value, FREE.get((name, key))):
            with pytest.raises((TypeError, ValueError), match=r"\w+: got .*, expected "):
                function(**{**good, key: wrong})


@pytest.mark.parametrize("whole", [False, True])
def test_stack_and_inject(whole):
    """Stacks, leaves the absent out, and gives the gradients of both results."""
    torch.manual_seed(1)
    x = torch.randn(COUNT, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(COUNT, dtype=torch.float64, requires_grad=True)
    bias = torch.rand(1, dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[True, False, True, False], [True, True, False, False]])

    def start(x, weight, bias, present=None):
        features = x if whole else list(x.unbind(0))
        return functional.stack_and_inject(features, weight, bias, present)

    stacked, injected = start(x, weight, bias)
    assert torch.equal(stacked, x)
    torch.testing.assert_close(injected, functional.inject(x, weight, bias))
    assert torch.autograd.gradcheck(start, (x, weight, bias))
    stacked, injected = start(x, weight, bias, present)
    assert torch.equal(stacked, torch.where(present.unsqueeze(-1), x, 0.0))
    assert torch.equal(injected.isnan().all(-1), ~present.any(0))
    known = present.any(0)
    torch.testing.assert_close(injected[known], functional.inject(x, weight, bias, present)[known])
    some = [present[:, known]]
    assert torch.autograd.gradcheck(
        lambda x, *rest: start(x[:, known], *rest, *some), (x, weight, bias)
    )


def test_what_gets_no_gradient_passes_none_on(fusion):
    features = torch.randn(COUNT, BATCH, DIM, requires_grad=True)
    fusion.equilibrium(features).modalities.sum().backward()
    assert features.grad is not None
    assert fusion.injection_weight.grad is None
    mask = torch.zeros(BATCH, COUNT, dtype=torch.bool)
    mask[1, 0] = True
    features.grad = None
    fusion.equilibrium(features, mask=mask).modalities.sum().backward()
    assert not features.grad[0, 1].any()


def test_rows_without_a_modality_are_no_part_of_the_gradients():
    x, weight, bias = torch.randn(2, 3, 4), torch.ones(2), torch.zeros(1, requires_grad=True)
    present = torch.tensor([[True, False, True], [True, False, False]])
    _, injected = functional.stack_and_inject(x, weight, bias, present)
    injected.sum().backward()
    assert bias.grad == 8


def test_nothing_is_packed_for_the_reference(fusion):
    parts = functional.pack(
        fusion.modality_parameters, fusion.fusion_parameters, fusion.options, fusion.solver
    )
    assert [part.numel() for part in parts] == [0, 0]


def test_features_of_two_dtypes_are_promoted(fusion):
    one, two = torch.randn(BATCH, DIM), torch.randn(BATCH, DIM).bfloat16()
    assert torch.equal(fusion([one, two]), fusion([one, two.float()]))
    with pytest.raises(TypeError, match=r"features: got dtype torch.float64, expected .*float32"):
        fusion([one, two.double()])


def test_stack_and_inject_checks_its_arguments():
    good = [torch.randn(4, 3), torch.randn(4, 3)]
    weight, bias = torch.ones(2), torch.zeros(1)
    for wrong in (
        (good[0], weight, bias), ([], weight, bias), ([good[0], good[1][:2]], weight, bias),
        ([good[0], good[1].double()], weight, bias), ([g.long() for g in good], weight, bias),
        (good, torch.ones(3), bias), (good, weight, torch.zeros(2)),
        (good, weight, bias, torch.ones(2, 4)), (good, weight, bias, torch.ones(4, 2).bool()),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=r"\w+: got .*, expected "):
            functional.stack_and_inject(*wrong)


def test_a_row_that_lost_a_modality_has_no_fusion(fusion):
    x, row = torch.randn(COUNT, BATCH, DIM), torch.randn(BATCH, DIM)
    status = torch.zeros(COUNT, BATCH, dtype=torch.int32)
    status[1, 2] = int(Status.NON_FINITE)
    got = functional.fusion_equilibrium(
        x, row, fusion.fusion_parameters, cell=fusion.options, modality_status=status
    )
    lost = torch.arange(BATCH) == 2
    assert torch.equal(got.status == int(Status.NON_FINITE), lost)
    for wrong in (status[0], status.long(), [1]):
        with pytest.raises((TypeError, ValueError), match=r"modality_status: got .*, expected"):
            functional.fusion_equilibrium(
                x, row, fusion.fusion_parameters, cell=fusion.options, modality_status=wrong
            )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_checked(fusion, name):
    function, good = getattr(functional, name), arguments(name, fusion)
    rows, wide = (COUNT, BATCH), torch.zeros(COUNT, BATCH, DIM + 1)
    wrong = {
        "adjoint": ["implicit", Unroll(2), None],
        "solver": ["anderson", Implicit(), None],
        "cell": [fusion.options._replace(num_groups=5)],
        "init": [wide, torch.zeros(rows), "zeros"],
        "tolerance": [1e-3, torch.ones(2), torch.tensor(1)],
        "present": [torch.ones(rows), torch.ones(BATCH, dtype=torch.bool)],
        "gate_mask": [wide, torch.ones(rows), torch.ones(BATCH, DIM)],
        "fusion_mask": [wide, torch.ones(BATCH, 1)],
        "status": [torch.zeros(rows), torch.zeros(COUNT, dtype=torch.int32)],
    }
    taken = function.__kwdefaults__
    for key in taken.keys() & wrong.keys():
        for value in wrong[key]:
            with pytest.raises((TypeError, ValueError), match=r"\w+: got .*, expected ") as error:
                function(**good, **{key: value})
            names = ("num_groups",) if key == "cell" else (key,)
            assert str(error.value).startswith(names), (key, value, error.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_are_checked(fusion, name):
    function, good = getattr(functional, name), arguments(name, fusion)
    narrow = DEQFusion(8, COUNT)
    concat = DEQFusion(DIM, COUNT, gate_input="concat")
    for key in (key for key in good if key.endswith("parameters")):
        of_modalities = isinstance(good[key], functional.ModalityParameters)
        other = narrow.modality_parameters if of_modalities else concat.fusion_parameters
        for wrong in (other, tuple(good[key]), good[key]._replace(norm1_bias=None)
                      if of_modalities else good[key]._replace(norm_bias=None)):  # fmt: skip
            with pytest.raises((TypeError, ValueError), match=r"^parameters.*: got .*, expected "):
                function(**{**good, key: wrong})


def test_what_was_silent():
    fusion = DEQFusion(DIM, COUNT)
    x = torch.ones(COUNT, BATCH, DIM, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^x: got torch\.int64, expected one of torch\.float64"):
        functional.modality_equilibrium(x, fusion.modality_parameters)
    with pytest.raises(ValueError, match=r"^injection: got shape \(5, 16\), expected \(6, 16\)$"):
        functional.fusion_equilibrium(x.float(), torch.randn(5, DIM), fusion.fusion_parameters)
    with pytest.raises(TypeError, match=r"^solver: got 'anderson', expected an instance of one of"):
        functional.modality_equilibrium(x.float(), fusion.modality_parameters, solver="anderson")


def test_cell_options_that_are_none(fusion):
    x = torch.randn(COUNT, BATCH, DIM)
    for cell in (None, (4, "sigmoid", "sum", False, "relu_norm")):
        with pytest.raises(TypeError, match=r"^cell: got (NoneType|tuple), expected CellOptions$"):
            functional.modality_equilibrium(x, fusion.modality_parameters, cell=cell)


def test_tensors_that_are_not_dense(fusion):
    x = torch.randn(COUNT, BATCH, DIM)
    ragged = torch.nested.nested_tensor([x[0], x[1][:2]], layout=torch.jagged)
    sparse = [each.to_sparse() for each in x]
    calls = {
        "features": lambda: fusion(ragged),
        "features[0]": lambda: fusion(sparse),
        "init": lambda: fusion(x, init=torch.zeros(COUNT + 1, BATCH, DIM).to_sparse()),
        "injection": lambda: fusion.equilibrium(x, injection=sparse[0]),
        "mask": lambda: fusion(x, mask=torch.zeros(BATCH, COUNT, dtype=torch.bool).to_sparse()),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=r": got a .*, expected a dense one$") as error:
            call()
        assert str(error.value).startswith(f"{name}: ")


@pytest.mark.parametrize("method", ["jacobian_penalty", "spectral_radius"])
def test_an_equilibrium_of_other_features(fusion, method):
    features = torch.randn(COUNT, BATCH, DIM)
    for rows in (slice(0, 1), slice(0, 5)):
        eq = fusion.equilibrium(features[:, rows])
        with pytest.raises(ValueError, match=r"^eq: got .*, expected .* as these features have$"):
            getattr(fusion, method)(eq, features)


@pytest.mark.parametrize("joint", [False, True], ids=["split", "joint"])
def test_watching_adjoints(joint):
    """What the adjoints by themselves say, of every backward pass and of none after."""
    torch.manual_seed(2)
    solver = Anderson(max_steps=4)
    fusion = DEQFusion(DIM, COUNT, joint=joint, adjoint=Implicit(solver)).double()
    features = torch.randn(COUNT, BATCH, DIM, dtype=torch.float64)
    eq = fusion.equilibrium(features)
    direction = torch.randn_like(eq.fused)
    with functional.watching_adjoints() as outer:
        fusion(features).backward(direction)
        with functional.watching_adjoints() as told:
            eq.fused.backward(direction)
    fusion(features).backward(direction)
    fused, modalities = told
    assert len(outer) == 4
    assert outer[2:] == told
    dm, _, _, expected = functional.fusion_adjoint(
        direction, eq.fused.detach(), eq.modalities.detach(), features.sum(0),
        fusion.fusion_parameters, cell=fusion.options, adjoint=fusion.adjoint,
    )  # fmt: skip
    assert all(map(torch.equal, fused, expected))
    assert (fused.status == Status.MAX_STEPS).any()
    *_, expected = functional.modality_adjoint(
        dm, eq.modalities.detach(), features, fusion.modality_parameters, cell=fusion.options,
        adjoint=fusion.adjoint,
    )  # fmt: skip
    assert all(map(torch.equal, modalities, expected))
    assert modalities.status.shape == (COUNT, BATCH)


def test_several_watch_adjoints(fusion):
    """Each collects all of its time, however their times overlap; an error ends it too."""

    def backward():
        fusion(torch.randn(COUNT, BATCH, DIM, requires_grad=True)).sum().backward()

    early, late = functional.watching_adjoints(), functional.watching_adjoints()
    first = early.__enter__()
    backward()
    with suppress(ZeroDivisionError), functional.watching_adjoints() as inner:
        backward()
        raise ZeroDivisionError
    second = late.__enter__()
    backward()
    early.__exit__(None, None, None)
    backward()
    late.__exit__(None, None, None)
    backward()
    # Two solves a pass.
    assert [len(told) for told in (first, inner, second)] == [6, 2, 4]


def test_watching_adjoints_compiles_nothing_anew(fusion):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fusion, backend=counter, fullgraph=True)
    features = torch.randn(COUNT, BATCH, DIM, requires_grad=True)
    compiled(features).sum().backward()
    with functional.watching_adjoints() as told:
        for module in (compiled, fusion, compiled):
            module(features).sum().backward()
    assert counter.frame_count == 1
    assert len(told) == 2


@pytest.mark.parametrize(("dim", "count"), [(DIM, 1), (DIM, 3), (8, COUNT)])
def test_an_equilibrium_of_another_layer(fusion, dim, count):
    other = DEQFusion(dim, count)
    eq = other.equilibrium(torch.randn(count, BATCH, dim))
    features = torch.randn(COUNT, BATCH, DIM)
    calls = (
        lambda: fusion.modality_weights(eq),
        lambda: fusion.jacobian_penalty(eq, features),
        lambda: fusion.spectral_radius(eq, features),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"^eq: got modalities of shape .*, expected "):
            call()


def test_a_gradient_that_is_not_finite_says_so(fusion):
    """Beside one that is 0, which needs no step."""
    x = torch.randn(COUNT, BATCH, DIM)
    gradient = torch.randn(COUNT, BATCH, DIM)
    gradient[0, 1], gradient[1, 2, 3] = 0.0, torch.nan
    with torch.no_grad():
        z = fusion.equilibrium(x).modalities
    dx, _, stats = functional.modality_adjoint(gradient, z, x, fusion.modality_parameters)
    assert (stats.status[0, 1], stats.steps[0, 1]) == (Status.CONVERGED, 0)
    assert not dx[0, 1].any()
    assert stats.status[1, 2] == Status.NON_FINITE
    others = torch.ones(COUNT, BATCH, dtype=torch.bool)
    others[1, 2] = False
    assert (stats.status[others] == Status.CONVERGED).all()
    assert dx[others].isfinite().all()


def test_one_feature_given_twice_compiles(fusion):
    x = torch.randn(BATCH, DIM, requires_grad=True)
    fusion([x, x]).sum().backward()
    expected, x.grad = x.grad, None
    torch._dynamo.reset()
    torch.compile(fusion, backend="aot_eager", fullgraph=True)([x, x]).sum().backward()
    torch.testing.assert_close(x.grad, expected)
