"""Analyses of tasks with other samples, models and metrics than rows and classes."""

import importlib.util

import numpy as np
import pytest

from deqfusion.cli import main
from tests.data.scenes import write_scene
from tests.data.small_mmimdb import SPLIT, write_mmimdb
from tests.data.small_mosi import write_mosi
from tests.tasks.test_vqa import folder as questions

__all__ = ["questions"]

_TASKS = {
    "mosi": ("batch_size=8",),
    "mmimdb": (f"split_sizes={','.join(map(str, SPLIT))}", "hidden=16,16", "batch_size=20"),
    "vqa": ("min_answer_count=1", "batch_size=64"),
    "sunrgbd": (
        *("validation_fraction=0.4", "num_points=256", "image_size=24,32", "image_width=8"),
        *("point_width=16", "num_seeds=32", "num_proposals=8", "augment=false"),
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, questions):
    folders = {name: tmp_path_factory.mktemp(name) for name in _TASKS}
    write_mosi(folders["mosi"])
    if importlib.util.find_spec("h5py"):
        write_mmimdb(folders["mmimdb"])
    for number in range(1, 6):
        write_scene(folders["sunrgbd"], f"{number:06}")
    return {**folders, "vqa": questions}


def _analyze(name, task, data, out, *more):
    options = [a for o in (*_TASKS[task], "dim=16", "epochs=1", "tol=1e-2") for a in ("--set", o)]
    command = ["analyze", name, "--task", task, "--data-dir", str(data[task]), "--out", str(out)]
    return main([*command, "--seeds", "1", "--quiet", *options, *more])


@pytest.mark.parametrize("task", _TASKS)
def test_comparison_tracing_and_watching(task, data, tmp_path, results):
    if task == "mmimdb":
        pytest.importorskip("h5py", reason="h5py is not installed (the extra hdf5)")
    assert _analyze("fusions", task, data, tmp_path, "--fusions", "deq", "sum") == 0
    assert _analyze("convergence", task, data, tmp_path, "--steps", "20", "--tied", "2") == 0
    assert (
        _analyze("stability", task, data, tmp_path, "--tol-start", "--set", "jacobian_weight=1")
        == 0
    )
    (table,) = results(tmp_path, "stability")["tables"]
    assert all(np.isfinite(row["radius"]) for row in table["rows"])
    (table,) = results(tmp_path, "fusions")["tables"]
    compared = {"mosi": "mae", "mmimdb": "f1_macro", "vqa": "accuracy", "sunrgbd": "map_25"}[task]
    assert table["rows"][1]["compared"] == compared


@pytest.mark.parametrize("task", ["mosi", "mmimdb"])
def test_importance_of_numbers(task, data, tmp_path, results):
    if task == "mmimdb":
        pytest.importorskip("h5py", reason="h5py is not installed (the extra hdf5)")
    assert _analyze("importance", task, data, tmp_path, "--noise", "1") == 0
    weights, _ = results(tmp_path, "importance")["tables"]
    names = ["text", "audio", "video"] if task == "mosi" else ["0", "1"]
    assert [row["name"] for row in weights["rows"]] == [*names, "all"]
    # Both encoders of MM-IMDB are part of its model: neither modality goes alone.
    assert (weights["rows"][0]["solo"] is None) == (task == "mmimdb")


@pytest.mark.parametrize("task", ["vqa", "sunrgbd"])
def test_importance_of_words_and_points_is_refused(task, data, tmp_path, capsys):
    assert _analyze("importance", task, data, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"task: got '{task}' with these options, expected one whose samples have a row" in error
    assert not (tmp_path / "out").exists()
