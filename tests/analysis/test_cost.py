"""`deqfusion analyze cost`: time and memory, and what accuracy is equal."""

import pytest

from deqfusion.analysis import cost
from deqfusion.engine import checked
from tests.engine.problem import RECIPE


def _record(name, seed, seconds, validation, megabytes=1.0):
    more = {"seconds": seconds, "validation": validation, "memory": {"bytes": megabytes * 1e6}}
    return {
        "name": name,
        "task": "t",
        "seed": seed,
        "selection": ["loss", "min"],
        "environment": {"load_average": 0.5},
        "splits": [{"test": {"accuracy": 0.5}, "more": more}],
    }


_RECORDS = [
    _record("deq", 0, [1.0, 1.0, 4.0], [0.2, 0.8, 0.7], 8.0),
    _record("sum", 0, [0.1, 0.1, 0.1, 0.3], [0.5, 0.4, 0.6, 0.7], 2.0),
    _record("concat", 0, [0.5, 0.5], [0.7, 0.9]),
]


def test_equal_accuracy_is_what_every_fusion_reaches():
    (table,) = cost.ANALYSIS.tables(_RECORDS)
    rows = {row["name"]: row for row in table.rows}
    # The worst of the best is sum's 0.7.
    assert [rows[name]["equal_seconds"] for name in ("deq", "sum", "concat")] == pytest.approx(
        [2.0, 0.6, 0.5]
    )
    assert rows["deq"]["base_seconds"] == 2.0
    assert rows["concat"]["base_seconds"] == 1.0
    assert (rows["concat"]["reached"], rows["sum"]["reached"]) == (1.0, 0.0)
    assert [rows[name]["epoch_seconds"] for name in ("deq", "sum")] == pytest.approx([1.0, 0.1])
    assert rows["sum"]["relative"] == pytest.approx(0.1)
    assert [rows[name]["megabytes"] for name in ("deq", "sum")] == [8.0, 2.0]
    assert rows["concat"]["best"] == 0.9


def test_an_error_is_better_where_it_is_less():
    records = [_record("deq", 0, [1.0, 1.0], [1.5, 1.0]), _record("sum", 0, [1.0, 1.0], [1.2, 1.3])]
    for record in records:
        record["splits"][0]["test"] = {"mae": 1.0}
    (table,) = cost.ANALYSIS.tables(records)
    rows = {row["name"]: row for row in table.rows}
    assert (rows["deq"]["best"], rows["sum"]["best"]) == (1.0, 1.2)
    assert (rows["deq"]["equal_seconds"], rows["sum"]["equal_seconds"]) == (2.0, 1.0)
    assert rows["sum"]["reached"] == 0.0


def test_memory_of_many_steps_grows_and_of_a_solve_does_not():
    splits, facts = RECIPE.load(None, {})

    def megabytes(fusion, **more):
        config = {**checked(RECIPE, {"dim": 16, "fusion": fusion, **more}), **facts}
        return cost.step_memory(RECIPE, config, splits)["bytes"] / 1e6

    few, many = megabytes("weight_tied:5"), megabytes("weight_tied:50")
    assert many > 2 * few
    long = {"tol": 1e-12, "jacobian_weight": 0.0}
    few, many = (megabytes("deq", max_steps=steps, **long) for steps in (10, 60))
    assert many < 1.2 * few


def test_command(analyze, tmp_path, results):
    assert analyze("cost", tmp_path, "--fusions", "deq", "sum", "--seeds", "2") == 0
    whole = results(tmp_path, "cost")
    (table,) = whole["tables"]
    deq, other = table["rows"]
    assert deq["relative"] == 1.0
    assert deq["megabytes"] > other["megabytes"] > 0
    more = whole["records"][0]["splits"][0]["more"]
    assert len(more["seconds"]) == len(more["validation"]) == 2
    assert "profiler" in more["memory"]["how"]
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
