"""MOGONET folders: what is read, and what each fault in a file says."""

import os
from pathlib import Path

import numpy as np
import pytest

from deqfusion.data import (
    DataError,
    load_mogonet,
    read_labels,
    read_matrix,
    repeated_splits,
    stratified_holdout,
)

_SHARED = Path(
    os.environ.get("DEQFUSION_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
)


@pytest.fixture
def shared():
    if not (_SHARED / "rosmap").is_dir():
        pytest.skip(f"{_SHARED / 'rosmap'} is absent (set DEQFUSION_DATA)")
    return _SHARED


@pytest.fixture
def folder(tmp_path):
    """A folder with modalities 1 and 2, 12 training and 6 test rows, 3 classes."""
    generator = np.random.default_rng(0)
    for part, rows in (("tr", 12), ("te", 6)):
        for number, width in ((1, 4), (2, 3)):
            np.savetxt(
                tmp_path / f"{number}_{part}.csv", generator.random((rows, width)), delimiter=","
            )
        np.savetxt(tmp_path / f"labels_{part}.csv", np.arange(rows) % 3)
    return tmp_path


def _edit(path, line, old, new):
    lines = path.read_text().split("\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    path.write_text("\n".join(lines))


def test_reads_what_was_written(folder):
    data = load_mogonet(folder, [1, 2])
    assert data.num_classes == 3
    assert [view.shape for view in data.train.modalities] == [(12, 4), (12, 3)]
    np.testing.assert_array_equal(data.test.labels, np.arange(6) % 3)
    expected = np.loadtxt(folder / "2_te.csv", delimiter=",")
    np.testing.assert_array_equal(data.test.modalities[1], expected)
    assert len(data.pooled()) == 18


def test_modalities_are_chosen_and_ordered(folder):
    data = load_mogonet(folder, [2, 1])
    assert [view.shape[1] for view in data.train.modalities] == [3, 4]
    with pytest.raises(ValueError, match=r"modalities: got \[1, 1\]"):
        load_mogonet(folder, [1, 1])


def test_missing_folder_and_files(folder):
    with pytest.raises(DataError, match=r"nowhere: no such folder, expected one with 1_tr\.csv"):
        load_mogonet(folder / "nowhere", [1, 2])
    with pytest.raises(DataError, match=r"3_tr\.csv: no such file, nor 3_te\.csv; ") as error:
        load_mogonet(folder, [1, 2, 3])
    assert str(error.value).count("3_t") == 2
    assert "for each N of 1, 2, 3" in str(error.value)
    (folder / "labels_te.csv").unlink()
    with pytest.raises(DataError, match=r"labels_te\.csv: no such file; expected N_tr\.csv"):
        load_mogonet(folder, [1, 2])


def test_ragged_row(folder):
    path = folder / "1_tr.csv"
    lines = path.read_text().split("\n")
    lines[4] = lines[4].rpartition(",")[0]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"1_tr\.csv, line 5: got 3 values, expected 4"):
        load_mogonet(folder, [1, 2])


def test_width_of_test_rows(folder):
    np.savetxt(folder / "1_te.csv", np.zeros((6, 5)), delimiter=",")
    with pytest.raises(DataError, match=r"1_te\.csv, line 1: got 5 values, expected 4 as in its"):
        load_mogonet(folder, [1, 2])


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("abc", r"column 2: got 'abc', expected a number"),
        ("", r"column 2: got '', expected a number"),
        ("1_000", r"column 2: got '1_000', expected a number"),
        ("nan", r"column 2: got nan, expected a finite number"),
        ("-inf", r"column 2: got -inf, expected a finite number"),
        ("1e999", r"column 2: got 1e999, expected a finite number"),
    ],
)
def test_bad_field(tmp_path, field, message):
    path = tmp_path / "1_tr.csv"
    path.write_text(f"1,2,3\n4,{field},6\n")
    with pytest.raises(DataError, match=rf"1_tr\.csv, line 2, {message}"):
        read_matrix(path)


@pytest.mark.parametrize("keep", range(1, 60))
def test_truncation_at_any_byte_of_the_last_rows_is_seen(folder, keep):
    path = folder / "2_tr.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-keep])
    with pytest.raises(DataError, match=r"2_tr\.csv"):
        load_mogonet(folder, [1, 2])


