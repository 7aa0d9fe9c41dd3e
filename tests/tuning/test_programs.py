"""Autotune of the Triton programs, interpreted, and by the cost model alone."""

from __future__ import annotations

import pytest
import torch

from deqfusion import Anderson, cli
from deqfusion.kernels import interpreted, tuning
from deqfusion.kernels.candidates import candidates
from deqfusion.kernels.config import SCHEDULES, Config, shipped
from deqfusion.kernels.cost import H200
from deqfusion.kernels.layout import Layout
from deqfusion.tuning import predict, search
from deqfusion.tuning.example import Example, Way
from deqfusion.tuning.result import FEWEST
from tests.tuning.problems import Clock, features, layer, timed, tune

needs_interpreter = pytest.mark.skipif(
    not interpreted(), reason="compiled programs run on a device: tests/gpu has their tests"
)


@needs_interpreter
def test_the_programs_interpreted(few, monkeypatch, store):
    from deqfusion.kernels import launch

    # By this clock, whose seconds nobody waits for, every way is tried; cooperative ones cannot.
    monkeypatch.setattr(search, "clock", Clock(1e-3))
    monkeypatch.setattr(search, "PROMISING", 1e6)
    monkeypatch.setattr(predict, "MEMORIES", (2,))
    monkeypatch.setattr("deqfusion.kernels.candidates.ROWS", (16,))
    monkeypatch.setattr("deqfusion.kernels.candidates.SCHEDULES", ("row", "step"))
    x = features(few, 3)
    found = tune(few, x, backward=True)
    assert [e.problem.solve for e in found.entries] == list(tuning.SOLVES)
    assert not [t.fault for t in found.trials if t.fault]
    assert {t.way.config.schedule for t in found.trials} == {"row", "step"}
    for entry in found.entries:
        assert entry.problem.precision == "ieee"
        assert entry.problem.rows == 4
        assert entry.default is not None
        assert entry.best.memory == found.solver.memory == 2
        if "adjoint" not in entry.problem.solve:
            assert entry.residual <= 0.05
    assert tuning.in_force("Triton interpreter") == [(store / "triton-interpreter.json", 4)]
    ran = {}
    inner = launch.Plan.run

    def recording(plan, *rest):
        ran[plan.solve] = plan.config
        return inner(plan, *rest)

    monkeypatch.setattr(launch.Plan, "run", recording)
    few(x.requires_grad_()).sum().backward()
    assert ran == {e.problem.solve: e.best.config for e in found.entries}


@needs_interpreter
def test_programs_that_spill_are_out_before_they_are_timed(few, monkeypatch):
    from deqfusion.kernels import launch

    inner = launch.launch

    def spilling(kernel, grid, arguments, constants, config, *rest):
        inner(kernel, grid, arguments, constants, config, *rest)
        if launch._watching is not None:
            spills = int(config.rows == 32)
            launch._watching.append(launch.Compiled(kernel.__name__, 255, spills, 0))
            # Of others no config is to blame.
            for name in ("pack_kernel", "parameter_gradients_kernel"):
                launch._watching.append(launch.Compiled(name, 255, 1, 0))

    monkeypatch.setattr(launch, "launch", spilling)
    monkeypatch.setattr(search, "clock", Clock(1e-3))
    found = tune(few, features(few, 3), backward=False)
    assert {t.way.memory for t in found.trials} == {0, 2}
    wide = [t for t in found.trials if t.way.config.rows == 32]
    assert wide
    assert all(t.fault.startswith("spills") and t.seconds is None for t in wide)
    assert all(e.best.config.rows == 16 for e in found.entries)
    for trial in found.trials:
        assert trial.way.config.rows == 32 or "spills" not in (trial.fault or "")


@needs_interpreter
def test_what_fell_back_is_not_timed_under_another_name(few, monkeypatch):
    """With one group nobody waits, so that cooperative runs; here no device holds its programs."""
    from deqfusion.kernels import launch

    inner = launch.Plan.run

    def full(plan, *rest):
        if plan.cooperative:
            raise launch.NotResident("4 programs, the device holds 0 at once")
        return inner(plan, *rest)

    monkeypatch.setattr(launch.Plan, "run", full)
    monkeypatch.setattr("deqfusion.kernels.candidates.SCHEDULES", ("cooperative", "row"))
    monkeypatch.setattr("deqfusion.kernels.candidates.ROWS", (16,))
    monkeypatch.setattr(search, "clock", Clock(1e-3))
    monkeypatch.setattr(search, "PROMISING", 1e6)
    found = tune(few, features(few, 3), backward=False)
    fell = [t for t in found.trials if t.way.config.schedule == "cooperative"]
    assert fell
    assert all("ran in schedule row" in t.fault and t.seconds is None for t in fell)
    assert {e.best.config.schedule for e in found.entries} == {"row"}


@needs_interpreter
def test_every_solve_has_its_program(few, monkeypatch):
    from deqfusion.kernels import PROGRAMS, launch

    launched = []
    inner = launch.launch

    def recording(kernel, *rest):
        launched.append(kernel.__name__)
        return inner(kernel, *rest)

    monkeypatch.setattr(launch, "launch", recording)
    assert set(search.KERNELS) == set(tuning.SOLVES)
    assert set(search.KERNELS.values()) < set(PROGRAMS)
    example = Example(few, features(few, 3), True)
    for solve in tuning.SOLVES:
        call = example.call(Way(solve, Config("row", 16, 16, 8, 2), 2, True))
        launched.clear()
        call()
        assert launched.count(search.KERNELS[solve]) == 1
        assert not set(launched) & set(search.KERNELS.values()) - {search.KERNELS[solve]}


