"""What a gain is: beyond the noise of rounds in turn, or none; and what is said of it."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest

from deqfusion import cli
from deqfusion.kernels import tuning
from deqfusion.kernels.tuning import Host
from deqfusion.tuning import Trial
from deqfusion.tuning.example import Way
from deqfusion.tuning.result import Gain, gain, settled
from tests.tuning.problems import timed


def noisy(monkeypatch, factor):
    """Ways take as long as others of the same moment, in which that varies tenfold, by `factor`."""
    rounds = itertools.count()

    def seconds(way):
        moment = 1 + 9 * math.sin(next(rounds)) ** 2
        return moment * (1 + 0.1 * math.cos(7 * moment)) / factor(way)

    timed(monkeypatch, seconds)


def test_noise_replaces_no_default(monkeypatch, store, capsys):
    """Of ways that are all alike in a moment that is not some median is the least."""
    noisy(monkeypatch, lambda way: 1.0)
    arguments = "autotune --dim 16 --num-groups 2 --batch 20 --forward-only --quiet --device cpu"
    assert cli.main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "default kept: nothing else is faster beyond the noise" in printed
    assert "solver: Anderson() is kept" in printed
    (file,) = store.glob("*.json")
    (entry,) = tuning.read(file)
    assert entry.best == entry.default
    assert entry.best.seconds > entry.runner_up.seconds
    assert entry.best.p20 < entry.best.seconds < entry.best.p80


def test_a_gain_beyond_the_noise_is_kept(monkeypatch):
    """By the ratios of rounds, where a moment is the same for all, not by times, which overlap."""
    quick = Trial(Way("host", Host(0.9), 5, True), final=True)
    default = Trial(Way("host", Host(0.75), 5, True), default=True, final=True)
    default.samples = (1.0, 9.0, 2.0, 5.0, 1.5)
    quick.samples = tuple(s / 1.2 for s in default.samples)
    for trial in (default, quick):
        trial.seconds = statistics.median(trial.samples)
    found = gain([(default, quick)])
    assert (found.low, found.median, found.high) == pytest.approx((1.2, 1.2, 1.2))
    assert settled([quick, default], default)[0] is quick
    # In other moments, or of few rounds, extremes must not meet.
    quick.final = False
    assert gain([(default, quick)]).low == pytest.approx(1.0 / 7.5)
    assert settled([quick, default], default)[0] is default
    quick.final, quick.samples = True, tuple(0.9 * min(default.samples) for _ in range(4))
    assert settled([quick, default], default)[0] is quick
    assert str(gain([(default, quick)])) == "2.22 times as fast (1.11 to 10.00)"
    # Rounds of several solves are summed.
    assert gain([(default, default), (default, default)]) == Gain(1.0, 1.0, 1.0)
    assert gain([]) is None
    assert settled([quick], None) == [quick]


def test_the_solver_to_write_is_named(monkeypatch, capsys):
    timed(monkeypatch, lambda way: 1.0 if way.memory == 4 else 2.0)
    arguments = (
        "autotune --dim 16 --num-groups 2 --batch 20 --forward-only --quiet --tol 1e-2 --dry-run"
    )
    assert cli.main([*arguments.split(), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "default kept" in printed
    assert "2.00 times as fast (2.00 to 2.00); nobody looks it up, so write" in printed
    assert "  DEQFusion(16, 2, solver=Anderson(tol=0.01, memory=4))" in printed
