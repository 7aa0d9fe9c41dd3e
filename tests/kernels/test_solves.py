"""The programs of all four solves, interpreted, against fp64 and the CPU implementation."""

import itertools
from dataclasses import replace

import pytest
import torch

from deqfusion import Anderson, Status
from deqfusion.kernels import launch, solves
from deqfusion.kernels.config import Config, SolveOptions, in_registers
from deqfusion.reference import solve as reference
from tests.kernels.problems import CONFIG, Problem, compare, outcomes, same, tensors

TIGHT = SolveOptions(rtol=1e-5)


# A few steps: rows without an attracting equilibrium, which the identity gate and the skip
# connection have, magnify roundings.
FEW = SolveOptions(rtol=1e-9, max_steps=3)


@pytest.mark.parametrize(
    ("gate", "gate_input", "tail"),
    list(itertools.product(["sigmoid", "identity"], ["sum", "concat"], ["relu_norm", "norm_relu"])),
)
def test_options_of_the_fusion_cell(gate, gate_input, tail):
    problem = Problem.new(gate=gate, gate_input=gate_input, tail=tail)
    compare(problem, FEW, blocks="fusion")


@pytest.mark.parametrize("skip", [False, True])
def test_options_of_the_modality_cell(skip):
    compare(Problem.new(skip=skip), FEW, blocks="modality")


@pytest.mark.parametrize(
    ("dim", "groups", "rows", "memory"), [(20, 1, 1, 0), (24, 3, 17, 1), (20, 2, 2, 8)]
)
def test_widths_rows_and_memories(dim, groups, rows, memory):
    options = SolveOptions(rtol=1e-4, memory=memory, max_steps=12)
    compare(Problem.new(dim, 1, rows, num_groups=groups), options)


def test_to_a_tight_tolerance():
    got = compare(Problem.new(), TIGHT)
    assert (got["z"].status == Status.CONVERGED).all()
    assert (got["z"].residual <= TIGHT.rtol).all()
    assert (got["zf"].residual <= TIGHT.rtol).all()


def test_mixing_and_absolute_tolerance():
    compare(Problem.new(), SolveOptions(mixing=0.7, rtol=1e-5, atol=1e-2, memory=4))


@pytest.mark.parametrize("width", [1, 16])
def test_masks_and_warm_start(width):
    torch.manual_seed(5)
    masks = {
        "gate_mask": torch.bernoulli(torch.full((2, 3, width), 0.6)) / 0.6,
        "fusion_mask": torch.bernoulli(torch.full((3, 16), 0.8)) / 0.8,
        "present": torch.tensor([[True, False, True], [True, True, True]]),
        "init": torch.randn(2, 3, 16),
    }
    got = compare(Problem.new(), SolveOptions(rtol=1e-4), **masks)
    assert not got["z"].state[0, 1].any()
    assert got["z"].steps[0, 1] == 0


@pytest.mark.parametrize("memory", [2, 3, 5])
@pytest.mark.parametrize("options", [{}, {"skip": True}], ids=["plain", "skip"])
def test_groups_that_are_programs_of_their_own(memory, options):
    """With one group nobody waits, so that schedule cooperative runs in the interpreter.

    Its programs keep the history in registers; steps and statuses are those of the other schedules.
    """
    problem = Problem.new(12, num_groups=1, **options)
    solver = replace(FEW if options else TIGHT, memory=memory)
    config = Config("cooperative", depth=16)
    assert in_registers(config, 16, memory, climbs=False)
    together, alone = (compare(problem, solver, c) for c in (config, CONFIG))
    for name, (status, steps) in outcomes(together).items():
        assert torch.equal(status, outcomes(alone)[name][0]), name
        assert (steps - outcomes(alone)[name][1]).abs().max() <= 1, name


def test_what_does_not_fit_into_registers():
    for config, slots, climbs in (
        (Config("row"), 5, False), (Config("cooperative"), 5, True),
        (Config("cooperative"), 1, False), (Config("cooperative"), 8, False),
        (Config("cooperative", rows=64), 5, False),
    ):  # fmt: skip
        assert not in_registers(config, 128, slots, climbs)
    assert in_registers(Config("cooperative"), 128, 5, climbs=False)


