"""TensorBoard's events: the history's numbers, once each, and one line where they cannot be."""

import pytest

from deqfusion.cli import main
from deqfusion.engine import RunDirectory, command, logs
from deqfusion.engine.logs import Log

_COLUMNS = ("epoch", "train_loss", "validation_loss", "steps", "converged")


def _scalars(run, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.events), purge_orphaned_data=True)
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def _epochs(run, rows, done, steps=5.0):
    log = Log("loss", run, None)
    with log.opened(_COLUMNS, rows[:done], 10):
        for row in rows[done:]:
            log.add(_COLUMNS, [*row[:3], steps, 1.0])


def test_events_are_those_of_the_history_after_a_kill_too(tmp_path):
    run = RunDirectory.open(tmp_path, {}, resume=False)
    rows = [[float(epoch), 1 / epoch, 2.0, 5.0] for epoch in range(1, 5)]
    # The third epoch is logged, but was not in the checkpoint.
    _epochs(run, rows[:3], 0)
    rows[2][1] = 0.5
    _epochs(run, rows, 2)
    assert _scalars(run, "train_loss") == [(1, 1.0), (2, 0.5), (3, 0.5), (4, 0.25)]
    assert [line.split(",")[1] for line in run.log.read_text().splitlines()[1:]] == [
        "1.0",
        "0.5",
        "0.5",
        "0.25",
    ]


def test_a_number_that_is_not_is_left_out(tmp_path):
    run = RunDirectory.open(tmp_path, {}, resume=False)
    _epochs(run, [[1.0, 1.0, 2.0, 0.0]], 0, steps=float("nan"))
    assert _scalars(run, "validation_loss") == [(1, 2.0)]
    with pytest.raises(KeyError):
        _scalars(run, "steps")


def test_without_tensorboard_it_is_said_once(folder, tmp_path, capsys, monkeypatch):
    for module in (command, logs):
        monkeypatch.setattr(module, "writes_events", lambda: False)
    out = tmp_path / "out"
    options = ["--data-dir", str(folder), "--out", str(out), "--modalities", "1,2"]
    options += ["--fusion", "sum", "--dim", "8"]
    assert main(["train", "rosmap", *options, "--epochs", "1"]) == 0
    assert capsys.readouterr().err.count("no TensorBoard events, as the package") == 1
    assert not (out / "tensorboard").exists()
    assert main(["train", "rosmap", *options, "--epochs", "2", "--resume"]) == 0
    assert "TensorBoard" not in capsys.readouterr().err
    quiet = ["--epochs", "1", "--quiet", "--out", str(tmp_path / "quiet")]
    assert main(["train", "rosmap", *options, *quiet]) == 0
    assert capsys.readouterr().err == ""
