"""Figures: what is drawn, that input is checked, and that no global state changes."""

import base64
import sys

import matplotlib as mpl
import numpy as np
import pytest

from deqfusion import plots

_PNG = b"\x89PNG\r\n\x1a\n"


def test_no_global_state_changes():
    before = dict(mpl.rcParams)
    plots.to_base64(plots.accuracy_bars({"a": [0.5, 0.6]}, highlight="a"))
    assert dict(mpl.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_accuracy_bars_show_means_spread_and_every_run():
    values = {"a": [0.5, 0.7], "b": [0.8, 0.9], "c": [0.4]}
    axes = plots.accuracy_bars(values, highlight="b").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert {text.get_text() for text in axes.texts} == {"0.600", "0.850", "0.400"}
    low, high = axes.get_ylim()
    assert low < 0.4
    assert high > 0.9
    drawn = np.concatenate([line.get_ydata() for line in axes.lines])
    for runs in values.values():
        assert np.isin(runs, drawn).all()


def test_traces_carry_the_last_residual_of_a_stopped_row():
    trace = np.array([[1.0, 0.1, np.nan, np.nan], [1.0, 0.1, 0.01, 0.001], [1.0, 0.1, 0.1, 0.1]])
    figure = plots.convergence_traces({"solver": trace}, tol=1e-3)
    median = next(line for line in figure.axes[0].lines if line.get_label() == "solver")
    np.testing.assert_allclose(median.get_ydata(), [1.0, 0.1, 0.1, 0.1])
    assert figure.axes[0].get_yscale() == "log"


def test_modality_weights_hatch_the_noisy_modality():
    table = np.array([[0.2, 0.8], [0.7, 0.3]])
    figure = plots.modality_weight_bars({"before": table, "after": table}, ["x", "y"])
    assert [axes.get_title() for axes in figure.axes] == ["before", "after"]
    bars = figure.axes[1].containers
    for column, container in enumerate(bars):
        # Percent above or below the equal share of 1/2.
        heights = [bar.get_height() for bar in container]
        np.testing.assert_allclose(heights, 200 * table[:, column] - 100)
        hatched = [bool(bar.get_hatch()) for bar in container]
        assert hatched == [row == column for row in range(2)]


def test_timing_bars_are_in_milliseconds():
    seconds = {"forward": {"ours": (0.001, 0.002, 0.004), "other": (0.01, 0.011, 0.012)}}
    axes = plots.timing_bars(seconds, highlight="ours").axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert sorted(widths) == pytest.approx([2.0, 11.0])


@pytest.mark.parametrize(("steps", "panels"), [([5.0, 4.0], 3), ([np.nan, np.nan], 2)])
def test_training_curves_leave_out_steps_where_there_is_no_solve(steps, panels):
    history = {
        "epoch": [1, 2],
        "train_loss": [1.0, 0.5],
        "validation_loss": [1.1, 0.7],
        "validation_accuracy": [0.5, 0.6],
        "steps": steps,
    }
    figure = plots.training_curves(history, best_epoch=2)
    assert len(figure.axes) == panels


def test_files_are_png(tmp_path):
    figure = plots.timing_bars({"forward": {"ours": (0.1, 0.2, 0.3)}}, highlight="ours")
    plots.save_png(figure, tmp_path / "figure.anything", dpi=40)
    assert (tmp_path / "figure.anything").read_bytes().startswith(_PNG)
    assert base64.b64decode(plots.to_base64(figure, dpi=40)).startswith(_PNG)


def test_bad_input():
    with pytest.raises(ValueError, match="accuracies: got"):
        plots.accuracy_bars({"a": []}, highlight="a")
    with pytest.raises(ValueError, match=r"traces\['t'\]: got shape \(3,\)"):
        plots.convergence_traces({"t": np.ones(3)})
    with pytest.raises(ValueError, match=r"panels\['p'\]: got shape \(2, 2\)"):
        plots.modality_weight_bars({"p": np.ones((2, 2))}, ["x", "y", "z"])
    with pytest.raises(ValueError, match="seconds: got an empty group"):
        plots.timing_bars({"forward": {}}, highlight="ours")


def test_score_panels_show_means_errors_and_every_value():
    panels = {"one": {"a": [0.2, 0.4, 0.6], "b": [0.5]}, "two": {"a": [1.0, 1.2], "b": [0.9, 0.8]}}
    figure = plots.score_panels(panels, highlight="a", zero=True)
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    drawn = np.concatenate([np.asarray(line.get_xdata(), dtype=float) for line in axes.lines])
    # Values, the mean 0.4 and its standard error to either side, and 0.
    error = 0.2 / np.sqrt(3)
    shown = [0.2, 0.4, 0.6, 0.5, 0.4 - error, 0.4 + error, 0.0]
    assert np.isclose(drawn[:, None], shown).any(axis=0).all()
    with pytest.raises(ValueError, match="expected a value for every name"):
        plots.score_panels({"one": {"a": []}}, highlight="a")


def test_band_panels_share_colours_and_one_legend():
    x = np.arange(3.0)
    line = (x, x + 1, x, x + 2)
    figure = plots.band_panels(
        {"one": {"a": line, "b": line}, "two": {"b": line}},
        **{"xlabel": "x", "ylabel": "y", "log": True, "marks": {"two": 0.5}},
    )
    one, two = figure.axes
    assert one.get_yscale() == "log"
    assert one.lines[1].get_color() == two.lines[0].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    np.testing.assert_array_equal(two.lines[1].get_ydata(), [0.5, 0.5])
    assert len(one.lines) == 4  # two lines, and the legend's empty ones
    with pytest.raises(ValueError, match="expected lines in each"):
        plots.band_panels({"one": {}}, xlabel="x", ylabel="y")
