"""The command, and bad input."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deqfusion import Unroll, cli
from deqfusion.kernels import tuning
from deqfusion.tuning import search
from tests.tuning.problems import features, layer, tune


def test_the_command(store, tmp_path, capsys):
    arguments = "autotune --dim 16 --num-groups 2 --modalities 1 --batch 8,30 --budget 1 --quiet"
    assert cli.main([*arguments.split(), "--dry-run"]) == 0
    assert not list(store.glob("*.json"))
    assert cli.main([*arguments.split(), "--out", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*.json")
    printed = capsys.readouterr().out
    assert str(file) in printed
    assert "default kept: " in printed or "kept (*): " in printed
    assert "2 to 32 rows" in printed
    assert 5 in {e.problem.memory for e in tuning.read(file)}
    assert sorted({e.problem.rows for e in tuning.read(file)}) == [8, 32]
    assert not list(store.glob("*.json"))


def test_the_memory_that_is_asked_for(tmp_path):
    arguments = "autotune --dim 16 --num-groups 2 --batch 8 --budget 1e-3 --quiet --memory 3"
    assert cli.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    assert [e.problem.memory for e in tuning.read(file)] == [3]


@pytest.mark.parametrize("prefix", ["", "fusion.", "model/fusion."])
def test_a_layer_from_a_file(prefix, tmp_path, capsys):
    model = layer(gate_input="concat")
    tensors = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    tensors["head.weight"] = torch.zeros(3)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    from deqfusion.tuning.command import layer_from_file

    found = layer_from_file(path, num_groups=2)
    assert found.options.gate_input == "concat"
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    arguments = "--num-groups 2 --batch 20 --budget 1 --quiet --dry-run --forward-only"
    assert cli.main(["autotune", "--from-module", str(tmp_path), *arguments.split()]) == 0
    assert "20 rows, width 16, 2 modalities" in capsys.readouterr().out


def test_a_checkpoint_gives_its_best_epoch(tmp_path):
    from deqfusion.tuning.command import layer_from_file

    tensors = {}
    for part, value in (("model", 1.0), ("best", 2.0)):
        for name, tensor in layer().state_dict().items():
            tensors[f"{part}/fusion.{name}"] = torch.full_like(tensor, value)
    save_file(tensors, tmp_path / "checkpoint.safetensors")
    found = layer_from_file(tmp_path / "checkpoint.safetensors", num_groups=2)
    assert (found.gate_bias == 2).all()


def test_a_run_says_how_its_cell_is_made(tmp_path, capsys):
    """Another cell has other steps and other times; what is given on the command line wins."""
    from deqfusion.engine.runs import CONFIG_FORMAT, CONFIG_VERSION
    from deqfusion.tuning.command import layer_from_file

    cell = {"gate": "identity", "skip": True, "tail": "norm_relu", "num_groups": 2}
    config = {"format": CONFIG_FORMAT, "version": CONFIG_VERSION, "task": "toy", **cell}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(layer(**cell).state_dict(), tmp_path / "model.safetensors")
    found = layer_from_file(tmp_path).options
    assert {name: getattr(found, name) for name in cell} == cell
    assert layer_from_file(tmp_path, num_groups=8).options.num_groups == 8
    # Of the file alone nothing is known.
    assert layer_from_file(tmp_path / "model.safetensors", num_groups=2).options.gate == "sigmoid"
    arguments = ["autotune", "--from-module", str(tmp_path), "--batch", "20", "--budget", "1e-3"]
    arguments += ["--quiet", "--dry-run", "--forward-only", "--device", "cpu"]
    assert cli.main(arguments) in (0, 1)
    assert "20 rows, width 16, 2 modalities" in capsys.readouterr().out
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(arguments) == 2
    assert f"{tmp_path / 'config.json'}: expected a JSON object" in capsys.readouterr().err


def file_of(kind: str, folder: Path) -> Path:
    path = folder / "file.safetensors"
    state = layer().state_dict()
    if kind == "pickle":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path.write_bytes(buffer.getvalue())
    elif kind == "folder":
        path = folder
    elif kind == "none":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "two":
        save_file({f"{k}.{n}": v.clone() for k in "ab" for n, v in state.items()}, path)
    elif kind == "part":
        save_file({n: v for n, v in state.items() if "norm1" not in n}, path)
    elif kind == "flat":
        save_file({**state, "modality_weight1": torch.zeros(3)}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", "cannot be read"),
        ("missing", "cannot be read"),
        ("folder", "cannot be read"),
        ("none", "got layers none, expected the tensors of one"),
        ("two", "got layers a., b., expected the tensors of one"),
        ("part", "Missing key(s) in state_dict"),
        ("flat", "expected (N, d, d)"),
    ],
)
def test_files_without_a_layer_are_refused_in_one_line(kind, message, tmp_path, capsys):
    path = file_of(kind, tmp_path)
    assert cli.main(["autotune", "--num-groups", "2", "--from-module", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"deqfusion: error: --from-module {path}")
    assert message in error
    assert error.count("\n") == 1


def test_groups_are_named_as_in_training_and_as_before(capsys):
    arguments = ["autotune", "--dim", "18", "--batch", "4", "--target", "h200"]
    for name in ("--num-groups", "--groups"):
        assert cli.main([*arguments, name, "5"]) == 2
        assert "expected a multiple of --num-groups, 5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["autotune", "--help"])
    assert not re.search(r"--groups\b", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--target h300", "target: got 'h300', expected one of 'h200', 'h100', 'a100', 'mi300x'"),
        ("--dim 30", "--dim: got 30, expected a multiple of --num-groups, 4"),
        ("--num-groups 7", "--dim: got 512, expected a multiple of --num-groups, 7"),
        ("--from-module a --dim 8", "--from-module: got --dim or --modalities as well, expected"),
        ("--device tpu", "--device: got 'tpu', expected cpu, cuda or cuda:1"),
        ("--device meta", "--device: got 'meta', expected cpu or one of"),
        ("--device cuda:99", "--device: got 'cuda:99', expected cpu or one of"),
        ("--target h200 --dtype float64", "dtype: got torch.float64"),
        ("--target h200 --budget 9", "--budget: got 9.0 with --target, by which nothing is measur"),
        ("--target h200 --device cpu", "--device: got cpu with --target, by which nothing is"),
        ("--target h200 --out here", "--out: got here with --target, by which nothing is"),
        ("--target h200 --dim 2056 --num-groups 1 --batch 1", "got 2056 channels per group"),
    ],
)
def test_bad_values_are_refused_in_one_line(arguments, message, capsys, store):
    assert cli.main(["autotune", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not store.exists()


@pytest.mark.parametrize(
    "arguments",
    ["--batch 0", "--batch 3,x", "--dim none", "--dtype int8", "--budget 0", "--budget nan",
     "--tol 0", "--out a --dry-run", "--modalities -1"],
)  # fmt: skip
def test_arguments_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["autotune", *arguments.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("deqfusion autotune: error: ")
    assert error.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_timed(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(search.Search, "host", None)
    out = str(tmp_path / "file" / "deeper")
    assert cli.main(["autotune", "--dim", "16", "--out", out]) == 2
    error = capsys.readouterr().err
    assert f"{out}: cannot be written" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({"joint": True}, {}, ValueError, "module: got joint=True"),
        ({"adjoint": Unroll(3)}, {}, ValueError, "module: got adjoint Unroll"),
        ({}, {"budget": 0}, ValueError, "budget: got 0"),
        ({}, {"budget": "1"}, TypeError, "budget: got '1'"),
        ({}, {"target": "h300"}, ValueError, "target: got 'h300'"),
        ({}, {"apply": 1}, TypeError, "apply: got 1"),
        ({}, {"backward": 1}, TypeError, "backward: got 1"),
    ],
)
def test_bad_input(options, arguments, error, message):
    model = layer(**options)
    with pytest.raises(error, match=message):
        tune(model, features(model), **arguments)


def test_bad_modules_and_features():
    model = layer()
    with pytest.raises(TypeError, match="module: got Linear, expected a DEQFusion"):
        tune(torch.nn.Linear(3, 3), features(model))
    with pytest.raises(ValueError, match="example_features: got no rows"):
        tune(model, features(model, 0))
    with pytest.raises(ValueError, match="features"):
        tune(model, torch.randn(3, 4, 16))


def test_the_reference_on_a_gpu_has_nothing_to_tune(monkeypatch):
    from deqfusion.tuning import api

    monkeypatch.setenv("DEQFUSION_BACKEND", "reference")
    assert not api._runs_programs(torch.device("cpu"))
    with pytest.raises(ValueError, match="DEQFUSION_BACKEND=reference: got a module on cuda"):
        api._runs_programs(torch.device("cuda"))
