"""What would take too long is skipped, with the reason: by contender and mode, and by run."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest

from deqfusion.bench import contenders, limits, page, report, runner, suites
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


def test_where_compiling_takes_long_cases_have_equal_shares() -> None:
    now = 0.0
    small, large = (suites.Case(Shape(rows, 64, 1)) for rows in (4, 4000))
    budget = limits.Budget(100.0, lambda: now)
    assert budget.to_verify(4, True) == pytest.approx(20.0)
    assert budget.to_verify(4, False) == pytest.approx(80.0)
    budget.note(small, 10.0)
    budget.note(suites.Case(Shape(8, 64, 1)), 30.0)
    now = 60.0
    assert budget.to_verify(2, True) == pytest.approx(16.0)
    # By what the others took it would take minutes.
    assert budget.refuse(large, compiling=True) is None
    assert budget.refuse(large) is not None
    now = 100.0
    assert budget.refuse(large, compiling=True) is not None
    assert budget.to_verify(1, True) == 0.0
    assert limits.Budget(None).to_verify(1, True) is None


def test_what_is_stopped() -> None:
    with pytest.raises(limits.OutOfTime, match="took more than 0 s"), limits.stopped(0.01):
        time.sleep(20)
    with limits.stopped(0.01) as late:
        with contextlib.suppress(limits.OutOfTime):
            time.sleep(20)
        # Once, and not in what is left of the body.
        time.sleep(0.05)
    assert len(late) == 1
    with limits.stopped(0.02) as late, limits.stopped(None):
        pass
    time.sleep(0.05)
    assert not late


@pytest.mark.parametrize("slow", [("forward",), ("forward_backward",)])
def test_a_contender_that_compiles_for_too_long_ends_no_run(
    slow: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others before it are timed, and what of it was verified; for those after it there is none."""
    run = contenders.get("textbook").run

    def late(self: Any, mode: str) -> Any:
        if mode in slow:
            try:
                time.sleep(600)
            except Exception as error:
                raise RuntimeError("as compilers tell of what they were told") from error
        return run(self, mode)

    monkeypatch.setattr(contenders.get("textbook"), "run", late)
    # A few seconds, of which a busy machine spends none beside what is tested.
    monkeypatch.setattr(runner.peaks, "measure", lambda device: {})
    monkeypatch.setattr(limits, "TO_VERIFY", 0.4)
    suite = suites.Suite(
        "test", suites.cases(Shape(4, 16, 1)), ("ours", "textbook", "torchdeq"), rounds=2,
        budget=8.0, device="cpu",
    )  # fmt: skip
    modes = {case["mode"]: case["contenders"] for case in runner.run(suite)["cases"]}
    for mode, entries in modes.items():
        assert entries["ours"]["status"] == "ok"
        assert entries["ours"]["seconds"]["median"] > 0
        stopped = mode in slow or slow == ("forward",)
        assert entries["textbook"]["status"] == ("skipped" if stopped else "ok")
        if stopped:
            assert entries["textbook"]["seconds"] is None
            assert "not measured: verifying it took more than" in entries["textbook"]["reason"]
        assert entries["torchdeq"]["status"] in ("skipped", "unavailable")
        assert "not measured: the " in entries["torchdeq"]["reason"]


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
