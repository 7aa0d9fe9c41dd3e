"""What a run says in the terminal: a line of progress, the list of what there is, and the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from types import TracebackType
from typing import Any, TextIO

import torch

from deqfusion.tuning.result import aligned

from . import contenders, results, runner, suites
from .work import shares

MODE_TITLES = {
    "forward": "forward",
    "forward_backward": "forward + backward",
    "forward_backward_penalty": "forward + backward, Jacobian penalty",
}
FACTOR_TITLES = {
    "batch": "batch",
    "dim": "width",
    "num_modalities": "modalities",
    "steps": "steps",
}
NOT_MEASURED = "not measured"


class Progress:
    """Says what is happening: on a terminal in one line, in a file in one every `EVERY` seconds.

    Args:
        stream: where.
        clock: seconds.
    """

    EVERY = 10.0

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream, clock
        self.terminal = stream.isatty()
        self.begin = clock()
        self.due = self.begin

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.terminal:
            self._write("\r\x1b[K")

    def show(self, message: str) -> None:
        """Replaces the line, or adds one if it is time."""
        now = self.clock()
        if self.terminal:
            self._write(f"\r\x1b[K{message}")
        elif now >= self.due:
            self.due = now + self.EVERY
            self._write(f"{now - self.begin:.0f} s: {message}\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def listing(device: torch.device) -> str:
    """Suites and contenders, a line each, and which contenders cannot run on a device and why."""
    kinds = contenders.contenders()
    width = max(map(len, (*kinds, *suites.SUITES)))
    lines = ["suites (--list --suite NAME: shapes and contenders)"]
    lines += [f"  {s.name.ljust(width)}  {s.summary}" for s in suites.SUITES.values()]
    here: dict[str | None, list[str]] = {None: []}
    for name, kind in kinds.items():
        found = here.setdefault(kind.unavailable(device), [])
        found.append(f"  {name.ljust(width)}  {kind.summary}")
    for reason, found in here.items():
        lines.append("contenders" if reason is None else f"contenders not here: {reason}")
        lines += found
    return "\n".join(lines)


def details(suite: suites.Suite, device: torch.device) -> str:
    """A suite's settings, cases and contenders."""
    kinds, names = contenders.contenders(), runner.names_of(suite, device)
    width = max(map(len, names))
    modes = ", ".join(MODE_TITLES[mode] for mode in suite.modes)
    limit = "" if suite.limit is None else f", at most {suite.limit:g} s of each and mode on a CPU"
    lines = [
        f"{suite.name}: {suite.summary}",
        f"{modes}; threads {', '.join(map(str, suite.threads))}; {suite.rounds} rounds{limit}",
        "rows, width, modalities",
    ]
    for case in suite.cases:
        notes = [case.label, f"to {case.target:g}" if case.target else ""]
        notes += [f"along {FACTOR_TITLES[factor]}" for factor in case.factors]
        lines.append(f"  {case.shape!s:<14}{', '.join(filter(None, notes))}".rstrip())
    lines.append("contenders")
    for name in names:
        reason = kinds[name].unavailable(device)
        more = f" (not here: {reason})" if reason else ""
        lines.append(f"  {name.ljust(width)}  {kinds[name].summary}{more}")
    return "\n".join(lines)


def absent(result: dict[str, Any]) -> dict[str, str]:
    """Why contenders could not run at all, by name: what is said once, and not of every case."""
    entries: dict[str, list[dict[str, Any]]] = {}
    for case in result["cases"]:
        for name, entry in case["contenders"].items():
            entries.setdefault(name, []).append(entry)
    return {
        name: str(found[0]["reason"])
        for name, found in entries.items()
        if {(e["status"], e.get("reason")) for e in found}
        == {("unavailable", found[0].get("reason"))}
    }


def untimed(case: dict[str, Any], without: Container[str]) -> str | None:
    """Status and reason of a case in which nobody was timed, if they are everybody's.

    Args:
        case: of a result.
        without: contenders that do not count, as `absent` has them.
    """
    said = {
        f"{entry['status'].upper()}: {entry.get('reason')}" if entry["seconds"] is None else None
        for name, entry in case["contenders"].items()
        if name not in without
    }
    return said.pop() if len(said) == 1 else None


def title(case: dict[str, Any]) -> str:
    """A case in words."""
    batch, dim, num_modalities = case["shape"]
    label = f" ({case['label']})" if case.get("label") else ""
    target = f" to {case['target']:g}" if "steps" in case.get("factors", ()) else ""
    return (
        f"B={batch} d={dim} N={num_modalities}{label}{target}, {case['threads']} thread"
        f"{'s' if case['threads'] > 1 else ''}, {MODE_TITLES.get(case['mode'], case['mode'])}"
    )


