"""Autotune: what wins was verified, what was found is kept, and time is bounded."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import deqfusion
from deqfusion import Anderson, DEQFusion, Implicit, Phantom, Picard, Unroll, cli, doctor, ops
from deqfusion.kernels import interpreted, tuning
from deqfusion.kernels.config import Config
from deqfusion.kernels.tuning import Host
from deqfusion.tuning import Trial, autotune, predict, search
from deqfusion.tuning.example import Example, Way
from deqfusion.tuning.result import Tuned

needs_interpreter = pytest.mark.skipif(
    not interpreted(), reason="compiled programs run on a device: tests/gpu has their tests"
)


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """An empty store of one's own: its folder."""
    monkeypatch.setenv("DEQFUSION_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path / "cache" / "configs"
    tuning.forget()


class Clock:
    """Seconds that pass by one with every look at the clock."""

    def __init__(self, step: float = 1.0) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def layer(dim: int = 16, count: int = 2, **options) -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(dim, count, **{"num_groups": 2, **options})


def features(model: DEQFusion, rows: int = 20) -> torch.Tensor:
    return torch.randn(model.num_modalities, rows, model.dim).to(model.gate_bias)


def tune(model: DEQFusion, x: torch.Tensor, **options) -> Tuned:
    return autotune(model, x, **{"budget": 60, "progress": False, **options})


# --- on a CPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
def test_on_a_cpu(backward, store):
    model = layer()
    before = model.solver
    found = tune(model, features(model), backward=backward)
    (entry,) = found.entries
    assert entry.problem == tuning.Problem("host", 16, 2, 2, "float32", 16)
    assert found.device == entry.device == tuning.host_name()
    assert isinstance(entry.best.config, Host)
    assert 0 < entry.residual <= entry.tolerance == 1e-3
    assert entry.best.seconds <= entry.default.seconds
    assert entry.torch == torch.__version__
    assert found.speedup >= 1
    assert isinstance(found.solver, Anderson)
    # What is kept is for the layer as it is.
    assert (entry.best.memory, entry.best.ladder) == (5, True)
    assert found.solver_speedup >= 1
    assert model.solver == before
    assert {t.way.memory for t in found.trials} == {0, *range(2, 9)}
    assert {t.way.config.compact_below for t in found.trials} == {0.5, 0.75, 0.9, 1.0}
    assert found.file == store / f"{tuning.slug(found.device)}.json"
    assert tuning.read(found.file) == [entry]
    starred = [line for line in found.table().splitlines() if line.startswith("*")]
    assert len(starred) == 1
    assert f"memory {entry.best.memory}," in starred[0]


def test_the_solver_is_applied_on_request_only():
    model = layer()
    found = tune(model, features(model), apply=True, save=False, backward=False)
    assert model.solver == found.solver
    assert found.entries[0].best.memory == found.solver.memory
    assert found.file is None
    assert not tuning.in_force(tuning.host_name())
    model.solver = Picard()
    found = tune(model, features(model), apply=True, backward=False)
    assert model.solver == Picard()
    assert len(found.trials) == 4


def test_what_was_found_is_looked_up_by_the_cpu_implementation(monkeypatch):
    model = layer()
    x = features(model).requires_grad_()
    seen = []
    inner = ops.solve.settings_of

    def recording(o, *rest):
        seen.append(o.compact_below)
        return inner(o, *rest)

    monkeypatch.setattr(ops.solve, "settings_of", recording)
    monkeypatch.setattr(ops.adjoint, "settings_of", recording)

    def used():
        seen.clear()
        model(x).sum().backward()
        return seen.copy()

    assert used() == [0.75] * 4
    monkeypatch.setattr(search, "COMPACTIONS", (0.9,))
    monkeypatch.setattr(search.Search, "_memories", lambda self, best: iter(()))
    monkeypatch.setattr(search, "COMPACT_BELOW", 0.9)
    tune(model, x.detach())
    assert used() == [0.9] * 4
    with ops.compacting(0.5):
        assert used() == [0.5] * 4
    # Of other sizes nothing is known.
    other = layer(16, 1)
    seen.clear()
    other(features(other))
    assert seen == [0.75] * 2


@pytest.mark.parametrize("dim", [16, 256])
def test_compaction_changes_no_answer(dim):
    model = layer(dim, solver=Anderson(tol=1e-5))
    x = features(model, 150)
    x[:, ::3] *= 1e-3

    def solved(below):
        with ops.compacting(below), torch.no_grad():
            return model.equilibrium(x)

    expected = solved(0.75)
    for below in (0.0, 0.5, 1.0):
        eq = solved(below)
        torch.testing.assert_close(eq.fused, expected.fused, rtol=1e-4, atol=1e-5)
        assert torch.equal(eq.stats.status, expected.stats.status)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(3)], ids=lambda a: type(a).__name__)
