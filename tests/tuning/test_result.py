"""What a gain is: beyond the noise of rounds in turn, or none; and what is said of it."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from deqfusion import cli
from deqfusion.kernels import tuning
from deqfusion.kernels.tuning import Host
from deqfusion.tuning import Trial, search
from deqfusion.tuning.example import Way
from deqfusion.tuning.result import Gain, gain, settled
from tests.tuning.problems import Clock, timed


def noisy(monkeypatch, factor):
    """Ways take as long as others of the same moment, in which that varies tenfold, by `factor`."""
    rounds = itertools.count()

    def seconds(way):
        moment = 1 + 9 * math.sin(next(rounds)) ** 2
        return 1e-3 * moment * (1 + 0.1 * math.cos(7 * moment)) / factor(way)

    timed(monkeypatch, seconds)


def test_noise_replaces_no_default(monkeypatch, store, capsys):
    """Of ways that are all alike in a moment that is not some median is the least."""
    noisy(monkeypatch, lambda way: 1.0)
    arguments = "autotune --dim 16 --num-groups 2 --batch 20 --forward-only --quiet --device cpu"
    assert cli.main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "default kept: with your solver nothing else is faster beyond the noise" in printed
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
    default.samples = (1.0, 9.0, 2.0, 5.0, 1.5, 8.0, 3.0, 4.0)
    quick.samples = tuple(s / 1.2 for s in default.samples)
    for trial in (default, quick):
        trial.seconds = statistics.median(trial.samples)
    found = gain([(default, quick)])
    assert (found.low, found.median, found.high) == pytest.approx((1.2, 1.2, 1.2))
    assert settled([quick, default], default)[0] is quick
    # In other moments nothing is sure, however far apart: a machine's load may have changed.
    quick.final, quick.samples = False, tuple(0.1 for _ in default.samples)
    assert gain([(default, quick)]).low == pytest.approx(10)
    assert settled([quick, default], default)[0] is default
    # Nor of few rounds.
    quick.final, quick.samples = True, quick.samples[:7]
    assert settled([quick, default], default)[0] is default
    assert str(gain([(default, quick)])) == "35.00 times as fast (10.00 to 90.00)"
    # Rounds of several solves are summed.
    assert gain([(default, default), (default, default)]) == Gain(1.0, 1.0, 1.0, 0, 8)
    assert gain([]) is None
    assert settled([quick], None) == [quick]


@pytest.mark.parametrize(
    ("won", "rounds", "median", "sure"),
    [
        (8, 8, 1.1, True), (7, 8, 1.1, False), (7, 7, 1.1, False), (13, 15, 1.1, True),
        (12, 15, 1.1, False), (15, 15, 1.02, False), (15, 15, 1.03, True), (0, 0, 5.0, False),
    ],
)  # fmt: skip
def test_a_gain_is_sure_where_a_coin_would_not_give_it(won, rounds, median, sure):
    assert Gain(median, median, median, won, rounds).sure == sure


def test_of_many_ways_that_are_alike_the_best_one_seldom_looks_better(monkeypatch):
    """Of eight challengers, each the best of a busy machine's rounds, as often as is said."""
    draw = random.Random(0)
    kept = 0
    for _ in range(300):
        moments = [1 + draw.random() for _ in range(15)]
        trials = []
        for below in range(9):
            samples = tuple(m * (1 + 0.2 * draw.random()) for m in moments)
            trial = Trial(Way("host", Host(below / 8), 5, True), final=True, samples=samples)
            trial.seconds = statistics.median(samples)
            trials.append(trial)
        best = min(trials[1:], key=lambda t: t.seconds)
        kept += settled([best, *trials], trials[0])[0] is best
    assert kept <= 12


def test_a_budget_too_small_to_tell_is_said(monkeypatch, capsys):
    """And fewer ways go to the finals, rather than too few rounds."""
    clock = Clock(0.0)
    monkeypatch.setattr(search, "clock", clock)

    def seconds(way):
        clock.now += 1.0 if way.memory == 4 else 2.0
        return 1.0 if way.memory == 4 else 2.0

    timed(monkeypatch, seconds)
    arguments = "autotune --dim 16 --num-groups 2 --batch 20 --forward-only --quiet --dry-run"

    def printed(budget):
        assert cli.main([*arguments.split(), "--device", "cpu", "--budget", str(budget)]) == 0
        return capsys.readouterr().out

    # Three samples of the default.
    told = printed(7)
    assert "default kept: nothing else that meets the tolerance was timed" in told
    assert "solver: Anderson() is kept: too little was timed to tell" in told
    assert "rounds in turn cannot tell what is faster from noise, 8 can" in printed(36)
    # Of the default and the best eight and more: screening leaves the time for them.
    for budget in (60, 120):
        told = printed(budget)
        assert "rounds in turn" not in told
        assert "2.00 times as fast (2.00 to 2.00)" in told


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
    # Of other parameters another may be the best.
    assert "found with random parameters" in printed
