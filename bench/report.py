"""What a run leaves: table, JSON and picture."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from . import contenders, runner, suites

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#999999")
MODE_TITLES = {"forward": "forward", "forward_backward": "forward + backward"}


class Progress:
    """One line that says what is happening, where the stream is a terminal; else silent."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.active = stream.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._write("")

    def show(self, message: str) -> None:
        """Replaces the line."""
        self._write(message)

    def _write(self, message: str) -> None:
        if self.active:
            self.stream.write(f"\r\x1b[K{message}")
            self.stream.flush()


def listing() -> str:
    """Suites and contenders, with why a contender cannot run here."""
    lines = ["suites"]
    for suite in suites.SUITES.values():
        shapes = " ".join(str(shape) for shape in suite.shapes)
        lines.append(f"  {suite.name}: {shapes}; {', '.join(suite.contenders)}")
    lines.append("contenders")
    for name, kind in contenders.contenders().items():
        reason = kind.unavailable()
        lines.append(f"  {name}: {kind.summary}" + (f" [not here: {reason}]" if reason else ""))
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """The result as aligned text.

    Args:
        result: of `runner.run`.

    Returns:
        One line per case and contender; a contender that failed has its reason and no time.
    """
    env = result["environment"]
    lines = [
        f"{env['cpu']}, {env['cores']} cores, torch {env['versions']['torch']}, {env['date']}",
        f"every row and block at a relative residual of at most {result['suite']['target']:.0e}, "
        f"verified in fp64; loss {result['suite']['loss']}; {result['suite']['rounds']} rounds; "
        f"ratio: time over that of {result['reference']}, median and 20th to 80th percentile",
    ]
    head = ("contender", "ms", "p20..p80", "ratio", "p20..p80", "residual", "adjoint", "steps")
    for case in result["cases"]:
        rows = [head, *(_row(name, entry) for name, entry in case["contenders"].items())]
        widths = [max(len(row[i]) for row in rows if len(row) > 2) for i in range(len(head))]
        batch, dim, num_modalities = case["shape"]
        lines += [
            "",
            f"B={batch} d={dim} N={num_modalities}, {case['threads']} thread"
            f"{'s' if case['threads'] > 1 else ''}, {MODE_TITLES[case['mode']]}",
        ]
        for row in rows:
            if len(row) > 2:
                cells = [row[0].ljust(widths[0])]
                cells += [cell.rjust(w) for cell, w in zip(row[1:-1], widths[1:-1], strict=True)]
                lines.append("  " + "  ".join([*cells, row[-1]]))
            else:
                lines.append(f"  {row[0].ljust(widths[0])}  {row[1]}")
        best = runner.best_baseline(case)
        if best is not None and case["contenders"][best]["ratio"] is not None:
            ratio = case["contenders"][best]["ratio"]
            lines.append(
                f"  best of the others: {best}, {ratio['median']:.2f} times the time of "
                f"{result['reference']} ({_spread(ratio, 1, 2)})"
            )
    return "\n".join(lines)


def _row(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    if entry["seconds"] is None:
        return name, f"{entry['status'].upper()}: {entry['reason']}"
    seconds, ratio, verified = entry["seconds"], entry["ratio"], entry["verified"]
    adjoint = verified.get("adjoint_residual")
    return (
        name,
        f"{seconds['median'] * 1e3:.1f}",
        _spread(seconds, 1e3, 1),
        "" if ratio is None else f"{ratio['median']:.2f}",
        "" if ratio is None else _spread(ratio, 1, 2),
        f"{verified['residual']:.1e}",
        "" if adjoint is None else f"{adjoint:.1e}",
        " ".join(f"{block} {count}" for block, count in verified["steps"].items()),
    )


def _spread(summary: dict[str, float], factor: float, digits: int) -> str:
    return f"{summary['p20'] * factor:.{digits}f}..{summary['p80'] * factor:.{digits}f}"


def write_json(result: dict[str, Any], path: Path) -> None:
    """Writes the result so that the file is either the old or the new one, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(result, stream, indent=1)
            stream.write("\n")
        # mkstemp's files are private; a report is for everyone who may read the folder.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def picture(result: dict[str, Any], path: Path) -> None:
    """Bars of how many times the reference's time the others take, with spread, as PNG.

    Args:
        result: of `runner.run`.
        path: of the file; replaced if it exists.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [mode for mode in suites.MODES if any(c["mode"] == mode for c in result["cases"])]
    rows = sorted({case["threads"] for case in result["cases"]})
    names = [n for n in result["suite"]["contenders"] if n != result["reference"]]
    figure = Figure(figsize=(6.4 * len(columns), 0.6 + 3.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharey="row")
    for i, thread_count in enumerate(rows):
        for j, mode in enumerate(columns):
            cases = [
                case
                for case in result["cases"]
                if case["threads"] == thread_count and case["mode"] == mode
            ]
            _bars(grid[i][j], cases, names)
            plural = "s" if thread_count > 1 else ""
            grid[i][j].set_title(f"{MODE_TITLES[mode]}, {thread_count} thread{plural}")
        grid[i][0].set_ylabel(f"time / time of {result['reference']}")
    figure.legend(
        *grid[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    env = result["environment"]
    figure.suptitle(
        f"{env['cpu']}, torch {env['versions']['torch']}, relative residual "
        f"{result['suite']['target']:.0e} on every row",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)


def _bars(axes: Any, cases: list[dict[str, Any]], names: list[str]) -> None:
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        offset = (index - (len(names) - 1) / 2) * width
        colour = COLOURS[index % len(COLOURS)]
        axes.bar([], [], color=colour, label=name)
        for position, case in enumerate(cases):
            entry = case["contenders"][name]
            ratio = entry["ratio"]
            if ratio is None:
                mark = entry["status"] if entry["status"] != "ok" else "no reference"
                axes.text(
                    position + offset, 0.05, mark, rotation=90, ha="center", fontsize="x-small"
                )
                continue
            median = ratio["median"]
            axes.bar(
                position + offset,
                median,
                width,
                color=colour,
                yerr=[[median - ratio["p20"]], [ratio["p80"] - median]],
                error_kw={"elinewidth": 1, "capsize": 2},
            )
            axes.text(
                position + offset,
                ratio["p80"],
                f"{median:.1f}",
                ha="center",
                va="bottom",
                fontsize="x-small",
            )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(
        range(len(cases)),
        [f"B={c['shape'][0]}\nd={c['shape'][1]} N={c['shape'][2]}" for c in cases],
    )
    axes.spines[["top", "right"]].set_visible(False)