def test_dtypes_and_adjoints(dtype, adjoint):
    """A state in bfloat16 cannot meet 1e-3; what its rounding allows, it can."""
    model = layer(adjoint=adjoint).to(dtype)
    found = tune(model, features(model), budget=1)
    assert found.entries[0].problem.precision == str(dtype).removeprefix("torch.")
    assert found.entries[0].default is not None


def test_rows_without_an_equilibrium_are_left_out():
    """The identity gate makes some at this width; without any other there is nothing to verify."""
    model = layer(32, gate="identity", skip=True, num_groups=4)
    found = tune(model, features(model, 200), budget=2, backward=False)
    assert found.without_answer > 0
    assert found.entries
    model.solver = Anderson(max_steps=1)
    found = tune(model, features(model), budget=1, backward=False)
    assert found.without_answer == 60
    assert "no row that the layer as it is solves" in found.trials[0].fault


# --- what may win, and what is kept --------------------------------------------------------------


def spoiled(monkeypatch, wrong):
    """Answers of the ways that `wrong` names are off by a hundredth, and take no time."""
    inner = Example.call

    def call(self, way):
        run = inner(self, way)
        if not wrong(way):
            return run
        answers = {name: tuple(1.01 * t for t in ts) for name, ts in run().items()}
        return lambda: answers

    monkeypatch.setattr(Example, "call", call)


def test_who_misses_the_residual_never_wins(monkeypatch):
    spoiled(monkeypatch, lambda way: way.memory == 3)
    model = layer()
    found = tune(model, features(model), backward=False)
    missed = [t for t in found.trials if t.way.memory == 3]
    assert missed
    for trial in missed:
        assert trial.residual > 1e-3
        assert "expected at most 1.00e-03" in trial.fault
        assert trial.seconds is None
    assert found.entries[0].best.memory != 3
    assert "residual 1." in found.table(100)


def test_where_nothing_meets_the_tolerance_nothing_is_kept(monkeypatch, store, capsys):
    spoiled(monkeypatch, lambda way: True)
    model = layer()
    found = tune(model, features(model), apply=True)
    assert found.entries == ()
    assert found.speedup is None
    assert found.file is None
    assert found.solver == model.solver == Anderson()
    arguments = "autotune --dim 16 --batch 20 --budget 1 --forward-only --quiet"
    assert cli.main(arguments.split()) == 1
    assert "nothing met the tolerance" in capsys.readouterr().out
    assert not list(store.glob("*.json"))


def test_a_wrong_gradient_is_seen():
    model = layer()
    example = Example(model, features(model), True)
    answers = example.call(Way("host", Host(0.75), 5, True))()
    assert list(answers) == list(tuning.SOLVES)
    residual, fault = example.judge(answers)
    assert fault is None
    assert residual <= 1e-3
    dm, dx = answers["fusion adjoint"]
    answers["fusion adjoint"] = dm, 1.1 * dx
    assert "fusion adjoint: dL/dx off by" in example.judge(answers)[1]
    answers["fusion adjoint"] = dm, dx
    answers["modality"] = (torch.full_like(answers["modality"][0], torch.nan),)
    assert example.judge(answers)[0] == float("inf")


