"""Autotune on a device: it finds something right, which operators run from then on."""

import logging

import pytest
import torch

from deqfusion import Anderson, DEQFusion, Implicit, autotune
from deqfusion.kernels import launch, tuning
from deqfusion.tuning import search

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch can use"
)


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("DEQFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "_told", False)
    tuning.forget()
    yield
    tuning.forget()


def layer(**options):
    torch.manual_seed(0)
    solver = Anderson(tol=1e-3)
    return DEQFusion(128, 2, solver=solver, adjoint=Implicit(solver), **options).cuda()


def configs(model, features, monkeypatch):
    """What each solve runs with."""
    ran = {}
    inner = launch.Plan.run

    def recording(plan, *rest):
        ran[plan.solve] = plan.config
        return inner(plan, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(launch.Plan, "run", recording)
        model(features.requires_grad_()).sum().backward()
    return ran


def test_tuned_and_looked_up(monkeypatch, caplog):
    model = layer()
    features = torch.randn(2, 64, 128, device="cuda")
    expected = model(features).detach()
    assert caplog.text.count("nothing tuned") == 1
    found = autotune(model, features, budget=40, apply=True, progress=False)
    now = [e for e in found.entries if e.problem.memory == model.solver.memory]
    now += [e for e in found.entries if "adjoint" in e.problem.solve and e not in now]
    assert [e.problem.solve for e in now] == list(tuning.SOLVES)
    name = torch.cuda.get_device_name()
    for entry in found.entries:
        assert entry.device == name
        if entry.best.memory == entry.default.memory:
            assert entry.best.seconds <= entry.default.seconds
        assert entry.best.warm > 0
        if "adjoint" not in entry.problem.solve:
            assert 0 < entry.residual <= 1e-3
    assert found.speedup is None or found.speedup.sure
    assert model.solver.memory == found.entries[0].best.memory
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        ran = configs(model, features, monkeypatch)
        assert not caplog.records
    assert ran == {e.problem.solve: e.best.config for e in now}
    torch.testing.assert_close(model(features), expected, rtol=1e-2, atol=1e-2)


def test_spills_are_seen_by_the_compiler():
    model = layer()
    features = torch.randn(2, 64, 128, device="cuda")
    with launch.watching() as programs, torch.no_grad():
        model(features)
    assert {search.KERNELS[solve] for solve in tuning.SOLVES[:2]} <= {p.name for p in programs}
    assert all(program.registers > 0 and program.spills == 0 for program in programs)


def test_a_graph_of_a_tuned_layer():
    model = layer().eval()
    features = torch.randn(2, 64, 128, device="cuda")
    autotune(model, features, budget=5, progress=False)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(features)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(features)
        features.copy_(torch.randn_like(features))
        graph.replay()
        torch.testing.assert_close(out, model(features))
