"""`python -m deqfusion.bench.solves`: what needs no GPU, and the command where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deqfusion.bench import contenders, solves
from deqfusion.bench.problem import Shape

pytest.importorskip("triton", reason="the GPU programs need Triton")
from deqfusion.kernels.config import Config

SHAPE = ["--shape", "16,64,2"]


def job(rows: int) -> solves.Job:
    return solves.Job(Shape(rows, 64, 2), "high", None, False, 1e-3)


def test_configs() -> None:
    assert solves.parse_config("auto") is None
    assert solves.parse_config("step,32,64,8,3") == Config("step", 32, 64, 8, 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config", "row,16"], "--config must be auto or schedule,rows,depth,warps,stages"),
        (["--config", "rows,16,32,8,2"], "schedule: got 'rows', expected one of row"),
        (["--config", "row,17,32,8,2"], "rows: got 17, expected a power of two"),
        (["--compile", "2/2"], "K from 0 below OF"),
        (["--shape", "16,64"], "16,64"),
    ],
)
def test_bad_options(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert solves.main([*SHAPE, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert solves.main(SHAPE) == 2
    assert "no GPU that torch can use, expected one" in capsys.readouterr().err


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_what_is_not_verified_has_no_time(off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's operations, as there may be no GPU; off: what an answer's fusion is moved by."""
    monkeypatch.setattr(solves, "_kernels", lambda function, runs: {"modality_solve": 5.0})
    solve = contenders.get("ours").forward

    def moved(self: Any) -> Any:
        answer = solve(self)
        answer.state[-1, 3] += off
        return answer

    monkeypatch.setattr(contenders.get("ours"), "forward", moved)
    line = solves.measure(job(8), torch.device("cpu"), runs=2)
    assert line["steps"].keys() == {"modality", "fusion"}
    assert (line["worst_residual"] <= 1e-3) is (off == 0)
    assert ("failed" in line) is (off > 0)
    assert ("wall_us" in line) is ("device_us" in line) is (off == 0)


def test_what_is_cut_off_leaves_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line is written as soon as it is known, with why it has no time."""
    out = tmp_path / "solves.json"
    seen = []

    def measured(job: solves.Job) -> dict[str, Any]:
        seen.append(out.exists())
        if job.shape.batch == 2:
            raise RuntimeError("spills")
        return {"wall_us": 7.0, "device_us": {"modality_solve": 5.0}, "steps": {"fusion": 4}}

    assert solves.run([job(1), job(2), job(3)], out, 1e9, measured) == 1
    assert seen == [False, True, True]
    result = json.loads(out.read_text())
    assert {"gpu", "commit", "versions"} <= result["environment"].keys()
    first, second, third = result["solves"]
    assert (first["shape"], first["config"], first["wall_us"]) == ("1,64,2", "auto", 7.0)
    assert second["failed"] == "RuntimeError: spills"
    assert "failed" not in third
    assert "wall 7 us, steps {'fusion': 4}; modality_solve 5" in capsys.readouterr().out
    assert solves.run([job(1)], out, -1.0, measured) == 1
    (line,) = json.loads(out.read_text())["solves"]
    assert line["failed"] == "not measured: out of time"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_command(tmp_path: Path) -> None:
    out = tmp_path / "solves.json"
    assert solves.main([*SHAPE, "--precision", "medium", "--backward", "--out", str(out)]) == 0
    (line,) = json.loads(out.read_text())["solves"]
    assert line["device_us"]["modality_solve"] > 0
    assert line["worst_residual"] <= 1e-3
