"""The `bench` command."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

DEFAULT_OUT = "reports/bench"


def register_commands(subparsers: Any) -> None:
    """Adds `bench` to an argparse subparsers object; the parsed result's `run` starts it."""
    parser = subparsers.add_parser(
        "bench",
        help="time equilibrium fusion against other implementations",
        description="Times forward, and forward and backward, of several implementations on the "
        "same problem, at equal residual verified in fp64. Prints a table; writes JSON and a "
        "picture.",
    )
    parser.add_argument("--suite", default="quick", help="quick (default, about a minute) or cpu")
    parser.add_argument(
        "--out",
        default=DEFAULT_OUT,
        metavar="DIR",
        help=f"folder for SUITE.json and SUITE.png (default {DEFAULT_OUT})",
    )
    parser.add_argument("--threads", metavar="N[,N...]", help="torch threads, one pass each")
    parser.add_argument("--contenders", metavar="NAME[,NAME...]", help="instead of the suite's")
    parser.add_argument(
        "--shape", action="append", metavar="B,d,N", help="instead of the suite's; repeatable"
    )
    parser.add_argument("--rounds", type=int, metavar="R", help="samples of each contender")
    parser.add_argument("--seed", type=int, metavar="S", help="of parameters and inputs")
    parser.add_argument(
        "--loss", help="sum (default) or mean over the batch: scale of the incoming gradient"
    )
    parser.add_argument(
        "--predict", metavar="DEVICE",
        help="print what the GPU programs should cost on h200, h100, a100 or mi300x for the "
        "shapes, by the cost model, and end",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list suites and contenders, and end")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Args:
        arguments: as parsed by the parser of `register_commands`.

    Returns:
        0, or 1 if our own implementation missed the target residual in some case.

    Raises:
        ValueError: naming an unknown suite or contender, or an option that does not parse; a
            `DEQFUSION_BACKEND` that cannot run.
        OSError: if the folder cannot be written.
    """
    import torch

    from deqfusion.ops import checked_implementation

    from . import contenders, report, runner, suites

    if arguments.list:
        print(report.listing())
        return 0
    suite = suites.get(arguments.suite, **_changes(arguments))
    if arguments.predict is not None:
        from deqfusion.kernels import cost

        for shape in suite.shapes:
            print(cost.table(shape.batch, shape.dim, shape.num_modalities, arguments.predict))
            print()
        return 0
    checked_implementation(torch.device("cpu"))
    for name in suite.contenders:
        contenders.get(name)
    out = _writable(Path(arguments.out))
    json_path, picture_path = out / f"{suite.name}.json", out / f"{suite.name}.png"

    with report.Progress(sys.stderr) as progress:
        result = runner.run(
            suite,
            progress=progress.show,
            save=lambda partial: report.write_json(partial, json_path),
        )
    print(report.table(result))
    report.picture(result, picture_path)
    print(f"\n{json_path}\n{picture_path}")
    ours = [case["contenders"].get(runner.REFERENCE) for case in result["cases"]]
    return int(any(entry is not None and entry["status"] == "failed" for entry in ours))


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as fields of a suite."""
    from .problem import Shape

    changes: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("rounds", "seed", "loss")
        if getattr(arguments, name) is not None
    }
    if arguments.threads is not None:
        try:
            changes["threads"] = tuple(int(part) for part in arguments.threads.split(","))
        except ValueError as error:
            raise ValueError(
                f"--threads must be counts such as 1,2, got {arguments.threads!r}"
            ) from error
    if arguments.contenders is not None:
        changes["contenders"] = tuple(arguments.contenders.split(","))
    if arguments.shape is not None:
        changes["shapes"] = tuple(Shape.parse(text) for text in arguments.shape)
    return changes


def _writable(folder: Path) -> Path:
    """Creates the folder and tries it, before minutes of measuring."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write to {folder}")
    return folder
