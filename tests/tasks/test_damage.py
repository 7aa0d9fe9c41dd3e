"""Damaged runs and unusable data, through the commands: one line that names the fault, code 2."""

import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deqfusion.cli import main
from deqfusion.engine.runs import read_config, read_tensors, write_tensors

_SMALL = ["--dim", "8", "--modalities", "1,2", "--epochs", "2", "--tol", "1e-2"]
_COMMANDS = ("evaluate", "resume")
_MOMENTS = "optimizer/head.weight"


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert _train(folder, out) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to be damaged."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def data(folder, tmp_path):
    """A copy of the data, to be damaged."""
    shutil.copytree(folder, tmp_path / "data")
    return tmp_path / "data"


def _train(folder, out, *more):
    return main(["train", "rosmap", "--data-dir", str(folder), "--out", str(out), *_SMALL, *more])


def _command(name, folder, run):
    """Evaluate a run, or resume it with its own options."""
    if name == "evaluate":
        return main(["evaluate", "--checkpoint", str(run), "--data-dir", str(folder)])
    return main(["train", "rosmap", "--data-dir", str(folder), "--out", str(run), "--resume"])


def _contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}


def _refused(capsys, name, folder, run, message):
    """The command must say `message` on one line, end with 2 and leave the run as it is."""
    capsys.readouterr()
    before = _contents(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _command(name, folder, run) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err, captured.err
    assert "expected" in captured.err
    assert captured.out == ""
    assert _contents(run) == before


@pytest.mark.parametrize("command", _COMMANDS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", "other"),
        ("modalities", [1, 1]),
        ("modalities", []),
        ("modalities", "1,2"),
        ("input_widths", [-6, 5]),
        ("input_widths", [6, 10**12]),
        ("input_widths", [6, 5.0]),
        ("input_widths", [6]),
        ("input_widths", 5),
        ("num_classes", 1),
        ("num_classes", 10**11),
        ("num_classes", "2"),
        ("data_sha256", None),
        ("fusion", "magic"),
        ("fusion", "weight_tied:0"),
        ("fusion", "weight_tied:99999999999999999999"),
        ("fusion", "sum:3"),
        ("fusion", 5),
        ("dim", -8),
        ("dim", 30),
        ("dim", 1_000_000),
        ("dim", 8.0),
        ("dim", "8"),
        ("dim", True),
        ("dim", None),
        ("tol", 0),
        ("tol", float("nan")),
        ("dropout", None),
        ("dropout", 1.0),
        ("epochs", "3"),
        ("seed", "a"),
        ("seed", 2**32),
        ("learning_rate", "abc"),
        ("learning_rate", None),
        ("learning_rate", float("inf")),
        ("learning_rate", 10**400),
        ("weight_decay", -1.0),
        ("batch_size", "4"),
        ("jacobian_weight", "w"),
        ("validation_fraction", "x"),
        ("splits", "a"),
        ("splits", -2),
        ("split", "a"),
        ("split", -5),
        ("split", 3),
    ],
)
def test_value_of_another_type_or_range(folder, run, capsys, command, key, value):
    (run / "config.json").write_text(json.dumps({**read_config(run), key: value}))
    _refused(capsys, command, folder, run, f"{run}/config.json: {key}: got ")


@pytest.mark.parametrize("command", _COMMANDS)
def test_missing_and_unknown_keys(folder, run, capsys, command):
    config = read_config(run)
    (run / "config.json").write_text(json.dumps({**config, "depth": 3}))
    _refused(capsys, command, folder, run, "config.json: 'depth': is unknown")
    for key in sorted(config.keys() - {"format", "version"}):
        rest = {name: value for name, value in config.items() if name != key}
        (run / "config.json").write_text(json.dumps(rest))
        _refused(capsys, command, folder, run, f"config.json: {key}: is missing")


@pytest.mark.parametrize("command", _COMMANDS)
def test_deeply_nested_configuration(folder, run, capsys, command):
    (run / "config.json").write_text("[" * 200_000)
    _refused(capsys, command, folder, run, "config.json: is JSON too deeply nested")


