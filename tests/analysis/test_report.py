"""Markdown from result files alone."""

import json

import pytest

from deqfusion.analysis import report


@pytest.fixture(scope="module")
def result(analyze, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis") / "out"
    assert analyze("fusions", out, "--fusions", "deq", "sum", "--seeds", "2") == 0
    return out / "fusions.json"


def test_tables_are_those_of_the_analysis(result, tmp_path, capsys):
    assert report.main([str(result)]) == 0
    printed = capsys.readouterr().out
    row = json.loads(result.read_text())["tables"][0]["rows"][1]
    line = next(line for line in printed.splitlines() if line.startswith("| sum"))
    assert f"{row['accuracy']:.3f} ± {row['accuracy_error']:.3f}" in line
    assert "### rosmap" in printed
    commit = json.loads(result.read_text())["records"][0]["environment"]["commit"]
    assert f"commit {commit[:12]}" in printed if commit else "commit None" in printed


def test_only_what_is_between_the_markers_is_written(result, tmp_path):
    page = tmp_path / "results.md"
    assert report.main([str(result), "--write", str(page)]) == 0
    first = page.read_text()
    assert first.startswith("# Results\n")
    page.write_text(first.replace("# Results", "# Mine").replace("| sum", "| changed"))
    assert report.main([str(result), "--write", str(page)]) == 0
    assert page.read_text() == first.replace("# Results", "# Mine")


def test_records_in_one_file_make_the_same_page(result, tmp_path, capsys):
    page, copy, records = tmp_path / "page.md", tmp_path / "copy.md", tmp_path / "records.json"
    assert report.main([str(result), "--write", str(page), "--records", str(records)]) == 0
    assert report.main([str(records), "--write", str(copy)]) == 0
    assert copy.read_text() == page.read_text()
    assert json.loads(records.read_text())["records"] == json.loads(result.read_text())["records"]
    assert len(records.read_text().splitlines()) == 4 + 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", 'expected a JSON object with "format"'),
        ('{"format": "deqfusion-analysis", "version": 1, "records": []}', "with a list of records"),
        ('{"format": "deqfusion-analysis", "version": 1, "records": [{}]}', "records[0]: expected"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, capsys, content, message):
    file = tmp_path / "x.json"
    file.write_text(content)
    page = tmp_path / "page.md"
    assert report.main([str(file), "--write", str(page)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(file) in error
    assert error.count("\n") == 1
    assert not page.exists()


def test_a_file_without_markers_is_left_alone(result, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("mine\n")
    assert report.main([str(result), "--write", str(page)]) == 2
    assert "without the lines <!-- results:begin -->" in capsys.readouterr().err
    assert page.read_text() == "mine\n"
