"""Pictures of a result: speed-up, time against a factor, time to a residual, memory, roofline.

Each is drawn from the record alone, and left out where the record has nothing for it. What colour
says, a marker, a line style or a position says too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from . import results
from .report import FACTOR_TITLES, MODE_TITLES

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
GREYS = ("#333333", "#999999")
HATCHES = ("", "///", "...", "xxx")
INCHES = 2.6
"""Of a column of the legend."""

BAR, GROUP = 0.32, 0.85
"""Inches of a bar with its figure, and of a case's name."""

MISSING = {"status": "not measured", "ratio": None, "memory": None}

MOST_BARS = 12
"""Cases in one row of bars; more are drawn as curves only."""

Result = dict[str, Any]


def figures(result: Result) -> dict[str, Figure]:
    """All pictures that a result has something for, by name.

    Args:
        result: of `runner.run`, or read from a file.
    """
    found = {
        "speedup": speedup(result),
        **{factor: against(result, factor) for factor in ("batch", "dim", "num_modalities")},
        "residual": to_residual(result),
        "memory": memory(result),
        "roofline": roofline(result),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


CAPTIONS = {
    "speedup": "Time over that of the reference, median of the rounds' ratios; whiskers: 20th to "
    "80th percentile. Above 1: slower than the reference.",
    "batch": "Time against rows, the other sizes fixed; bars: 20th to 80th percentile.",
    "dim": "Time against width, the other sizes fixed; bars: 20th to 80th percentile.",
    "num_modalities": "Time against modalities, the other sizes fixed; bars: 20th to 80th "
    "percentile.",
    "residual": "Time to a residual: each point is the time of a solve, and the worst relative "
    "residual of its rows and blocks, verified in fp64.",
    "memory": "Memory at the peak of a run, above what was allocated before it. Where ours begins "
    "in bfloat16 it has copies of the weights in that: of few rows most of its memory.",
    "roofline": "Operations per second against operations per byte, both counted from steps and "
    "shape; lines: copy bandwidth and matrix rates measured in the same run.",
}


def speedup(result: Result) -> Figure | None:
    """Time over that of the reference, as bars with spread."""
    return _bars(result, f"time / time of {result['reference']}", _ratio, reference=1.0)


def memory(result: Result) -> Figure | None:
    """Megabytes at the peak, as bars."""
    return _bars(result, "MB at the peak of a run", _megabytes, with_reference=True)


def against(result: Result, factor: str) -> Figure | None:
    """Time against one factor, a panel per mode."""

    def point(case: Result, entry: Result) -> tuple[float, float, tuple[float, float]]:
        seconds = entry["seconds"]
        spread = seconds["median"] - seconds["p20"], seconds["p80"] - seconds["median"]
        x = case["shape"][("batch", "dim", "num_modalities").index(factor)]
        return x, seconds["median"], spread

    cases = [case for case in result["cases"] if factor in case.get("factors", ())]
    return _curves(result, cases, point, FACTOR_TITLES[factor], "seconds")


def to_residual(result: Result) -> Figure | None:
    """Residual against time, of the cases that differ in their target."""

    def point(case: Result, entry: Result) -> tuple[float, float, tuple[float, float]]:
        return entry["seconds"]["median"], entry["verified"]["residual"], (0.0, 0.0)

    targets = [case for case in result["cases"] if "steps" in case.get("factors", ())]
    shapes = [case["shape"] for case in targets]
    modes = {case["mode"] for case in targets}
    # The suite's own target is a case of its shape too.
    cases = [c for c in result["cases"] if c["shape"] in shapes and c["mode"] in modes]
    return _curves(
        result, cases if targets else [], point, "seconds", "worst relative residual", by="target"
    )


def roofline(result: Result) -> Figure | None:
    """Operations per second against operations per byte, under the measured ceilings."""
    points: dict[str, list[tuple[float, float]]] = {}
    for case in result["cases"]:
        for name, entry in case["contenders"].items():
            if work := entry.get("work"):
                x = work["operations"] / work["bytes"]
                points.setdefault(name, []).append((x, work["operations_per_second"] / 1e9))
    if not points or not result.get("peaks"):
        return None
    figure, (axes,) = _panels(1, 1, width=8.0)
    low = min(x for found in points.values() for x, _ in found) / 2
    high = max(x for found in points.values() for x, _ in found) * 2
    # In the legend: beside the lines their names would meet, where rates are close.
    ceilings = [
        (f"{rate} peak, {threads}t: {peaks[rate] / 1e9:.0f} GFLOP/s", peaks["copy"], peaks[rate])
        for threads, peaks in result["peaks"].items()
        for rate in peaks
        if rate != "copy"
    ]
    for index, (label, copy, rate) in enumerate(ceilings):
        ridge = [low, max(low, min(high, rate / copy)), high]
        axes.plot(
            ridge, [min(copy * x, rate) / 1e9 for x in ridge], label=label, linewidth=1,
            color=GREYS[index // len(LINES) % len(GREYS)], linestyle=LINES[index % len(LINES)],
        )  # fmt: skip
    for name, index in _places(result).items():
        if found := points.get(name):
            x, y = zip(*found, strict=True)
            axes.plot(x, y, linestyle="", label=name, alpha=0.8, **_point(index))
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    return _finish(figure, axes.get_legend_handles_labels()[0], result)


def _ratio(entry: Result) -> tuple[float, float, float] | None:
    ratio = entry["ratio"]
    return None if ratio is None else (ratio["median"], ratio["p20"], ratio["p80"])


def _megabytes(entry: Result) -> tuple[float, float, float] | None:
    if not entry.get("memory"):
        return None
    value = entry["memory"]["bytes"] / 1e6
    return value, value, value


def _bars(
    result: Result, label: str, value: Callable[[Result], tuple[float, float, float] | None],
    reference: float | None = None, with_reference: bool = False,
) -> Figure | None:  # fmt: skip
    """Groups of bars by case: a row of panels per thread count, a column per mode."""
    cases = [case for case in result["cases"] if "steps" not in case.get("factors", ())]
    places = _places(result)
    if not with_reference:
        places.pop(result["reference"], None)
    if not any(value(entry) for case in cases for entry in case["contenders"].values()):
        return None
    modes = list(dict.fromkeys(case["mode"] for case in cases))
    counts = sorted({case["threads"] for case in cases})
    groups = {
        key: [case for case in cases if (case["threads"], case["mode"]) == key]
        for key in ((threads, mode) for threads in counts for mode in modes)
    }
    longest = max(map(len, groups.values()))
    if longest > MOST_BARS:
        return None
    width = max(5.5, BAR * longest * len(places), GROUP * longest)
    figure, panels = _panels(len(counts), len(modes), width=width)
    for axes, ((threads, mode), found) in zip(panels, groups.items(), strict=True):
        width = 0.8 / max(len(places), 1)
        for place, case in enumerate(found):
            entries = [case["contenders"].get(name, MISSING) for name in places]
            if (
                len(entries) > 1
                and len({e["status"] for e in entries}) == 1
                and not any(map(value, entries))
            ):
                # Once for all of them.
                _bar(axes, place, width, None, entries[0], {})
                continue
            for order, (entry, index) in enumerate(zip(entries, places.values(), strict=True)):
                at = place + (order - (len(places) - 1) / 2) * width
                _bar(axes, at, width, value(entry), entry, _fill(index))
        axes.set_xlim(-0.6, len(found) - 0.4)
        if reference is not None:
            axes.axhline(reference, color="black", linewidth=0.8)
        axes.set_xticks(range(len(found)), [_tick(case) for case in found], fontsize="small")
        axes.set_title(f"{MODE_TITLES.get(mode, mode)}, {threads}t", fontsize="medium")
        axes.set_ylabel(label)
    handles = [Patch(label=name, **_fill(index)) for name, index in places.items()]
    return _finish(figure, handles, result)


def _bar(
    axes: Axes, at: float, width: float, value: tuple[float, float, float] | None, entry: Result,
    style: dict[str, Any],
) -> None:  # fmt: skip
    """One bar with its figure, or the word that says why there is none."""
    if value is None:
        mark = entry["status"] if entry["status"] != "ok" else "not measured"
        axes.text(at, 0, f" {mark}", rotation=90, ha="center", va="bottom", fontsize="xx-small")
        return
    middle, low, high = value
    spread = [[middle - low], [high - middle]] if high > low else None
    axes.bar(at, middle, width, yerr=spread, error_kw={"elinewidth": 1, "capsize": 2}, **style)
    axes.text(at, high, f"{middle:.3g}", ha="center", va="bottom", fontsize="xx-small")


def _curves(
    result: Result, cases: Sequence[Result],
    point: Callable[[Result, Result], tuple[float, float, tuple[float, float]]],
    xlabel: str, ylabel: str, by: str = "",
) -> Figure | None:  # fmt: skip
    """A line per contender through its points in order, a panel per thread count and mode."""
    keys = list(dict.fromkeys((case["threads"], case["mode"]) for case in cases))
    places = {n: i for n, i in _places(result).items() if any(n in c["contenders"] for c in cases)}
    most = 0
    if not keys:
        return None
    figure, panels = _panels(1, len(keys))
    for axes, key in zip(panels, keys, strict=True):
        found = [case for case in cases if (case["threads"], case["mode"]) == key]
        if by:
            found.sort(key=lambda case: case.get(by) or 0.0)
        for name, index in places.items():
            timed = [
                (case, case["contenders"][name])
                for case in found
                if case["contenders"].get(name, {}).get("seconds") is not None
            ]
            points = [point(case, entry) for case, entry in timed]
            if not by:
                points.sort()
            if not points:
                axes.plot([], [], label=f"{name} (not measured)", color=COLOURS[index % 7])
                continue
            known = {case[by] for case, _ in timed} if by else {x for x, *_ in points}
            most = max(most, len(known))
            x, y, spread = zip(*points, strict=True)
            errors = list(zip(*spread, strict=True)) if any(map(any, spread)) else None
            axes.errorbar(x, y, errors, label=name, capsize=2, linestyle=LINES[index % 4],
                          **_point(index))  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
        axes.set_title(f"{MODE_TITLES.get(key[1], key[1])}, {key[0]}t", fontsize="medium")
        axes.grid(color="#DDDDDD")
        _plain(axes.yaxis)
        if by:
            _plain(axes.xaxis)
        else:
            at = sorted({point(c, e)[0] for c in found for e in _timed(c)})
            axes.set_xticks(at, [f"{x:g}" for x in at])
            axes.minorticks_off()
    # One size, or one target, is no curve.
    if most < 2:
        return None
    return _finish(figure, panels[0].get_legend_handles_labels()[0], result)


def _places(result: Result) -> dict[str, int]:
    """Contenders that ran in some case, and what gives each the same colour in every picture."""
    names = dict.fromkeys(name for case in result["cases"] for name in case["contenders"])
    ran = {
        name
        for case in result["cases"]
        for name, entry in case["contenders"].items()
        if entry["status"] != "unavailable"
    }
    return {name: index for index, name in enumerate(n for n in names if n in ran)}


def _timed(case: Result) -> list[Result]:
    return [entry for entry in case["contenders"].values() if entry["seconds"] is not None]


def _plain(axis: Axis) -> None:
    """Figures as one writes them at a logarithmic axis, as many as its range asks for."""
    low, high = axis.get_view_interval()
    digits = (
        (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 10 * low else (1, 2, 5) if high < 1e3 * low else (1,)
    )
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _point(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _fill(index: int) -> dict[str, Any]:
    hatch = HATCHES[index // len(COLOURS) % len(HATCHES)]
    return {"facecolor": COLOURS[index % len(COLOURS)], "hatch": hatch, "edgecolor": "white"}


def _tick(case: Result) -> str:
    batch, dim, num_modalities = case["shape"]
    return f"B={batch}\nd={dim} N={num_modalities}"


def _panels(rows: int, columns: int, width: float = 5.5) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, 1.0 + 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    return figure, panels


def _finish(figure: Figure, handles: Sequence[Any], result: Result) -> Figure:
    """Adds the legend and the line that says where the figures come from."""
    columns = max(1, min(4, int(figure.get_figwidth() / INCHES)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False,
                  fontsize="small")  # fmt: skip
    figure.suptitle(results.describe(result), fontsize="small")
    return figure
