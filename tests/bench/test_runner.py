"""Running a suite: records, failures that are reported as failures, the table and the picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from deqfusion.bench import (
    contenders,
    quick_comparison,
    report,
    resources,
    results,
    runner,
    suites,
    timing,
)
from deqfusion.bench.contenders import Answer, registry
from deqfusion.bench.contenders.textbook import Textbook
from deqfusion.bench.problem import Shape
from deqfusion.bench.profile import main as profile_main
from deqfusion.cli import main

SHAPE = Shape(6, 64, 2)


class Lazy(Textbook):
    """Stops long before the tolerance."""

    name = "lazy"

    def forward(self) -> Answer:
        flat = torch.ones_like(self.start)
        return Answer(self.problem.unflatten(flat), {"joint": 1})


class Drifting(Textbook):
    """Right while it is verified, wrong once it is timed."""

    name = "drifting"
    runs = 0

    def forward(self) -> Answer:
        answer = super().forward()
        self.runs += 1
        return answer if self.runs == 1 else Answer(answer.state + 1, answer.steps)


class Loose(Textbook):
    """Stops by another rule: at thirty times the tolerance that it is given."""

    name = "loose"
    baseline = False

    def set_tolerances(self, tol: float, adjoint_tol: float) -> None:
        super().set_tolerances(30 * tol, 30 * adjoint_tol)


class Absent(Textbook):
    """Cannot run here."""

    name = "absent"

    @classmethod
    def unavailable(cls, device: torch.device | None = None) -> str | None:
        return "not installed"


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        contenders.contenders()
        for kind in (Lazy, Drifting, Loose, Absent):
            patch.setitem(registry._REGISTRY, kind.name, kind)
        suite = suites.Suite(
            "test",
            suites.cases(SHAPE),
            ("textbook", "lazy", "drifting", "loose", "absent", "ours"),
            rounds=3,
        )
        saved: list[int] = []
        found = runner.run(suite, save=lambda partial: saved.append(len(partial["cases"])))
        # After the case, and once more with the peaks measured at the end.
        assert saved == [2, 2]
        found["table"] = report.table(found)
        return found


def test_record(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    results.write_json(result, path)
    found = results.read_json(path)
    assert found["format"] == results.FORMAT
    assert found["device"] == "cpu"
    assert set(found["peaks"]["1"]) == {"copy", "fp32", "bf16"}
    assert found["environment"]["cpu"]
    assert found["environment"]["cores"] >= 1
    assert found["environment"]["cpu"] in found["environment"]["tuned"]
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert found["suite"]["shapes"] == ["6,64,2"]
    assert [case["mode"] for case in found["cases"]] == ["forward", "forward_backward"]
    for case in found["cases"]:
        assert (case["shape"], case["threads"]) == ([6, 64, 2], 1)
        for name in ("textbook", "ours"):
            entry = case["contenders"][name]
            assert entry["status"] == "ok"
            assert entry["verified"]["residual"] <= 1e-3
            seconds = entry["seconds"]
            assert len(seconds["samples"]) == 3
            assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
            assert entry["memory"]["bytes"] > 0
            assert entry["memory"]["how"] == resources.CPU_MEMORY
            assert entry["launches"] is entry["device_seconds"] is entry["floor"] is None
            work = entry["work"]
            rate = work["operations"] / seconds["median"]
            assert work["operations_per_second"] == pytest.approx(rate)
        assert case["contenders"]["ours"]["ratio"] is None
        assert case["contenders"]["textbook"]["ratio"]["median"] > 0
    backward = found["cases"][1]["contenders"]
    for name in ("textbook", "ours"):
        assert backward[name]["verified"]["adjoint_residual"] <= 1e-3
        assert backward[name]["verified"]["gradient_error"] <= 1e-2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["lazy", "drifting", "absent"])
def test_failures_have_no_time(name: str, result: dict[str, Any]) -> None:
    for case in result["cases"]:
        entry = case["contenders"][name]
        assert entry["status"] == ("unavailable" if name == "absent" else "failed")
        assert entry["reason"]
        assert entry["seconds"] is None
        assert entry["ratio"] is None


def test_whoever_stops_by_another_rule_is_brought_to_the_same_residual(
    result: dict[str, Any],
) -> None:
    """By a tighter tolerance, in every mode, and no tighter than it takes."""
    for case in result["cases"]:
        entry = case["contenders"]["loose"]
        assert entry["status"] == "ok", entry["reason"]
        assert 1e-4 < entry["verified"]["residual"] <= 1e-3
        assert 1e-5 <= entry["tolerances"]["forward"] < 1e-3 / 3
    assert entry["verified"]["adjoint_residual"] <= 1e-3
    assert entry["tolerances"]["forward_backward"] < 1e-3 / 3


def test_table(result: dict[str, Any]) -> None:
    lines = result["table"].splitlines()
    assert "B=6 d=64 N=2, 1 thread, forward" in lines
    failed = [line for line in lines if line.split()[:1] == ["lazy"]]
    assert len(failed) == 2
    assert all("FAILED: forward: residual" in line for line in failed)
    # Once, not of every case.
    assert [line for line in lines if "absent" in line] == ["absent UNAVAILABLE: not installed"]
    assert sum(line.startswith("  best of the others: textbook") for line in lines) == 2


def test_rounds_rotate_and_warm_up() -> None:
    order: list[str] = []
    now = 0.0

    def clock() -> float:
        return now

    def function(name: str, seconds: float):
        def run() -> None:
            nonlocal now
            now += seconds
            order.append(name)

        return run

    functions = {name: function(name, s) for name, s in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    stopwatch = timing.Stopwatch(clock=clock)
    samples, on_device = timing.interleaved(functions, 3, stopwatch=stopwatch)
    assert on_device == {}
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert samples == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}
    assert timing.ratios(samples["c"], samples["a"]) == {"median": 4.0, "p20": 4.0, "p80": 4.0}


def test_short_functions_are_repeated_within_a_sample() -> None:
    assert timing.repeats_for(1.0) == 1
    assert timing.repeats_for(timing.SHORTEST_SAMPLE / 8) == 8
    with pytest.raises(ValueError, match="no values"):
        timing.summary([])


FILES = [
    "index.html",
    "quick-memory.png",
    "quick-roofline.png",
    "quick-speedup.png",
    "quick.json",
]


def test_quick_comparison() -> None:
    threads = torch.get_num_threads()
    found = quick_comparison(batch=6, dim=64, num_modalities=2, threads=1, rounds=2)
    assert torch.get_num_threads() == threads
    assert set(found["contenders"]) == {"textbook", "ours"}
    for entry in found["contenders"].values():
        assert entry["ok"], entry["reason"]
        assert entry["residual"] <= found["tol"]
        for mode in suites.MODES:
            assert set(entry[mode]) == {"median", "p20", "p80"}
    for mode in suites.MODES:
        assert found["ratios"][mode]["p20"] <= found["ratios"][mode]["p80"]


def test_command_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    arguments = ["bench", "--shape", "4,32,1", "--rounds", "1", "--threads", "1"]
    arguments += ["--contenders", "textbook,ours", "--out", str(out)]
    assert main(arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert "B=4 d=32 N=1, 1 thread, forward + backward" in capsys.readouterr().out


def test_an_interrupted_run_says_where_its_cases_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, rows = runner.run_case, 0

    def run_case(case: Any, setting: Any) -> Any:
        if case.shape.batch == rows:
            raise KeyboardInterrupt
        return inner(case, setting)

    monkeypatch.setattr(runner, "run_case", run_case)
    arguments = ["bench", "--shape", "4,32,1", "--shape", "8,32,1", "--contenders", "ours"]
    arguments += ["--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]
    for rows, kept in ((4, False), (8, True)):  # noqa: B007
        assert main(arguments) == 130
        assert (f"measured is in {tmp_path / 'quick.json'}" in capsys.readouterr().err) == kept
        assert (tmp_path / "quick.json").exists() == kept
    shapes = [case["shape"] for case in results.read_json(tmp_path / "quick.json")["cases"]]
    assert shapes == [[4, 32, 1]] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--suite", "slow"], "unknown suite 'slow', expected one of quick, paper, sweep, train"),
        (["--contenders", "ours,theirs"], "unknown contender 'theirs', expected one of"),
        (["--shape", "4,32"], "shape must be B,d,N"),
        (["--shape", "4,30,2"], "shape 4,30,2: its width d must be a multiple of 4"),
        (["--threads", "one"], "--threads must be counts such as 1,2, got 'one'"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--loss", "max"], "loss must be one of sum, mean, got 'max'"),
        (["--contenders", "absent,ours"], "--contenders: got absent, which cannot run here: not "),
        (["--budget", "0"], "budget must be above 0 seconds, got 0.0"),
        (["--limit", "0"], "limit must be above 0 seconds, got 0.0"),
        (["--device", "tpu"], "device must be one of auto, cpu, cuda, got 'tpu'"),
        (["--compare", "nowhere.json"], "nowhere.json: cannot be read (No such file or directory)"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    contenders.contenders()
    monkeypatch.setitem(registry._REGISTRY, "absent", Absent)
    out = tmp_path / "out"
    assert main(["bench", "--out", str(out), *options]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert not out.exists()


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    assert main(["bench", "--out", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert path.read_text() == "kept"


def test_listing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    described = {name: kind.summary for name, kind in contenders.contenders().items()}
    described |= {name: suite.summary for name, suite in suites.SUITES.items()}
    columns = set()
    for name, summary in described.items():
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.endswith(f"  {summary}")
        columns.add(line.index(summary))
    assert len(columns) == 1


def test_listing_of_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--suite", "paper"]) == 0
    out = capsys.readouterr().out
    assert "  6400,512,2    question answering: 64 x 100 tokens\n" in out
    assert "  612,500,3     to 0.1, along steps\n" in out
    assert all(f"  {name} " in out for name in suites.SUITES["paper"].contenders)


class Stream(io.StringIO):
    """Of a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_progress_in_a_file_is_a_line_now_and_then() -> None:
    now = 100.0
    stream = Stream(False)
    with report.Progress(stream, lambda: now) as progress:
        for now in (100.0, 104.0, 109.0, 111.0, 112.0, 140.0):
            progress.show(f"at {now:.0f}")
    assert stream.getvalue() == "0 s: at 100\n11 s: at 111\n40 s: at 140\n"
    stream = Stream(True)
    with report.Progress(stream, lambda: now) as progress:
        progress.show("one")
        progress.show("two")
    assert stream.getvalue() == "\r\x1b[Kone\r\x1b[Ktwo\r\x1b[K"


