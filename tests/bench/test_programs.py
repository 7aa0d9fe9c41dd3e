"""Contenders that keep no adjoint, the Triton programs, interpreted: verified by true gradients."""

import dataclasses
import importlib
from contextlib import contextmanager

import pytest

from deqfusion.bench import contenders, runner, suites, warm, work
from deqfusion.bench.contenders import BACKWARD, FORWARD
from deqfusion.bench.contenders.ours_programs import OursPrograms
from deqfusion.bench.problem import Problem, Shape
from deqfusion.bench.trial import Trial, Truth
from deqfusion.kernels.config import SCHEDULES, Config

pytest.importorskip("triton", reason="the GPU programs need Triton")
launch = importlib.import_module("deqfusion.kernels.launch")


def test_programs_are_verified():
    trial = Trial("ours_row", Problem(Shape(2, 16, 1)), 1e-3, (BACKWARD,))
    assert (trial.status, trial.reason) == ({BACKWARD: "ok"}, {BACKWARD: ""})
    found = trial.found[BACKWARD]
    assert found["residual"] <= 1e-3
    assert found["gradient_error"] <= trial.truth.allowed
    # The programs do not tell the steps of their adjoints, so that nothing is counted of them.
    assert set(found["steps"]) == {"modality", "fusion"}
    assert work.count(trial.problem.shape, BACKWARD, trial.evaluations[BACKWARD],
                      found["steps"], trial.contender.memory) is None  # fmt: skip


def test_wrong_gradients_are_seen():
    """What has no adjoint to be checked by is held against gradients solved in fp64."""
    problem = Problem(Shape(4, 16, 1))
    trial = Trial("ours_reference", problem, 1e-3, (FORWARD, BACKWARD))
    answer = dataclasses.replace(trial.contender.run(BACKWARD), adjoint=None)
    assert trial.verify(BACKWARD, answer)
    assert trial.found[BACKWARD]["gradient_error"] <= trial.truth.allowed
    wrong = {name: value * 1.5 for name, value in answer.gradients().items()}
    assert not trial.verify(BACKWARD, dataclasses.replace(answer, gradients=lambda: wrong))


def test_truth_is_shared():
    problem = Problem(Shape(4, 16, 1))
    truth = Truth(problem, 1e-3)
    assert Trial("textbook", problem, 1e-3, truth=truth).truth is truth
    # Nobody asked for it: it was not solved.
    assert "gradients" not in truth.__dict__


def test_every_schedule_and_precision_is_a_contender():
    known = contenders.contenders()
    for schedule in SCHEDULES:
        for suffix, precision in (("", "highest"), ("_high", "high"), ("_medium", "medium")):
            kind = known[f"ours_{schedule}{suffix}"]
            assert issubclass(kind, OursPrograms)
            assert (kind.schedule, kind.precision) == (schedule, precision)
            assert not kind.baseline
    for suite in suites.SUITES.values():
        assert set(suite.contenders) | set(suite.on_gpu) <= set(known)


def test_parts_that_warm_caches_cover_every_pair_once(monkeypatch):
    seen = []
    kinds = contenders.contenders()
    for name in ("textbook", "ours", "ours_row"):
        monkeypatch.setattr(
            kinds[name], "run",
            lambda self, mode: seen.append((self.name, self.problem.shape.batch, mode)),
        )  # fmt: skip
    suite = suites.Suite(
        "test", suites.cases(Shape(20, 16, 1), Shape(30, 32, 1)),
        ("textbook", "textbook_cudagraph", "ours", "ours_row"), device="cpu",
    )  # fmt: skip
    ran = [warm.warm(suite, part, 3) for part in range(3)]
    # What cannot run here is left out; rows decide on a program's schedule, and are the case's own.
    assert sum(ran) == 6
    assert len(seen) == len(set(seen)) == 12
    assert {(name, rows) for name, rows, _ in seen} == {
        (name, rows) for name in ("textbook", "ours", "ours_row") for rows in (20, 30)
    }


def test_what_fails_while_it_is_warmed_is_left_to_the_measurement(monkeypatch):
    def wide(self, mode):
        raise ValueError("2048 channels per group")

    monkeypatch.setattr(contenders.get("ours"), "run", wide)
    suite = suites.Suite("test", suites.cases(Shape(2, 16, 1)), ("ours",), device="cpu")
    assert warm.warm(suite, 0, 1) == 1


@pytest.mark.parametrize("text", ["", "3", "2/2", "-1/2", "a/b", "1/0"])
def test_parts_that_do_not_parse(text):
    with pytest.raises(ValueError, match="--warm must be K/OF"):
        warm.parse(text)


@pytest.fixture
def cooperative_here(monkeypatch):
    """`ours_cooperative` on this device, which holds none of its programs at once."""
    kind, run = contenders.get("ours_cooperative"), launch.Plan.run

    def refusing(self, *arguments):
        if self.cooperative:
            raise launch.NotResident("528 programs, the device holds 264 at once")
        return run(self, *arguments)

    monkeypatch.setattr(kind, "unavailable", classmethod(lambda cls, device: None))
    monkeypatch.setattr(launch, "_would_wait", lambda config, layout: False)
    monkeypatch.setattr(launch.Plan, "run", refusing)


NOT_HELD = "more programs than can be resident: ran in schedule row"


@pytest.mark.usefixtures("cooperative_here")
def test_what_fell_back_to_another_schedule_has_no_time_under_its_name():
    suite = suites.Suite(
        "test", suites.cases(Shape(2, 16, 1)), ("ours_cooperative", "ours"), rounds=1,
        modes=(FORWARD,), target=1e-1, device="cpu",
    )  # fmt: skip
    (case,) = runner.run(suite)["cases"]
    entry = case["contenders"]["ours_cooperative"]
    assert (entry["status"], entry["reason"]) == ("unavailable", NOT_HELD)
    assert entry["seconds"] is entry["verified"] is None
    assert case["contenders"]["ours"]["status"] == "ok"


@pytest.mark.usefixtures("cooperative_here")
def test_what_falls_back_backward_keeps_its_forward_time(monkeypatch):
    real = launch.ran

    @contextmanager
    def ran():
        """As if the two solves of the forward had been cooperative."""
        with real() as configs:
            yield configs
        configs[:2] = [Config("cooperative")] * 2

    monkeypatch.setattr(launch, "ran", ran)
    contender = contenders.get("ours_cooperative")(Problem(Shape(2, 16, 1)))
    contender.set_tolerances(1e-1, 1e-1)
    contender.run(FORWARD)
    with pytest.raises(contenders.Unavailable, match=NOT_HELD):
        contender.run(BACKWARD)
    # Both adjoints ran in row; what a run collects is kept by mode.
    schedules = {mode: [c.schedule for c in ran] for mode, ran in contender.configs.items()}
    cooperative = ["cooperative"] * 2
    assert schedules == {FORWARD: cooperative, BACKWARD: [*cooperative, "row", "row"]}
    trial = Trial("ours", Problem(Shape(2, 16, 1)), 1e-3)
    with trial.guard(BACKWARD):
        raise contenders.Unavailable(NOT_HELD)
    assert trial.status == {FORWARD: "ok", BACKWARD: "unavailable"}
    assert trial.reason == {FORWARD: "", BACKWARD: NOT_HELD}