def test_model_of_another_size_is_refused_before_it_is_allocated(folder, run):
    (run / "config.json").write_text(json.dumps({**read_config(run), "dim": 8192}))
    program = """
import sys
from deqfusion.cli import main
from deqfusion.tasks.omics import Rosmap

def build(recipe, config, build=Rosmap.build):
    model = build(recipe, config)
    print({parameter.device.type for parameter in model.parameters()})
    return model

Rosmap.build = build
sys.exit(main(sys.argv[1:]))
"""
    # In a process of its own: the functions that tests poison do not know torch.device("meta").
    options = ["evaluate", "--checkpoint", str(run), "--data-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", program, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == "{'meta'}\n"
    assert done.stderr.count("\n") == 1
    assert f"{run}/model.safetensors: tensor 'model/" in done.stderr


def test_a_file_of_the_run_in_place_of_its_folder(folder, finished, capsys):
    assert _command("evaluate", folder, finished / "model.safetensors") == 2
    err = capsys.readouterr().err
    assert f"model.safetensors: is a file, expected the folder of a run, such as {finished}" in err


@pytest.mark.parametrize(
    ("name", "alter", "message"),
    [
        ("columns", lambda t: t[:-1], "tensor 'columns' is uint8 ("),
        ("columns", lambda t: t[:0], "tensor 'columns' is uint8 (0,), expected the names"),
        (f"{_MOMENTS}/step", lambda t: -t, f"tensor '{_MOMENTS}/step' has -2, expected numbers"),
        (f"{_MOMENTS}/exp_avg_sq", lambda t: -t - 1, f"tensor '{_MOMENTS}/exp_avg_sq' has -1"),
        (f"{_MOMENTS}/exp_avg", lambda t: t * torch.nan, f"tensor '{_MOMENTS}/exp_avg' has NaN"),
        ("history", lambda t: t * torch.nan, "tensor 'history' has epoch = nan in row 1"),
        ("history", lambda t: t * 2, "tensor 'history' has epochs 2.0, 4.0"),
        ("history", lambda t: t.float(), "tensor 'history' is float32 (2, 12), expected float64"),
        ("history", lambda t: t.long(), "tensor 'history' is int64 (2, 12), expected float64"),
        ("history", lambda t: t[:, 0], "tensor 'history' is float64 (2,), expected float64"),
    ],
)
def test_checkpoint_that_no_training_leaves(folder, run, capsys, name, alter, message):
    path = run / "checkpoint.safetensors"
    tensors = read_tensors(path, "checkpoint")
    tensors[name] = alter(tensors[name])
    write_tensors(path, "checkpoint", tensors)
    _refused(capsys, "resume", folder, run, f"{path}: {message}")


@pytest.mark.parametrize(
    ("command", "kind"), [("evaluate", "model"), ("resume", "checkpoint")], ids=_COMMANDS
)
@pytest.mark.parametrize("place", [1, 100, 1000])
def test_flipped_bit_in_a_tensor(folder, run, capsys, command, kind, place):
    path = run / f"{kind}.safetensors"
    content = bytearray(path.read_bytes())
    content[-place] ^= 1
    path.write_bytes(content)
    _refused(capsys, command, folder, run, f"{path}: its tensors have sha256:")


@pytest.mark.parametrize(
    ("command", "kind"), [("evaluate", "model"), ("resume", "checkpoint")], ids=_COMMANDS
)
def test_files_without_a_digest_are_read(folder, run, command, kind):
    path = run / f"{kind}.safetensors"
    save_file(read_tensors(path, kind), path, metadata={"format": f"deqfusion-{kind}-2"})
    assert _command(command, folder, run) == 0


def test_scaling_that_nothing_was_fitted_to(folder, run, capsys):
    path = run / "model.safetensors"
    tensors = read_tensors(path, "model")
    tensors["model/scaling.span_1"][2] = 0.0
    write_tensors(path, "model", tensors)
    _refused(
        capsys,
        "evaluate",
        folder,
        run,
        f"{path}: tensor 'scaling.span_1' has a number that is not > 0",
    )


def _nothing_left(capsys, code, out, *messages):
    """The command must end with 2 and one line, and leave no folder behind."""
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1
    for message in (*messages, "expected"):
        assert message in captured.err, captured.err
    assert not out.exists()


@pytest.mark.parametrize("label", ["1e19", "1e300"])
def test_label_beyond_whole_numbers(data, tmp_path, capsys, label):
    (data / "labels_tr.csv").write_text(f"0\n{label}\n" + "0\n1\n" * 19)
    code = _train(data, tmp_path / "out")
    _nothing_left(capsys, code, tmp_path / "out", "labels_tr.csv, line 2: got label 1e+")


@pytest.mark.parametrize("splits", ["0", "2"])
@pytest.mark.parametrize("fraction", ["0.001", "0.99"])
def test_fraction_that_holds_out_too_little_or_too_much(folder, tmp_path, capsys, splits, fraction):
    out = tmp_path / "out"
    code = _train(folder, out, "--validation-fraction", fraction, "--splits", splits)
    message = f"--validation-fraction: cannot hold out {fraction} of 40 rows"
    _nothing_left(capsys, code, out, message)
    assert _train(folder, out, "--splits", splits) == 0


def test_fraction_in_the_file_that_holds_out_too_little(folder, run, capsys):
    (run / "config.json").write_text(json.dumps({**read_config(run), "validation_fraction": 0.001}))
    message = f"{run}/config.json: validation_fraction: cannot hold out 0.001 of 40 rows"
    _refused(capsys, "resume", folder, run, message)


def test_largest_seed(folder, tmp_path):
    assert _train(folder, tmp_path / "out", "--seed", str(2**32 - 1), "--splits", "2") == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("splits", ["0", "4"])
@pytest.mark.parametrize(("part", "value"), [("te", "1e39"), ("te", "1e25"), ("tr", "1e308")])
def test_value_that_overflows(data, tmp_path, capsys, splits, part, value):
    path = data / f"1_{part}.csv"
    rows = np.loadtxt(path, delimiter=",")
    # Of values in the rows trained on, only a span beyond float64 overflows.
    rows[2, 3], rows[3, 3] = float(value), -float(value)
    np.savetxt(path, rows, delimiter=",")
    code = _train(data, tmp_path / "out", "--splits", splits)
    line = 3 if splits == "0" else ""
    message = f"1_{part}.csv, line {line}"
    _nothing_left(capsys, code, tmp_path / "out", message, ", column 4: got ")


@pytest.mark.filterwarnings("error")
def test_value_that_overflows_in_evaluation(data, run, capsys):
    path = data / "2_te.csv"
    rows = np.loadtxt(path, delimiter=",")
    rows[4, 1] = 1e39
    np.savetxt(path, rows, delimiter=",")
    _refused(capsys, "evaluate", data, run, "2_te.csv, line 5, column 2: got 1e+39")


@pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory the process has")
def test_model_that_memory_does_not_hold(folder, tmp_path):
    program = """
import resource, sys
from deqfusion.cli import main
import deqfusion.tasks.omics

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**31
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[1:]))
"""
    options = ["train", "rosmap", "--data-dir", str(folder), "--out", str(tmp_path / "out")]
    options += ["--modalities", "1,2", "--dim", "8192"]
    done = subprocess.run(
        [sys.executable, "-c", program, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--dim: got 8192, which takes 7.5 GiB in training, expected" in done.stderr
    assert not (tmp_path / "out").exists()