def test_what_products_cannot_tell_is_allowed_for():
    """Twice as far off as the reference, if that says that it met the tolerance; up to a bound."""
    model = layer()
    example = Example(model, features(model), False)
    assert example._allowed["fusion"] == 1e-3
    true = torch.zeros(20, dtype=torch.int32)
    for factor, status, allowed in ((1.003, 0, None), (1.003, 1, 1e-3), (2.0, 0, 1e-2)):
        off = (factor * example.zf,)
        errors = example._errors["fusion"](off)
        claimed = torch.full(errors.shape, status)
        example._allow("fusion", (example.zf,), true, off, claimed)
        expected = 2 * float(errors.median()) if allowed is None else allowed
        assert 1e-3 <= expected <= 1e-2
        assert example._allowed["fusion"] == pytest.approx(expected)
    assert not example._solved["fusion"].any()
    # In bfloat16 the bound is of its rounding.
    example = Example(model.bfloat16(), features(model), False)
    example._allow("fusion", (2 * example.zf,), true, (example.zf,), true)
    assert example._allowed["fusion"] == 4 * 2**-7


def test_what_has_no_truth_is_not_what_others_are_held_against():
    """Neither as a measure of rounding, nor as rows that an answer must solve."""
    model = layer()
    x = features(model, 32)
    whole = Example(model, x, False)
    x[:, :20] = torch.nan
    example = Example(model, x, False)
    assert example._allowed == whole._allowed == {"modality": 1e-3, "fusion": 1e-3}
    for name in tuning.SOLVES[:2]:
        assert not example._solved[name][..., :20].any()
        assert torch.equal(example._solved[name][..., 20:], whole._solved[name][..., 20:])
    noise = {"modality": (torch.randn_like(x),), "fusion": (torch.randn_like(x[0]),)}
    assert "fusion: residual" in example.judge(noise)[1]
    # Whose truth did not converge is left out, however near the answer came.
    errors = torch.zeros(32)
    example._errors["fusion"] = lambda answer: errors
    failed = torch.ones(32, dtype=torch.int32)
    example._allow("fusion", (example.zf,), failed, (example.zf,), 0 * failed)
    assert not example._solved["fusion"].any()
    assert example._allowed["fusion"] == 1e-3


@pytest.mark.parametrize("fainter", [4, 16, 64])
def test_where_few_rows_have_an_equilibrium_nothing_far_off_wins(fainter):
    """More than half have none: the error of the median is no rounding."""
    torch.manual_seed(0)
    model = DEQFusion(64, 2, gate="identity", skip=True, solver=Anderson(tol=1e-3)).eval()
    found = tune(model, torch.randn(2, 64, 64) / fainter, budget=1e-3, save=False)
    assert found.without_answer > 96
    for entry in found.entries:
        assert entry.residual <= 1e-2
    if not found.entries:
        assert "no row that the layer as it is solves" in found.trials[0].fault


def test_what_raises_is_out():
    model = layer()
    run = search.Search(Example(model, features(model), False), 5, search.clock(), print)
    trial = run.screen(Way("host", Host(0.75), -1, True))
    assert trial.fault.startswith("ValueError: memory: got -1")
    assert run.of("host") == []
    assert run.best_solver() == (5, True)


def test_a_short_search_does_not_lose_what_a_long_one_found(monkeypatch, store):
    """What is stored is tried after the default, whatever the time."""
    model = layer()
    x = features(model)
    found = tune(model, x, budget=1, backward=False)
    best = replace(found.entries[0].best, config=Host(0.625))
    tuning.save([replace(found.entries[0], best=best)], found.file)
    monkeypatch.setattr(search, "clock", Clock())
    found = tune(model, x, budget=1, backward=False)
    assert {t.way.config for t in found.trials} == {Host(0.75), Host(0.625)}


@pytest.mark.parametrize("at", [1, 3, 9])
def test_an_interruption_keeps_what_was_found(at, monkeypatch, store):
    inner, begun = Example.call, []

    def call(self, way):
        begun.append(way)
        if len(begun) > at:
            raise KeyboardInterrupt
        return inner(self, way)

    monkeypatch.setattr(Example, "call", call)
    model = layer(solver=Anderson(tol=1e-2))
    found = tune(model, features(model), backward=False)
    assert found.interrupted
    assert len([t for t in found.trials if t.counts]) <= at
    assert tuning.read(found.file) == list(found.entries)
    assert len(found.entries) == 1
    assert found.trials[-1].fault == "interrupted"


