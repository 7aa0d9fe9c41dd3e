"""The doctor: it reports what is there, and notices when something is wrong."""

from __future__ import annotations

import json

import pytest
import torch

import deqfusion
from deqfusion import cli, doctor


@pytest.fixture(scope="module")
def report() -> dict:
    return doctor.collect()


def test_report_is_json_and_complete(report: dict) -> None:
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["deqfusion"] == deqfusion.__version__
    assert report["processor"]["threads"] == torch.get_num_threads()
    assert bool(report["gpus"]) == torch.cuda.is_available()


def test_every_operator_runs_on_the_cpu(report: dict) -> None:
    assert report["operators"]
    for name, devices in report["operators"].items():
        assert name.startswith("deqfusion::")
        assert "cpu" in devices
    assert report["implementations"]["cpu"]["implementation"] == "reference"


def test_self_test_passes_on_this_machine(report: dict) -> None:
    test = report["self_test"]["cpu"]
    assert test["error"] is None
    assert test["ok"]
    assert 0 < test["residual"] <= test["tolerance"]
    assert 1 < test["steps"] <= 50
    assert test["milliseconds"] > 0


def test_self_test_notices_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = deqfusion.DEQFusion.equilibrium

    def off_by_a_little(self: deqfusion.DEQFusion, *args: object, **kwargs: object) -> object:
        eq = solve(self, *args, **kwargs)
        return type(eq)(eq.fused * 1.1, eq.modalities, eq.stats)

    monkeypatch.setattr(deqfusion.DEQFusion, "equilibrium", off_by_a_little)
    test = doctor.self_test("cpu")
    assert not test["ok"]
    assert "expected at most" in test["error"]


def test_self_test_notices_rows_that_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deqfusion, "Anderson", lambda tol: deqfusion.Picard(tol=tol, max_steps=2))
    test = doctor.self_test("cpu")
    assert not test["ok"]
    assert "MAX_STEPS" in test["error"]


def test_self_test_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    doctor.self_test("cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_text_has_every_section(capsys: pytest.CaptureFixture[str], report: dict) -> None:
    text = doctor.render(report)
    for label in ("versions", "processor", "operator", "runs on", "ladder", "self-test", "missing"):
        assert any(line.startswith(label) for line in text.splitlines()), label
    for absent in report["missing"]:
        assert absent in text


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_exit_code_and_json(
    passed: bool,
    code: int,
    report: dict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = {"ok": passed, "tolerance": 1e-3, "error": None if passed else "broken"}
    changed = {**report, "self_test": {"cpu": outcome}}
    monkeypatch.setattr(doctor, "collect", lambda: changed)
    assert cli.main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == changed


def test_failure_is_shown_as_one(report: dict) -> None:
    outcome = {"ok": False, "tolerance": 1e-3, "error": "broken"}
    text = doctor.render({**report, "self_test": {"cpu": outcome}})
    assert "cpu: FAILED: broken" in text


def test_backend_asked_for_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = doctor.operators()
    monkeypatch.setenv("DEQFUSION_BACKEND", "reference")
    answers = doctor.implementations(registered)
    assert "DEQFUSION_BACKEND" in answers["cpu"]["reason"]
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    monkeypatch.setattr(doctor.kernels, "status", lambda: (True, "Triton imports"))
    monkeypatch.setattr(doctor.kernels, "interpreted", lambda: False)
    answers = doctor.implementations(registered)
    assert answers["cuda"]["implementation"] == "no device"
    assert answers["cuda"]["reason"].startswith("with one, triton: ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    answers = doctor.implementations(registered)
    assert answers["cuda"]["implementation"] == "triton"
    assert answers["cpu"] == {
        "implementation": "none: every solve is refused",
        "reason": "TRITON_INTERPRET=1 is not set",
    }
    monkeypatch.setattr(doctor.kernels, "interpreted", lambda: True)
    answers = doctor.implementations(registered)
    for device in ("cpu", "cuda"):
        assert answers[device]["implementation"] == "triton"
        assert "interpreter" in answers[device]["reason"]
    monkeypatch.setattr(doctor.kernels, "status", lambda: (False, "Triton cannot be imported"))
    answers = doctor.implementations(registered)
    assert set(map(tuple, map(dict.values, answers.values()))) == {
        ("none: every solve is refused", "Triton cannot be imported")
    }
    monkeypatch.setenv("DEQFUSION_BACKEND", "nonsense")
    refused = doctor.implementations(registered)
    assert "refused" in refused["cpu"]["implementation"]
    assert "nonsense" in refused["cpu"]["reason"]
    assert not doctor.self_test("cpu")["ok"]


def test_self_test_in_the_interpreter_says_so_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_interpreted", lambda device: True)
    test = doctor.self_test("cpu")
    assert test["ok"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("deqfusion: self-test on cpu in Triton's interpreter, about")
    monkeypatch.undo()
    doctor.self_test("cpu")
    assert capsys.readouterr().err == ""


def test_operators_without_a_device_are_reported() -> None:
    answers = doctor.implementations({"deqfusion::some": ["cpu"]})
    assert answers["cpu"]["implementation"] == "reference"
    assert answers["cuda"] == {
        "implementation": "none",
        "reason": "not registered: deqfusion::some",
    }


def test_missing_names_what_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "installed_version", lambda package: None)
    monkeypatch.setattr(doctor.kernels, "status", lambda: (False, "Triton cannot be imported"))
    absent = doctor.missing([])
    assert [line.partition(":")[0] for line in absent] == [
        "GPU that torch can use",
        "GPU programs",
        "torchdeq",
        "C++ compiler",
    ]