def test_more_row_blocks_than_programs(monkeypatch):
    """Programs that are resident together go from row block to row block."""
    problem = Problem.new(12, rows=70, num_groups=1)
    config = Config("cooperative", depth=16)
    solved = problem.reference(Anderson(tol=1e-3))
    states = solved["z"].state, solved["zf"].state
    alone = problem.programs(FEW, states, config, "both")
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "resident", lambda *_: 2 * 2)
    grids = []
    real = launch.launch

    def launched(kernel, grid, *rest, **more):
        grids.append(grid)
        return real(kernel, grid, *rest, **more)

    monkeypatch.setattr(launch, "launch", launched)
    same(problem.programs(FEW, states, config, "both"), alone)
    assert (2, 2, 1) in grids


def test_programs_that_would_wait_for_one_another_are_not_interpreted():
    problem = Problem.new()
    with pytest.raises(ValueError, match=r"cooperative with 2 groups .* expected row or step"):
        problem.programs(TIGHT, (problem.features, problem.injection), Config("cooperative"))


def test_too_many_programs_for_the_device_run_in_schedule_row(monkeypatch):
    """The rule by which schedule cooperative falls back, with a device that holds none."""
    run, seen = launch.Plan.run, []

    def full(self, *arguments):
        seen.append(self.config.schedule)
        if self.cooperative:
            raise launch.NotResident("4 programs, the device holds 0 at once")
        return run(self, *arguments)

    monkeypatch.setattr(launch.Plan, "run", full)
    problem = Problem.new(12, num_groups=1)
    states = problem.features, problem.injection
    got = problem.programs(FEW, states, Config("cooperative", depth=16))
    assert seen == ["cooperative", "row"] * 4
    same(got, problem.programs(FEW, states, CONFIG))


STEP = Config("step", depth=16)


def test_what_a_failed_launch_counted_is_forgotten(monkeypatch):
    """Row blocks without a modality end in the first phase, and are counted: once."""
    problem, options = Problem.new(12, 1, 40, num_groups=1), SolveOptions(rtol=1e-4)
    present = torch.ones(1, 40, dtype=torch.bool)
    present[:, :16] = False
    flat, _ = solves.pack(problem.modality, problem.fusion, 1, "sum", options.low)

    def solve():
        return solves.solve_modality(
            problem.features,
            problem.modality,
            1,
            False,
            options,
            present=present,
            weights=flat,
            config=STEP,
        )

    expected, one = solve(), launch.launch

    def failing(kernel, grid, arguments, constants, *rest):
        if constants["PHASE"] == 2:
            raise launch.NotCompiled("out of shared memory")
        return one(kernel, grid, arguments, constants, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "launch", failing)
        with pytest.raises(launch.NotCompiled):
            solve()
    with launch.ran() as configs:
        again = solve()
    assert configs == [STEP]
    assert torch.equal(again.steps, expected.steps)
    assert torch.equal(again.state, expected.state)


@pytest.mark.parametrize(
    "change",
    [{"gate_input": "concat", "gate": "identity"}, {"tail": "norm_relu"},
     {"skip": True, "gate": "identity", "tail": "norm_relu"},
     {"dim": 15, "num_groups": 3, "rows": 17, "count": 1}],
)  # fmt: skip
def test_schedule_step_is_row_in_more_launches(change):
    """Bit by bit, for every option of the cell; row itself is held against fp64 above."""
    problem = Problem.new(**change)
    states = problem.features, problem.injection
    one, two = (problem.programs(FEW, states, config) for config in (CONFIG, STEP))
    same(one, two)


