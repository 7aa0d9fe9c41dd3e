"""Runs that are kept: not repeated, continued, divided, and refused where they are others."""

import json
import shutil
from pathlib import Path

import pytest

from deqfusion.analysis import records
from deqfusion.analysis.records import read_records, run_jobs
from deqfusion.analysis.settings import Job, Part, Setting
from deqfusion.engine import TrainingDivergedError, checked
from deqfusion.engine import train as engine_train
from deqfusion.engine.runs import write_json
from deqfusion.tasks import get_recipe

_OPTIONS = {"dim": 8, "modalities": [1, 2], "epochs": 2, "tol": 1e-2}


def _setting(folder, out, **more):
    defaults = {"options": _OPTIONS, "seeds": range(2)}
    return Setting(get_recipe("rosmap"), folder, Path(out), **{**defaults, **more})


def _jobs(setting, names=("sum", "concat")):
    return [Job(name, seed, {"fusion": name}) for seed in setting.seeds for name in names]


def _trained(monkeypatch):
    """Count trainings by fusion and seed."""
    seen = []

    def train(recipe, data, out, options, **more):
        seen.append((options["fusion"], options["seed"]))
        return engine_train(recipe, data, out, options, **more)

    monkeypatch.setattr(records, "train", train)
    return seen


def test_a_record_has_what_a_result_needs(folder, tmp_path):
    setting = _setting(folder, tmp_path)
    assert run_jobs("fusions", setting, _jobs(setting)) == 0
    found = read_records(tmp_path, "fusions")
    assert [(r["name"], r["seed"]) for r in found] == [
        *(("concat", 0), ("concat", 1)),
        *(("sum", 0), ("sum", 1)),
    ]
    record = found[0]
    (split,) = record["splits"]
    assert record["candidates"][0]["options"] == checked(
        setting.recipe, {**_OPTIONS, "fusion": "concat", "seed": 0}
    )
    assert {"auc", "accuracy", "f1", "loss"} == split["test"].keys() == split["validation"].keys()
    assert split["epochs"] == 2
    assert split["training_seconds"] > 0
    assert {"versions", "cpu", "commit", "threads"} <= record["environment"].keys()
    # The run itself, which holds a model and a checkpoint, is not kept.
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_is_there_is_not_trained_again(folder, tmp_path, monkeypatch):
    setting = _setting(folder, tmp_path)
    run_jobs("fusions", setting, _jobs(setting)[:1])
    seen = _trained(monkeypatch)
    assert run_jobs("fusions", setting, _jobs(setting)) == 0
    assert seen == [("concat", 0), ("sum", 1), ("concat", 1)]
    seen.clear()
    run_jobs("fusions", setting, _jobs(setting))
    assert seen == []


