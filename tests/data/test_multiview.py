"""MATLAB files of several views."""

import numpy as np
import pytest
from scipy.io import savemat

from deqfusion.data import DataError, load_multiview


def _cells(*views):
    cells = np.empty((1, len(views)), dtype=object)
    for index, view in enumerate(views):
        cells[0, index] = view
    return cells


_FIRST = np.arange(12, dtype=np.uint8).reshape(6, 2)
_SECOND = np.linspace(0.0, 1.0, 18).reshape(6, 3)
_LABELS = np.array([[3], [1], [3], [7], [1], [7]], dtype=np.uint8)


@pytest.mark.parametrize("name", ["Y", "gt"])
def test_views_and_classes(tmp_path, name):
    path = tmp_path / "a.mat"
    savemat(path, {"X": _cells(_FIRST, _SECOND), name: _LABELS})
    rows = load_multiview(path)
    np.testing.assert_array_equal(rows.modalities[0], _FIRST)
    np.testing.assert_array_equal(rows.modalities[1], _SECOND)
    assert rows.modalities[0].dtype == np.float64
    np.testing.assert_array_equal(rows.labels, [1, 0, 1, 2, 0, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"X": _cells(_FIRST)}, "has X, expected X and one of Y, gt"),
        ({"Y": _LABELS}, "has Y, expected X and one of"),
        ({"X": _FIRST, "Y": _LABELS}, "X: got an array of uint8, expected cells"),
        ({"X": _cells(_FIRST, _SECOND.T), "Y": _LABELS}, r"X\{2\}: got shape \(3, 6\), expected"),
        (
            {"X": _cells(_FIRST, np.full((6, 3), np.inf)), "Y": _LABELS},
            r"X\{2\}: got NaN, inf or complex",
        ),
        ({"X": _cells(_FIRST), "Y": np.ones((6, 1))}, "Y: one class only, expected at least two"),
        ({"X": _cells("text"), "Y": _LABELS}, r"X\{1\}: got <U4, expected real numbers"),
    ],
)
def test_faults(tmp_path, content, message):
    path = tmp_path / "a.mat"
    savemat(path, content)
    with pytest.raises(DataError, match=rf"a\.mat: {message}"):
        load_multiview(path)


@pytest.mark.parametrize("keep", [0, 100, 200, -5])
def test_half_a_file(tmp_path, keep):
    path = tmp_path / "a.mat"
    savemat(path, {"X": _cells(_FIRST, _SECOND), "Y": _LABELS}, do_compression=True)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a\.mat: "):
        load_multiview(path)
    with pytest.raises(DataError, match=r"b\.mat: no such file"):
        load_multiview(tmp_path / "b.mat")
