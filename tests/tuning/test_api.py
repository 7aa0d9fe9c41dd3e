"""Autotune on a CPU, and what is around it."""

from __future__ import annotations

import json

import pytest
import torch

import deqfusion
from deqfusion import Anderson, Implicit, Phantom, Picard, doctor, ops
from deqfusion.kernels import tuning
from deqfusion.kernels.tuning import Host
from deqfusion.tuning import autotune, search
from tests.tuning.problems import compactions, features, layer, tune


@pytest.mark.parametrize("backward", [False, True])
def test_on_a_cpu(backward, store):
    model = layer()
    before = model.solver
    found = tune(model, features(model), backward=backward)
    entry, *others = found.entries
    threads = torch.get_num_threads()
    assert entry.problem == tuning.Problem("host", 16, 2, 2, "float32", 5, threads, 16)
    # And for the solver that is recommended, where it is another.
    assert [e.problem.memory for e in others] == [found.solver.memory] * (found.solver != before)
    assert found.device == entry.device == tuning.host_name()
    assert isinstance(entry.best.config, Host)
    assert 0 < entry.residual <= entry.tolerance == 1e-3
    assert entry.best.p20 <= entry.best.seconds <= entry.best.p80
    assert entry.best.seconds <= entry.default.seconds
    assert entry.torch == torch.__version__
    assert (found.speedup is None) == (entry.best == entry.default)
    assert found.speedup is None or found.speedup.low > 1
    assert isinstance(found.solver, Anderson)
    # What is kept is for the layer as it is.
    assert (entry.best.memory, entry.best.ladder) == (5, True)
    assert (found.solver_speedup is None) == (found.solver == before)
    assert found.solver == before or found.solver_speedup.low > 1
    assert model.solver == before
    assert {t.way.memory for t in found.trials} == {0, *range(2, 9)}
    assert {t.way.config.compact_below for t in found.trials} == {0.5, 0.75, 0.9, 1.0}
    assert found.file == store / f"{tuning.slug(found.device)}.json"
    assert set(tuning.read(found.file)) == set(found.entries)
    starred = [line for line in found.table(100).splitlines() if line.startswith("*")]
    assert len(starred) == len(found.entries)
    starred.sort(key=lambda line: f"memory {entry.best.memory}," not in line)
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
    seen = compactions(monkeypatch)

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


def test_the_function_is_exported():
    assert deqfusion.autotune is autotune
    assert "autotune" in deqfusion.__all__


def test_a_progress_bar_on_standard_error(capsys):
    model = layer()
    tune(model, features(model), progress=True, backward=False, budget=1)
    captured = capsys.readouterr()
    assert "autotune: " in captured.err
    assert "1/1 s, host: " in captured.err
    assert captured.out == ""
    # In a file, where a bar cannot be written over, not one for every way.
    assert captured.err.count("autotune: ") <= 3


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
    # One for the layer's memory, and another where a different one is recommended.
    count = len({model.solver.memory, found.solver.memory})
    assert f"{tuning.host_name()}: {count} entries of {found.file}" in line()