@pytest.mark.parametrize(
    "change",
    [{"ladder": True, "rtol": 1e-3}, {"memory": 0, "mixing": 0.7, "max_steps": 4},
     {"memory": 8, "relative": False, "ridge": 1e-4, "max_steps": 10, "atol": 1e-3}],
)  # fmt: skip
def test_schedule_step_with_options_of_the_solver(change):
    masks = {
        "gate_mask": torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]).unsqueeze(-1),
        "fusion_mask": torch.rand(3, 16),
        "present": torch.tensor([[True, False, True], [True, True, True]]),
        "init": torch.randn(2, 3, 16),
    }
    problem = Problem.new()
    problem.features[0, 0, 3] = torch.nan
    states = problem.features.nan_to_num(), problem.injection
    options = SolveOptions(**change)
    one, two = (problem.programs(options, states, config, **masks) for config in (CONFIG, STEP))
    same(one, two)


def test_schedule_step_of_a_truncated_adjoint():
    problem = Problem.new()
    options = SolveOptions(max_steps=4, mixing=0.5, memory=0, truncated=True)
    states = problem.features, problem.injection
    status = torch.zeros(2, 3, dtype=torch.int32)
    one, two = (
        solves.adjoint_modality(
            problem.gradient, states[0], status, problem.features, problem.modality, 2, False,
            options, config=config,
        )
        for config in (CONFIG, STEP)
    )  # fmt: skip
    assert torch.equal(one[0], two[0])
    assert all(map(torch.equal, one[1], two[1]))


@pytest.mark.parametrize("schedule", ["row", "cooperative", "step"])
def test_packed_parameters_serve_more_than_one_solve(schedule):
    """The counters in them are 0 before and after."""
    problem, options = Problem.new(12, num_groups=1), SolveOptions(ladder=True)
    config = Config(schedule, depth=16)
    flats = solves.pack(problem.modality, problem.fusion, 1, "sum", options.low)
    before = [flat.clone() for flat in flats]
    modality = problem.features, problem.modality, 1, False, options
    fusion = (
        problem.features, problem.injection, problem.fusion, 1, "sigmoid", "sum", "relu_norm",
        options,
    )  # fmt: skip
    for solve, arguments, flat in (
        (solves.solve_modality, modality, flats[0]), (solves.solve_fusion, fusion, flats[1]),
    ):  # fmt: skip
        alone = solve(*arguments, config=config)
        for _ in range(2):
            again = solve(*arguments, weights=flat, config=config)
            assert torch.equal(again.state, alone.state)
            assert torch.equal(again.steps, alone.steps)
    # The bits: a bfloat16 pair need not be a number.
    for flat, old in zip(flats, before, strict=True):
        assert torch.equal(flat.view(torch.int32), old.view(torch.int32))
    with pytest.raises(ValueError, match=r"packed: got \d+ elements, expected \d+"):
        solves.solve_modality(*modality, weights=flats[1], config=config)


def test_schedule_step_launches_no_more_than_it_needs(monkeypatch):
    """Steps end with the last row, long before max_steps."""
    phases = []
    one = launch.launch

    def counted(kernel, grid, arguments, constants, *rest):
        phases.append(constants.get("PHASE"))
        return one(kernel, grid, arguments, constants, *rest)

    monkeypatch.setattr(launch, "launch", counted)
    problem = Problem.new()
    got = solves.solve_modality(
        problem.features, problem.modality, 2, False, SolveOptions(max_steps=400), config=STEP
    )
    steps = int(got.steps.max())
    assert steps < 40
    assert phases == [1] + [2, 3, 4] * steps + [5]


def test_rows_that_are_not_finite():
    problem = Problem.new(count=1, rows=5)
    options = SolveOptions(max_steps=6)
    clean = problem.programs(options, (problem.features, problem.injection))
    for row, value in ((1, torch.nan), (2, torch.inf), (3, -torch.inf)):
        problem.features[0, row, 3] = problem.injection[row, 5] = value
    states = (
        torch.where(problem.features.isfinite(), problem.features, 0.0),
        torch.where(problem.injection.isfinite(), problem.injection, 0.0),
    )
    got = problem.programs(options, states)
    assert (got["z"].status[0, 1:4] == Status.NON_FINITE).all()
    assert (got["zf"].status[1:4] == Status.NON_FINITE).all()
    assert not got["z"].state[0, 1:4].any()
    others = torch.tensor([0, 4])
    for name in ("z", "zf"):
        assert torch.equal(got[name].state[..., others, :], clean[name].state[..., others, :])
    for name, tensor in tensors(got).items():
        assert tensor.isfinite().all(), name
    assert not got["back"][0][0, 1:4].any()


