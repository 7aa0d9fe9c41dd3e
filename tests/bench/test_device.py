"""The device benchmark, on CPU tensors and interpreted programs: what it verifies and records."""

import json

import pytest
import torch

from deqfusion.bench import contenders, device
from deqfusion.bench.problem import Problem, Shape

pytest.importorskip("triton", reason="the GPU programs need Triton")


def test_record(tmp_path, monkeypatch):
    """Programs and baselines are verified, timed, and written; what cannot run says why."""
    monkeypatch.setattr(device, "PRECISIONS", ("highest",))
    monkeypatch.setattr(device, "BASELINES", ("textbook", "textbook_reduce_overhead"))
    path = tmp_path / "out" / "gpu.json"
    arguments = ["--out", str(path), "--shape", "2,16,1", "--schedule", "row", "--rounds", "1"]
    assert device.main([*arguments, "--device", "cpu"]) == 0
    record = json.loads(path.read_text())
    assert record["environment"]["versions"]["torch"] == torch.__version__
    (case,) = record["cases"]
    for mode in ("forward", "forward_backward"):
        assert set(case[mode]["seconds"]) == {"row highest", "eager, same algorithm", "textbook"}
        assert all(value["median"] > 0 for value in case[mode]["seconds"].values())
    if not torch.cuda.is_available():
        assert "no GPU" in case["forward"]["failed"]["textbook_reduce_overhead"]
    assert set(record["peaks"]) == {"copy", "bf16", "tf32"}


def test_wrong_answers_get_no_time(monkeypatch):
    problem = Problem(Shape(4, 16, 1))
    truth = device.true_gradients(problem)
    entry = device.Entry(contenders.get("ours")(problem))
    allowed = device.allowed_error(problem, truth)
    assert device.verified(entry, "forward", None, 0.0) is None
    assert device.verified(entry, "forward_backward", truth, allowed) is None
    wrong = {name: value * 1.5 for name, value in truth.items()}
    assert "gradients" in device.verified(entry, "forward_backward", wrong, allowed)
    monkeypatch.setattr(device, "FACTORS", (500.0,))
    assert "residual" in device.verified(entry, "forward", None, 0.0)


def test_parts_that_warm_caches_cover_every_entry_once(monkeypatch):
    monkeypatch.setattr(device, "PRECISIONS", ("highest",))
    monkeypatch.setattr(device, "BASELINES", ("textbook", "textbook_reduce_overhead"))
    shapes, schedules = [Shape(2, 16, 1)], ["row", "step"]
    seen = []
    monkeypatch.setattr(
        device.Entry, "run", lambda entry, mode: seen.append((entry.schedule, mode))
    )
    ran = [device.warm(shapes, schedules, torch.device("cpu"), part, 3) for part in range(3)]
    # Two schedules, the reference, and two baselines.
    assert sum(ran) == 5
    for schedule in schedules:
        assert seen.count((schedule, "forward")) == seen.count((schedule, "forward_backward")) == 1
    with pytest.raises(SystemExit):
        device.main(["--device", "cpu"])
