"""Training: learns, chooses its epoch on validation rows, and resumes bit for bit."""

import numpy as np
import pytest
import torch

from deqfusion.engine import (
    CheckpointError,
    RunDirectory,
    Splits,
    TensorSamples,
    Trainer,
    TrainingDivergedError,
    checked,
    fit,
    train,
)
from deqfusion.engine.runs import read_tensors, write_tensors
from deqfusion.models import MultimodalClassifier
from tests.engine.problem import RECIPE, Problem, rows

_OPTIONS = {"epochs": 6, "learning_rate": 1e-2, "batch_size": 16, "seed": 3}
# Seconds differ from run to run.
_TIMES = ("step_seconds", "seconds")


def _model(fusion="deq", dropout=0.3):
    torch.manual_seed(0)
    return MultimodalClassifier([5, 4], 2, dim=8, fusion=fusion, dropout=dropout)


def _fit(model, options=None, *, fusion="deq", train=None, **more):
    config = checked(RECIPE, {**_OPTIONS, "fusion": fusion, "dim": 8, **(options or {})})
    splits = Splits(rows(40, 1) if train is None else train, rows(20, 2))
    return fit(RECIPE, model, splits, config, **more)


def _comparable(result):
    kept = [i for i, name in enumerate(result.columns) if name not in _TIMES]
    return result.history[:, kept]


def _interrupted(model, run, after, options=None, **more):
    """Train with a checkpoint and stop dead after some epochs."""
    append, count = run.append_log, 1

    def stop(row):
        nonlocal count
        append(row)
        count += 1
        if count == after:
            raise KeyboardInterrupt

    run.append_log = stop
    with pytest.raises(KeyboardInterrupt):
        _fit(model, options, run=run, **more)
    del run.append_log


def test_learns():
    torch.manual_seed(0)
    model = MultimodalClassifier([5, 4], 2, dim=32)
    result = _fit(model, {"epochs": 12, "learning_rate": 5e-3})
    losses = result.column("train_loss")
    assert losses[-5:].mean() < 0.6 * losses[0]
    inputs, labels = rows(200, 9).data
    accuracy = (model.predict(inputs).argmax(-1) == labels).double().mean()
    assert accuracy > 0.65


def test_best_epoch_is_the_one_of_least_validation_loss_and_the_model_is_of_it():
    model = _model()
    result = _fit(model)
    losses = result.column("validation_loss")
    assert result.best_epoch == losses.argmin() + 1
    inputs, labels = rows(20, 2).data
    loss = torch.nn.functional.nll_loss(model.predict(inputs).log(), labels).item()
    assert loss == pytest.approx(losses.min(), rel=1e-4)
    assert result.validation["loss"] == losses.min()


@pytest.mark.parametrize(
    ("fusion", "options"),
    [
        ("deq", {}),
        ("deq", {"tol_start": 0.1, "tol_steps": 6, "jacobian_weight": 1.0}),
        ("concat", {"optimizer": "sgd", "schedule": "cosine", "warmup": 2.0}),
        ("sum", {"optimizer": "adam", "schedule": "step", "step_epochs": 2, "batch_size": None}),
        ("gated", {"fusion_rate": 0.1, "weight_decay": 0.1, "clip_norm": None}),
        ("weight_tied:1", {"amp": "bfloat16"}),
        ("deq", {"amp": "bfloat16", "jacobian_weight": 1.0}),
        ("concat", {"amp": "float16", "learning_rate": 1.0}),
        ("attention", {"workers": 1, "epochs": 4}),
    ],
)
def test_resumed_run_is_the_uninterrupted_one(tmp_path, fusion, options):
    solver = {"heads": 4, **options}
    config = checked(RECIPE, {**_OPTIONS, "fusion": fusion, "dim": 8, **solver})

    def new_model():
        torch.manual_seed(0)
        return RECIPE.build(config)

    whole = new_model()
    expected = _fit(whole, solver, fusion=fusion)
    run = RunDirectory.open(tmp_path, {}, resume=False)
    _interrupted(new_model(), run, 3, solver, fusion=fusion)

    resumed = new_model()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1.0)
    result = _fit(resumed, solver, fusion=fusion, run=run)
    assert len(result.history) == config["epochs"]
    assert result.columns == expected.columns
    np.testing.assert_array_equal(_comparable(result), _comparable(expected))
    assert result.best_epoch == expected.best_epoch
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert len(run.log.read_text().splitlines()) == 1 + config["epochs"]


