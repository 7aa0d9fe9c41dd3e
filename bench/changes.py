"""What got slower or faster since an older result, beyond the noise of both.

A machine that moved (another load, clock or host) slows everything. So a contender is held against
one of the same run that was timed in turn with it, round by round: the first of `ANCHORS` that both
files have in a case. With q the ratio of its time over that one's, the change is q now over q then;
its bounds are those of both spreads (20th to 80th percentile), least over most and most over least.
It has changed where 1 is outside of them, and the medians differ by more than `LEAST`. Fewer than
`ROUNDS` samples have no spread to speak of. Where a case has no anchor times are compared, which is
said. The same machine is required: another one's figures compare machines, not commits.
"""

from __future__ import annotations

import statistics
from typing import Any

from . import results, timing
from .report import title

LEAST = 0.05
"""Relative change of the median that is worth a line."""

ROUNDS = 3

ANCHORS = ("textbook", "torchdeq", "textbook_compiled")
"""Contenders that are not ours, whose code seldom changes."""

Summary = dict[str, float]


def check_machines(old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """Refuses results of different machines.

    Args:
        old, new: results, or of the new one what will be: environment and device.
        where: the old one's file, for the message.

    Raises:
        ValueError: says what differs, and what compares anyway.
    """
    before, after = results.machine(old), results.machine(new)
    if before != after:
        differing = ", ".join(
            f"{key} {before.get(key)!r} then and {after.get(key)!r} now"
            for key in {**before, **after}
            if before.get(key) != after.get(key)
        )
        raise ValueError(
            f"{where}: got a result of another machine ({differing}), expected one of this; "
            "--across-machines compares them anyway"
        )


def text(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The comparison: one line per change beyond noise, slower ones first, and what is not known.

    Args:
        old, new: results.
    """
    lines = [f"against {results.describe(old)}, commit {old['environment'].get('commit')}"]
    if results.machine(old) != results.machine(new):
        lines.append("DIFFERENT MACHINES: what follows compares them as much as the code")
    before = {_key(case, old["suite"]): case for case in old["cases"]}
    slower: list[str] = []
    faster: list[str] = []
    within: list[Summary] = []
    moved: dict[str, list[float]] = {}
    missing = left_out = few = by_times = 0
    for case in new["cases"]:
        known = before.get(_key(case, new["suite"]), {"contenders": {}})["contenders"]
        anchor = _anchor(known, case["contenders"])
        for name, entry in case["contenders"].items():
            then, now = (known.get(name) or {}).get("seconds"), entry["seconds"]
            where = f"{title(case)}: {name}"
            if then is None and now is None:
                continue
            if now is None and entry["status"] == "skipped":
                # For lack of time, or of what it needs: that says nothing of its speed.
                left_out += 1
            elif now is None and then is not None:
                slower.append(f"{where}: {entry['status']} now ({entry['reason']})")
            elif then is None:
                missing += 1
            elif min(len(s.get("samples", ())) for s in (then, now)) < ROUNDS:
                few += 1
            elif name == anchor:
                moved.setdefault(name, []).append(now["median"] / then["median"])
            else:
                by_times += anchor is None
                change = _change(
                    _relative(then, known, anchor), _relative(now, case["contenders"], anchor)
                )
                line = f"{where}: {_words(change, then, now, anchor)}"
                if change["p20"] > 1 and change["median"] > 1 + LEAST:
                    slower.append(line)
                elif change["p80"] < 1 and change["median"] < 1 - LEAST:
                    faster.append(line)
                else:
                    within.append(change)
    lines += [
        f"held against {name}, in the same rounds, which takes "
        f"{statistics.median(ratios):.2f} times what it took ({min(ratios):.2f} to "
        f"{max(ratios):.2f} in {len(ratios)} cases)"
        for name, ratios in moved.items()
    ]
    lines += [f"  slower: {line}" for line in slower] + [f"  faster: {line}" for line in faster]
    noise = ""
    if within:
        low, high = min(c["p20"] for c in within), max(c["p80"] for c in within)
        noise = f" (bounds {low:.2f} to {high:.2f} times)"
    lines.append(f"  {len(slower)} slower, {len(faster)} faster, {len(within)} within noise{noise}")
    if by_times:
        lines.append(
            f"  {by_times} by their times alone, with none of {', '.join(ANCHORS)} in both files: "
            "a machine that moved shows as a change"
        )
    if few:
        lines.append(f"  {few} of fewer than {ROUNDS} rounds: no spread to judge by")
    if missing:
        lines.append(f"  {missing} not measured in the old file")
    if left_out:
        lines.append(f"  {left_out} not measured in the new one")
    return "\n".join(lines)


def _key(case: dict[str, Any], suite: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two cases the same problem."""
    problem = suite.get("loss"), suite.get("seed"), case.get("target")
    return tuple(case["shape"]), case["threads"], case["mode"], problem


def _anchor(*both: dict[str, Any]) -> str | None:
    """Whom others are held against in a case of both files."""

    def timed(entries: dict[str, Any], name: str) -> bool:
        return len(((entries.get(name) or {}).get("seconds") or {}).get("samples", ())) >= ROUNDS

    return next((name for name in ANCHORS if all(timed(entries, name) for entries in both)), None)


def _relative(seconds: Any, entries: dict[str, Any], anchor: str | None) -> Summary:
    """Its time over the anchor's, round by round; without an anchor its time."""
    if anchor is None:
        return {name: float(seconds[name]) for name in ("p20", "median", "p80")}
    other = entries[anchor]["seconds"]
    if len(seconds["samples"]) != len(other["samples"]):
        # Not of the same rounds, so that they do not pair.
        return _change(other, seconds)
    return timing.ratios(seconds["samples"], other["samples"])


def _change(then: Summary, now: Summary) -> Summary:
    """How many times as much, and its bounds by both spreads."""
    return {
        "p20": now["p20"] / then["p80"],
        "median": now["median"] / then["median"],
        "p80": now["p80"] / then["p20"],
    }


def _words(change: Summary, then: Summary, now: Summary, anchor: str | None) -> str:
    by = "" if anchor is None else f" against {anchor}"
    return (
        f"{change['median']:.2f} times{by} ({change['p20']:.2f} to {change['p80']:.2f}); "
        f"{1e3 * then['median']:.4g} ms then, {1e3 * now['median']:.4g} ms now"
    )
