"""MM-IMDB's file: rows on demand, its split by position, and what each fault says."""

import multiprocessing
import pickle
import sys

import numpy as np
import pytest

from deqfusion.data.errors import DataError
from deqfusion.data.mmimdb import MMIMDB_SPLIT, MMIMDBFile, mmimdb_split
from tests.data.small_mmimdb import SPLIT, WIDTHS, arrays, write_mmimdb

pytest.importorskip("h5py", reason="h5py is not installed (the extra hdf5)")


def test_rows_in_any_order_and_repeated(tmp_path):
    write_mmimdb(tmp_path)
    file = MMIMDBFile(tmp_path)
    assert (len(file), file.widths) == (sum(SPLIT), WIDTHS)
    rows = np.array([7, 3, 60, 3])
    got = file.rows(rows)
    for values, key in zip(got, ("features", "vgg_features", "genres"), strict=True):
        np.testing.assert_array_equal(values, arrays()[key][rows])
        assert values.dtype == np.float32


def test_the_file_itself_may_be_named(tmp_path):
    assert len(MMIMDBFile(write_mmimdb(tmp_path))) == sum(SPLIT)


def test_split_is_by_position(tmp_path):
    write_mmimdb(tmp_path)
    train, validation, test = mmimdb_split(MMIMDBFile(tmp_path), SPLIT)
    assert [len(part) for part in (train, validation, test)] == SPLIT
    np.testing.assert_array_equal(np.concatenate([train, validation, test]), np.arange(sum(SPLIT)))


def test_published_split():
    assert (MMIMDB_SPLIT, sum(MMIMDB_SPLIT)) == ((15552, 2608, 7799), 25959)


@pytest.mark.parametrize("sizes", [[40, 0, 28], [40, 28], [68, 0, 0]])
def test_empty_split(tmp_path, sizes):
    path = write_mmimdb(tmp_path)
    with pytest.raises(
        DataError, match=rf"{path}: got a split into .*, expected three parts, none"
    ):
        mmimdb_split(MMIMDBFile(tmp_path), sizes)


def test_split_of_another_file(tmp_path):
    write_mmimdb(tmp_path)
    with pytest.raises(DataError, match=r"\.hdf5: has 68 rows, expected 25959: 15552 to train on"):
        mmimdb_split(MMIMDBFile(tmp_path))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"multimodal_imdb\.hdf5: no such file, expected MM-IMDB's"):
        MMIMDBFile(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_half_downloaded_file(tmp_path, share):
    path = write_mmimdb(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=r"\.hdf5: is no complete HDF5 file .*half-downloaded\?"):
        MMIMDBFile(tmp_path)


@pytest.mark.parametrize("key", ["features", "vgg_features", "genres"])
def test_wrong_key(tmp_path, key):
    content = arrays()
    content["other"] = content.pop(key)
    write_mmimdb(tmp_path, content)
    message = rf"no key '{key}', expected features, vgg_features, genres; it has .*other"
    with pytest.raises(DataError, match=message):
        MMIMDBFile(tmp_path)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("vgg_features", np.zeros((67, 4)), r"key 'vgg_features' has 67 rows, expected 68 as key"),
        ("genres", np.zeros((70, 4)), r"key 'genres' has 70 rows, expected 68 as key 'features'"),
        ("features", np.zeros(68), r"key 'features' is float64 \(68,\), expected numbers \(rows"),
        ("genres", np.zeros((68, 0)), r"key 'genres' is float64 \(68, 0\), expected numbers"),
        ("features", np.array([[b"a"]] * 68), r"key 'features' is \|S1 \(68, 1\), expected numb"),
    ],
)
def test_wrong_shape(tmp_path, key, values, message):
    write_mmimdb(tmp_path, {**arrays(), key: values})
    with pytest.raises(DataError, match=message):
        MMIMDBFile(tmp_path)


def test_group_in_place_of_an_array(tmp_path):
    import h5py

    content = arrays()
    del content["genres"]
    with h5py.File(write_mmimdb(tmp_path, content), "a") as file:
        file.create_group("genres")
    with pytest.raises(DataError, match=r"key 'genres' is a group, expected numbers"):
        MMIMDBFile(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("features", np.nan, r"key 'features', row 50, column 2: got nan, expected a finite"),
        ("vgg_features", np.inf, r"key 'vgg_features', row 50, column 2: got inf, expected a fin"),
        ("vgg_features", 1e39, r"key 'vgg_features', row 50, column 2: got 1e\+39, expected"),
        ("genres", 2, r"key 'genres', row 50, column 2: got 2.*, expected 0 or 1"),
    ],
)
def test_bad_value(tmp_path, monkeypatch, key, value, message):
    # Several chunks, so that the row is counted from the first.
    monkeypatch.setattr("deqfusion.data.mmimdb._CHUNK", 16)
    content = arrays(widths=(5, 6, 4))
    content[key] = content[key].astype(np.float64)
    content[key][50, 2] = value
    write_mmimdb(tmp_path, content)
    with pytest.raises(DataError, match=message):
        MMIMDBFile(tmp_path).check()


def test_digest_is_of_what_is_read(tmp_path):
    content = arrays(widths=(5, 6, 4))
    write_mmimdb(tmp_path, content)
    digest = MMIMDBFile(tmp_path).check()
    assert len(digest) == 64
    write_mmimdb(tmp_path, {**content, "images": np.zeros((68, 2, 2))})
    assert MMIMDBFile(tmp_path).check() == digest
    content["vgg_features"][67, 5] += 1
    write_mmimdb(tmp_path, content)
    assert MMIMDBFile(tmp_path).check() != digest


def test_part_that_cannot_be_read(tmp_path):
    import h5py

    path = tmp_path / "multimodal_imdb.hdf5"
    content = arrays(widths=(50, 60, 4))
    with h5py.File(path, "w") as file:
        for key, values in content.items():
            file.create_dataset(key, data=values, chunks=(8, values.shape[1]), compression="gzip")
        where = file["vgg_features"].id.get_chunk_info(3)
    damaged = bytearray(path.read_bytes())
    damaged[where.byte_offset : where.byte_offset + 8] = b"\xff" * 8
    path.write_bytes(damaged)
    file = MMIMDBFile(tmp_path)
    file.rows(np.array([0]))
    for read in (file.check, lambda: file.rows(np.array([30]))):
        with pytest.raises(DataError, match=r"key 'vgg_features' cannot be read \("):
            read()


def _read_in_a_child(file, results):
    before = file._file
    total = float(file.rows(np.array([5]))[0].sum())
    # On Linux the parent's handle happens to work; HDF5 does not promise it.
    results.put((total, file._file is not before))


def test_usable_after_pickling_and_in_a_forked_process(tmp_path):
    write_mmimdb(tmp_path)
    file = MMIMDBFile(tmp_path)
    expected = float(file.rows(np.array([5]))[0].sum())
    assert float(pickle.loads(pickle.dumps(file)).rows(np.array([5]))[0].sum()) == expected
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_read_in_a_child, args=(file, results))
    process.start()
    assert results.get(timeout=60) == (expected, True)
    process.join()


def test_without_h5py(tmp_path, monkeypatch):
    write_mmimdb(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"pip install deqfusion\[hdf5\]"):
        MMIMDBFile(tmp_path)
