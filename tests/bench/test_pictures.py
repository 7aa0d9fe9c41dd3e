"""Pictures and page: drawn from the record alone, and what is not measured is said."""

import copy
import re

import matplotlib as mpl
import pytest

from deqfusion.bench import page, pictures, results
from deqfusion.cli import main
from tests.bench.test_results import COMMITTED, ENTRY, RESULT

NONE = {"status": "failed", "reason": "<missed>", "seconds": None, "ratio": None, "verified": None}


def entry(seconds, ratio=None, residual=1e-4):
    def summary(value):
        return {"p20": 0.9 * value, "median": value, "p80": 1.2 * value, "samples": [value] * 3}

    rate = {"operations_per_second": 1e9 / seconds, "bytes_per_second": 1e8 / seconds}
    return {
        **ENTRY,
        "verified": {"residual": residual, "steps": {"joint": 9}},
        "seconds": summary(seconds),
        "ratio": None if ratio is None else summary(ratio),
        "memory": {"bytes": 5_000_000, "how": "counted"},
        "work": {"operations": 1e9, "bytes": 1e8, "rate": "fp32", **rate},
    }


def full():
    """A result that has something for every picture."""
    cases = []
    every = ["batch", "dim", "num_modalities"]
    for shape, factors in (
        ([8, 64, 2], every[:1]), ([16, 64, 2], every), ([16, 128, 2], ["dim"]),
        ([16, 64, 3], ["num_modalities"]),
    ):  # fmt: skip
        for mode in ("forward", "forward_backward"):
            found = {"textbook": entry(2e-3, 2.0), "torchdeq": NONE, "ours": entry(1e-3)}
            cases.append({"shape": shape, "label": "", "factors": factors, "target": 1e-3,
                          "threads": 1, "mode": mode, "contenders": found})  # fmt: skip
    for target in (1e-1, 1e-2):
        found = {"textbook": entry(1e-4 / target, 2.0, target), "ours": entry(1e-3, None, target)}
        cases.append({"shape": [16, 64, 2], "label": "", "factors": ["steps"], "target": target,
                      "threads": 1, "mode": "forward", "contenders": found})  # fmt: skip
    peaks = {"1": {"copy": 1e10, "fp32": 1e11, "bf16": 2e11}}
    return {**RESULT, "peaks": peaks, "cases": cases, "fits": []}


def test_every_picture():
    before = dict(mpl.rcParams)
    found = pictures.figures(full())
    assert set(found) == set(pictures.CAPTIONS) == set(page.TITLES)
    assert dict(mpl.rcParams) == before


def test_ceilings_of_the_roofline_are_named_in_the_legend():
    """Where rates are close their names would meet beside the lines."""
    result = full()
    result["peaks"]["2"] = {"copy": 1.1e10, "fp32": 1.1e11, "bf16": 2.1e11}
    figure = pictures.roofline(result)
    assert not figure.axes[0].texts
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert "fp32 peak, 1t: 100 GFLOP/s" in named
    assert "bf16 peak, 2t: 210 GFLOP/s" in named
    styles = {
        (line.get_color(), line.get_linestyle())
        for line in figure.axes[0].lines
        if "peak" in str(line.get_label())
    }
    assert len(styles) == 4
    # All of it is on the picture.
    figure.canvas.draw()
    assert figure.bbox.containsx(legend.get_window_extent().x0)
    assert figure.bbox.containsx(legend.get_window_extent().x1)


def test_speedup_bars_have_the_ratio_the_spread_and_the_failure():
    axes = pictures.speedup(full()).axes[0]
    written = [text.get_text().strip() for text in axes.texts]
    assert written.count("2") == 4
    assert written.count("failed") == 4
    bars = [patch for patch in axes.patches if patch.get_height()]
    assert [bar.get_height() for bar in bars] == [2.0] * 4


def test_a_case_without_a_bar_says_so_once_and_on_the_picture():
    result = full()
    skipped = {**NONE, "status": "skipped"}
    result["cases"][6]["contenders"] = dict.fromkeys(("textbook", "torchdeq", "ours"), skipped)
    figure = pictures.speedup(result)
    figure.canvas.draw()
    (text,) = [t for t in figure.axes[0].texts if t.get_text().strip() == "skipped"]
    low, high = figure.axes[0].get_xlim()
    assert text.get_position()[0] == 3 < high
    assert low < 0


