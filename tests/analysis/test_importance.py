"""`deqfusion analyze importance`: weights, solo runs, noise and missing modalities."""

import numpy as np
import pytest
import torch

from deqfusion.analysis import importance
from deqfusion.analysis.extended import extended
from deqfusion.analysis.models import solved
from deqfusion.analysis.settings import Setting
from deqfusion.engine import checked
from deqfusion.tasks import get_recipe
from tests.engine.problem import RECIPE


@pytest.fixture(scope="module")
def done(analyze, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis") / "out"
    assert analyze("importance", out, "--seeds", "2", "--noise", "2", "1e-9") == 0
    return out


@pytest.fixture
def model():
    splits, facts = RECIPE.load(None, {})
    config = {**checked(RECIPE, {"dim": 8}), **facts}
    return RECIPE.build(config).eval(), splits.test.batch(torch.arange(6))


def test_solo_runs_have_one_modality(done, results):
    records = results(done, "importance")["records"]
    found = {r["name"]: r["candidates"][0]["options"]["modalities"] for r in records}
    assert found == {"all": [1, 2], "only 1": [1], "only 2": [2]}
    weights, _ = results(done, "importance")["tables"]
    assert [row["name"] for row in weights["rows"]] == ["1", "2", "all"]
    alone = [r["splits"][0]["test"]["accuracy"] for r in records if r["name"] == "only 2"]
    assert weights["rows"][1]["solo"] == pytest.approx(np.mean(alone))


def test_conditions_of_the_trained_model(done, results):
    whole = results(done, "importance")
    record = next(r for r in whole["records"] if r["name"] == "all")
    (split,) = record["splits"]
    conditions = split["more"]["conditions"]
    assert set(conditions) == {"", *(f"{m} {c}" for m in "12" for c in ("1e-09", "2", "missing"))}
    assert conditions[""]["metrics"] == pytest.approx(split["test"], rel=1e-5)
    assert conditions["1 1e-09"]["metrics"] == pytest.approx(split["test"], rel=1e-4)
    assert conditions["1 2"]["metrics"]["loss"] != pytest.approx(split["test"]["loss"], rel=1e-3)
    assert sum(conditions[""]["weights"]) == pytest.approx(1.0, abs=1e-4)
    assert conditions["2 missing"]["weights"] == pytest.approx([1.0, 0.0], abs=1e-4)
    assert (done / "importance.png").read_bytes().startswith(b"\x89PNG")
    _, response = whole["tables"]
    assert [row["level"] for row in response["rows"]] == ["none", "1e-09", "2", "missing"] * 2


def test_noise_is_in_one_modality_and_of_its_scale(model):
    _, batch = model
    scale = torch.tensor([0.0, 1.0, 100.0, 0.0, 0.0])
    inputs, labels = importance._noisy(batch, 0, scale, torch.Generator().manual_seed(0))
    difference = inputs[0] - batch[0][0]
    assert torch.equal(inputs[1], batch[0][1])
    assert torch.equal(labels, batch[1])
    assert torch.equal(difference[:, 0], torch.zeros(6))
    assert 0.2 < difference[:, 1].std() < 3
    assert 20 < difference[:, 2].std() < 300
    named = {"inputs": batch[0], "scores": labels}
    again = importance._noisy(named, 0, scale, torch.Generator().manual_seed(0))
    assert torch.equal(again["inputs"][0], inputs[0])
    assert torch.equal(again["scores"], labels)


def test_scales_are_the_training_rows_deviations():
    splits, _ = RECIPE.load(None, {})
    first, second = importance._scales(splits.train)
    inputs, _ = splits.train.data
    torch.testing.assert_close(first, inputs[0].std(0, correction=0))
    torch.testing.assert_close(second, inputs[1].std(0, correction=0))


def test_a_missing_modality_is_masked_and_only_for_the_while(model):
    net, batch = model
    whole = solved(RECIPE, net, batch)
    with importance._without(net.fusion, 1):
        without = solved(RECIPE, net, batch)
    mask = torch.tensor([False, True]).expand(6, 2)
    with torch.no_grad():
        expected = net.fusion.equilibrium(whole.features, mask=mask)
    assert torch.equal(without.equilibrium.fused, expected.fused)
    assert not torch.equal(without.equilibrium.fused, whole.equilibrium.fused)
    assert torch.equal(solved(RECIPE, net, batch).equilibrium.fused, whole.equilibrium.fused)


def test_a_task_without_the_option_is_restricted():
    recipe = extended(RECIPE, importance._only(1))
    splits, facts = recipe.load(None, {})
    whole, _ = RECIPE.load(None, {})
    assert facts["input_widths"] == [4]
    for part, before in zip(splits, whole, strict=True):
        (view,), labels = part.data
        assert torch.equal(view, before.data[0][1])
        assert torch.equal(labels, before.data[1])


def test_names_of_modalities_become_options(folder, tmp_path):
    for task, only in (("rosmap", [2]), ("mosi", ["2"])):
        setting = Setting(get_recipe(task), folder, tmp_path, {})
        assert importance._options(setting, "only 2")["modalities"] == only
        assert "modalities" not in importance._options(setting, "all")


def test_other_noise_is_another_analysis(done, analyze, capsys):
    assert analyze("importance", done, "--seeds", "2", "--noise", "1") == 2
    error = capsys.readouterr().err
    assert "is of --noise [1e-09, 2.0], expected [1.0] as asked for" in error


def test_samples_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="task: got 'vqa' with these options, expected one whose"):
        importance._views({"words": torch.zeros(3)}, "vqa")
    with pytest.raises(ValueError, match="expected one whose samples have a row of numbers"):
        importance._views({"inputs": ({"input_ids": 0}, torch.zeros(3))}, "mosi")
