"""`deqfusion train rosmap` and `evaluate`, as commands: figures, faults, kills."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from deqfusion.cli import main
from deqfusion.data import load_mogonet
from deqfusion.engine.runs import read_config, read_tensors
from deqfusion.tasks.omics import Rosmap

_SHARED = Path(
    os.environ.get("DEQFUSION_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
)
_SMALL = ["--dim", "8", "--modalities", "1,2", "--epochs", "3"]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert _train(folder, out) == 0
    return out


def _train(folder, out, *more):
    return main(["train", "rosmap", "--data-dir", str(folder), "--out", str(out), *_SMALL, *more])


def _resume(folder, out, *more):
    """Resume a run with its own options."""
    options = ["--data-dir", str(folder), "--out", str(out), "--resume"]
    return main(["train", "rosmap", *options, *more])


def _evaluate(folder, checkpoint, *more):
    return main(["evaluate", "--checkpoint", str(checkpoint), "--data-dir", str(folder), *more])


def _contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def _curve(out):
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def _same_model(one, two):
    first, second = (read_tensors(path / "model.safetensors", "model") for path in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_run_writes_model_metrics_log_and_curves(finished):
    files = {name for name in _contents(finished) if not name.startswith("tensorboard")}
    assert files == {
        "checkpoint.safetensors",
        "config.json",
        "curves.png",
        "log.csv",
        "metrics.json",
        "model.safetensors",
    }
    metrics = json.loads((finished / "metrics.json").read_text())
    of_training = {"validation", "epochs", "best_epoch", "parameters", "training_seconds"}
    assert set(metrics) == {"loss", "accuracy", "f1", "auc", *of_training}
    best = _curve(finished)[metrics["best_epoch"] - 1]
    assert metrics["validation"]["auc"] == float(best["validation_auc"])
    assert len(_curve(finished)) == metrics["epochs"] == 3


def test_evaluate_gives_the_figures_of_training(folder, finished, capsys):
    assert _evaluate(folder, finished) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((finished / "metrics.json").read_text())
    for name in ("accuracy", "f1", "auc"):
        assert f"{name} {metrics[name]:.3f}" in printed


def test_evaluate_prints_json(folder, finished, capsys):
    assert _evaluate(folder, finished, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert printed == {"rows": "test rows"} | {
        key: metrics[key] for key in ("loss", "accuracy", "f1", "auc")
    }


def test_an_undefined_metric_is_null(folder, finished, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    np.savetxt(data / "labels_te.csv", np.zeros(20))
    assert _evaluate(data, finished, "--json") == 0
    assert json.loads(capsys.readouterr().out)["auc"] is None


@pytest.mark.parametrize("splits", ["0", "2"])
def test_quiet_shows_no_bar(folder, tmp_path, capsys, splits):
    assert _train(folder, tmp_path / "out", "--quiet", "--splits", splits) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "auc" in captured.out


def test_scaling_is_that_of_the_rows_trained_on(folder, finished):
    tensors = read_tensors(finished / "model.safetensors", "model")
    train = load_mogonet(folder, [1, 2]).train
    # 32 of 40 rows are trained on: their range lies within that of all.
    low = tensors["model/scaling.shift_0"].numpy()
    assert (low >= train.modalities[0].min(axis=0)).all()
    assert (low > train.modalities[0].min(axis=0)).any()


def test_test_rows_play_no_part_in_training(folder, finished, tmp_path):
    altered = tmp_path / "altered"
    shutil.copytree(folder, altered)
    rows = np.loadtxt(altered / "1_te.csv", delimiter=",")
    np.savetxt(altered / "1_te.csv", -100 * rows, delimiter=",")
    assert _train(altered, tmp_path / "out") == 0
    assert _curve(tmp_path / "out") == _curve(finished)
    assert _same_model(tmp_path / "out", finished)


def test_same_seed_same_curve_other_seed_another(folder, finished, tmp_path):
    assert _train(folder, tmp_path / "same") == 0
    assert _curve(tmp_path / "same") == _curve(finished)
    assert _train(folder, tmp_path / "other", "--seed", "1") == 0
    assert _curve(tmp_path / "other") != _curve(finished)


@pytest.mark.parametrize(
    "fusion", ["concat", "sum", "gated", "tensor", "attention", "weight_tied:2"]
)
def test_every_fusion_trains_and_evaluates(folder, tmp_path, fusion):
    assert _train(folder, tmp_path / "out", "--fusion", fusion) == 0
    assert _evaluate(folder, tmp_path / "out") == 0


def test_options_reach_training(folder, finished, tmp_path):
    for number, option in enumerate((["--jacobian-weight", "2"], ["--batch-size", "8"])):
        assert _train(folder, tmp_path / str(number), *option) == 0
        assert _curve(tmp_path / str(number)) != _curve(finished)


def test_repeated_splits(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert _train(folder, out, "--splits", "3") == 0
    with (out / "splits.csv").open() as file:
        rows = list(csv.DictReader(file))
    accuracies = np.array([float(row["accuracy"]) for row in rows])
    summary = json.loads((out / "metrics.json").read_text())["accuracy"]
    assert summary["mean"] == pytest.approx(accuracies.mean())
    assert summary["standard_error"] == pytest.approx(accuracies.std(ddof=1) / np.sqrt(3))
    assert f"{summary['mean']:.3f}, standard error" in capsys.readouterr().out

    # A split's model is judged on the rows that it was not trained on.
    assert _evaluate(folder, out / "split_001") == 0
    printed = capsys.readouterr().out
    assert "test rows of split 1" in printed
    assert f"auc {float(rows[1]['auc']):.3f}" in printed

    before = _contents(out)
    assert _train(folder, out, "--splits", "3", "--resume") == 0
    assert _contents(out) == before
    assert _evaluate(folder, out) == 2
    assert "a run of 3 splits" in capsys.readouterr().err


def test_one_split_has_no_standard_error(folder, tmp_path, capsys):
    assert _train(folder, tmp_path / "out", "--splits", "1") == 0
    printed = capsys.readouterr().out
    assert "1 split: 32 training, 8 validation, 20 test samples" in printed
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert f"accuracy  {metrics['accuracy']['mean']:.3f}\n" in printed
    assert metrics["accuracy"]["standard_error"] is None


def test_more_than_two_classes(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    for part, rows in (("tr", 40), ("te", 20)):
        np.savetxt(data / f"labels_{part}.csv", np.arange(rows) % 4)
    assert _train(data, tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"f1_macro", "f1_weighted", "auc_macro", "auc_weighted"} < set(metrics)


def test_options_from_a_file_and_arguments_before_them(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('task = "rosmap"\nepochs = 2\n[fusion]\nfusion = "sum"\nclip_norm = "none"\n')
    out = tmp_path / "out"
    options = ["--data-dir", str(folder), "--modalities", "1,2", "--config", str(recipe)]
    assert main(["train", "rosmap", *options, "--out", str(out), "--dim", "8"]) == 0
    config = read_config(out)
    assert (config["epochs"], config["fusion"], config["dim"]) == (2, "sum", 8)
    assert config["clip_norm"] is None
    assert config["learning_rate"] == Rosmap.defaults["learning_rate"]
    again = tmp_path / "again"
    assert main(["train", "rosmap", *options, "--out", str(again), "--epochs", "1"]) == 0
    assert read_config(again)["epochs"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = 0", "recipe.toml: epochs: got 0, expected a whole number from 1"),
        ("epoch = 3", "recipe.toml: 'epoch': is unknown, expected only modalities"),
        ("epochs = ", "recipe.toml: is not TOML"),
        ("[a]\ndim = 8\n[b]\ndim = 8", "recipe.toml: dim: is given twice"),
        ('task = "brca"', "recipe.toml: task: is another one, expected 'rosmap'"),
        ("dim = 30", "recipe.toml: dim: got 30, expected a multiple of 4"),
        (None, "recipe.toml: cannot be read"),
    ],
)
def test_unusable_file_of_options(folder, tmp_path, capsys, text, message):
    recipe = tmp_path / "recipe.toml"
    if text is not None:
        recipe.write_text(text)
    options = ["--data-dir", str(folder), "--out", str(tmp_path / "out"), "--config", str(recipe)]
    assert main(["train", "rosmap", *options, "--modalities", "1,2"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()


def _refused(capsys, code, message, before, out):
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert _contents(out) == before


def test_out_with_a_run_is_refused_without_resume(folder, finished, capsys):
    before = _contents(finished)
    _refused(capsys, _train(folder, finished), "already there", before, finished)


def test_resume_takes_the_options_of_the_run(folder, tmp_path):
    out = tmp_path / "out"
    assert _train(folder, out, "--fusion", "sum", "--learning-rate", "0.01") == 0
    before = _contents(out)
    assert _resume(folder, out) == 0
    assert _contents(out) == before


@pytest.mark.parametrize("splits", ["0", "2"])
def test_resume_with_more_epochs_is_remembered(folder, tmp_path, capsys, splits):
    out = tmp_path / "out"
    assert _train(folder, out, "--fusion", "sum", "--splits", splits) == 0
    assert _resume(folder, out, "--epochs", "5") == 0
    more = _contents(out)
    configs = [json.loads(text) for name, text in more.items() if name.endswith("config.json")]
    assert [config["epochs"] for config in configs] == [5] * (1 + int(splits))
    assert _resume(folder, out) == 0
    assert _contents(out) == more
    # What is refused is not remembered.
    capsys.readouterr()
    code = _resume(folder, out, "--epochs", "4", "--quiet")
    _refused(capsys, code, "epochs: got 4, expected at least the 5", more, out)


def test_resume_of_a_run_killed_before_its_first_epoch(folder, finished, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished / "config.json", out)
    assert _resume(folder, out, "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert _same_model(out, finished)


@pytest.mark.parametrize("splits", ["0", "2"])
def test_resume_of_nothing_starts_a_run_and_says_so(folder, tmp_path, capsys, splits):
    out = tmp_path / "out"
    assert _train(folder, out, "--resume", "--quiet", "--splits", splits) == 0
    said = f"deqfusion: nothing to resume in {out}: starting a new run\n"
    assert capsys.readouterr().err == said
    assert _train(folder, out, "--resume", "--quiet", "--splits", splits) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("options", [["--resume"], ["--modalities", "1,2"]])
def test_a_file_in_place_of_the_folder_is_refused(folder, finished, capsys, options):
    before = _contents(finished)
    path = finished / "checkpoint.safetensors"
    code = main(["train", "rosmap", "--data-dir", str(folder), "--out", str(path), *options])
    _refused(capsys, code, f"{path}: is a file, expected", before, finished)


def test_resume_with_other_options_is_refused(folder, finished, capsys):
    before = _contents(finished)
    code = _train(folder, finished, "--resume", "--fusion", "sum")
    _refused(capsys, code, "the run has fusion = 'deq', expected 'sum'", before, finished)


def test_resume_on_other_data_is_refused(folder, finished, tmp_path, capsys):
    altered = tmp_path / "data"
    shutil.copytree(folder, altered)
    path = altered / "1_tr.csv"
    path.write_text(path.read_text().replace("1", "2", 1))
    before = _contents(finished)
    code = _train(altered, finished, "--resume")
    _refused(capsys, code, "the run has data_sha256", before, finished)


def test_corrupt_checkpoint_is_refused(folder, finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    path = out / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    before = _contents(out)
    _refused(capsys, _train(folder, out, "--resume"), "checkpoint.safetensors: ", before, out)
    path = out / "model.safetensors"
    path.write_bytes(b"\x80\x04 not a model")
    before = _contents(out)
    _refused(capsys, _evaluate(folder, out), "model.safetensors: cannot be read", before, out)


def test_evaluate_needs_a_finished_run_and_fitting_data(folder, finished, tmp_path, capsys):
    assert _evaluate(folder, tmp_path) == 2
    assert "config.json: no such file" in capsys.readouterr().err
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "model.safetensors").unlink()
    assert _evaluate(folder, out) == 2
    assert "expected a finished run" in capsys.readouterr().err
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    for part in ("tr", "te"):
        shutil.copy(data / f"1_{part}.csv", data / f"2_{part}.csv")
    assert _evaluate(data, finished) == 2
    assert "input_widths = [6, 5], expected [6, 6] as in" in capsys.readouterr().err


def test_missing_data_creates_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert _train(tmp_path / "nowhere", out) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "nowhere: no such folder" in captured.err
    assert not out.exists()


@pytest.mark.parametrize(
    "option",
    [
        ["--epochs", "0"],
        ["--fusion", "magic"],
        ["--fusion", "weight_tied:0"],
        ["--fusion", "weight_tied:1001"],
        ["--optimizer", "newton"],
        ["--clip-norm", "0"],
        ["--jacobian-weight", "inf"],
        ["--tol", "0"],
        ["--dropout", "1"],
        ["--splits", "-1"],
        ["--modalities", "1,x"],
        ["--modalities", "1,1"],
        ["--modalities", "1,1_0"],
        ["--learning-rate", "nan"],
        ["--validation-fraction", "1"],
        ["--seed", "4294967296"],
        ["--dim", "4000000"],
        ["--batch-size", "0"],
    ],
)
def test_bad_arguments(folder, tmp_path, capsys, option):
    with pytest.raises(SystemExit) as stop:
        _train(folder, tmp_path / "out", *option)
    assert stop.value.code == 2
    assert f"argument {option[0]}: got '{option[1]}', expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--fusion", "sum", "--jacobian-weight", "1"], "--jacobian-weight: got 1 with fusion"),
        (["--fusion", "attention", "--dim", "30"], "--dim: got 30, expected a multiple of the 4"),
        (["--amp", "float16", "--strategy", "fsdp"], "--amp: got 'float16' with strategy 'fsdp'"),
        (["--tol-start", "1e-4"], "--tol-start: got 0.0001, expected at least tol 0.001"),
        (["--dim", "30"], "--dim: got 30, expected a multiple of 4 for fusion 'deq'"),
    ],
)
def test_options_that_do_not_fit_together(folder, tmp_path, capsys, option, message):
    assert _train(folder, tmp_path / "out", *option) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()


def _spawn(folder, out, epochs):
    command = [sys.executable, "-m", "deqfusion.cli", "train", "rosmap", *_SMALL]
    command += [
        "--fusion",
        "gated",
        "--data-dir",
        str(folder),
        "--out",
        str(out),
        "--epochs",
        str(epochs),
        "--resume",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _logged(out):
    log = out / "log.csv"
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0


def test_killed_run_resumes_to_the_same_model(folder, tmp_path):
    epochs = 100
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = _spawn(folder, whole, epochs)
    process = _spawn(folder, killed, epochs)
    for pause in (0.0, 0.02):
        target = _logged(killed) + 5
        deadline = time.monotonic() + 60
        while _logged(killed) < target and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        logged = _logged(killed)
        kept = len(read_tensors(killed / "checkpoint.safetensors", "checkpoint")["history"])
        # The log's line follows its checkpoint, which is ahead by one at most.
        assert target <= logged <= kept <= logged + 1
        process = _spawn(folder, killed, epochs)
    assert process.wait(timeout=120) == 0
    assert reference.wait(timeout=120) == 0
    assert _curve(killed) == _curve(whole)
    assert _same_model(killed, whole)


def test_rosmap_for_a_few_epochs(tmp_path):
    if not (_SHARED / "rosmap").is_dir():
        pytest.skip(f"{_SHARED / 'rosmap'} is absent (set DEQFUSION_DATA)")
    options = ["--data-dir", str(_SHARED / "rosmap"), "--out", str(tmp_path / "out")]
    assert main(["train", "rosmap", *options, "--epochs", "60"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    # Well above the 0.5 of chance, whose standard error is 0.06 on 106 rows.
    assert metrics["auc"] > 0.7
    assert all(float(row["converged"]) > 0.95 for row in _curve(tmp_path / "out"))


def test_one_modality_of_brca_and_the_missing_others(tmp_path, capsys):
    folder = _SHARED / "mogonet_brca_mirna"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent (set DEQFUSION_DATA)")
    options = ["--data-dir", str(folder), "--out", str(tmp_path / "out"), "--dim", "16"]
    assert main(["train", "rosmap", *options]) == 2
    assert "1_tr.csv: no such file" in capsys.readouterr().err
    options += ["--modalities", "3", "--fusion", "sum", "--learning-rate", "1e-2"]
    assert main(["train", "rosmap", *options, "--epochs", "40"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    # Logistic regression on all rows has 0.711, the largest class 0.5.
    assert metrics["accuracy"] > 0.6