def test_row_count_must_match_the_labels(folder):
    path = folder / "2_te.csv"
    path.write_text("".join(line + "\n" for line in path.read_text().split("\n")[:4]))
    with pytest.raises(DataError, match=r"2_te\.csv, line 4: .*4 rows, expected 6, .*labels_te"):
        load_mogonet(folder, [1, 2])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe1,2\n"])
def test_empty_or_binary_file(tmp_path, content):
    path = tmp_path / "1_tr.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"1_tr\.csv: (is empty|byte 0 is not text)"):
        read_matrix(path)


def test_blank_line(tmp_path):
    path = tmp_path / "1_tr.csv"
    path.write_text("1,2\n\n3,4\n")
    with pytest.raises(DataError, match=r"line 2: got 1 values, expected 2"):
        read_matrix(path)


def test_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "1_tr.csv"
    path.write_bytes(b"1,2\r\n3,4\r\n")
    np.testing.assert_array_equal(read_matrix(path), [[1.0, 2.0], [3.0, 4.0]])


def test_labels_out_of_range(folder):
    _edit(folder / "labels_te.csv", 2, "1.0", "3.0")
    with pytest.raises(DataError, match=r"labels_te\.csv, line 2: got label 3, expected 0 to 2"):
        load_mogonet(folder, [1, 2])
    _edit(folder / "labels_tr.csv", 7, "0.0", "7.0")
    with pytest.raises(DataError, match=r"labels_tr\.csv, line 7: got label 7, expected 0 to 3"):
        load_mogonet(folder, [1, 2])


@pytest.mark.parametrize("label", ["-1", "0.5"])
def test_labels_that_are_no_class(tmp_path, label):
    path = tmp_path / "labels_tr.csv"
    path.write_text(f"0\n1.0e+00\n{label}\n")
    with pytest.raises(DataError, match=rf"labels_tr\.csv, line 3: got label {label}, expected 0"):
        read_labels(path)


def test_one_class_only(folder):
    (folder / "labels_tr.csv").write_text("0\n" * 12)
    with pytest.raises(DataError, match=r"labels_tr\.csv: one class only"):
        load_mogonet(folder, [1, 2])


def test_repeated_splits_are_stratified_disjoint_and_seeded(folder):
    data = load_mogonet(folder, [1, 2])
    pooled = {tuple(row) for row in data.pooled().modalities[0]}
    splits = list(repeated_splits(data, 4, seed=0))
    assert len(splits) == 4
    for split in splits:
        train = {tuple(row) for row in split.train.modalities[0]}
        test = {tuple(row) for row in split.test.modalities[0]}
        assert len(test) == len(data.test)
        assert train | test == pooled
        assert not train & test
        np.testing.assert_array_equal(np.bincount(split.test.labels), [2, 2, 2])
    # A longer series begins with the shorter one: a run's split is found again by its number.
    again = list(repeated_splits(data, 2, seed=0))
    for one, two in zip(again, splits, strict=False):
        np.testing.assert_array_equal(one.test.modalities[1], two.test.modalities[1])
    different = next(repeated_splits(data, 1, seed=1))
    assert not np.array_equal(different.test.modalities[0], splits[0].test.modalities[0])
    with pytest.raises(ValueError, match="repeats: got 0"):
        next(repeated_splits(data, 0, seed=0))


def test_holdout():
    labels = np.repeat([0, 1], [30, 10])
    kept, held = stratified_holdout(labels, 0.2, seed=0)
    assert sorted([*kept, *held]) == list(range(40))
    np.testing.assert_array_equal(np.bincount(labels[held]), [6, 2])
    with pytest.raises(ValueError, match=r"fraction: got 1\.0"):
        stratified_holdout(labels, 1.0, seed=0)
    with pytest.raises(DataError, match="cannot hold out"):
        stratified_holdout(np.array([0, 0, 0, 1]), 0.25, seed=0)


def test_rosmap(shared):
    data = load_mogonet(shared / "rosmap")
    assert [view.shape for view in data.train.modalities] == [(245, 200)] * 3
    assert [view.shape for view in data.test.modalities] == [(106, 200)] * 3
    assert data.num_classes == 2


def test_brca_without_two_of_its_modalities(shared):
    folder = shared / "mogonet_brca_mirna"
    with pytest.raises(DataError, match=r"1_tr\.csv: no such file, nor 1_te.*2_te\.csv; "):
        load_mogonet(folder)
    data = load_mogonet(folder, [3])
    assert data.train.modalities[0].shape == (612, 503)
    assert data.test.modalities[0].shape == (263, 503)
    assert data.num_classes == 5
