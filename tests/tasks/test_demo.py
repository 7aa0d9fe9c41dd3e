"""The demonstration on a small scale: what it measures, and that its page says only that."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from deqfusion.cli import main
from deqfusion.tasks.comparison import Comparison, DemoOptions
from deqfusion.tasks.demo import compare
from deqfusion.tasks.demo_page import page, table, verdict

_OPTIONS = DemoOptions(
    fusions=("deq", "weight_tied:2", "concat"),
    seeds=(0, 1),
    epochs=2,
    dim=32,
    tol=1e-2,
    learning_rates=(5e-3,),
)
_TIMING = {
    "shape": {"batch": 8, "dim": 16, "num_modalities": 2},
    "threads": 1,
    "rounds": 3,
    "tol": 1e-3,
    "contenders": {
        name: {
            "ok": True,
            "reason": "",
            "residual": 5e-4,
            "forward": {"median": seconds, "p20": 0.9 * seconds, "p80": 1.1 * seconds},
            "forward_backward": {"median": seconds, "p20": 0.9 * seconds, "p80": 1.1 * seconds},
        }
        for name, seconds in (("textbook", 0.02), ("ours", 0.01))
    },
    "ratios": {
        mode: {"median": 2.0, "p20": 1.9, "p80": 2.1} for mode in ("forward", "forward_backward")
    },
}


@pytest.fixture(scope="module")
def comparison():
    return compare(_OPTIONS)


def test_every_fusion_and_seed_is_measured_on_the_same_data(comparison):
    assert [(run["fusion"], run["seed"]) for run in comparison.runs] == [
        (name, seed) for seed in (0, 1) for name in _OPTIONS.fusions
    ]
    assert all(0.1 < run["accuracy"] <= 1.0 for run in comparison.runs)
    deq = comparison.values("deq", "converged")
    assert min(deq) > 0.9
    assert np.isnan(comparison.values("concat", "steps")).all()


def test_weights_and_traces(comparison):
    assert list(comparison.weights) == ["before training", "after training"]
    for weights in comparison.weights.values():
        assert weights.shape == (3, 3)
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-5)
    assert set(comparison.traces) == {"Anderson", "weight-tied steps"}
    for trace in comparison.traces.values():
        # From z = 0 the first relative residual is ||f(0)|| / ||f(0)||.
        np.testing.assert_allclose(trace[:, 0], 1.0, rtol=1e-5)
    finals = {name: np.nanmin(trace, axis=1) for name, trace in comparison.traces.items()}
    assert np.median(finals["Anderson"]) < np.median(finals["weight-tied steps"])


def test_page_carries_its_pictures_and_figures(comparison):
    text = page(comparison, [_TIMING])
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == 4
    for picture in pictures:
        assert base64.b64decode(picture, validate=True).startswith(b"\x89PNG")
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    for name in _OPTIONS.fusions:
        assert f"<td>{np.mean(comparison.values(name, 'accuracy')):.3f}</td>" in text
    assert "forward 2.00 times as fast as eager PyTorch" in text


def test_contender_that_failed_gets_no_time(comparison):
    entry = {"ok": False, "reason": "residual 0.1", "forward": None, "forward_backward": None}
    contenders = {**_TIMING["contenders"], "textbook": {**entry, "residual": 0.1}}
    ratios = {"forward": None, "forward_backward": None}
    text = table(comparison, [{**_TIMING, "contenders": contenders, "ratios": ratios}])
    assert "eager PyTorch failed (residual 0.1)" in text
    assert "times as fast" not in text


@pytest.mark.parametrize(
    ("ours", "relation"),
    [
        ([0.9, 0.9], "DEQ is better than it: difference +0.100"),
        ([0.7, 0.7], "DEQ is worse than it: difference -0.100"),
        ([0.7, 0.92], "DEQ is equal to it within the spread"),
    ],
)
def test_verdict_follows_the_figures(ours, relation):
    options = DemoOptions(fusions=("deq", "sum", "concat"), seeds=(0, 1))
    runs = [{"fusion": "deq", "accuracy": value} for value in ours]
    runs += [{"fusion": "sum", "accuracy": 0.8}, {"fusion": "sum", "accuracy": 0.8}]
    runs += [{"fusion": "concat", "accuracy": 0.6}, {"fusion": "concat", "accuracy": 0.6}]
    text = verdict(Comparison(options, runs=runs))
    assert "Best of the others: sum, 0.800" in text
    assert relation in text


def test_command_writes_page_and_figures(tmp_path, capsys):
    out = tmp_path / "reports" / "demo"
    arguments = ["demo", "--out", str(out), "--epochs", "1", "--seeds", "1", "--no-timing"]
    assert main([*arguments, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert f"report: {out / 'index.html'}" in printed.out
    assert printed.err == ""
    assert (out / "index.html").read_text().startswith("<!doctype html>")
    record = json.loads((out / "results.json").read_text())
    assert len(record["runs"]) == 7
    assert record["timing"] == []


def test_the_learning_rate_is_the_validation_rows_choice():
    """One that learns nothing loses against one that does, wherever it stands."""
    options = DemoOptions(fusions=("concat",), seeds=(0,), epochs=3, dim=32)
    for rates in ((1e-9, 5e-3), (5e-3, 1e-9)):
        (run,) = compare(replace(options, learning_rates=rates)).runs
        assert run["learning_rate"] == 5e-3
        assert run["accuracy"] > 0.5
