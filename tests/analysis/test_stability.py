"""`deqfusion analyze stability`: what is measured over training."""

import numpy as np
import pytest
import torch

from deqfusion.analysis import stability
from deqfusion.analysis.extended import extended
from deqfusion.analysis.models import solved
from deqfusion.engine import checked, fit
from tests.engine.problem import RECIPE


@pytest.fixture(scope="module")
def done(analyze, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis") / "out"
    more = ("--seeds", "2", "--tol-start", "0.5", "--set", "jacobian_weight=10")
    assert analyze("stability", out, *more) == 0
    return out


def test_each_training_has_its_history(done, results):
    whole = results(done, "stability")
    options = {r["name"]: r["candidates"][0]["options"] for r in whole["records"]}
    assert list(options) == ["no penalty", "penalty", "tol 0.5 to 0.01"]
    assert options["penalty"]["jacobian_weight"] == 10
    assert options["no penalty"] == {**options["penalty"], "jacobian_weight": 0.0}
    # 32 training rows in one step, 2 epochs: the schedule ends with the first.
    changed = {"tol_start": 0.5, "tol_steps": 1}
    assert options["tol 0.5 to 0.01"] == {**options["penalty"], **changed}
    for record in whole["records"]:
        history = record["splits"][0]["more"]["history"]
        assert all(len(values) == 2 for values in history.values())
    (table,) = whole["tables"]
    assert [row["name"] for row in table["rows"]] == ["penalty", "no penalty", "tol 0.5 to 0.01"]
    assert (done / "stability.png").read_bytes().startswith(b"\x89PNG")


def test_a_looser_tolerance_takes_fewer_steps_first(done, results):
    found = {}
    for record in results(done, "stability")["records"]:
        steps = record["splits"][0]["more"]["history"]["steps"]
        found.setdefault(record["name"], []).append(steps[0])
    assert np.mean(found["tol 0.5 to 0.01"]) < np.mean(found["penalty"])


def test_radii_are_those_of_the_validation_rows():
    recipe = extended(RECIPE, stability.Watched)
    splits, facts = RECIPE.load(None, {})
    config = {**checked(recipe, {"dim": 8, "epochs": 1}), **facts}
    model = recipe.build(config)
    recipe.prepare(model, splits, config)
    result = fit(recipe, model, splits, config)
    batch = splits.validation.batch(torch.arange(20))
    found = solved(RECIPE, model.eval(), batch)
    radius = found.fusion.spectral_radius(found.equilibrium, found.features)
    measured = result.validation
    assert measured["radius_mean"] == pytest.approx(float(radius.mean()), rel=1e-3)
    assert measured["radius_max"] == pytest.approx(float(radius.max()), rel=1e-3)
    assert measured["radius_above_1"] == pytest.approx(float((radius > 1).double().mean()))
    with torch.no_grad():
        metrics = RECIPE.metrics([RECIPE.predict(model, batch)])
    assert measured["loss"] == pytest.approx(metrics["loss"])


def test_rise_is_above_the_least_before():
    assert stability._rise(np.array([3.0, 1.0, 1.5, 0.5, 0.7])) == 0.5
    assert stability._rise(np.array([3.0, 1.0])) == 0.0
    assert stability._end(np.arange(20.0)) == 18.5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "jacobian_weight=0"], "jacobian_weight: got 0, expected a penalty"),
        (["--set", "tol_start=0.1"], "tol_start: got 0.1, expected none"),
        (["--tol-start", "1e-5"], "tol_start: got 1e-05, expected at least tol 0.01"),
    ],
)
def test_refusals(analyze, tmp_path, capsys, more, message):
    assert analyze("stability", tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