def test_a_problem_that_cannot_be_built_does_not_end_the_suite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inner = runner.Problem

    def problem(shape: Shape, **options: Any) -> Any:
        if shape.batch == 8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nat a place")
        return inner(shape, **options)

    monkeypatch.setattr(runner, "Problem", problem)
    shapes = Shape(8, 64, 1), Shape(4, 64, 1)
    suite = suites.Suite("test", suites.cases(*shapes), ("textbook", "ours"), rounds=1)
    result = runner.run(suite)
    assert len(result["cases"]) == 4
    for case in result["cases"]:
        for entry in case["contenders"].values():
            if case["shape"][0] == 4:
                assert entry["status"] == "ok"
                continue
            assert (entry["status"], entry["seconds"]) == ("failed", None)
            said = "problem: RuntimeError: DefaultCPUAllocator: can't allocate memory"
            assert entry["reason"] == said
    assert "FAILED: problem: RuntimeError" in report.table(result)


def test_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_main(["--shape", "8,64,2", "--runs", "1", "--backward"]) == 0
    out = capsys.readouterr().out
    assert "matrix products" in out
    assert "aten::bmm" in out or "aten::addmm" in out
    assert profile_main(["--shape", "8,64"]) == 2
    assert "shape must be B,d,N" in capsys.readouterr().err