def test_a_checkpoint_per_epoch_and_a_log_line_that_is_ahead_is_dropped(tmp_path):
    run = RunDirectory.open(tmp_path, {}, resume=False)
    _interrupted(_model(), run, 2)
    assert len(read_tensors(run.checkpoint, "checkpoint")["history"]) == 2
    with run.log.open("a") as file:
        file.write("3.0,0.1,0.")
    _fit(_model(), run=run)
    epochs = [float(line.split(",")[0]) for line in run.log.read_text().splitlines()[1:]]
    assert epochs == [1, 2, 3, 4, 5, 6]


def test_finished_run_can_go_on_for_more_epochs(tmp_path):
    run = RunDirectory.open(tmp_path, {}, resume=False)
    _fit(_model(), {"epochs": 2}, run=run)
    result = _fit(_model(), run=run)
    np.testing.assert_array_equal(_comparable(result), _comparable(_fit(_model())))


def test_a_cosine_run_cannot_go_on_for_more_epochs(tmp_path):
    options = {"fusion": "sum", "dim": 8, "epochs": 2, "schedule": "cosine"}
    train(RECIPE, tmp_path, tmp_path / "run", options)
    train(RECIPE, tmp_path, tmp_path / "run", options, resume=True)
    with pytest.raises(CheckpointError, match="the run has epochs = 2, expected 3 to resume it"):
        train(RECIPE, tmp_path, tmp_path / "run", {**options, "epochs": 3}, resume=True)


def test_callers_random_state_is_untouched():
    torch.manual_seed(5)
    model = _model("concat")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _fit(model, {"epochs": 1}, fusion="concat")
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_changes_the_curve():
    first = _fit(_model("concat"), fusion="concat")
    second = _fit(_model("concat"), {"seed": 4}, fusion="concat")
    assert not np.array_equal(first.column("train_loss"), second.column("train_loss"))


@pytest.mark.parametrize("batch_size", [None, 16])
def test_solve_statistics_are_those_of_an_equilibrium_or_absent(batch_size):
    torch.manual_seed(0)
    model = MultimodalClassifier([5, 4], 2, dim=32)
    stats = model(rows(40, 1).data[0]).equilibrium.stats
    options = {"epochs": 1, "batch_size": batch_size, "learning_rate": 1e-12}
    result = _fit(model, options)
    assert result.column("steps")[0] == pytest.approx(stats.steps.double().mean().item())
    assert result.column("converged")[0] == pytest.approx(stats.converged.double().mean().item())
    assert np.isnan(_fit(_model("concat"), fusion="concat").column("steps")).all()


def test_jacobian_weight_changes_training_and_needs_an_equilibrium():
    plain = _fit(_model(), {"epochs": 2})
    penalised = _fit(_model(), {"epochs": 2, "jacobian_weight": 1.0})
    assert plain.column("train_loss")[1] != penalised.column("train_loss")[1]
    assert (plain.column("penalty") == 0).all()
    assert (penalised.column("penalty") > 0).all()
    with pytest.raises(ValueError, match=r"jacobian_weight: got 1 with fusion 'concat'"):
        _fit(_model("concat"), {"jacobian_weight": 1.0}, fusion="concat")


def test_early_stopping_ends_after_its_patience_and_stays_ended(tmp_path):
    options = {"early_stopping": 2, "learning_rate": 0.3, "epochs": 40}
    run = RunDirectory.open(tmp_path, {}, resume=False)
    result = _fit(_model("concat"), options, fusion="concat", run=run)
    assert len(result.history) == result.best_epoch + 2 < 40
    again = _fit(_model("concat"), options, fusion="concat", run=run)
    assert len(again.history) == len(result.history)


def test_workers_read_what_the_process_itself_would():
    own, read = (_fit(_model(), {"epochs": 2, "workers": count}) for count in (0, 2))
    np.testing.assert_array_equal(_comparable(own), _comparable(read))


def test_what_samples_draw_is_new_each_epoch_and_the_same_again():
    class Noisy(TensorSamples):
        def batch(self, indices):
            (first, second), labels = super().batch(indices)
            seen.append(torch.rand(()).item())
            return (first + seen[-1], second), labels

    seen: list[float] = []
    noisy = Noisy(rows(40, 1).data)
    runs = [_fit(_model(), {"epochs": 2}, train=noisy) for _ in range(2)]
    np.testing.assert_array_equal(_comparable(runs[0]), _comparable(runs[1]))
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    assert len(set(seen)) == half