def table(result: dict[str, Any]) -> str:
    """The result as aligned text.

    Args:
        result: of `runner.run`, or read from a file.

    Returns:
        One line per case and contender; a contender that failed has its reason and no time.
    """
    suite = result["suite"]
    lines = [
        results.describe(result),
        f"every row and block at a relative residual of at most {suite['target']:.0e} where no "
        f"other is named, verified in fp64; loss {suite['loss']}; {suite['rounds']} rounds; ratio: "
        f"time over that of {result['reference']}, median and 20th to 80th percentile",
        *_peaks(result),
    ]
    missing = absent(result)
    lines += [f"{name} UNAVAILABLE: {reason}" for name, reason in missing.items()]
    for case in result["cases"]:
        peaks = result.get("peaks", {}).get(str(case["threads"]), {})
        reason = untimed(case, missing)
        if reason is not None:
            # Of several in a row a line each.
            lines += [] if lines[-1].startswith(NOT_MEASURED) else [""]
            lines.append(f"{NOT_MEASURED}: {title(case)}: {reason}")
            continue
        lines += ["", title(case), *_rows(case, peaks, missing)]
        best = runner.best_baseline(case)
        if best is not None and case["contenders"][best]["ratio"] is not None:
            ratio = case["contenders"][best]["ratio"]
            lines.append(
                f"  best of the others: {best}, {ratio['median']:.2f} times the time of "
                f"{result['reference']} ({_spread(ratio, 1, 2)})"
            )
    if result.get("fits"):
        lines += ["", *_fits(result["fits"])]
    return "\n".join(lines)


def _peaks(result: dict[str, Any]) -> list[str]:
    lines = []
    for threads, found in result.get("peaks", {}).items():
        rates = ", ".join(
            f"{name} {v / 1e9:.0f} GFLOP/s" for name, v in found.items() if name != "copy"
        )
        lines.append(f"measured peaks, {threads}t: copy {found['copy'] / 1e9:.1f} GB/s, {rates}")
    return lines


COLUMNS = (
    "contender", "ms", "p20..p80", "ratio", "p20..p80", "device ms", "MB", "launches", "GFLOP/s",
    "of peak", "of copy", "of floor", "residual", "adjoint", "steps",
)  # fmt: skip


def _rows(case: dict[str, Any], peaks: dict[str, float], without: Container[str]) -> list[str]:
    """A case's lines: aligned columns, without those that nobody has a value for."""
    rows = {
        name: _row(name, entry, peaks)
        for name, entry in case["contenders"].items()
        if name not in without
    }
    width = max(len(name) for name in (*rows, COLUMNS[0]))
    timed = [(row[0].ljust(width), *row[1:]) for row in rows.values() if len(row) == len(COLUMNS)]
    grid = iter(aligned([COLUMNS, *timed], left=(0, len(COLUMNS) - 1)).split("\n"))
    lines = [next(grid)] if timed else []
    for row in rows.values():
        lines.append(next(grid) if len(row) == len(COLUMNS) else f"{row[0].ljust(width)}  {row[1]}")
    return [f"  {line}" for line in lines]


def _row(name: str, entry: dict[str, Any], peaks: dict[str, float]) -> tuple[str, ...]:
    if entry["seconds"] is None:
        return name, f"{entry['status'].upper()}: {entry['reason']}"
    seconds, ratio, verified = entry["seconds"], entry["ratio"], entry["verified"]
    on_device, memory, launches, work, floor = (
        entry.get(key) for key in ("device_seconds", "memory", "launches", "work", "floor")
    )
    adjoint = verified.get("adjoint_residual")
    of_rate, of_copy = shares(work, peaks)
    digits = 1 if seconds["median"] > 0.01 else 3
    return (
        name,
        f"{seconds['median'] * 1e3:.{digits}f}",
        _spread(seconds, 1e3, digits),
        "" if ratio is None else f"{ratio['median']:.2f}",
        "" if ratio is None else _spread(ratio, 1, 2),
        "" if on_device is None else f"{on_device['median'] * 1e3:.3f}",
        "" if memory is None else f"{memory['bytes'] / 1e6:.1f}",
        "" if launches is None else str(launches["host"]),
        "" if work is None else f"{work['operations_per_second'] / 1e9:.0f}",
        "" if work is None or of_rate is None else f"{of_rate:.0%} {work['rate']}",
        "" if of_copy is None else f"{of_copy:.0%}",
        "" if floor is None else f"{floor['fraction']:.0%}",
        f"{verified['residual']:.1e}",
        "" if adjoint is None else f"{adjoint:.1e}",
        " ".join(f"{block} {count}" for block, count in verified["steps"].items()),
    )


def _spread(summary: dict[str, float], factor: float, digits: int) -> str:
    return f"{summary['p20'] * factor:.{digits}f}..{summary['p80'] * factor:.{digits}f}"


def _fits(found: list[dict[str, Any]]) -> list[str]:
    """Exponents, one line per contender and mode, with a column per factor."""
    factors = list(dict.fromkeys(record["factor"] for record in found))
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for record in found:
        key = record["contender"], record["mode"], record["threads"]
        fit = record["fit"]
        text = NOT_MEASURED
        if fit is not None:
            text = f"{fit['exponent']:.2f} +- {fit['error']:.2f} ({fit['points']})"
        lines.setdefault(key, {})[record["factor"]] = text
    head = [FACTOR_TITLES.get(factor, factor) for factor in factors]
    out = ["time grows as the factor to the power of (standard error, points):"]
    out.append(f"  {'':<44}" + "".join(f"{name:>20}" for name in head))
    for (name, mode, threads), cells in lines.items():
        row = "".join(f"{cells.get(factor, ''):>20}" for factor in factors)
        out.append(f"  {name + ', ' + MODE_TITLES.get(mode, mode) + f', {threads}t':<44}" + row)
    return out
