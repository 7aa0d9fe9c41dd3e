"""What wins was verified, what was found is kept, and time is bounded."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import astuple, replace

import pytest
import torch

from deqfusion import Anderson, DEQFusion, cli
from deqfusion.kernels import tuning
from deqfusion.kernels.config import Config
from deqfusion.kernels.tuning import Host
from deqfusion.tuning import Trial, search
from deqfusion.tuning.example import Example, Way
from tests.tuning.problems import Clock, compactions, features, layer, timed, tune


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


@pytest.mark.parametrize(
    ("precision", "rounding"), [("highest", 2**-23), ("high", 2**-10), ("medium", 2**-10)]
)
def test_the_rounding_of_products(monkeypatch, precision, rounding):
    """At "medium" they are of float16, which has the bits of tf32."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    model = layer()
    assert Example(model, features(model), False)._rounding == rounding


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


def test_what_the_best_solver_gains_is_known_though_its_default_is_slow():
    """That was not among the fastest, and is what its configuration is held against."""
    times = {(5, 0.75): 1.6, (2, 0.5): 1.0, (2, 0.9): 1.01, (2, 1.0): 1.02, (3, 0.75): 1.03,
             (2, 0.75): 1.3}  # fmt: skip
    run = finals(times)
    assert run.finals("host", run.of("host"), 60)
    assert run.kept("host", 2, True)[0].way.config == Host(0.5)
    found = run.solver_gain((2, True))
    assert found.sure
    assert found.median == pytest.approx(1.6)


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


@pytest.mark.parametrize("apply", [False, True])
def test_what_is_kept_was_timed_with_the_solver_that_the_layer_has(apply, monkeypatch):
    """Of one memory one compaction is the best, of another another."""

    def seconds(way):
        best = 0.5 if way.memory == 7 else 0.9
        return (1.0 if way.memory == 7 else 2.0) - 0.5 * (way.config.compact_below == best)

    timed(monkeypatch, seconds)
    model = layer()
    found = tune(model, features(model), backward=False, apply=apply)
    both = [(7, Host(0.5), 0.5), (5, Host(0.9), 1.5)]
    assert [(e.best.memory, e.best.config, e.best.seconds) for e in found.entries] == (
        both if apply else both[::-1]
    )
    for entry in found.entries:
        assert entry.problem.memory == entry.best.memory == entry.runner_up.memory
        assert (entry.default.memory, entry.default.config) == (5, Host(0.75))
    assert found.solver.memory == 7
    assert model.solver.memory == (7 if apply else 5)
    # What the configuration gains, and what the solver.
    assert found.speedup.median == pytest.approx(2 / 1.5)
    assert found.solver_speedup.median == pytest.approx(1.5 / 0.5)
    # Whoever has that solver gets what was found for it.
    assert {tuning.lookup(found.device, *astuple(e.problem)) for e in found.entries} == {
        Host(0.5), Host(0.9),
    }  # fmt: skip


def test_threads_and_memory_are_part_of_what_was_tuned(monkeypatch):
    """What was found with one of either says nothing about another."""
    timed(monkeypatch, lambda way: 1.0 if way.config == Host(0.9) else 2.0)
    model = layer()
    x = features(model)
    found = tune(model, x, backward=False)
    assert {e.best.config for e in found.entries} == {Host(0.9)}
    below = compactions(monkeypatch)

    def used(solver=None, threads=None):
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        below.clear()
        try:
            model.solver = solver or Anderson()
            model(x)
        finally:
            torch.set_num_threads(before)
        return set(below)

    assert used() == {0.9}
    assert used(threads=torch.get_num_threads() + 1) == {0.75}
    assert used(Anderson(memory=4)) == {0.75}


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
    assert "kept" in done.stdout
    assert ".json" not in done.stdout
