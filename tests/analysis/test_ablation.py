"""`deqfusion analyze ablation`: deq with one thing changed at a time."""

import pytest
import torch

from deqfusion.analysis import records
from deqfusion.analysis.ablation import VARIANTS
from deqfusion.analysis.extended import fusions_of
from deqfusion.engine import train as engine_train

_FEW = ("no gate", "tol=0.1")


@pytest.fixture(scope="module")
def done(analyze, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis") / "out"
    assert analyze("ablation", out, "--seeds", "2", "--variants", *_FEW) == 0
    return out


def test_differences_are_from_base_seed_by_seed(done, results):
    whole = results(done, "ablation")
    (table,) = whole["tables"]
    assert [row["name"] for row in table["rows"]] == ["base", *_FEW]
    accuracy = {
        (r["name"], r["seed"]): r["splits"][0]["test"]["accuracy"] for r in whole["records"]
    }
    for row in table["rows"][1:]:
        differences = [accuracy[row["name"], s] - accuracy["base", s] for s in (0, 1)]
        assert row["difference"] == pytest.approx(sum(differences) / 2)
        assert {"p_t", "p_wilcoxon", "p_holm"} <= row.keys()
    assert (done / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_a_tolerance_is_another_run(done, results):
    found = {(r["name"], r["seed"]): r for r in results(done, "ablation")["records"]}
    options = {
        name: found[name, 0]["candidates"][0]["options"] for name in ("base", "no gate", "tol=0.1")
    }
    assert options["tol=0.1"] == {**options["base"], "tol": 0.1}
    assert options["no gate"] == options["base"]
    steps = {name: found[name, 0]["splits"][0]["steps"] for name in options}
    assert steps["tol=0.1"] < steps["base"]


def test_no_gate_trains_a_model_without(analyze, tmp_path, monkeypatch):
    built = {}

    def train(recipe, data, out, options, **more):
        config = {**options, "input_widths": [6, 5], "num_classes": 2}
        built[str(out)] = fusions_of(recipe.build(config))[0].gate_weight
        return engine_train(recipe, data, out, options, **more)

    monkeypatch.setattr(records, "train", train)
    assert analyze("ablation", tmp_path, "--seeds", "1", "--variants", "no gate") == 0
    norms = {path.split("/")[-3]: weight.norm() for path, weight in built.items()}
    assert norms["no_gate"] == 0
    assert norms["base"] > torch.tensor(0.1)


def test_all_variants_that_change_something_by_default(analyze, tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(records, "train", lambda *a, **k: names.append(a[2]) or _stop())

    def _stop():
        raise records.TrainingDivergedError("no")

    assert analyze("ablation", tmp_path, "--seeds", "1", "--set", "jacobian_weight=100") == 1
    seen = {path.parent.parent.name for path in names}
    slug = {name: name.replace(" ", "_").replace("=", "_") for name in VARIANTS}
    # Base's own values; a width of 8 allows every number of groups.
    alike = {"jacobian_weight=100", "tol=0.01", "memory=5", "num_groups=4"}
    assert seen == {slug[name] for name in VARIANTS.keys() - alike}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants", "memory=5"], "--variants: got 'memory=5', which the options have already"),
        (["--set", "dim=4", "--variants", "num_groups=8"], "--variants: got 'num_groups=8'"),
        (["--change", "tol=0.01"], "--change: got 'tol=0.01', which the options have already"),
        (["--change", "fusion=sum"], "--change: got 'fusion=sum'"),
        (["--change", "dropot=0.5"], "--change: got 'dropot=0.5', expected NAME=VALUE"),
        (["--set", "fusion=sum"], "fusion: got 'sum', expected 'deq'"),
    ],
)
def test_variants_that_are_none(analyze, tmp_path, capsys, more, message):
    assert analyze("ablation", tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_without_anything_to_compare_has_a_table(analyze, tmp_path, results, capsys):
    more = ("--seeds", "1", "--variants", "no gate", "--part", "2/2")
    assert analyze("ablation", tmp_path, *more) == 0
    assert "1 of 2 runs are not done yet" in capsys.readouterr().out
    (table,) = results(tmp_path, "ablation")["tables"]
    assert [row["name"] for row in table["rows"]] == ["no gate"]
    assert "difference" not in table["rows"][0]
    assert not (tmp_path / "ablation.png").exists()


def test_any_option_of_the_task_can_be_a_variant(analyze, tmp_path, results):
    more = ("--seeds", "1", "--variants", "no gate", "--change", "dropout=0.4")
    assert analyze("ablation", tmp_path, *more) == 0
    whole = results(tmp_path, "ablation")
    (table,) = whole["tables"]
    assert [row["name"] for row in table["rows"]] == ["base", "no gate", "dropout=0.4"]
    options = {r["name"]: r["candidates"][0]["options"] for r in whole["records"]}
    assert options["dropout=0.4"] == {**options["base"], "dropout": 0.4}
    losses = {r["name"]: r["splits"][0]["validation"]["loss"] for r in whole["records"]}
    for row in table["rows"]:
        assert row["validation"] == pytest.approx(losses[row["name"]])
    text = (tmp_path / "ablation.txt").read_text()
    assert "validation loss" in text
    assert "Of one seed: without a standard error or a test." in text
    assert "p (Holm) below" not in text