def test_an_interrupted_run_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    whole, broken = _setting(folder, tmp_path / "whole"), _setting(folder, tmp_path / "broken")
    run_jobs("fusions", whole, _jobs(whole)[:1])
    epochs = []

    def train(recipe, data, out, options, **more):
        epochs.append(options["epochs"])
        if len(epochs) == 1:
            engine_train(recipe, data, out, {**options, "epochs": 1}, **more)
            raise KeyboardInterrupt
        assert (out / "checkpoint.safetensors").exists()
        return engine_train(recipe, data, out, options, **more)

    monkeypatch.setattr(records, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run_jobs("fusions", broken, _jobs(broken)[:1])
    assert read_records(broken.out, "fusions") == []
    run_jobs("fusions", broken, _jobs(broken)[:1])
    one, two = (read_records(s.out, "fusions")[0]["splits"][0] for s in (whole, broken))
    assert len(epochs) == 2
    assert one["test"] == two["test"]


def test_parts_share_the_jobs_and_every_name(folder, tmp_path, monkeypatch):
    seen, shares = _trained(monkeypatch), []
    for number in (1, 2):
        setting = _setting(folder, tmp_path, part=Part(number, 2))
        missing = run_jobs("fusions", setting, _jobs(setting))
        assert missing == (2 if number == 1 else 0)
        shares.append(set(seen))
        seen.clear()
    assert shares[0] | shares[1] == {(j.name, j.seed) for j in _jobs(setting)}
    assert not shares[0] & shares[1]
    assert {name for name, _ in shares[0]} == {name for name, _ in shares[1]} == {"sum", "concat"}


@pytest.mark.parametrize("names", [("sum",), ("sum", "concat", "gated")])
def test_parts_are_even_whatever_the_number_of_names(folder, tmp_path, monkeypatch, names):
    seen, shares = _trained(monkeypatch), []
    for number in (1, 2):
        setting = _setting(folder, tmp_path, part=Part(number, 2), seeds=range(4))
        run_jobs("fusions", setting, _jobs(setting, names))
        shares.append(sorted(seen))
        seen.clear()
    assert len(shares[0]) == len(shares[1]) == 2 * len(names)
    assert {name for name, _ in shares[0]} == {name for name, _ in shares[1]} == set(names)


def test_validation_chooses_among_candidates(folder, tmp_path):
    candidates = ({"learning_rate": 1e-6}, {"learning_rate": 3e-2})
    setting = _setting(folder, tmp_path, candidates=candidates, options={**_OPTIONS, "epochs": 8})
    run_jobs("fusions", setting, _jobs(setting)[:1])
    (record,) = read_records(tmp_path, "fusions")
    losses = [candidate["validation"] for candidate in record["candidates"]]
    assert record["chosen"] == losses.index(min(losses)) == 1
    assert record["splits"][0]["validation"]["loss"] == losses[1]


def test_an_option_of_deq_makes_one_candidate_of_the_others(folder, tmp_path):
    candidates = ({"jacobian_weight": 1.0}, {"jacobian_weight": 10.0})
    setting = _setting(folder, tmp_path, candidates=candidates)
    deq, other = (setting.configs(Job(f, 0, {"fusion": f})) for f in ("deq", "sum"))
    assert [config["jacobian_weight"] for config in deq] == [1.0, 10.0]
    assert [config["jacobian_weight"] for config in other] == [0.0]


def test_a_run_that_diverges_is_a_result(folder, tmp_path, monkeypatch):
    def train(*arguments, **more):
        raise TrainingDivergedError("epoch 1: training loss is nan")

    monkeypatch.setattr(records, "train", train)
    setting = _setting(folder, tmp_path)
    assert run_jobs("fusions", setting, _jobs(setting)[:1]) == 0
    (record,) = read_records(tmp_path, "fusions")
    assert record["splits"] == []
    assert record["candidates"][0]["failed"] == "epoch 1: training loss is nan"


def _other_options(setting, data):
    return {"options": {**_OPTIONS, "epochs": 3}}


def _other_candidates(setting, data):
    return {"candidates": ({"dropout": 0.1}, {"dropout": 0.2})}


def _other_data(setting, data):
    shutil.copytree(setting.data, data)
    lines = (data / "1_te.csv").read_text().splitlines()
    (data / "1_te.csv").write_text("\n".join([lines[1], *lines[1:]]) + "\n")
    return {"data": data}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_options, "seed_0.json: the run has epochs = 2, expected 3 as asked for"),
        (_other_candidates, "seed_0.json: got 1 choices of options, expected 2"),
        (_other_data, "seed_0.json: is of other data"),
    ],
)
def test_records_of_something_else_are_refused(folder, tmp_path, monkeypatch, change, message):
    setting = _setting(folder, tmp_path / "out")
    run_jobs("fusions", setting, _jobs(setting)[:1])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.json")}
    seen = _trained(monkeypatch)
    other = _setting(setting.data, tmp_path / "out")
    arguments = {"data": folder, **change(other, tmp_path / "data")}
    other = _setting(arguments.pop("data"), tmp_path / "out", **arguments)
    # The record that does not fit is of the last job: nothing is trained before it is found.
    with pytest.raises(records.RecordError, match=message):
        run_jobs("fusions", other, _jobs(other)[::-1])
    assert seen == []
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.json")} == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda record: "{", "is not JSON"),
        (lambda record: json.dumps([]), 'expected a JSON object with "format"'),
        (lambda record: json.dumps({**record, "version": 9}), "got version 9, expected 1"),
        (lambda record: json.dumps({**record, "splits": None}), "splits: got None, expected"),
    ],
)
def test_damaged_records_are_refused(folder, tmp_path, damage, message):
    setting = _setting(folder, tmp_path)
    run_jobs("fusions", setting, _jobs(setting)[:1])
    (path,) = tmp_path.rglob("seed_0.json")
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(records.RecordError, match=message):
        run_jobs("fusions", setting, _jobs(setting))


def test_mean_over_splits_and_the_undefined(tmp_path):
    record = {"splits": [{"test": {"auc": 0.5, "f1": None}}, {"test": {"auc": 1.0, "f1": 0.5}}]}
    assert records.mean_of(record, "test", "auc") == 0.75
    assert records.mean_of(record, "test", "f1") != records.mean_of(record, "test", "f1")
    write_json(tmp_path / "x.json", record)
    with pytest.raises(records.RecordError, match='expected a JSON object with "format"'):
        records.read_record(tmp_path / "x.json")