@needs_interpreter
def test_nothing_left_over_by_a_way_that_raised_spoils_the_next(few, monkeypatch):
    """Counters, which are packed with the parameters, are zero only after a solve that ended."""
    from deqfusion.kernels import launch

    inner, broken = launch.launch, []

    def breaking(kernel, grid, arguments, constants, *rest):
        if broken and constants.get("PHASE") == broken[0]:
            raise launch.NotCompiled("the end")
        seen.append(constants.get("PHASE"))
        return inner(kernel, grid, arguments, constants, *rest)

    seen = []
    monkeypatch.setattr(launch, "launch", breaking)
    run = search.Search(Example(few, features(few, 3), False), 60, search.clock(), lambda *_: None)
    way = Way("modality", Config("step", 16, 16, 4, 1), 2, False)
    assert run.screen(way).fault is None
    broken.append(seen[-1])
    assert run.screen(way).fault == "NotCompiled: the end"
    broken.clear()
    assert run.screen(way).fault is None


@needs_interpreter
def test_the_configs_kept_are_those_of_the_own_memory(few, monkeypatch):
    timed(monkeypatch, lambda way: (1.0 if way.memory == 0 else 2.0) - 0.5 * (
        way.config.rows == (16 if way.memory == 0 else 32)
    ))  # fmt: skip
    monkeypatch.setattr(search, "clock", Clock(1e-3))
    monkeypatch.setattr(search, "PROMISING", 1e6)
    # As many as can tell that something is faster.
    monkeypatch.setattr(search, "ROUNDS", FEWEST)
    x = features(few, 3)
    for apply in (False, True):
        found = tune(few, x, backward=False, apply=apply, save=False, budget=1e4)
        assert found.solver.memory == 0
        kept = [(e.problem.memory, e.best.config.rows, e.best.seconds) for e in found.entries]
        both = [(0, 16, 0.5)] * 2, [(2, 32, 1.5)] * 2
        assert kept == [*both[not apply], *both[apply]]
        assert found.speedup.median == pytest.approx(2 / 1.5)
        assert found.solver_speedup.median == pytest.approx(3)


@needs_interpreter
@pytest.mark.usefixtures("few")
def test_a_precision_asked_for_is_set_back(capsys):
    arguments = "--dim 8 --num-groups 1 --modalities 1 --batch 3 --tol 0.05 --budget 1e-3 --quiet"
    more = "--forward-only --dry-run --precision medium"
    assert cli.main(["autotune", *arguments.split(), *more.split()]) in (0, 1)
    assert torch.get_float32_matmul_precision() == "highest"
    assert "Triton interpreter: 3 rows" in capsys.readouterr().out


@needs_interpreter
def test_what_the_programs_lack_is_refused(few):
    few.double()
    with pytest.raises(ValueError, match=r"dtype: got torch\.float64"):
        tune(few, features(few, 3))


def test_a_target_is_predicted_and_nothing_stored(store, capsys):
    arguments = "autotune --target h200 --dim 128 --batch 64 --forward-only"
    assert cli.main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "h200: 64 rows, width 128, 2 modalities (predicted, not measured" in printed
    assert "predicted us" in printed
    assert not store.exists()
    model = layer(128)
    found = tune(model, features(model), target="a100", apply=True)
    assert found.predicted
    assert found.entries == ()
    assert found.file is None
    assert found.speedup is None
    assert model.solver == Anderson()
    for solve in tuning.SOLVES:
        times = [t.seconds for t in found.trials if t.way.solve == solve]
        assert len(times) == 5
        assert times == sorted(times)


def test_candidates_fit_the_device():
    steps = {0: 20, 5: 10}
    every = candidates(
        "modality", 612, Layout(500, 4), 3, H200, low=True, steps=steps,
        shared=227 * 1024,
    )  # fmt: skip
    assert [c.rank for c in every] == sorted(c.rank for c in every)
    assert {c.memory for c in every} == {0, 5}
    assert {c.config.schedule for c in every} == {"row", "cooperative", "step"}
    # 612 rows in tiles of 16 are 468 cooperative programs, of 132 at once: several row blocks each.
    assert min(c.config.rows for c in every if c.config.schedule == "cooperative") == 16
    for c in every:
        tiles = c.config.depth * (c.config.rows + 128)
        assert 4 * tiles * c.config.stages <= 227 * 1024
        assert c.config.rows * 128 <= 64 * 32 * c.config.warps


@pytest.mark.parametrize("half", [False, True])
def test_the_shipped_configuration_is_no_change(half):
    """Also where steps multiply in float16, whose products are deeper."""
    layout, steps, known = Layout(500, 4), {5: 10}, {"capability": 90, "half": half}
    every = candidates("modality", 64, layout, 3, H200, low=half, steps=steps, half=half)
    for schedule in SCHEDULES:
        ours = shipped(schedule, adjoint=False, **known)
        found = {c.config: c.changes for c in every if c.config.schedule == schedule}
        assert found[ours] == 0
