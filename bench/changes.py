"""What got slower or faster since an older result, beyond the noise of both.

A contender's time in a case has changed where the spreads of the two runs (20th to 80th percentile)
do not meet, and the medians differ by more than `LEAST`. Fewer than `ROUNDS` samples have no spread
to speak of. The same machine is required: another one's figures compare machines, not commits.
"""

from __future__ import annotations

from typing import Any

from . import results
from .report import title

LEAST = 0.05
"""Relative change of the median that is worth a line."""

ROUNDS = 3


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
    within = missing = few = 0
    for case in new["cases"]:
        known = before.get(_key(case, new["suite"]), {"contenders": {}})["contenders"]
        for name, entry in case["contenders"].items():
            then, now = (known.get(name) or {}).get("seconds"), entry["seconds"]
            where = f"{title(case)}: {name}"
            if then is None and now is None:
                continue
            if now is None and then is not None:
                slower.append(f"{where}: {entry['status']} now ({entry['reason']})")
            elif then is None:
                missing += 1
            elif min(len(s.get("samples", ())) for s in (then, now)) < ROUNDS:
                few += 1
            elif now["p20"] > then["p80"] and now["median"] > then["median"] * (1 + LEAST):
                slower.append(f"{where}: {_times(then, now)}")
            elif now["p80"] < then["p20"] and now["median"] < then["median"] * (1 - LEAST):
                faster.append(f"{where}: {_times(then, now)}")
            else:
                within += 1
    lines += [f"  slower: {line}" for line in slower] + [f"  faster: {line}" for line in faster]
    lines.append(f"  {len(slower)} slower, {len(faster)} faster, {within} within noise")
    if few:
        lines.append(f"  {few} of fewer than {ROUNDS} rounds: no spread to judge by")
    if missing:
        lines.append(f"  {missing} not measured in the old file")
    return "\n".join(lines)


def _key(case: dict[str, Any], suite: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two cases the same problem; format 1 had the suite's target throughout."""
    target = case.get("target", suite.get("target"))
    problem = suite.get("loss"), suite.get("seed"), target
    return tuple(case["shape"]), case["threads"], case["mode"], problem


def _times(then: dict[str, float], now: dict[str, float]) -> str:
    ratio = now["median"] / then["median"]
    return (
        f"{1e3 * then['median']:.4g} ms then, {1e3 * now['median']:.4g} ms now ({ratio:.2f} times)"
    )
