"""Training: learns, chooses its epoch on validation rows, and resumes bit for bit."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from deqfusion.engine import (
    CheckpointError,
    FitOptions,
    Rows,
    RunDirectory,
    TrainingDivergedError,
    fit,
)
from deqfusion.engine.runs import read_tensors, write_tensors
from deqfusion.engine.training import HISTORY_COLUMNS
from deqfusion.models import MultimodalClassifier

_OPTIONS = FitOptions(epochs=6, learning_rate=1e-2, batch_size=16, seed=3)
# Seconds differ from run to run.
_COMPARABLE = [index for index, name in enumerate(HISTORY_COLUMNS) if name != "step_seconds"]
_COLUMN = {name: index for index, name in enumerate(HISTORY_COLUMNS)}


def _rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(torch.randn(count, width, generator=generator) for width in (5, 4))
    labels = (inputs[0][:, 0] + inputs[1][:, 0] > 0).long()
    return Rows(inputs, labels)


def _model(fusion="deq", **options):
    torch.manual_seed(0)
    return MultimodalClassifier([5, 4], 2, dim=8, fusion=fusion, dropout=0.3, **options)


def _fit(model, options=_OPTIONS, **more):
    return fit(model, _rows(40, 1), _rows(20, 2), options, **more)


def _interrupted(model, run, after):
    """Train with a checkpoint and stop dead after some epochs."""
    append, count = run.append_log, 0

    def stop(row):
        nonlocal count
        append(row)
        count += 1
        if count == after:
            raise KeyboardInterrupt

    run.append_log = stop
    with pytest.raises(KeyboardInterrupt):
        _fit(model, run=run)
    del run.append_log


def test_learns():
    torch.manual_seed(0)
    model = MultimodalClassifier([5, 4], 2, dim=32)
    result = _fit(model, dataclasses.replace(_OPTIONS, epochs=12, learning_rate=5e-3))
    losses = result.history[:, _COLUMN["train_loss"]]
    assert losses[-5:].mean() < 0.6 * losses[0]
    test = _rows(200, 9)
    accuracy = (model.predict(test.inputs).argmax(-1) == test.labels).double().mean()
    assert accuracy > 0.65


def test_best_epoch_is_the_one_of_least_validation_loss_and_the_model_is_of_it():
    model = _model()
    result = _fit(model)
    losses = result.history[:, _COLUMN["validation_loss"]]
    assert result.best_epoch == losses.argmin() + 1
    rows = _rows(20, 2)
    probabilities = model.predict(rows.inputs)
    loss = torch.nn.functional.nll_loss(probabilities.log(), rows.labels).item()
    assert loss == pytest.approx(losses.min(), rel=1e-4)


@pytest.mark.parametrize("fusion", ["deq", "concat", "sum", "gated", "weight_tied:1"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, fusion):
    whole = _model(fusion)
    expected = _fit(whole)
    run = RunDirectory.open(tmp_path, {}, resume=False)
    _interrupted(_model(fusion), run, after=3)

    resumed = _model(fusion)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1.0)
    result = _fit(resumed, run=run)
    assert len(result.history) == 6
    np.testing.assert_array_equal(result.history[:, _COMPARABLE], expected.history[:, _COMPARABLE])
    assert result.best_epoch == expected.best_epoch
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert len(run.log.read_text().splitlines()) == 7


def test_a_checkpoint_per_epoch_and_a_log_line_that_is_ahead_is_dropped(tmp_path):
    run = RunDirectory.open(tmp_path, {}, resume=False)
    _interrupted(_model(), run, after=2)
    assert len(read_tensors(run.checkpoint, "checkpoint")["history"]) == 2
    with run.log.open("a") as file:
        file.write("3.0,0.1,0.")
    _fit(_model(), run=run)
    epochs = [float(line.split(",")[0]) for line in run.log.read_text().splitlines()[1:]]
    assert epochs == [1, 2, 3, 4, 5, 6]


def test_finished_run_can_go_on_for_more_epochs(tmp_path):
    run = RunDirectory.open(tmp_path, {}, resume=False)
    _fit(_model(), dataclasses.replace(_OPTIONS, epochs=2), run=run)
    result = _fit(_model(), run=run)
    expected = _fit(_model())
    np.testing.assert_array_equal(result.history[:, _COMPARABLE], expected.history[:, _COMPARABLE])


def test_callers_random_state_is_untouched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _fit(_model("concat"), dataclasses.replace(_OPTIONS, epochs=1))
    torch.manual_seed(5)
    model = _model("concat")
    torch.manual_seed(5)
    _fit(model, dataclasses.replace(_OPTIONS, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_changes_the_curve():
    first = _fit(_model("concat"))
    second = _fit(_model("concat"), dataclasses.replace(_OPTIONS, seed=4))
    assert not np.array_equal(first.history[:, 1], second.history[:, 1])


def test_solve_statistics_are_those_of_an_equilibrium_or_absent():
    torch.manual_seed(0)
    model = MultimodalClassifier([5, 4], 2, dim=32)
    stats = model(_rows(40, 1).inputs).equilibrium.stats
    first = _fit(model, dataclasses.replace(_OPTIONS, epochs=1, batch_size=None)).history[0]
    assert first[_COLUMN["steps"]] == stats.steps.double().mean().item()
    assert first[_COLUMN["converged"]] == stats.converged.double().mean().item()
    assert np.isnan(_fit(_model("concat")).history[:, _COLUMN["steps"]]).all()


def test_jacobian_weight_changes_training_and_needs_an_equilibrium():
    options = dataclasses.replace(_OPTIONS, jacobian_weight=1.0, epochs=2)
    plain = _fit(_model(), dataclasses.replace(_OPTIONS, epochs=2))
    penalised = _fit(_model(), options)
    assert plain.history[1, 1] != penalised.history[1, 1]
    with pytest.raises(ValueError, match=r"jacobian_weight: got 1\.0 with ConcatFusion"):
        _fit(_model("concat"), options)


def test_divergence_is_an_error_with_the_epoch():
    rows = _rows(40, 1)
    rows.inputs[0][0, 0] = torch.inf
    with pytest.raises(TrainingDivergedError, match="epoch 1: training and validation loss"):
        fit(_model("concat"), rows, _rows(20, 2), _OPTIONS)


def test_checkpoint_of_another_model_is_refused_and_kept(tmp_path):
    run = RunDirectory.open(tmp_path, {}, resume=False)
    _fit(_model("concat"), run=run)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: tensor 'model/fusion"):
        _fit(_model("gated"), run=run)
    with pytest.raises(CheckpointError, match="epochs: got 2, expected at least the 6"):
        _fit(_model("concat"), dataclasses.replace(_OPTIONS, epochs=2), run=run)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_checkpoint_without_history_is_refused(tmp_path):
    run = RunDirectory.open(tmp_path, {}, resume=False)
    write_tensors(run.checkpoint, "checkpoint", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"tensor 'history' is float64 \(0,\), expected"):
        _fit(_model("concat"), run=run)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("batch_size", 0),
        ("weight_decay", -1.0),
        ("jacobian_weight", math.inf),
        ("clip_norm", 0.0),
    ],
)
def test_bad_options(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected"):
        dataclasses.replace(_OPTIONS, **{name: value})
