"""Times of the solves' Triton programs by themselves, one config beside another, on a GPU.

    python -m deqfusion.bench.solves --shape 256,512,2 --precision medium \\
        --config auto --config cooperative,16,64,8,3 [--backward] --out OUT.json

A config is schedule, rows, depth, warps and stages of `deqfusion.kernels.config.Config`, or `auto`:
what was tuned, else the default. Every answer is evaluated once more in fp64, and has a time only
where all rows meet the tolerance there. Device times are the profiler's, means over runs; wall
times medians, host included. After each line the file is written anew, so that what a
limit cuts off leaves the rest.

Compiling takes longer than measuring. `--compile K/OF` runs the K-th share (from 0) of the lines
once and measures nothing: processes beside one another fill Triton's cache for the measurement.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deqfusion.kernels import triton_version

from . import contenders, environment, peaks, timing, warm
from .contenders import Contender
from .contenders.base import products
from .problem import Problem, Shape
from .results import write_json
from .suites import MODES
from .verification import verify_state

AUTO = "auto"
PRECISIONS = ("highest", "high", "medium")
_FIELDS = "schedule,rows,depth,warps,stages"


class Job(NamedTuple):
    """A line: a shape, torch's precision of fp32 products, a config (None: the default)."""

    shape: Shape
    precision: str
    config: Any
    backward: bool
    tol: float


def parse_config(text: str) -> Any:
    """A config from `schedule,rows,depth,warps,stages`; None from `auto`.

    Raises:
        ValueError: if it is neither.
    """
    from deqfusion.kernels.config import Config

    if text == AUTO:
        return None
    schedule, *numbers = text.split(",")
    if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--config must be {AUTO} or {_FIELDS}, got {text!r}")
    return Config(schedule, *map(int, numbers))


def made(job: Job, device: torch.device) -> Contender:
    """This library on the job's problem."""
    contender = contenders.get("ours")(Problem(job.shape).to(device))
    contender.set_tolerances(job.tol, job.tol)
    return contender


@contextmanager
def under(job: Job) -> Iterator[None]:
    """The job's precision of products and config."""
    from deqfusion.kernels.launch import using

    with products(job.precision), nullcontext() if job.config is None else using(job.config):
        yield


def measure(job: Job, device: torch.device, runs: int = 10) -> dict[str, Any]:
    """Runs a job and times its programs; without times where the answer is not verified."""
    from deqfusion.kernels.launch import ran, watching

    contender, mode = made(job, device), MODES[int(job.backward)]
    with under(job):
        with ran() as configs, watching() as compiled:
            answer = contender.function(mode)()
        worst = verify_state(contender.problem, answer.state)
        line: dict[str, Any] = {
            "configs": [str(config) for config in dict.fromkeys(configs)],
            "steps": {
                name: int(torch.as_tensor(steps).max()) for name, steps in answer.solves.items()
            },
            "worst_residual": worst,
            "programs": [asdict(each) for each in dict.fromkeys(compiled)],
        }
        # f(z) is returned, and where f contracts is nearer than z, which was tested.
        if not worst <= job.tol:
            return {**line, "failed": f"a residual of {worst:.3g}, expected at most {job.tol:g}"}
        function, stopwatch = contender.function(mode), timing.Stopwatch(device)
        wall = timing.summary([stopwatch(function, 1)[0] for _ in range(runs)])["median"]
        return {**line, "device_us": _kernels(function, runs), "wall_us": round(1e6 * wall, 1)}


def _kernels(call: Callable[[], object], runs: int) -> dict[str, float]:
    """Microseconds per run of every program of ours, and of all others together."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(runs):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in recorded.key_averages():
        ours = event.key.endswith("_kernel") and "::" not in event.key
        name = event.key.removesuffix("_kernel") if ours else "others"
        times[name] = times.get(name, 0.0) + event.self_device_time_total / runs
    return {name: round(value, 2) for name, value in sorted(times.items())}


def run(
    jobs: Sequence[Job], out: Path, budget: float, measured: Callable[[Job], dict[str, Any]]
) -> int:
    """Measures jobs until `budget` seconds are over, writing `out` after each.

    Returns:
        How many have no time: not verified, not compiled, or left out.
    """
    begin, lines, without = time.monotonic(), [], 0
    record = environment.record()
    record["peaks"] = peaks.measure(torch.device("cuda")) if torch.cuda.is_available() else {}
    for job in jobs:
        line = {**job._asdict(), "shape": str(job.shape), "config": str(job.config or AUTO)}
        if time.monotonic() - begin > budget:
            line["failed"] = "not measured: out of time"
        else:
            try:
                line |= measured(job)
            except Exception as error:
                line["failed"] = f"{type(error).__name__}: {error}"
        without += "failed" in line
        lines.append(line)
        write_json({"environment": record, "solves": lines}, out)
        print(_text(line), flush=True)
    return without


def _text(line: dict[str, Any]) -> str:
    head = f"{line['shape']} {line['precision']} {line['config']}"
    if "failed" in line:
        return f"{head}: {line['failed']}"
    times = ", ".join(f"{name} {value:g}" for name, value in line["device_us"].items())
    return f"{head}: wall {line['wall_us']:g} us, steps {line['steps']}; {times}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; exit code 0, 1 where a line has no time, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m deqfusion.bench.solves", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", action="append", required=True, metavar="B,d,N")
    parser.add_argument("--config", action="append", metavar=f"{AUTO} or {_FIELDS}")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="default highest")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--tol", type=float, default=1e-3, help="of both solves")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--compile", metavar="K/OF", help="only fill the compiler's cache")
    parser.add_argument("--out", type=Path, default=Path("solves.json"), metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        if triton_version() is None:
            raise ValueError("Triton cannot be imported, expected it installed")
        parts = None if options.compile is None else warm.parse(options.compile)
        jobs = [
            Job(Shape.parse(shape), precision, config, options.backward, options.tol)
            for shape, precision, config in itertools.product(
                options.shape, options.precision or ("highest",),
                map(parse_config, options.config or (AUTO,)),
            )
        ]  # fmt: skip
        if not torch.cuda.is_available():
            raise ValueError("no GPU that torch can use, expected one")
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    if parts is None:
        return int(run(jobs, options.out, options.budget, partial(measure, device=device)) > 0)
    for job in jobs[parts[0] :: parts[1]]:
        try:
            with under(job):
                made(job, device).function(MODES[int(job.backward)])()
        except Exception as error:
            print(f"{job}: {type(error).__name__}: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
