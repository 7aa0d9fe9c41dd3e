"""What would take too long is skipped, with the reason: by contender and mode, and by run."""

from __future__ import annotations

import pytest

from deqfusion.bench import limits, page, report, runner, suites
from deqfusion.bench.problem import Shape


def test_a_budget_bounds_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the line through two cases; what is skipped says nothing about others."""
    note = limits.Budget.note
    monkeypatch.setattr(
        limits.Budget, "note", lambda self, case, seconds: note(self, case, case.shape.batch)
    )
    shapes = (Shape(4, 64, 1), Shape(8, 64, 1), Shape(400_000_000, 64, 1), Shape(4, 64, 1))
    suite = suites.Suite(
        "test", suites.cases(*shapes), ("ours",), modes=("forward",), rounds=2, budget=600.0,
        device="cpu",
    )  # fmt: skip
    cases = runner.run(suite)["cases"]
    # The smallest first: most are measured before the budget is spent.
    assert [case["shape"][0] for case in cases] == [4, 4, 8, 400_000_000]
    entries = [case["contenders"]["ours"] for case in cases]
    assert [entry["status"] for entry in entries] == ["ok", "ok", "ok", "skipped"]
    assert entries[3]["reason"].startswith("some 56569 s, ")
    assert entries[3]["reason"].endswith(" are left of the budget of 600 s")


@pytest.mark.parametrize(("spent_at", "verified"), [("textbook", 1), ("ours", 2)])
def test_a_budget_is_looked_at_within_a_case(
    spent_at: str, verified: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every contender, and before what was verified is timed."""
    now, begun = 0.0, 0

    def progress(line: str) -> None:
        nonlocal now, begun
        begun += "verifying" in line
        now = 700.0 if f"verifying {spent_at}" in line else now

    inner = limits.Budget
    monkeypatch.setattr(runner, "Budget", lambda seconds: inner(seconds, lambda: now))
    suite = suites.Suite(
        "test", suites.cases(Shape(4, 32, 1)), ("textbook", "ours"), modes=("forward",), rounds=2,
        budget=600.0, device="cpu",
    )  # fmt: skip
    result = runner.run(suite, progress=progress)
    assert begun == verified
    for entry in result["cases"][0]["contenders"].values():
        assert (entry["status"], entry["seconds"]) == ("skipped", None)
        assert entry["reason"] == "the budget of 600 s is spent"
    line = "not measured: B=4 d=32 N=1, 1 thread, forward: SKIPPED: the budget of 600 s is spent"
    assert report.table(result).endswith(f"\n\n{line}")
    assert page.page(result, []).count("the budget of 600 s is spent") == 2


def test_rounds_that_would_not_end_in_time_do_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "once", lambda function, stopwatch: next(seconds))
    # Of one row 9 rounds of 30 s, of two of 80 s.
    seconds = iter([10.0, 20.0, 40.0, 40.0])
    suite = suites.Suite(
        "test", suites.cases(Shape(1, 32, 1), Shape(2, 32, 1)), ("textbook", "ours"),
        modes=("forward",), rounds=9, budget=600.0, device="cpu",
    )  # fmt: skip
    first, second = (case["contenders"] for case in runner.run(suite)["cases"])
    assert {entry["status"] for entry in first.values()} == {"ok"}
    for entry in second.values():
        assert entry["status"] == "skipped"
        assert entry["reason"].startswith("some 720 s, ")


def test_a_budget_that_is_spent() -> None:
    now = 0.0
    case = suites.Case(Shape(4, 64, 1))
    budget = limits.Budget(10.0, lambda: now)
    assert budget.refuse(case) is None
    now = 4.0
    budget.note(case, 4.0)
    assert budget.refuse(case) is None
    now = 7.0
    assert budget.refuse(case) == "some 4 s, 3 are left of the budget of 10 s"
    # Of one case nothing is known about how time grows.
    assert budget.refuse(suites.Case(Shape(16, 64, 1))).startswith("some 4 s, ")
    budget.note(suites.Case(Shape(8, 64, 1)), 4.5)
    assert budget.refuse(suites.Case(Shape(16, 64, 1))).startswith("some 6 s, ")
    # At most with the root of the size.
    budget.note(suites.Case(Shape(8, 64, 1)), 8.0)
    assert budget.refuse(suites.Case(Shape(32, 64, 1))).startswith("some 16 s, ")
    now = 5.0
    assert budget.refuse(case) is None
    assert limits.Budget(None).refuse(case) is None


def test_what_takes_too_long_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "once", lambda function, stopwatch: next(seconds))
    seconds = iter([1.0, 2.0, 50.0])
    # A problem of the last size would not even fit into memory.
    shapes = (Shape(4, 64, 1), Shape(8, 64, 1), Shape(12, 64, 1), Shape(400_000_000, 64, 1))
    suite = suites.Suite(
        "test", suites.cases(*shapes), ("ours",), modes=("forward",), rounds=2, limit=90.0,
        device="cpu",
    )  # fmt: skip
    entries = [case["contenders"]["ours"] for case in runner.run(suite)["cases"]]
    assert [entry["status"] for entry in entries] == ["ok", "ok", "skipped", "skipped"]
    assert [entry["seconds"] is None for entry in entries] == [False, False, True, True]
    assert "2 runs of 50.0 s would exceed the limit of 90 s" in entries[2]["reason"]
    assert "(50.0 s at 12,64,1) would exceed the limit of 90 s" in entries[3]["reason"]
