"""The command line: ``deqfusion COMMAND ...``, the same as ``python -m deqfusion.cli COMMAND ...``.

Exit codes: 0 done; 1 ran, but the result is not good (a solve that did not converge, a self-test
that failed); 2 wrong arguments or unusable input, with one line on standard error that says what
was got and what was expected; 130 interrupted.

The commands live beside what they run; a module is imported only when one of its commands is
chosen, so that asking for help stays quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

__all__ = ["COMMANDS", "build_parser", "main", "run"]

#: Name of each command: the module whose ``register_commands`` adds it, and its line of help.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("deqfusion.tasks", "train, compare and time fusions on handwritten digits"),
    "train": ("deqfusion.tasks", "train a model on a task's data"),
    "evaluate": ("deqfusion.tasks", "evaluate a checkpoint"),
    "analyze": (
        "deqfusion.analysis",
        "compare fusions and look into trained models, each a table and a picture",
    ),
    "bench": ("deqfusion.bench", "time equilibrium fusion against other implementations"),
    "plot": ("deqfusion.bench", "draw a result of bench again"),
    "autotune": (
        "deqfusion.tuning.command",
        "find what solves fastest on this device, and keep it for later runs",
    ),
    "doctor": ("deqfusion.doctor", "say what is installed, what runs where, and whether it works"),
}


class Parser(argparse.ArgumentParser):
    """A parser, its commands' parsers alike, that refuses arguments in one line, without usage."""

    def error(self, message: str) -> NoReturn:
        """End the process with code 2 and the message on standard error."""
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the base's, but refuse what is unknown in the name of the command it was given to."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown


def chosen_command(arguments: Sequence[str]) -> str | None:
    """Return the command among the arguments, or None where there is none or an unknown one."""
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    return first if first in COMMANDS else None


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser, with the options of one command.

    Args:
        command: the command to be parsed, a key of `COMMANDS`: its module is imported and adds
            its options. None: every command's name and line of help, without options.

    Returns:
        A parser whose result holds ``run``, a function of that result that returns an exit code.
    """
    parser = Parser(
        prog="deqfusion",
        description="Deep equilibrium multimodal fusion.",
        epilog="deqfusion COMMAND --help lists a command's options.",
    )
    parser.add_argument(
        "--version", action="version", version=f"deqfusion {metadata.version('deqfusion')}"
    )
    parser.add_argument(
        "--traceback", action="store_true", help="where input is refused, show where in the code"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    if command is None:
        for name, (_, help_line) in COMMANDS.items():
            subparsers.add_parser(name, help=help_line)
    else:
        importlib.import_module(COMMANDS[command][0]).register_commands(subparsers)
    return parser


def one_line(error: BaseException | str) -> str:
    """Return an error's message on one line, or its type where it has none."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        # Of open, mkdir and their kind, which say nothing of what was expected.
        return (
            f"{error.filename}: cannot be read or written ({error.strerror}), expected that it can"
        )
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; None takes them from the process.

    Returns:
        The exit code: 0, 1, 2 or 130 (see the module's docstring).

    Raises:
        SystemExit: from ``--help`` and ``--version`` (0), and on arguments that do not parse (2).
    """
    from deqfusion.solution import ConvergenceError

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    show_traceback = False
    try:
        options = build_parser(chosen_command(arguments)).parse_args(arguments)
        show_traceback = options.traceback
        code = int(options.run(options) or 0)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("deqfusion: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of standard output has gone: nothing to tell it, and the interpreter's own
        # flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConvergenceError, ValueError, OSError) as error:
        if show_traceback:
            traceback.print_exc()
        print(f"deqfusion: error: {one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, ConvergenceError) else 2


def run() -> NoReturn:
    """Run the command line as a program: end the process with the exit code of `main`."""
    code: Any = 1
    try:
        code = main()
    except SystemExit as error:
        code = error.code
    except Exception:
        sys.excepthook(*sys.exc_info())
    # One of several processes ends in its own way; `distributed` is not imported to find that out.
    distributed = sys.modules.get("deqfusion.engine.distributed")
    if distributed is not None:
        distributed.leave(code or 0)
    sys.exit(code)


if __name__ == "__main__":
    run()
