"""What tables of test metrics say in words."""

import math

import pytest

from deqfusion.analysis import fusions
from deqfusion.analysis.comparison import (
    agreement,
    asked_options,
    comparison_notes,
    over_tasks,
    verdict,
)
from deqfusion.analysis.report import markdown
from deqfusion.engine import checked
from deqfusion.tasks import get_recipe


def row(name, value, metric="accuracy", difference=None, p=math.nan):
    found = {"name": name, metric: value, "compared": metric, "seeds": 5}
    return found if difference is None else {**found, "difference": difference, "p_holm": p}


def record(task, name, seed, value, metric="accuracy", load=1.0, **options):
    config = checked(get_recipe(task), {"fusion": name, "seed": seed, **options})
    split = {"test": {metric: value}, "validation": {metric: value}}
    split |= dict.fromkeys(("training_seconds", "epochs", "best_epoch", "parameters"), 1)
    return {
        "analysis": "fusions",
        "task": task,
        "name": name,
        "seed": seed,
        "candidates": [{"options": config}],
        "chosen": 0,
        "selection": [metric, "max"],
        "environment": {"cpu": "C", "threads": 1, "cores": 2, "load_average": load},
        "splits": [split],
    }


def test_a_base_that_is_the_best_is_said_to_be():
    rows = [row("deq", 0.8), row("sum", 0.7, difference=-0.1, p=0.01)]
    assert verdict(rows, "deq") == [
        "deq's mean accuracy, 0.800, is the best.",
        "By p (Holm) below 0.05, worse accuracy than deq: sum.",
    ]


def test_how_far_validation_tells_the_better_fusion():
    def rows(*pairs):
        return [row(str(n), t) | {"validation": v} for n, (v, t) in enumerate(pairs)]

    records = [record("rosmap", "deq", 0, 0.5)]
    (text,) = agreement(records, rows((0.1, 0.3), (0.2, 0.2), (0.3, 0.1)))
    assert text.startswith("Over these 3, mean accuracy on validation samples")
    assert text.endswith("on test samples correlate with -1.00.")
    assert agreement(records, rows((0.1, 0.3), (0.2, 0.2))) == []
    assert agreement(records, rows((0.1, 0.3), (0.1, 0.2), (0.1, 0.1))) == []


def test_a_base_that_shares_the_best_is_said_to():
    rows = [row("deq", 0.8), row("gated", 0.8 + 2e-16, difference=2e-16, p=1.0), row("sum", 0.7)]
    assert rows[1]["accuracy"] > rows[0]["accuracy"]
    assert verdict(rows, "deq")[0] == "deq's mean accuracy, 0.800, is the best, with gated."
    assert "shares it, on 2 (a, b) of 2 tasks" in over_tasks({"a": rows, "b": rows}, "deq")


def test_a_base_that_is_not_the_best_is_said_not_to_be():
    rows = [
        row("deq", 0.8),
        row("sum", 0.9, difference=0.1, p=0.04),
        row("concat", 0.81, difference=0.01, p=0.5),
    ]
    assert verdict(rows, "deq") == [
        "deq's mean accuracy, 0.800, is not the best: that of sum is 0.900 (p (Holm) 0.04).",
        "By p (Holm) below 0.05, better accuracy than deq: sum.",
    ]
    assert verdict(rows[::2], "deq")[1] == "No difference from deq has a p (Holm) below 0.05."
    assert verdict(rows[1:], "deq") == verdict(rows[:1], "deq") == []
    # Without a value, as of scenes that lack all boxes, there is nothing to say.
    none = row("gated", math.nan, difference=math.nan)
    del none["accuracy"]
    assert verdict([none, *rows], "deq") == verdict(rows, "deq")
    # Nor of other seeds than the others'.
    few = {**row("gated", 0.99, difference=0.2, p=0.01), "seeds": 2}
    assert verdict([few, *rows], "deq") == verdict(rows, "deq")


def test_of_an_error_less_is_better():
    rows = [row("deq", 1.0, "mae"), row("sum", 1.2, "mae", difference=0.2, p=0.01)]
    assert verdict(rows, "deq") == [
        "deq's mean mae, 1.000, is the best.",
        "By p (Holm) below 0.05, worse mae than deq: sum.",
    ]


def test_tasks_are_counted_and_ranks_averaged():
    rows = {
        "a": [row("deq", 0.8), row("sum", 0.7, difference=-0.1, p=0.01)],
        "b": [row("deq", 1.0, "mae"), row("sum", 0.5, "mae", difference=-0.5, p=0.01)],
        "c": [row("deq", 0.8), row("sum", 0.9, difference=0.1, p=0.2), row("tensor", 0.7)],
    }
    assert over_tasks(rows, "deq") == (
        "deq has the best mean, or shares it, on 1 (a) of 3 tasks. By p (Holm) below 0.05 it is "
        "better than some other on 1 (a), and worse than some other on 1 (b). Mean rank over the "
        "tasks, 1 the best: sum 1.3, deq 1.7."
    )
    assert over_tasks({"a": rows["a"]}, "deq") == ""


@pytest.mark.parametrize("options", [{}, {"splits": 1, "epochs": 7}])
def test_options_that_are_no_defaults_are_noted(options):
    names = ("deq", "sum")
    records = [record("cub", name, 0, 0.5, **options) for name in names]
    assert asked_options("cub", records, "deq") == options
    notes = comparison_notes("cub", records, "deq")
    assert ("Not the task's defaults: splits 1, epochs 7." in notes) == bool(options)
    assert any("Not the task's defaults" in note for note in notes) == bool(options)
    # Those that seeds differ in are not those of all.
    records.insert(0, record("cub", "deq", 1, 0.5, dropout=0.1, **options))
    assert asked_options("cub", records, "deq") == options


def test_a_report_says_who_wins_and_what_else_ran():
    values = {"deq": (0.5, 0.6), "sum": (0.7, 0.7)}
    records = [
        record(task, name, seed, value, load=load)
        for task, load in (("cub", 1.0), ("handwritten", 3.0))
        for name, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    page = markdown(records)
    assert "deq has the best mean, or shares it, on none of 2 tasks." in page
    assert page.count("deq's mean accuracy, 0.550, is not the best: that of sum is 0.700") == 2
    assert "were 0.5 to 1.5 per core, above 1 at 4 of 8: other programs ran beside them" in page
    assert "C, 1 thread;" in page
    assert "other programs" not in markdown(records[:4])
    assert [table.title for table in fusions.ANALYSIS.tables(records)] == ["cub", "handwritten"]
