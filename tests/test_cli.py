"""The command line: which commands exist, what their exit codes and error lines are."""

from __future__ import annotations

import argparse
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from deqfusion import cli, kernels
from deqfusion.solution import ConvergenceError

Install = Callable[[Callable[[argparse.Namespace], int | None]], None]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that makes its argument the only command, named ``work``."""

    def install(run: Callable[[argparse.Namespace], int | None]) -> None:
        def register_commands(subparsers: argparse._SubParsersAction) -> None:
            parser = subparsers.add_parser("work")
            parser.add_argument("--times", type=int, default=1)
            parser.set_defaults(run=run)

        module = types.ModuleType("deqfusion_test_stand_in")
        module.register_commands = register_commands
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "COMMANDS", {"work": (module.__name__, "work")})

    return install


def refuse(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        raise error

    return run


def error_line(arguments: list[str], program: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which arguments that do not parse are refused."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(program)
    return captured.err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    for name, (_, help_line) in cli.COMMANDS.items():
        assert name in listed
        assert help_line in " ".join(listed.split())


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help_and_a_function_to_run(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: deqfusion {command}")


@pytest.mark.parametrize("module", sorted({module for module, _ in cli.COMMANDS.values()}))
def test_modules_register_the_commands_listed_for_them_and_no_other(module: str) -> None:
    expected = {name for name, (owner, _) in cli.COMMANDS.items() if owner == module}
    parser = cli.build_parser(min(expected))
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    assert set(actions[0].choices) == expected


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["analyse"]])
def test_missing_and_unknown_commands_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "COMMAND" in error_line(arguments, "deqfusion", capsys)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
@pytest.mark.parametrize("option", ["--no-such-option", "--two\nlines"])
def test_unknown_options_are_refused(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error_line([command, option], "deqfusion", capsys)


def test_arguments_are_refused_in_the_name_of_their_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = error_line(["train", "rosmap", "--epochs", "0"], "deqfusion train rosmap", capsys)
    assert "argument --epochs: got '0', expected" in error
    assert error.endswith("(see deqfusion train rosmap --help)\n")
    for command, more in (("train rosmap", "--data-dir a --out b"), ("demo", "--out b")):
        error = error_line(f"{command} {more} --lr-0 1".split(), f"deqfusion {command}", capsys)
        assert "unrecognized arguments: --lr-0 1" in error
        assert error.endswith(f"(see deqfusion {command} --help)\n")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (2, 2)])
def test_exit_code_is_what_the_command_returns(
    returned: int | None, code: int, stand_in: Install
) -> None:
    stand_in(lambda options: returned)
    assert cli.main(["work"]) == code


def test_options_reach_the_command(stand_in: Install) -> None:
    stand_in(lambda options: options.times)
    assert cli.main(["work", "--times", "2"]) == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("dim: got 0,\n  expected > 0"), 2, "dim: got 0, expected > 0"),
        (
            FileNotFoundError(2, "No such file", "a.csv"),
            2,
            "a.csv: cannot be read or written (No such file), expected that it can",
        ),
        (OSError(), 2, "OSError"),
        (ConvergenceError("fusion: 3 rows"), 1, "fusion: 3 rows"),
    ],
)
def test_refusals_are_one_line(
    error: Exception,
    code: int,
    line: str,
    stand_in: Install,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in(refuse(error))
    assert cli.main(["work"]) == code
    captured = capsys.readouterr()
    assert captured.err == f"deqfusion: error: {line}\n"
    assert captured.out == ""


def test_data_and_checkpoint_errors_are_refusals() -> None:
    from deqfusion.data import DataError
    from deqfusion.engine import CheckpointError

    assert issubclass(DataError, ValueError)
    assert issubclass(CheckpointError, ValueError)


def test_traceback_on_request(stand_in: Install, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(refuse(ValueError("here")))
    assert cli.main(["--traceback", "work"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("deqfusion: error: here\n")


def test_interruption(stand_in: Install, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(refuse(KeyboardInterrupt()))
    assert cli.main(["work"]) == 130
    assert capsys.readouterr().err == "deqfusion: interrupted\n"


def test_mistakes_in_the_program_are_not_hidden(stand_in: Install) -> None:
    stand_in(refuse(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["work"])


@pytest.mark.parametrize(
    "arguments",
    [
        "demo --out out",
        "train rosmap --data-dir nowhere --out out",
        "evaluate --data-dir nowhere --checkpoint nowhere",
        "bench --out out",
        "autotune --dim 16 --out out --device cpu",
    ],
)
@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("triton", "DEQFUSION_BACKEND=triton: got CPU tensors, expected"),
        ("nonsense", "DEQFUSION_BACKEND: got 'nonsense', expected"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_before_anything_is_written(
    arguments: str,
    backend: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEQFUSION_BACKEND", backend)
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    assert cli.main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"deqfusion: error: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["deqfusion", "deqfusion.cli"])
def test_runs_as_a_module(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("deqfusion ")
    assert done.stderr == ""


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    program = """
import sys, types
from deqfusion import cli

def register_commands(subparsers):
    parser = subparsers.add_parser("work")
    parser.set_defaults(run=lambda options: print("line\\n" * 100_000))

sys.modules["stand_in"] = types.SimpleNamespace(register_commands=register_commands)
cli.COMMANDS["work"] = ("stand_in", "work")
sys.exit(cli.main(["work"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_help_of_a_task_says_what_an_option_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "sunrgbd", "--help"])
    text = capsys.readouterr().out
    shown = " ".join(text.split())
    for words in (
        "deq, concat, sum, gated, tensor, attention, weight_tied:K (default deq)",
        "anderson, picard or broyden (default anderson)",
        "constant, cosine or step (default cosine)",
        "(default 0.1 for deq, else 0)",
    ):
        assert words in shown
    headings = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert len(headings) == len(set(headings))