def test_the_command_says_that_it_was_interrupted(monkeypatch, capsys):
    def finals(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(search.Search, "finals", finals)
    assert cli.main(["autotune", "--dim", "16", "--batch", "20", "--budget", "2", "--quiet"]) == 130
    printed = capsys.readouterr().out
    assert "interrupted: the best so far is kept" in printed
    assert ".json" in printed


def test_the_budget_is_kept(monkeypatch):
    """By a clock that is looked at some ten times for a way."""
    model = layer()
    x = features(model)
    tried = []
    for budget in (1.0, 60.0, 120.0):
        monkeypatch.setattr(search, "clock", Clock())
        found = tune(model, x, budget=budget, backward=False)
        # The default always is.
        tried.append(len(found.trials))
        assert search.clock.now < budget + 100
        assert found.entries
    assert tried[0] == 1
    assert tried[0] < tried[1] < tried[2]


def test_rounds_rotate_and_medians_decide(monkeypatch):
    model = layer()
    run = search.Search(Example(model, features(model), False), 5, search.clock(), print)
    trials = [Trial(Way("host", Host(0.75), m, True)) for m in range(3)]
    assert search.SAMPLES == 3
    order = []
    for trial in trials:
        run._calls[id(trial)] = lambda trial=trial: order.append(trial.way.memory)
    samples = iter([1.0, 1.0, 5.0, 2.0, 5.0, 3.0, 5.0, 9.0, 5.0])
    monkeypatch.setattr(run, "_time", lambda call, flush: (call(), next(samples))[1])
    run.sample(trials, 3)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert [t.seconds for t in trials] == [3.0, 2.0, 5.0]


def test_the_memory_is_that_of_both_forward_solves():
    model = layer()
    run = search.Search(Example(model, features(model), False), 5, search.clock(), print)
    for solve, times in (("modality", (1.0, 2.0, 3.0)), ("fusion", (9.0, 2.0, None))):
        for memory, seconds in zip((2, 3, 4), times, strict=True):
            run.trials.append(Trial(Way(solve, Config(), memory, True), seconds=seconds))
    assert run._best_memory() == 3
    assert [t.way.memory for t in run.by("modality", 3, True)] == [3]
    # Among those of the finals, whatever the others took in another moment.
    for trial in run.trials:
        if trial.way.memory == 2:
            trial.final = True
    assert run._best_memory() == 2


def finals(times: dict[tuple[int, float], float], own: int = 5) -> search.Search:
    """A search whose ways took so long, by memory and compaction, and take that from now on."""
    model = layer(solver=Anderson(memory=own))
    run = search.Search(Example(model, features(model), False), 60, search.clock(), lambda *_: None)
    run.slower = 1.0
    for (memory, below), seconds in times.items():
        trial = Trial(
            Way("host", Host(below), memory, True), default=(memory, below) == (own, 0.75)
        )
        trial.residual, trial.seconds = 0.0, seconds
        run.trials.append(trial)
        run._calls[id(trial)] = lambda seconds=seconds: seconds
    run._time = lambda call, flush: run.slower * call()
    return run


def order_of(run: search.Search) -> list[tuple[int, float]]:
    return [(t.way.memory, t.way.config.compact_below) for t in run.of("host")]


def test_who_was_not_in_the_finals_does_not_win_them():
    """Though everything is twice as slow there as it was when that was screened."""
    times = {(5, 0.75): 1.6, (5, 0.9): 1.55, (2, 0.75): 1.0, (3, 0.75): 1.01, (4, 0.75): 1.02,
             (6, 0.75): 1.03, (7, 0.75): 1.5}  # fmt: skip
    run = finals(times)
    run.slower = 2.0
    assert run.finals("host", run.of("host"), 60)
    assert order_of(run)[:4] == [(2, 0.75), (3, 0.75), (4, 0.75), (6, 0.75)]
    # With the layer's own solver there were all; the one that was not comes last.
    assert order_of(run)[4:] == [(5, 0.9), (5, 0.75), (7, 0.75)]
    assert [t.final for t in run.of("host")] == [True] * 6 + [False]
    assert [t.seconds for t in run.of("host")][-2:] == [3.2, 1.5]
    assert run.best_solver() == (2, True)


@pytest.mark.parametrize(("rounds", "replaced"), [(0, False), (1, False), (2, False), (3, True)])
def test_finals_cut_short_replace_nothing(rounds, replaced, monkeypatch):
    """One sample says less than the median of three."""
    run = finals({(5, 0.75): 1.2, (2, 0.75): 1.0, (3, 0.75): 1.1})
    run.slower, begun = 2.0, []
    monkeypatch.setattr(
        search.Search, "passed", property(lambda self: 0.0 if len(begun) < rounds else 99.0)
    )
    run.progress = lambda *_: begun.append(1)
    assert run.finals("host", run.of("host"), 60)
    assert len(begun) == rounds
    factor = 2 if replaced else 1
    assert [t.seconds for t in run.of("host")] == [factor * s for s in (1.0, 1.1, 1.2)]
    assert all(t.final == replaced for t in run.trials)


@pytest.mark.parametrize(("rounds", "replaced"), [(2, False), (3, True)])
def test_an_interrupted_final_keeps_whole_rounds(rounds, replaced):
    run = finals({(5, 0.75): 1.2, (2, 0.75): 1.0, (3, 0.75): 1.1})
    samples = []

    def time(call, flush):
        if len(samples) == 3 * rounds + 1:
            raise KeyboardInterrupt
        samples.append(call())
        return 2 * call() if len(samples) <= 3 * rounds else 99.0

    run._time = time
    with pytest.raises(KeyboardInterrupt):
        run.finals("host", run.of("host"), 60)
    factor = 2 if replaced else 1
    assert [t.seconds for t in run.of("host")] == [factor * s for s in (1.0, 1.1, 1.2)]


def timed(monkeypatch, seconds):
    """Ways take as long as `seconds` says; they solve all the same."""
    inner = Example.call

    def call(self, way):
        run = inner(self, way)
        names[id(run)] = run, way
        return run

    names = {}
    monkeypatch.setattr(Example, "call", call)
    monkeypatch.setattr(search.Search, "_time", lambda self, run, flush: seconds(names[id(run)][1]))


@pytest.mark.parametrize("apply", [False, True])
def test_what_is_kept_was_timed_with_the_solver_that_the_layer_has(apply, monkeypatch):
    """Of one memory one compaction is the best, of another another."""

    def seconds(way):
        best = 0.5 if way.memory == 7 else 0.9
        return (1.0 if way.memory == 7 else 2.0) - 0.5 * (way.config.compact_below == best)

    timed(monkeypatch, seconds)
    model = layer()
    found = tune(model, features(model), backward=False, apply=apply)
    (entry,) = found.entries
    best = (7, Host(0.5), 0.5) if apply else (5, Host(0.9), 1.5)
    assert (entry.best.memory, entry.best.config, entry.best.seconds) == best
    assert entry.runner_up.memory == entry.best.memory
    assert (entry.default.memory, entry.default.config) == (5, Host(0.75))
    assert found.solver.memory == 7
    assert model.solver.memory == (7 if apply else 5)
    # What the configuration gains, and what the solver.
    assert found.speedup == pytest.approx(2 / 1.5)
    assert found.solver_speedup == pytest.approx(1.5 / 0.5)


def test_where_the_own_solver_solves_nothing_the_best_one_is_kept(monkeypatch):
    spoiled(monkeypatch, lambda way: way.memory == 5)
    model = layer()
    found = tune(model, features(model), backward=False)
    (entry,) = found.entries
    assert entry.best.memory == found.solver.memory != 5
    assert entry.default is None
    assert found.speedup is None
    assert found.solver_speedup is None


@pytest.mark.parametrize("at", [5, 8])
def test_who_raises_in_the_finals_is_out_and_the_others_are_kept(at, monkeypatch):
    """In the first round of them (each was verified once and timed thrice), or after three."""
    inner, seen = Example.call, []

    def call(self, way):
        run = inner(self, way)
        if way.memory != 7:
            return run

        def failing():
            seen.append(way)
            if seen.count(way) == at:
                raise RuntimeError("out of resources")
            return run()

        return failing

    monkeypatch.setattr(Example, "call", call)
    monkeypatch.setattr(
        search.Search, "_memories", lambda self, best: iter([Way("host", best.config, 7, True)])
    )
    monkeypatch.setattr(search.Search, "_ladders", lambda self, best: iter(()))
    monkeypatch.setattr(search, "COMPACTIONS", (0.75,))
    model = layer()
    found = tune(model, features(model), backward=False)
    (raised,) = [t for t in found.trials if t.fault]
    assert raised.way.memory == 7
    assert raised.fault == "RuntimeError: out of resources"
    (entry,) = found.entries
    assert entry.best.memory == 5
    assert tuning.read(found.file) == [entry]
    assert [t.final for t in found.trials if t.counts] == [at == 8]


def test_what_cannot_be_saved_in_the_end_is_returned(monkeypatch, caplog, store):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning, "save", full)
    model = layer()
    found = tune(model, features(model), backward=False, budget=1, apply=True)
    assert found.entries
    assert found.file is None
    assert model.solver == found.solver
    (record,) = caplog.records
    assert record.name == "deqfusion.tuning.api"
    assert "cannot be saved (No space left on device)" in record.getMessage()
    assert str(store) in record.getMessage()


