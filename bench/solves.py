"""Times of the solves' Triton programs by themselves, one config beside another, on a GPU.

    python -m deqfusion.bench.solves --shape 256,512,2 --precision medium \\
        --config auto --config cooperative,16,64,8,3 [--backward] --out OUT.json

A config is schedule, rows, depth, warps and stages of `deqfusion.kernels.config.Config`, or `auto`:
what was tuned, else the default. Every answer is evaluated once more in fp64, and has a time only
where all rows meet the tolerance there. Device times are the profiler's, means over runs; wall
times medians by events, host included. After each line the file is written anew, so that what a
limit cuts off leaves the rest.

Compiling takes longer than measuring. `--compile K/OF` runs the K-th share (from 0) of the lines
once and measures nothing: processes beside one another fill Triton's cache for the measurement.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqfusion import Anderson, DEQFusion, Equilibrium, Implicit
from deqfusion.kernels import triton_version

from . import environment, peaks, warm
from .problem import Shape
from .results import write_json

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


def residuals(layer: DEQFusion, eq: Equilibrium, features: Tensor) -> Tensor:
    """||f(z) - z|| / ||f(z)|| of an answer z, evaluated in fp64: (N+1, rows)."""
    wide = DEQFusion(layer.dim, layer.num_modalities, **layer.options._asdict())
    wide = wide.to(features.device, torch.float64)
    wide.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    with torch.no_grad():
        z = torch.cat((eq.modalities, eq.fused.unsqueeze(0))).double()
        f = wide.cell(z, features.double())
    return (f - z).norm(dim=-1) / f.norm(dim=-1)


def measure(job: Job, device: torch.device, runs: int = 10) -> dict[str, Any]:
    """Runs a job and times its programs; without times where the answer is not verified."""
    from deqfusion.kernels.launch import ran, watching

    call, layer, features = _problem(job, device)
    with ran() as configs, watching() as compiled:
        eq = call()
    found = residuals(layer, eq, features.detach())
    line: dict[str, Any] = {
        "configs": [str(config) for config in dict.fromkeys(configs)],
        "steps": eq.stats.steps.amax(-1).tolist(),
        "worst_residual": float(found.max()),
        "programs": [asdict(each) for each in dict.fromkeys(compiled)],
    }
    # f(z) is returned, and where f contracts is nearer than z, which was tested.
    if not bool((found <= job.tol).all()):
        return {**line, "failed": f"a residual of {found.max():.3g}, expected at most {job.tol:g}"}
    return {**line, "device_us": _kernels(call, runs), "wall_us": _wall(call, runs)}


def _problem(job: Job, device: torch.device) -> tuple[Callable[[], Equilibrium], DEQFusion, Tensor]:
    from deqfusion.kernels.launch import using

    rows, dim, modalities = job.shape.batch, job.shape.dim, job.shape.num_modalities
    torch.manual_seed(0)
    solver = Anderson(tol=job.tol, max_steps=200)
    layer = DEQFusion(dim, modalities, solver=solver, adjoint=Implicit(solver)).to(device)
    features = torch.randn(modalities, rows, dim, device=device, requires_grad=job.backward)

    def call() -> Equilibrium:
        with nullcontext() if job.config is None else using(job.config):
            if not job.backward:
                with torch.no_grad():
                    return layer.equilibrium(features)
            layer.zero_grad(set_to_none=True)
            features.grad = None
            eq = layer.equilibrium(features)
            eq.fused.sum().backward()
            return eq

    return call, layer, features


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


def _wall(call: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return round(statistics.median(times), 1)


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
    device, before = torch.device("cuda"), torch.get_float32_matmul_precision()

    def measured(job: Job) -> dict[str, Any]:
        torch.set_float32_matmul_precision(job.precision)
        return measure(job, device)

    try:
        if parts is not None:
            for job in jobs[parts[0] :: parts[1]]:
                torch.set_float32_matmul_precision(job.precision)
                try:
                    _problem(job, device)[0]()
                except Exception as error:
                    print(f"{job}: {type(error).__name__}: {error}", file=sys.stderr)
            return 0
        return int(run(jobs, options.out, options.budget, measured) > 0)
    finally:
        torch.set_float32_matmul_precision(before)


if __name__ == "__main__":
    sys.exit(main())
