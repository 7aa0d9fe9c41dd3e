"""Interleaved timing: every round runs every contender once, in an order that rotates.

A machine that is busy for a second slows all contenders of that round alike, so the ratio of two
contenders is taken round by round, and its median and spread are reported beside the times.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

SHORTEST_SAMPLE = 0.02
"""Seconds; faster functions are repeated within a sample so that the clock's noise is small."""


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile.

    Raises:
        ValueError: if there are no values.
    """
    if not len(values):
        raise ValueError("no values to summarise")
    p20, median, p80 = np.percentile(np.asarray(values, dtype=float), (20, 50, 80))
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Summary of the ratio of two contenders' times, taken round by round."""
    return summary([a / b for a, b in zip(numerator, denominator, strict=True)])


def repeats_for(seconds: float) -> int:
    """How often to run something that takes `seconds` within one sample."""
    return max(1, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-6)))


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    progress: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times functions in rotating rounds after one warm-up run of each.

    Args:
        functions: what to run, by name.
        rounds: samples of each.
        progress: called after every sample.
        clock: seconds.

    Returns:
        Seconds per run, one per round, by name.
    """
    repeats = {}
    for name, function in functions.items():
        begin = clock()
        function()
        repeats[name] = repeats_for(clock() - begin)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                function, count = functions[name], repeats[name]
                begin = clock()
                for _ in range(count):
                    function()
                samples[name].append((clock() - begin) / count)
                progress()
            order = order[1:] + order[:1]
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return samples
