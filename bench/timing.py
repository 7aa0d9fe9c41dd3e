"""Interleaved timing: every round runs every contender once, in an order that rotates.

A machine that is busy for a second slows all contenders of that round alike, so the ratio of two
contenders is taken round by round, and its median and spread are reported beside the times.

A call ends with the end of the device's work. On a GPU its time there is that between two events
around it, which includes what the device waits for the host.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

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


class Stopwatch:
    """Times calls of a function; on a GPU each to the end of the device's work.

    Args:
        device: where the function works.
        clock: seconds.
    """

    def __init__(
        self, device: torch.device | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.device = torch.device("cpu") if device is None else device
        self.clock = clock

    def __call__(self, function: Callable[[], object], count: int) -> tuple[float, float | None]:
        """Wall seconds per call, and seconds of the device; None where it is the CPU."""
        if self.device.type != "cuda":
            begin = self.clock()
            for _ in range(count):
                function()
            return (self.clock() - begin) / count, None
        spent = 0.0
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin = self.clock()
        for _ in range(count):
            start.record()
            function()
            end.record()
            end.synchronize()
            spent += 1e-3 * start.elapsed_time(end)
        return (self.clock() - begin) / count, spent / count


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    contexts: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
    progress: Callable[[], object] = lambda: None,
    stopwatch: Stopwatch | None = None,
    failed: Callable[[str, Exception], object] | None = None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Times functions in rotating rounds after one warm-up run of each.

    Args:
        functions: what to run, by name.
        rounds: samples of each.
        contexts: what to run them under, entered outside of what is timed.
        progress: called after every sample.
        stopwatch: of the device; None: of the CPU.
        failed: called with the name and what it raised; the others go on. None: it is raised.

    Returns:
        Wall seconds per run, one per round, by name; the same of the device, empty for the CPU.
        Without the names of those that failed.
    """
    stopwatch = stopwatch or Stopwatch()
    under = dict.fromkeys(functions, nullcontext) | dict(contexts or {})

    def sample(name: str, count: int) -> tuple[float, float | None] | None:
        try:
            with under[name]():
                return stopwatch(functions[name], count)
        except Exception as error:
            if failed is None:
                raise
            failed(name, error)
            return None

    once = {name: sample(name, 1) for name in functions}
    repeats = {name: repeats_for(taken[0]) for name, taken in once.items() if taken is not None}
    wall: dict[str, list[float]] = {name: [] for name in repeats}
    device: dict[str, list[float]] = {name: [] for name in repeats}
    order = list(repeats)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in tuple(order):
                taken = sample(name, repeats[name])
                if taken is None:
                    order.remove(name)
                    continue
                seconds, on_device = taken
                wall[name].append(seconds)
                if on_device is not None:
                    device[name].append(on_device)
                progress()
            order = order[1:] + order[:1]
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    wall = {name: wall[name] for name in repeats if name in order}
    return wall, {name: device[name] for name in wall if device[name]}