def test_the_command_says_that_nothing_was_saved(tmp_path):
    """In one line, after all that it found."""
    program = """
from deqfusion import cli
from deqfusion.kernels import tuning
def full(*_):
    raise OSError(28, "No space left on device")
tuning.save = full
raise SystemExit(cli.main("autotune --dim 16 --batch 20 --budget 1 --quiet --device cpu".split()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be saved (No space left on device)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "times as fast as the default" in done.stdout
    assert ".json" not in done.stdout


# --- the programs, interpreted -------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """The programs on CPU tensors, with few ways to run them."""
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    from deqfusion.kernels import candidates

    monkeypatch.setattr(candidates, "ROWS", (16, 32))
    monkeypatch.setattr(candidates, "SCHEDULES", ("row",))
    monkeypatch.setattr(candidates, "DEPTHS", (16,))
    monkeypatch.setattr(candidates, "WARPS", (8,))
    monkeypatch.setattr(candidates, "STAGES", (2,))
    monkeypatch.setattr(predict, "MEMORIES", (0, 2))
    monkeypatch.setattr(search, "SAMPLES", 1)
    monkeypatch.setattr(search, "ROUNDS", 1)
    quick = Anderson(tol=0.05, memory=2)
    return layer(8, 1, num_groups=1, solver=quick, adjoint=Implicit(quick))


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
    x = features(few, 3)
    for apply in (False, True):
        found = tune(few, x, backward=False, apply=apply, save=False)
        assert found.solver.memory == 0
        kept = {(e.best.memory, e.best.config.rows, e.best.seconds) for e in found.entries}
        assert kept == {(0, 16, 0.5) if apply else (2, 32, 1.5)}
        assert found.speedup == pytest.approx(2 / 1.5)
        assert found.solver_speedup == pytest.approx(3)


@needs_interpreter
def test_the_precision_of_products_is_part_of_what_is_tuned(few, capsys):
    arguments = "--dim 8 --groups 1 --modalities 1 --batch 3 --tol 0.05 --budget 1e-3 --quiet"
    more = "--forward-only --dry-run --precision medium"
    assert cli.main(["autotune", *arguments.split(), *more.split()]) in (0, 1)
    assert torch.get_float32_matmul_precision() == "highest"
    assert "Triton interpreter: 3 rows" in capsys.readouterr().out
    torch.set_float32_matmul_precision("medium")
    try:
        example = Example(few, features(few, 3), False)
        assert example.problem("modality").precision == "low"
    finally:
        torch.set_float32_matmul_precision("highest")


@needs_interpreter
def test_what_the_programs_lack_is_refused(few):
    few.double()
    with pytest.raises(ValueError, match=r"dtype: got torch\.float64"):
        tune(few, features(few, 3))


# --- the cost model alone ------------------------------------------------------------------------


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
    from deqfusion.kernels.candidates import candidates
    from deqfusion.kernels.cost import DEVICES
    from deqfusion.kernels.layout import Layout

    steps = {0: 20, 5: 10}
    every = candidates(
        "modality", 612, Layout(500, 4), 3, DEVICES["h200"], low=True, steps=steps,
        shared=227 * 1024,
    )  # fmt: skip
    assert [c.rank for c in every] == sorted(c.rank for c in every)
    assert {c.memory for c in every} == {0, 5}
    assert {c.config.schedule for c in every} == {"row", "cooperative", "step"}
    # 612 rows in tiles of 16 would be 468 cooperative programs, of 132 at once.
    assert min(c.config.rows for c in every if c.config.schedule == "cooperative") == 64
    for c in every:
        tiles = c.config.depth * (c.config.rows + 128)
        assert 4 * tiles * c.config.stages <= 227 * 1024
        assert c.config.rows * 128 <= 64 * 32 * c.config.warps


# --- the command, and bad input ------------------------------------------------------------------


def test_the_command(store, tmp_path, capsys):
    arguments = "autotune --dim 16 --groups 2 --modalities 1 --batch 8,30 --budget 1 --quiet"
    assert cli.main([*arguments.split(), "--dry-run"]) == 0
    assert not list(store.glob("*.json"))
    assert cli.main([*arguments.split(), "--out", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*.json")
    printed = capsys.readouterr().out
    assert str(file) in printed
    assert "times as fast as the default" in printed
    assert [e.problem.rows for e in tuning.read(file)] == [8, 32]
    assert not list(store.glob("*.json"))


@pytest.mark.parametrize("prefix", ["", "fusion.", "model/fusion."])
def test_a_layer_from_a_file(prefix, tmp_path, capsys):
    model = layer(gate_input="concat")
    tensors = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    tensors["head.weight"] = torch.zeros(3)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    from deqfusion.tuning.command import layer_from_file

    found = layer_from_file(path, num_groups=2)
    assert found.options.gate_input == "concat"
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    arguments = [
        "--groups",
        "2",
        "--batch",
        "20",
        "--budget",
        "1",
        "--quiet",
        "--dry-run",
        "--forward-only",
    ]
    assert cli.main(["autotune", "--from-module", str(tmp_path), *arguments]) == 0
    assert "20 rows, width 16, 2 modalities" in capsys.readouterr().out


def test_a_checkpoint_gives_its_best_epoch(tmp_path):
    from deqfusion.tuning.command import layer_from_file

    tensors = {}
    for part, value in (("model", 1.0), ("best", 2.0)):
        for name, tensor in layer().state_dict().items():
            tensors[f"{part}/fusion.{name}"] = torch.full_like(tensor, value)
    save_file(tensors, tmp_path / "checkpoint.safetensors")
    found = layer_from_file(tmp_path / "checkpoint.safetensors", num_groups=2)
    assert (found.gate_bias == 2).all()


def file_of(kind: str, folder: Path) -> Path:
    path = folder / "file.safetensors"
    state = layer().state_dict()
    if kind == "pickle":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path.write_bytes(buffer.getvalue())
    elif kind == "folder":
        path = folder
    elif kind == "none":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "two":
        save_file({f"{k}.{n}": v.clone() for k in "ab" for n, v in state.items()}, path)
    elif kind == "part":
        save_file({n: v for n, v in state.items() if "norm1" not in n}, path)
    elif kind == "flat":
        save_file({**state, "modality_weight1": torch.zeros(3)}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", "cannot be read"),
        ("missing", "cannot be read"),
        ("folder", "cannot be read"),
        ("none", "got layers none, expected the tensors of one"),
        ("two", "got layers a., b., expected the tensors of one"),
        ("part", "Missing key(s) in state_dict"),
        ("flat", "expected (N, d, d)"),
    ],
)
def test_files_without_a_layer_are_refused_in_one_line(kind, message, tmp_path, capsys):
    path = file_of(kind, tmp_path)
    assert cli.main(["autotune", "--groups", "2", "--from-module", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"deqfusion: error: --from-module {path}")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--target h300", "target: got 'h300', expected one of 'h200', 'h100', 'a100', 'mi300x'"),
        ("--dim 30", "num_groups: got 4, expected a divisor of dim = 30"),
        ("--from-module a --dim 8", "--from-module: got --dim or --modalities as well, expected"),
        ("--device tpu", "--device: got 'tpu', expected cpu, cuda or cuda:1"),
        ("--device meta", "--device: got 'meta', expected cpu or one of"),
        ("--device cuda:99", "--device: got 'cuda:99', expected cpu or one of"),
        ("--target h200 --dtype float64", "dtype: got torch.float64"),
        ("--target h200 --dim 2056 --groups 1 --batch 1", "got 2056 channels per group"),
    ],
)
def test_bad_values_are_refused_in_one_line(arguments, message, capsys, store):
    assert cli.main(["autotune", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not store.exists()


@pytest.mark.parametrize(
    "arguments",
    ["--batch 0", "--batch 3,x", "--dim none", "--dtype int8", "--budget 0", "--budget nan",
     "--tol 0", "--out a --dry-run", "--modalities -1"],
)  # fmt: skip
def test_arguments_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["autotune", *arguments.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("deqfusion autotune: error: ")
    assert error.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_timed(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(search.Search, "host", None)
    out = str(tmp_path / "file" / "deeper")
    assert cli.main(["autotune", "--dim", "16", "--out", out]) == 2
    error = capsys.readouterr().err
    assert f"{out}: cannot be written" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({"joint": True}, {}, ValueError, "module: got joint=True"),
        ({"adjoint": Unroll(3)}, {}, ValueError, "module: got adjoint Unroll"),
        ({}, {"budget": 0}, ValueError, "budget: got 0"),
        ({}, {"budget": "1"}, TypeError, "budget: got '1'"),
        ({}, {"target": "h300"}, ValueError, "target: got 'h300'"),
        ({}, {"apply": 1}, TypeError, "apply: got 1"),
        ({}, {"backward": 1}, TypeError, "backward: got 1"),
    ],
)
def test_bad_input(options, arguments, error, message):
    model = layer(**options)
    with pytest.raises(error, match=message):
        tune(model, features(model), **arguments)


def test_bad_modules_and_features():
    model = layer()
    with pytest.raises(TypeError, match="module: got Linear, expected a DEQFusion"):
        tune(torch.nn.Linear(3, 3), features(model))
    with pytest.raises(ValueError, match="example_features: got no rows"):
        tune(model, features(model, 0))
    with pytest.raises(ValueError, match="features"):
        tune(model, torch.randn(3, 4, 16))


def test_the_reference_on_a_gpu_has_nothing_to_tune(monkeypatch):
    from deqfusion.tuning import api

    monkeypatch.setenv("DEQFUSION_BACKEND", "reference")
    assert not api._runs_programs(torch.device("cpu"))
    with pytest.raises(ValueError, match="DEQFUSION_BACKEND=reference: got a module on cuda"):
        api._runs_programs(torch.device("cuda"))


# --- around it -----------------------------------------------------------------------------------


def test_the_function_is_exported():
    assert deqfusion.autotune is autotune
    assert "autotune" in deqfusion.__all__


def test_a_progress_bar_on_standard_error(capsys):
    model = layer()
    tune(model, features(model), progress=True, backward=False, budget=1)
    captured = capsys.readouterr()
    assert "autotune: " in captured.err
    assert "memory" in captured.err
    assert captured.out == ""


def test_the_doctor_says_what_is_in_force(capsys):
    def line():
        names = ("versions", "environment", "operators", "implementations", "self_test")
        report = {name: {} for name in names} | {"gpus": [], "missing": [], "system": ""}
        report["processor"] = dict.fromkeys(("name", "cores", "threads", "capability"), "")
        report |= {"ladder": {"on": False, "reason": ""}, "tuned": doctor.tuned([])}
        json.dumps(report)
        text = doctor.render(report)
        return next(x for x in text.splitlines() if x.startswith("tuned"))

    assert f"{tuning.host_name()}: nothing, the defaults are used" in line()
    model = layer()
    found = tune(model, features(model), backward=False, budget=1)
    assert f"{tuning.host_name()}: 1 entries of {found.file}" in line()
