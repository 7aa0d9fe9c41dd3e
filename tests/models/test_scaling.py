"""Input scaling: fitted once, kept in the state, and refused where it was never fitted."""

import pytest
import torch

from deqfusion.models import SCALINGS, InputScaling


def _views():
    first = torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, 4.0], [2.0, 5.0, 9.0]])
    return [first.double(), torch.tensor([[0.0], [2.0], [1.0]])]


def test_kinds_by_hand():
    views = _views()
    low, high = (InputScaling([3, 1], kind).fit(views)(views) for kind in ("minmax", "centered"))
    torch.testing.assert_close(low[0][:, 0], torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(high[0][:, 2], torch.tensor([-3.0, -1.0, 4.0]) / 7)
    # Other rows leave 0..1: nothing is fitted to them.
    other = InputScaling([1]).fit(views[1:])([torch.tensor([[5.0]])])
    assert other[0].item() == 2.5
    standard = InputScaling([3, 1], "standard").fit(views)(views)
    torch.testing.assert_close(standard[1].square().mean(), torch.tensor(1.0))


@pytest.mark.parametrize("kind", SCALINGS)
def test_constant_features_are_zero_and_the_state_has_it_all(kind):
    views = _views()
    scaling = InputScaling([3, 1], kind).fit(views)
    again = InputScaling([3, 1], kind)
    again.load_state_dict(scaling.state_dict())
    for got, expected in zip(again(views), scaling(views), strict=True):
        assert torch.equal(got, expected)
        assert got.dtype == torch.float32
    assert (scaling(views)[0][:, 1] == 0).all()


def test_bad_input():
    with pytest.raises(ValueError, match="kind: got 'log', expected one of minmax"):
        InputScaling([3], "log")
    with pytest.raises(ValueError, match=r"views: got \[1\] features, expected \[3\]"):
        InputScaling([3])([torch.zeros(2, 1)])
    state = InputScaling([3]).state_dict()
    state["span_0"][1] = 0
    with pytest.raises(RuntimeError, match="'span_0' has a number that is not > 0"):
        InputScaling([3]).load_state_dict(state)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize(
    ("fitted", "value", "found"),
    [
        # Large numbers of a wide span are none, small ones of a narrow span are.
        ([-1e20, 0.0, 1e20], 3e20, False),
        ([0.0, 1e-20, 2e-20], 1e-2, True),
        ([0.0, 1.0, 2.0], 1e19, True),
        ([0.0, 1.0, 2.0], float("nan"), True),
        # A span beyond float64.
        ([-1e308, 0.0, 1e308], 0.0, True),
    ],
)
def test_outliers_are_what_scaling_leaves_too_large(kind, fitted, value, found):
    view = torch.tensor(fitted, dtype=torch.float64)[:, None].expand(-1, 2)
    other = view.clone()
    other[1, 1] = value
    scaling = InputScaling([1, 2], kind).fit([torch.ones(3, 1), view])
    got = scaling.outlier([torch.ones(3, 1), other])
    assert (got is not None) == found
    if got is not None and fitted[0] > -1:
        assert (got.view, got.row, got.column) == (1, 1, 1)
        assert f"got {value:g}, which is " in str(got)
    assert scaling.outlier([torch.ones(0, 1), other[:0]]) is None
