"""`deqfusion analyze fusions`: the comparison of fusions as a command."""

import csv
import json
import shutil

import pytest

from deqfusion.analysis.comparison import headline
from deqfusion.analysis.fusions import ANALYSIS

_TWO = ("--fusions", "deq", "sum", "--seeds", "2")


@pytest.fixture(scope="module")
def of_two(analyze, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis") / "out"
    assert analyze("fusions", out, *_TWO) == 0
    return out


def test_table_and_picture_are_of_the_records(of_two, results, capsys):
    whole = results(of_two, "fusions")
    (table,) = whole["tables"]
    assert [row["name"] for row in table["rows"]] == ["deq", "sum"]
    by_fusion = {
        name: [r["splits"][0]["test"]["accuracy"] for r in whole["records"] if r["name"] == name]
        for name in ("deq", "sum")
    }
    for row in table["rows"]:
        assert row["accuracy"] == pytest.approx(sum(by_fusion[row["name"]]) / 2)
        assert row["seeds"] == 2
        assert row["failed"] == 0
    deq, other = table["rows"]
    assert "difference" not in deq
    assert other["difference"] == pytest.approx(other["accuracy"] - deq["accuracy"])
    assert other["steps"] is None
    assert deq["steps"] > 1
    with (of_two / "fusions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [r["accuracy"] for r in table["rows"]]
    assert f"{other['accuracy']:.3f}" in (of_two / "fusions.txt").read_text()
    assert (of_two / "fusions.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_draw_runs_of_their_own(of_two, results):
    losses = [r["splits"][0]["test"]["loss"] for r in results(of_two, "fusions")["records"]]
    assert len(set(losses)) == 4


def test_a_part_says_what_is_missing(analyze, tmp_path, capsys):
    assert analyze("fusions", tmp_path / "out", *_TWO, "--part", "1/2") == 0
    assert "2 of 4 runs are not done yet" in capsys.readouterr().out
    assert analyze("fusions", tmp_path / "out", *_TWO, "--part", "2/2") == 0
    assert "not done" not in capsys.readouterr().out


def test_a_fusion_without_a_successful_run_is_counted(of_two, results):
    whole = results(of_two, "fusions")
    for record in whole["records"]:
        if record["name"] == "sum" and record["seed"] == 1:
            record["splits"] = []
    (table,) = ANALYSIS.tables(whole["records"])
    row = next(row for row in table.rows if row["name"] == "sum")
    assert (row["seeds"], row["failed"]) == (1, 1)
    assert any("1 runs diverged" in note for note in table.notes)


def test_where_every_run_diverges_there_is_no_table(of_two, analyze, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(of_two / "fusions" / "rosmap", out / "fusions" / "brca")
    for path in out.rglob("*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "task": "brca"}))
    # The other task's runs do not make up for it.
    assert analyze("fusions", out, *_TWO, "--set", "learning_rate=1e30") == 1
    printed = capsys.readouterr().out
    assert "4 runs of rosmap diverged" in printed
    assert "no run of rosmap has succeeded" in printed
    assert not (out / "fusions.txt").exists()
    record = json.loads(next((out / "fusions" / "rosmap").rglob("*.json")).read_text())
    assert "expected a finite number" in record["candidates"][0]["failed"]


def test_the_compared_metric_of_every_kind_of_task():
    def record(*metrics, selection=("mae", "min")):
        return {"selection": selection, "splits": [{"test": dict.fromkeys(metrics, 0.0)}]}

    assert headline([record("loss", "f1", "accuracy")]) == "accuracy"
    assert headline([record("pearson", "acc7", "mae")]) == "mae"
    assert headline([record("f1_micro", "f1_macro")]) == "f1_macro"
    assert headline([record("map_50", "map_25")]) == "map_25"
    assert headline([record("own", selection=("own", "max"))]) == "own"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "nonsense"], "task: got 'nonsense', expected one of rosmap"),
        (["--set", "nonsense=1"], "--set: got 'nonsense=1', expected NAME=VALUE"),
        (["--set", "epochs=0"], "--set epochs: got '0', expected a whole number"),
        (["--set", "seed=1"], "seed: got 1, expected only other options"),
        (["--set", "fusion=sum"], "fusion: got 'sum', expected --fusions"),
        (["--set", "dim=6"], "dim: got 6, expected a multiple of 4"),
        (["--choose", "dropout", "0.1"], "--choose dropout: got 1 values, expected at least 2"),
        (["--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_refusals_in_one_line(analyze, tmp_path, capsys, more, message):
    out = tmp_path / "out"
    assert analyze("fusions", out, *_TWO, *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/99999"])
def test_parts_that_are_none(analyze, tmp_path, capsys, part):
    with pytest.raises(SystemExit) as stop:
        analyze("fusions", tmp_path, "--part", part)
    assert stop.value.code == 2
    assert "expected K/OF with K from 1 to OF" in capsys.readouterr().err


def test_another_folder_of_options_is_refused(of_two, analyze, capsys):
    before = {path: path.read_bytes() for path in of_two.rglob("*") if path.is_file()}
    assert analyze("fusions", of_two, *_TWO, "--set", "dropout=0.2") == 2
    assert "the run has dropout = 0.0, expected 0.2 as asked for" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in of_two.rglob("*") if path.is_file()} == before


def test_results_of_several_tasks_have_tables_of_their_own(of_two, results):
    whole = results(of_two, "fusions")["records"]
    others = [{**record, "task": "brca"} for record in whole]
    tables = ANALYSIS.tables([*whole, *others])
    assert [table.title for table in tables] == ["brca", "rosmap"]
    figure = ANALYSIS.picture([*whole, *others])
    assert len(figure.axes) == 2
