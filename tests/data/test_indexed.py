"""Index-column CSV files: rows matched by id, and faults named with file and line."""

import gzip

import numpy as np
import pytest

from deqfusion.data import DataError, load_indexed


@pytest.fixture
def folder(tmp_path):
    lines = [f"P{i},{i % 3},{'ABN'[i % 3]}" for i in range(9)]
    (tmp_path / "labels.csv").write_text("\n".join([",label,kind", *lines]) + "\n")
    genes = [f'P{i},{i}.5,"{-i}"' for i in range(9)]
    with gzip.open(tmp_path / "mrna.csv.gz", "wt") as file:
        # Another order than the labels, and a patient without a label.
        file.write("\n".join([',"gene, one",two', *reversed(genes), "Q,1,2"]) + "\n")
    (tmp_path / "cnv.csv").write_text("\n".join([",c", *(f"P{i},{i}e1" for i in range(9))]) + "\n")
    return tmp_path


def test_rows_are_matched_by_id(folder):
    rows, classes, files, columns = load_indexed(folder, ["mrna", "cnv"], "kind")
    assert files == [folder / "mrna.csv.gz", folder / "cnv.csv"]
    assert columns == [["gene, one", "two"], ["c"]]
    assert classes == ["A", "B", "N"]
    np.testing.assert_array_equal(rows.labels, np.arange(9) % 3)
    np.testing.assert_array_equal(rows.modalities[0], [[i + 0.5, -i] for i in range(9)])
    np.testing.assert_array_equal(rows.modalities[1][:, 0], 10 * np.arange(9))


def test_a_class_is_left_out(folder):
    rows, classes, *_ = load_indexed(folder, ["cnv"], "kind", without=("N",))
    assert classes == ["A", "B"]
    np.testing.assert_array_equal(rows.modalities[0][:, 0], [0, 10, 30, 40, 60, 70])


@pytest.mark.parametrize(
    ("name", "alter", "message"),
    [
        ("cnv.csv", lambda t: t[:-1], r"cnv\.csv: no line end, expected a complete last line"),
        ("cnv.csv", lambda t: t.replace("3e1", "x"), r"line 5, column 'c': got 'x', expected"),
        ("cnv.csv", lambda t: t.replace("3e1", ""), r"line 5, column 'c': got '', expected"),
        ("cnv.csv", lambda t: t.replace("3e1", "nan"), r"line 5, column 'c': got 'nan'"),
        ("cnv.csv", lambda t: t.replace("3e1", "3_0"), r"line 5, column 'c': got '3_0', expected"),
        ("cnv.csv", lambda t: t.replace("3e1", "3" * 200_000), r"line 5: field larger than .*CSV"),
        ("cnv.csv", lambda t: t.replace("P3", "\nP3"), r"line 5: got 0 values, expected 1 as in"),
        ("cnv.csv", lambda t: t.replace("3e1", "3,1"), r"line 5: got 2 values, expected 1 as in"),
        ("cnv.csv", lambda t: t.replace("P3", "P4"), r"line 6: got 'P4' again, expected every id"),
        ("cnv.csv", lambda t: t.replace("P3", "P33"), r"cnv\.csv: no row 'P3', expected one for"),
        ("cnv.csv", lambda t: ",c\n", r"cnv\.csv: is empty, expected a header"),
        ("labels.csv", lambda t: t.replace("kind", "sort"), r"got columns label, sort, expected"),
        ("labels.csv", lambda t: t.replace("B", "A").replace("N", "A"), r"'kind' has 1 classes"),
    ],
)
def test_faults(folder, name, alter, message):
    path = folder / name
    path.write_text(alter(path.read_text()))
    with pytest.raises(DataError, match=message):
        load_indexed(folder, ["mrna", "cnv"], "kind")


def test_missing_and_half_a_file(folder):
    with pytest.raises(DataError, match=r"protein\.csv\.gz: no such file, nor protein\.csv"):
        load_indexed(folder, ["protein"], "kind")
    with pytest.raises(DataError, match=r"no such folder, expected one with mrna\.csv\.gz"):
        load_indexed(folder / "nowhere", ["mrna"], "kind")
    path = folder / "mrna.csv.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"mrna\.csv\.gz: cannot be read \(.*\), expected a whole"):
        load_indexed(folder, ["mrna"], "kind")
