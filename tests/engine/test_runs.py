"""A run's folder: nothing is overwritten, and what is no run of ours is refused by name."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from deqfusion.engine.runs import (
    CheckpointError,
    RunDirectory,
    check_tensors,
    read_config,
    read_tensors,
    write_atomically,
    write_tensors,
)

_CONFIG = {"task": "rosmap", "dim": 8, "modalities": (1, 2), "epochs": 3}


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_new_run_writes_its_configuration(tmp_path):
    run = RunDirectory.open(tmp_path / "a" / "b", _CONFIG, resume=False)
    config = read_config(run.path)
    assert config["dim"] == 8
    assert config["modalities"] == [1, 2]
    assert list(_contents(run.path)) == ["config.json"]


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_folder_is_left_alone(tmp_path, resume):
    (tmp_path / "thesis.txt").write_text("years of work")
    before = _contents(tmp_path)
    message = r"config\.json: no such file" if resume else r"thesis\.txt: already there, expected"
    with pytest.raises(CheckpointError, match=message):
        RunDirectory.open(tmp_path, _CONFIG, resume=resume)
    assert _contents(tmp_path) == before


def test_out_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match="file: is a file, expected"):
            RunDirectory.open(path, _CONFIG, resume=resume)


def test_existing_run_needs_resume_and_the_same_configuration(tmp_path):
    RunDirectory.open(tmp_path, _CONFIG, resume=False)
    before = _contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"already there.*--resume"):
        RunDirectory.open(tmp_path, _CONFIG, resume=False)
    with pytest.raises(CheckpointError, match=r"config\.json: the run has dim = 8, expected 16"):
        RunDirectory.open(tmp_path, {**_CONFIG, "dim": 16}, resume=True)
    RunDirectory.open(tmp_path, {**_CONFIG, "epochs": 30}, resume=True)
    assert _contents(tmp_path) == before


def test_the_configuration_asked_for_last_is_written_on_request(tmp_path):
    whole = RunDirectory.open(tmp_path, _CONFIG, resume=False)
    part = RunDirectory.open(tmp_path / "part", _CONFIG, resume=False, part_of=whole)
    assert whole.started
    assert part.started
    more = {**_CONFIG, "epochs": 30}
    whole = RunDirectory.open(tmp_path, more, resume=True)
    part = RunDirectory.open(tmp_path / "part", more, resume=True, part_of=whole)
    assert not whole.started
    assert not part.started
    part.write_config()
    for run in (whole, part):
        assert read_config(run.path)["epochs"] == 30


def test_resume_starts_a_run_where_there_is_none(tmp_path):
    # A process killed before its first complete file leaves a temporary one.
    (tmp_path / "config.json.tmp").write_text("{")
    run = RunDirectory.open(tmp_path, _CONFIG, resume=True)
    assert read_config(run.path)["dim"] == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected a JSON object with"),
        ('{"format": "other"}', "expected a JSON object with"),
        ('{"format": "deqfusion-run", "version": 99}', "got version 99, expected 2"),
    ],
)
def test_foreign_configuration(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        read_config(tmp_path)


def test_tensors_round_trip(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(5, dtype=torch.uint8)}
    write_tensors(path, "model", tensors)
    read = read_tensors(path, "model")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_tensors(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    write_tensors(path, "model", {"a": torch.randn(30)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read .*complete"):
        read_tensors(path, "model")


def test_foreign_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        read_tensors(path, "model")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="got format '' in its header, expected 'deqfus"):
        read_tensors(path, "model")
    write_tensors(path, "model", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="got format 'deqfusion-model-2'"):
        read_tensors(path, "checkpoint")


def test_a_pickle_is_refused_without_being_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(path, "model")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "tensor 'a' is missing"),
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, "tensor 'b' is unknown"),
        ({"a": torch.zeros(3)}, r"tensor 'a' is float32 \(3,\), expected float32 \(2,\)"),
        ({"a": torch.zeros(2).double()}, r"tensor 'a' is float64 \(2,\), expected float32"),
        ({"a": torch.tensor([0.0, torch.nan])}, "tensor 'a' has NaN or inf"),
    ],
)
def test_tensors_of_another_model(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        check_tensors(tmp_path / "model", tensors, {"a": torch.zeros(2)})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"


def test_log_round_trips_every_bit(tmp_path):
    run = RunDirectory.open(tmp_path, _CONFIG, resume=False)
    run.write_log(["epoch", "loss"], [[1.0, 0.1 + 0.2]])
    run.append_log([2.0, 1 / 3])
    lines = run.log.read_text().splitlines()
    assert lines[0] == "epoch,loss"
    assert [json.loads(f"[{line}]") for line in lines[1:]] == [[1.0, 0.1 + 0.2], [2.0, 1 / 3]]
