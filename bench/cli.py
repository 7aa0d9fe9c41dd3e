"""The `bench` and `plot` commands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

DEFAULT_OUT = "reports/bench"
# Options that end without a measurement, each with those that it heeds.
_HEEDED = {
    "list": ("suite",),
    "predict": ("suite", "shape"),
    "warm": ("suite", "shape", "device", "contenders", "seed"),
}


def register_commands(subparsers: Any) -> None:
    """Adds `bench` and `plot` to an argparse subparsers object.

    The parsed result's `run` starts the command.
    """
    parser = subparsers.add_parser(
        "bench",
        help="time equilibrium fusion against other implementations",
        description="Times forward, and forward and backward, of several implementations on the "
        "same problem, at equal residual verified in fp64. Prints a table; writes JSON, pictures "
        "and a page with all of them.",
    )
    parser.add_argument("--suite", metavar="NAME", help="quick (default) or another of --list")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help=f"folder for SUITE.json, pictures and index.html (default {DEFAULT_OUT})",
    )
    parser.add_argument("--device", help="cpu, cuda or auto: CUDA where torch can use it")
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
        "--limit", type=float, metavar="S",
        help="seconds that a contender's samples may take in one mode of a case, on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, metavar="S",
        help="seconds for the whole run, about: cases and contenders that would take longer are "
        "skipped, which is said; default: no bound",
    )  # fmt: skip
    _add_compare(parser)
    parser.add_argument("--no-pictures", action="store_true", help="write the JSON file only")
    parser.add_argument(
        "--predict", metavar="DEVICE",
        help="print what the GPU programs should cost on h200, h100, a100 or mi300x for the "
        "shapes, by the cost model, and end",
    )  # fmt: skip
    parser.add_argument(
        "--warm", metavar="K/OF",
        help="only fill the compilers' caches, the K-th of OF parts (from 0), and end",
    )  # fmt: skip
    parser.add_argument(
        "--list", action="store_true",
        help="list suites and contenders, or with --suite what is in that one, and end",
    )  # fmt: skip
    parser.set_defaults(run=run)

    parser = subparsers.add_parser(
        "plot",
        help="draw a result of bench again",
        description="Draws the pictures and the page of a result file, and prints its table.",
    )
    parser.add_argument("file", metavar="FILE.json", help="as deqfusion bench writes it")
    parser.add_argument("--out", metavar="DIR", help="folder for them (default: the file's)")
    _add_compare(parser)
    parser.set_defaults(run=plot)


def _add_compare(parser: Any) -> None:
    parser.add_argument(
        "--compare", metavar="OLD.json", help="print what got slower or faster, beyond noise"
    )
    parser.add_argument(
        "--across-machines", action="store_true", help="compare also with another machine's result"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs `bench`.

    Args:
        arguments: as parsed by the parser of `register_commands`.

    Returns:
        0, or 1 if our own implementation missed the target residual in some case.

    Raises:
        ValueError: naming an unknown suite, contender or device, or an option that does not parse;
            a `DEQFUSION_BACKEND` that cannot run; a file to compare with that is none.
        OSError: if the folder cannot be written, or a file not read.
    """
    from . import contenders, page, report, results, runner, suites
    from . import warm as warming

    _refuse_unheeded(arguments)
    suite = suites.get(arguments.suite or "quick", **_changes(arguments))
    if arguments.list:
        here = runner.device_of(suites.get("quick"))
        print(report.details(suite, here) if arguments.suite else report.listing(here))
        return 0
    if arguments.predict is not None:
        from deqfusion.kernels import cost

        for shape in dict.fromkeys(case.shape for case in suite.cases):
            print(cost.table(shape.batch, shape.dim, shape.num_modalities, arguments.predict))
            print()
        return 0
    device = runner.device_of(suite)
    for name in runner.names_of(suite, device):
        reason = contenders.get(name).unavailable(device)
        if arguments.contenders is not None and reason is not None:
            raise ValueError(f"--contenders: got {name}, which cannot run here: {reason}")
    if arguments.warm is not None:
        warming.warm(suite, *warming.parse(arguments.warm))
        return 0

    from deqfusion.ops import checked_implementation

    checked_implementation(device)
    old = _old(arguments, runner.here(device))
    out = page.writable(Path(DEFAULT_OUT if arguments.out is None else arguments.out))
    json_path = out / f"{suite.name}.json"
    saved = False

    def save(partial: dict[str, Any]) -> None:
        nonlocal saved
        results.write_json(partial, json_path)
        saved = True

    try:
        with report.Progress(sys.stderr) as progress:
            result = runner.run(suite, progress=progress.show, save=save)
    except KeyboardInterrupt:
        if saved:
            print(f"what was measured is in {json_path}; deqfusion plot draws it", file=sys.stderr)
        raise
    print(report.table(result))
    print(f"\n{json_path}")
    if not arguments.no_pictures:
        print(*page.write(result, out), sep="\n")
    _print_changes(old, result)
    missed = [
        entry
        for case in result["cases"]
        for name, entry in case["contenders"].items()
        # Products in 16 bits cannot meet every tolerance: not met is reported, and no fault.
        if name.startswith("ours") and not name.endswith("_medium")
    ]
    return int(any(entry["status"] == "failed" for entry in missed))


def plot(arguments: argparse.Namespace) -> int:
    """Runs `plot`.

    Raises:
        ValueError: if a file is no result of this benchmark.
        OSError: if one cannot be read, or the folder not written.
    """
    from . import page, report, results

    path = Path(arguments.file)
    result = results.read_json(path)
    old = _old(arguments, result)
    out = page.writable(path.parent if arguments.out is None else Path(arguments.out))
    print(report.table(result))
    print()
    print(*page.write(result, out), sep="\n")
    _print_changes(old, result)
    return 0


def _refuse_unheeded(arguments: argparse.Namespace) -> None:
    """Refuses options beside one that ends without a measurement, and without them."""
    given = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("command", "run", "traceback") and value not in (None, False)
    }
    for mode, heeded in _HEEDED.items():
        for name in given if mode in given else ():
            if name not in (mode, *heeded):
                raise ValueError(
                    f"--{name.replace('_', '-')}: got it with --{mode}, which has no use for it, "
                    "expected it left out"
                )


def _old(arguments: argparse.Namespace, new: dict[str, Any]) -> dict[str, Any] | None:
    """The result to compare with, read and found comparable before minutes of measuring."""
    from . import changes, results

    if arguments.compare is None:
        if arguments.across_machines:
            raise ValueError("--across-machines: got it without --compare, expected both or none")
        return None
    old = results.read_json(Path(arguments.compare))
    if not arguments.across_machines:
        changes.check_machines(old, new, arguments.compare)
    return old


def _print_changes(old: dict[str, Any] | None, result: dict[str, Any]) -> None:
    from . import changes

    if old is not None:
        print(f"\n{changes.text(old, result)}")


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as fields of a suite."""
    from . import suites
    from .problem import Shape

    changes: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("rounds", "seed", "loss", "limit", "budget", "device")
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
        changes["contenders"] = changes["on_gpu"] = tuple(arguments.contenders.split(","))
    if arguments.shape is not None:
        changes["cases"] = suites.cases(*map(Shape.parse, arguments.shape))
    return changes