def test_a_row_that_lost_a_modality_has_no_fusion():
    """Whatever is injected: a state that is not finite can be of features that are."""
    problem = Problem.new(8, num_groups=1)
    lost = torch.zeros(2, 3, dtype=torch.int32)
    lost[0, 1], lost[1, 2] = Status.NON_FINITE, Status.STAGNATED
    plain, got = (
        solves.solve_fusion(
            problem.features, problem.injection, problem.fusion, 1, "sigmoid", "sum", "relu_norm",
            SolveOptions(max_steps=3), modality_status=status,
        )
        for status in (None, lost)
    )  # fmt: skip
    assert got.status.tolist() == [plain.status[0], Status.NON_FINITE, plain.status[2]]
    assert not got.state[1].any()
    assert torch.equal(got.state[[0, 2]], plain.state[[0, 2]])


def test_gradients_that_are_not_finite_or_zero():
    problem = Problem.new(num_groups=1)
    problem.gradient[:, 0] = 0.0
    problem.gradient[1, 2, 4] = torch.nan
    states = problem.features, problem.injection
    dx, _, outcome = problem.programs(SolveOptions(), states)["back"]
    assert not dx[:, 0].any()
    assert (outcome.steps[:, 0] == 0).all()
    assert outcome.status[1, 2] == Status.NON_FINITE
    assert not dx[1, 2].isfinite().all()
    assert dx[0].isfinite().all()


def test_gradients_scale():
    """A gradient 1e25 times smaller takes the same steps."""
    problem = Problem.new(count=1)
    states = problem.features, problem.injection
    large = problem.programs(SolveOptions(), states)
    problem.gradient *= 1e-25
    small = problem.programs(SolveOptions(), states)
    for name in ("back", "fused_back"):
        assert torch.equal(large[name][-1].steps, small[name][-1].steps)
        torch.testing.assert_close(small[name][0] * 1e25, large[name][0], rtol=1e-4, atol=1e-9)


def test_the_ladder_meets_the_tolerance():
    """In fp32: what ends a row is exact."""
    rtol = 1e-4
    problem = Problem.new(count=1)
    expected = problem.programs(SolveOptions(rtol=1e-6), (problem.features, problem.injection))
    got = problem.programs(
        SolveOptions(rtol=rtol, ladder=True), (problem.features, problem.injection)
    )
    for name in ("z", "zf"):
        assert (got[name].status == Status.CONVERGED).all()
        assert (got[name].residual <= rtol).all()
        error = (got[name].state - expected[name].state).norm(dim=-1)
        assert (error <= 4 * rtol * expected[name].state.norm(dim=-1)).all()
    for name in ("back", "fused_back"):
        assert (got[name][-1].status == Status.CONVERGED).all()
        error = (got[name][0] - expected[name][0]).norm()
        assert error <= 8 * rtol * expected[name][0].norm()


@pytest.fixture
def ladder_anywhere(monkeypatch):
    """Narrow problems, and processors without bfloat16 products, have none otherwise."""
    monkeypatch.setattr(reference, "LADDER_WIDTH", 1)
    monkeypatch.setattr(reference, "bfloat16_instructions", lambda: "assumed")


@pytest.mark.usefixtures("ladder_anywhere")
@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_the_ladder_takes_the_steps_of_the_reference(rtol):
    """Within one, in all four solves, and few more than exact products do."""
    problem = Problem.new(64, 1, 16, num_groups=4)
    exact = problem.reference(Anderson(tol=rtol, ladder="off"))
    states = exact["z"].state, exact["zf"].state
    expected = outcomes(problem.reference(Anderson(tol=rtol), states=states))
    got = outcomes(problem.programs(SolveOptions(rtol=rtol, ladder=True), states))
    more = []
    for name, (status, steps) in got.items():
        assert torch.equal(status, expected[name][0]), name
        assert (steps - expected[name][1]).abs().max() <= 1, name
        more.append((steps - outcomes(exact)[name][1]).float().mean())
    assert max(more) <= 1
    # There are other products: somewhere they take a step more.
    assert max(more) > 0


