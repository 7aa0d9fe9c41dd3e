"""Tables as text, Markdown and CSV."""

import csv
import math

from deqfusion.analysis.tables import Table, json_rows, write_csv

_ROWS = [
    {"name": "a", "x": 0.5, "x_error": 0.25, "p": math.nan},
    {"name": "bcd", "x": 1.0, "x_error": math.nan, "p": 0.04, "more": 3},
]
_TABLE = Table("t", _ROWS, {"name": ("name", ""), "x": ("an x", "+.2f"), "p": ("p", ".1g")}, ["N."])


def test_text_shows_errors_and_dashes():
    assert _TABLE.text().splitlines() == [
        "t",
        "name          an x     p",
        "a     +0.50 ± 0.25     -",
        "bcd          +1.00  0.04",
        "N.",
    ]


def test_markdown():
    assert _TABLE.markdown().splitlines() == [
        "| name | an x | p |",
        "|---|---|---|",
        "| a | +0.50 ± 0.25 | - |",
        "| bcd | +1.00 | 0.04 |",
        "",
        "N.",
    ]


def test_csv_and_json_have_every_column_and_no_nan(tmp_path):
    write_csv(tmp_path / "t.csv", [_TABLE, Table("u", [{"name": "e", "y": 2}], {})])
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a", "bcd", "e"]
    assert rows[0] == {"name": "a", "x": "0.5", "x_error": "0.25", "p": "", "more": "", "y": ""}
    assert rows[2]["y"] == "2"
    assert json_rows(_TABLE)[0]["p"] is None
