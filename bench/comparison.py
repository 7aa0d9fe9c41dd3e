"""The README's table, drawn from committed results.

    python -m deqfusion.bench.comparison bench/results/cpu-*.json [--write README.md]

Every figure is that of a file; with `--write` the text between the comparison markers is replaced.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import NOT_MEASURED
from .results import read_json, write_text
from .runner import REFERENCE
from .suites import MODES

BEGIN, END = "<!-- comparison:begin -->\n", "<!-- comparison:end -->\n"
OTHERS = {"textbook": "eager", "textbook_compiled": "compiled", "torchdeq": "torchdeq"}


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """One line per shape.

    Args:
        results: contents of result files of one machine, as `deqfusion bench` writes them.

    Returns:
        A sentence on what was measured, and the table.

    Raises:
        ValueError: results of different machines, or without our time.
    """

    def cells_of(found: dict[tuple[int, str], list[str]], count: int, mode: str) -> list[str]:
        return found.get((count, mode), [NOT_MEASURED] * (1 + len(OTHERS)))

    cells: dict[tuple[Any, ...], dict[tuple[int, str], list[str]]] = {}
    machines, counts = set(), set()
    for result in results:
        machine = result["environment"]
        machines.add((machine["cpu"], machine["versions"]["torch"]))
        for case in result["cases"]:
            counts.add(case["threads"])
            found = cells.setdefault(tuple(case["shape"]), {})
            found[case["threads"], case["mode"]] = _cells(case["contenders"])
    if len(machines) != 1:
        raise ValueError(f"results of different machines: {sorted(machines)}")
    ((cpu, version),) = machines
    others = " | ".join(OTHERS.values())
    lines = [
        f"Time of the others over ours, {' / '.join(map(str, sorted(counts)))} threads "
        f"({cpu}, torch {version}, fp32; ours",
        "with bf16 products far from the tolerance at width 256 and more: `ladder`), verified to a",
        "relative residual of 1e-3, medians of interleaved runs; *compiled* by `torch.compile`.",
        "",
        f"| rows, width, modalities | forward: ours | {others} | and backward: ours | {others} |",
        "|" + "---|" * (3 + 2 * len(OTHERS)),
    ]
    for shape, found in sorted(cells.items()):
        columns = [
            " / ".join(column)
            for mode in MODES
            for column in zip(*(cells_of(found, n, mode) for n in sorted(counts)), strict=True)
        ]
        lines.append(f"| {', '.join(map(str, shape))} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def _cells(contenders: dict[str, Any]) -> list[str]:
    """Milliseconds of ours, and the ratio of each of the others."""
    ours = contenders.get(REFERENCE, {"status": NOT_MEASURED})
    if ours["status"] != "ok":
        raise ValueError(f"{REFERENCE}: {ours['status']}, expected a time")
    cells = [f"{ours['seconds']['median'] * 1e3:.0f} ms"]
    for name in OTHERS:
        entry = contenders.get(name, {"status": NOT_MEASURED})
        ok = entry["status"] == "ok"
        cells.append(f"{entry['ratio']['median']:.1f}" if ok else entry["status"])
    return cells


def replace(text: str, table: str) -> str:
    """The text with what stands between the markers replaced by `table`.

    Raises:
        ValueError: if the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"got a text without the lines {BEGIN.strip()} and {END.strip()}")
    return before + begin + table + end + after


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; exit code 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m deqfusion.bench.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="README", help="file to put the table into")
    options = parser.parse_args(arguments)
    try:
        table = markdown([read_json(path) for path in options.files])
        if options.write is None:
            print(table, end="")
        else:
            text = options.write.read_text(encoding="utf-8")
            write_text(replace(text, table), options.write)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