def test_rate_of_the_fusion_is_scaled():
    def change(model, before):
        pairs = zip(model.parameters(), before, strict=True)
        return sum((new - old).abs().sum().item() for new, old in pairs)

    for rate, expected in ((1.0, False), (1e-6, True)):
        model = _model("gated")
        before = [p.detach().clone() for p in model.fusion.parameters()]
        _fit(model, {"fusion_rate": rate, "epochs": 2}, fusion="gated")
        assert (change(model.fusion, before) < 1e-3) == expected


def test_compiled_model_learns_the_same(monkeypatch):
    # Without code generation, which takes a minute. Compiled dropout draws other numbers: none.
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: whole(m, backend="aot_eager"))
    plain, compiled = (
        _fit(_model("concat", 0.0), {"compile": compile, "epochs": 2}, fusion="concat")
        for compile in (False, True)
    )
    np.testing.assert_allclose(_comparable(compiled), _comparable(plain), rtol=1e-3)


def test_deterministic_mode_covers_training_and_evaluation_and_is_left_behind():
    assert not torch.are_deterministic_algorithms_enabled()
    seen = []

    class Watching(type(RECIPE)):
        def objective(self, model, batch):
            seen.append(("objective", torch.are_deterministic_algorithms_enabled()))
            return super().objective(model, batch)

        def predict(self, model, batch):
            seen.append(("predict", torch.are_deterministic_algorithms_enabled()))
            return super().predict(model, batch)

    config = checked(RECIPE, {**_OPTIONS, "dim": 8, "deterministic": True, "epochs": 1})
    trainer = Trainer(Watching(), _model(), config)
    trainer.fit(Splits(rows(40, 1), rows(20, 2)))
    assert set(seen) == {("objective", True), ("predict", True)}
    assert not torch.are_deterministic_algorithms_enabled()
    # As the test samples are, after training.
    seen.clear()
    trainer.evaluate(rows(20, 3))
    assert set(seen) == {("predict", True)}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_strategy_of_several_processes_is_not_ignored(tmp_path, strategy):
    options = {"fusion": "sum", "dim": 8, "epochs": 1, "strategy": strategy}
    with pytest.raises(ValueError, match=f"strategy: got '{strategy}' in a single process, expec"):
        train(RECIPE, tmp_path, tmp_path / "run", options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=f"strategy: got '{strategy}' without a process, expected"):
        _fit(_model("sum"), {"strategy": strategy}, fusion="sum")


def test_divergence_is_an_error_with_the_epoch():
    train = rows(40, 1)
    train.data[0][0][0, 0] = torch.inf
    with pytest.raises(TrainingDivergedError, match="epoch 1: training loss is nan, expected"):
        _fit(_model("concat"), fusion="concat", train=train)


def test_checkpoint_of_another_model_is_refused_and_kept(tmp_path):
    run = RunDirectory.open(tmp_path, {}, resume=False)
    _fit(_model("concat"), fusion="concat", run=run)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: tensor 'model/fusion"):
        _fit(_model("gated"), fusion="gated", run=run)
    with pytest.raises(CheckpointError, match="epochs: got 2, expected at least the 6"):
        _fit(_model("concat"), {"epochs": 2}, fusion="concat", run=run)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_checkpoint_without_history_is_refused(tmp_path):
    run = RunDirectory.open(tmp_path, {}, resume=False)
    write_tensors(run.checkpoint, "checkpoint", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"tensor 'columns' is uint8 \(0,\), expected"):
        _fit(_model("concat"), fusion="concat", run=run)


def test_samples_that_are_taken_share_the_tensors():
    samples = rows(40, 1)
    taken = samples.take(np.arange(10, 40)).take(np.array([3, 1]))
    assert len(taken) == 2
    assert taken.shared is samples.shared
    inputs, labels = taken.data
    assert torch.equal(labels, samples.data[1][[13, 11]])
    assert torch.equal(taken.batch(torch.tensor([1]))[0][0], inputs[0][1:])


@pytest.mark.parametrize("repeats", [0, 2])
def test_a_model_that_cannot_be_prepared_leaves_no_run(tmp_path, repeats):
    class Unprepared(Problem):
        def repeats(self, config):
            return repeats

        def prepare(self, model, splits, config):
            raise OSError("no weights")

    out = tmp_path / "new" / "run"
    with pytest.raises(OSError, match="no weights"):
        train(Unprepared(), tmp_path, out, {"dim": 8, "epochs": 1})
    assert not out.parent.exists()