def test_a_contender_has_one_colour_in_every_picture():
    """Whoever is left out, as the reference is where ratios are drawn."""
    result = full()
    for case in result["cases"]:
        case["contenders"] = {
            "ours": case["contenders"]["ours"], "textbook": case["contenders"]["textbook"],
        }  # fmt: skip
    colours = set()
    for figure in (pictures.speedup(result), pictures.memory(result)):
        (legend,) = figure.legends
        colours |= {
            patch.get_facecolor()
            for patch, text in zip(legend.get_patches(), legend.get_texts(), strict=True)
            if text.get_text() == "textbook"
        }
    points = next(
        line for line in pictures.roofline(result).axes[0].lines if line.get_label() == "textbook"
    )
    assert colours == {mpl.colors.to_rgba(points.get_color())}
    line = pictures.against(result, "batch").axes[0].containers[1].lines[0]
    assert line.get_color() == points.get_color()


def test_axes_are_in_figures_as_one_writes_them():
    figure = pictures.against(full(), "batch")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16"]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert "0.001" in shown
    assert not any("times" in text for text in shown)
    assert not any(label.get_text() for label in axes.get_yticklabels(minor=True))


def test_one_size_or_target_is_no_curve():
    result = full()
    result["cases"] = result["cases"][2:4]
    assert pictures.against(result, "batch") is None
    result["cases"] += [{**result["cases"][0], "factors": ["steps"]}]
    assert pictures.to_residual(result) is None


def test_curves_go_through_the_points_in_order():
    axes = pictures.against(full(), "batch").axes[0]
    lines = {container.get_label(): container.lines[0] for container in axes.containers}
    assert list(lines["textbook"].get_xdata()) == [8, 16]
    assert list(lines["ours"].get_ydata()) == [1e-3, 1e-3]
    labels = [line.get_label() for line in axes.lines]
    assert "torchdeq (not measured)" in labels


def test_time_to_a_residual_includes_the_suite_s_own_target():
    axes = pictures.to_residual(full()).axes[0]
    line = next(c.lines[0] for c in axes.containers if c.get_label() == "textbook")
    assert list(line.get_ydata()) == [1e-4, 1e-2, 1e-1]


def test_roofline_shows_what_was_measured():
    axes = pictures.roofline(full()).axes[0]
    points = [line for line in axes.lines if line.get_label() in ("textbook", "ours")]
    assert [len(line.get_xdata()) for line in points] == [10, 10]
    without = full()
    del without["peaks"]
    assert pictures.roofline(without) is None


@pytest.mark.parametrize("path", COMMITTED[:1], ids=lambda path: path.name)
def test_plot_of_a_committed_file(path, tmp_path, capsys):
    assert main(["plot", str(path), "--out", str(tmp_path / "new")]) == 0
    drawn = [f"cpu-{name}.png" for name in ("memory", "roofline", "speedup")]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [*drawn, "index.html"]
    assert "best of the others" in capsys.readouterr().out


def test_page_is_self_contained_and_escaped(tmp_path):
    result = full()
    result["environment"] = {**RESULT["environment"], "cpu": "<b>CPU</b>"}
    written = page.write(result, tmp_path)
    assert written[-1] == tmp_path / "index.html"
    assert len(written) == 1 + len(pictures.CAPTIONS)
    text = written[-1].read_text()
    assert text.count("data:image/png;base64,") == len(pictures.CAPTIONS)
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<b>CPU" not in text
    assert "torchdeq: failed: &lt;missed&gt;" in text


def test_a_name_chooses_no_folder(tmp_path):
    result = full()
    result["suite"] = {**RESULT["suite"], "name": "../../elsewhere/name"}
    out = tmp_path / "out"
    out.mkdir()
    assert all(path.parent == out for path in page.write(result, out))
    assert list(tmp_path.iterdir()) == [out]


def test_plot_beside_its_file_and_where_it_cannot_write(tmp_path, capsys):
    path = tmp_path / "r.json"
    results.write_json(full(), path)
    assert main(["plot", str(path)]) == 0
    assert (tmp_path / "index.html").exists()
    before = path.read_text()
    capsys.readouterr()
    assert main(["plot", str(path), "--out", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert path.read_text() == before


def test_nothing_measured_draws_nothing():
    result = copy.deepcopy(full())
    for case in result["cases"]:
        case["contenders"] = {"textbook": NONE, "ours": NONE}
    assert pictures.figures(result) == {}