@pytest.mark.usefixtures("ladder_anywhere")
@pytest.mark.parametrize(
    "change", [{"max_steps": 1}, {"max_steps": 6}, {"memory": 0, "mixing": 0.7}], ids=repr
)
def test_the_ladder_with_options_of_the_solver(change):
    masks = {
        "present": torch.tensor([[True, False, True], [True, True, True]]),
        "init": torch.randn(2, 3, 16),
    }
    problem = Problem.new()
    options = SolveOptions(ladder=True, **change)
    close = Anderson(tol=options.rtol, ladder="off")
    states = tuple(problem.reference(close, **masks)[name].state for name in ("z", "zf"))
    expected = outcomes(problem.reference(Anderson(tol=options.rtol, **change), states, **masks))
    for name, (status, steps) in outcomes(problem.programs(options, states, **masks)).items():
        assert torch.equal(status, expected[name][0]), name
        assert (steps - expected[name][1]).abs().max() <= 1, name


def test_rows_do_not_see_each_other():
    # With the skip connection rows take different numbers of cheap steps.
    problem = Problem.new(count=1, rows=18, skip=True)
    options = SolveOptions(ladder=True, rtol=1e-4)
    whole = solves.solve_modality(problem.features, problem.modality, 2, True, options)
    some = torch.tensor([17, 3])
    part = solves.solve_modality(
        problem.features[:, some].contiguous(), problem.modality, 2, True, options
    )
    assert torch.equal(part.state, whole.state[:, some])
    assert torch.equal(part.steps, whole.steps[:, some])


def test_trace():
    problem = Problem.new(count=1)
    got = solves.solve_modality(
        problem.features, problem.modality, 2, False, SolveOptions(), record=True
    )
    steps = torch.arange(50)
    taken = steps < got.steps.unsqueeze(-1)
    assert torch.equal(got.trace[..., 0].isfinite(), taken)
    last = got.trace.gather(2, (got.steps.long() - 1)[..., None, None].expand(-1, -1, -1, 2))
    torch.testing.assert_close((last[..., 0] / last[..., 1]).squeeze(-1), got.residual)


def test_empty_batch():
    problem = Problem.new(rows=0)
    got = problem.programs(SolveOptions(), (problem.features, problem.injection))
    assert got["z"].state.shape == (2, 0, 16)
    assert not any(g.any() for g in got["back"][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"memory": 9}, "memory: got 9, expected 0 to 8"), ({"precision": "fp8"}, "precision: got"),
     ({"max_steps": 0}, "max_steps: got 0")],
)  # fmt: skip
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SolveOptions(**options)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"rows": 24}, "rows: got 24, expected a power of two"), ({"warps": 0}, "warps: got 0"),
     ({"warps": 6}, "warps: got 6, expected a power of two"),
     ({"schedule": "fast"}, "schedule: got 'fast', expected one of row, cooperative, step")],
)  # fmt: skip
def test_configs_out_of_range(config, message):
    with pytest.raises(ValueError, match=message):
        Config(**config)


def test_out_of_memory_says_where(monkeypatch):
    def nothing_left(*shape, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    problem = Problem.new()
    monkeypatch.setattr(launch.Plan, "empty", nothing_left)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as raised:
        solves.solve_modality(problem.features, problem.modality, 2, False, SolveOptions())
    (note,) = raised.value.__notes__
    assert note.startswith("in a solve of 2 x 3 rows of 16 with Config(schedule='row'")


def test_a_width_that_no_tile_holds():
    x = torch.randn(1, 1, 1030)
    with pytest.raises(ValueError, match=r"dim 1030 in 1 groups: got 1030 channels per group"):
        solves.solve_modality(x, [x] * 10, 1, False, SolveOptions())