def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for options in (["--device", "cuda"], ["--suite", "gpu"]):
        assert main(["bench", *options, "--out", str(tmp_path / "out")]) == 2
        assert "device: got cuda, expected cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("out of something\nat a place"), "RuntimeError: out of something"),
        (ValueError("got 2048 channels per group"), "ValueError: got 2048 channels per group"),
        (KeyError("wide"), "KeyError: 'wide'"),
        (torch.OutOfMemoryError("no memory\nat a place"), "OutOfMemoryError: no memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_contender_raises_is_its_own(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Textbook):
        name = "broken"

        def forward(self) -> Answer:
            raise error

    contenders.contenders()
    monkeypatch.setitem(registry._REGISTRY, "broken", Broken)
    suite = suites.Suite("test", suites.cases(SHAPE), ("broken", "ours"), rounds=1, device="cpu")
    for case in runner.run(suite)["cases"]:
        broken, ours = case["contenders"].values()
        assert broken["status"] == "failed"
        assert broken["reason"] == said
        assert broken["seconds"] is None
        assert ours["status"] == "ok"


def test_what_fails_backward_keeps_its_forward_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(Textbook):
        name = "halved"

        def gradients(self) -> dict[str, torch.Tensor]:
            return {name: value / 2 for name, value in super().gradients().items()}

    contenders.contenders()
    monkeypatch.setitem(registry._REGISTRY, "halved", Halved)
    suite = suites.Suite("test", suites.cases(SHAPE), ("halved", "ours"), rounds=1, device="cpu")
    forward, backward = (case["contenders"]["halved"] for case in runner.run(suite)["cases"])
    assert forward["status"] == "ok"
    assert forward["seconds"]["median"] > 0
    assert (backward["status"], backward["seconds"]) == ("failed", None)
    assert "gradient_error 5.00e-01" in backward["reason"]


def test_a_contender_that_fails_while_it_is_timed_fails_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = 3
    counts = {"first": 0, "later": 0}

    def failing(kind: str, after: int, error: Exception) -> type[Textbook]:
        class Failing(Textbook):
            name = kind

            def forward(self) -> Answer:
                # The verified run, the limit's and those that memory is taken from come first.
                counts[kind] += timed
                if counts[kind] > after:
                    raise error
                return super().forward()

        return Failing

    timed, interleaved = False, timing.interleaved

    def recording(*arguments: Any, **options: Any) -> Any:
        nonlocal timed
        timed = True
        try:
            return interleaved(*arguments, **options)
        finally:
            timed = False

    contenders.contenders()
    memory = torch.OutOfMemoryError("CUDA out of memory\nTried to allocate")
    for kind in (failing("first", 0, ValueError("too wide")), failing("later", 2, memory)):
        monkeypatch.setitem(registry._REGISTRY, kind.name, kind)
    monkeypatch.setattr(timing, "interleaved", recording)
    monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 1e-9)
    names = ("first", "later", "textbook", "ours")
    suite = suites.Suite("test", suites.cases(SHAPE), names, rounds=rounds, device="cpu")
    for case in runner.run(suite)["cases"]:
        first, later, textbook, ours = case["contenders"].values()
        assert (first["status"], later["status"]) == ("failed", "failed")
        assert first["reason"] == "ValueError: too wide"
        assert later["reason"] == "OutOfMemoryError: CUDA out of memory"
        assert first["seconds"] is later["seconds"] is later["ratio"] is None
        assert [len(entry["seconds"]["samples"]) for entry in (textbook, ours)] == [rounds] * 2
    assert counts == {"first": 1, "later": 3}


def test_what_fails_in_a_round_is_raised_where_nobody_takes_it() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        timing.interleaved({"a": fail}, 1)
    said: list[str] = []
    found = timing.interleaved(
        {"a": fail, "b": lambda: None}, 2, failed=lambda name, error: said.append(f"{name} {error}")
    )
    assert (list(found[0]), said) == (["b"], ["a no"])
