r"""What a solve should cost on a device, from bytes, operations, launches and meetings.

A program of schedule *row* streams all weights of its block through its multiprocessor every step,
one of the others the columns of its group. G programs of schedule *cooperative* meet three times a
step; in *step* the host launches each phase, of which an adjoint has one more:

    bytes       = products (W^2 b / g + BM W 4)  +  (4 M + 6) BM W 4 / g       per program and step
    operations  = products 2 BM W^2 / g
    step        = waves max(bytes / L2, operations / rate) + phases latency
                  + meetings barrier or phases host
    solve       = launch + steps step

with g = 1 or G, b the bytes of a weight, L2 and rate those of one multiprocessor (rate times the
part of a matrix instruction's 64 rows that BM fills), and waves the programs over the
multiprocessors, rounded up. Where all weights exceed the L2 cache, what they take from memory is a
floor of a step. Every step counts as one with bfloat16 products where the solve has any, and what
the ladder keeps of an exact evaluation is not counted. Where nothing was tuned, the model chooses
the schedule. The constants are `DEVICES`; only those of the H200 were measured (by others, on one),
the rest are data sheets', and what none gives is marked assumed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

from .config import MAX_PADDED, SCHEDULES, Config, shipped, shipped_schedules
from .layout import Layout


@dataclass(frozen=True)
class Device:
    """Constants of a device; rates per second, times in seconds.

    Attributes:
        multiprocessors: of the whole device.
        bf16, tf32: dense matrix operations, of the whole device.
        memory: bytes from HBM.
        l2: bytes from L2, of one multiprocessor.
        cache: bytes of L2.
        launch, barrier: of a kernel, and of a meeting between programs.
        capability: as `config.shipped` takes it.
        source: of these.
    """

    multiprocessors: int
    bf16: float
    tf32: float
    memory: float
    l2: float
    cache: float
    launch: float
    barrier: float
    capability: int
    source: str


H200 = Device(
    132, 790e12, 395e12, 4.3e12, 110e9, 50e6, 3e-6, 1e-6, 90,
    "measured on an H200 (bf16, memory, l2, launch, barrier); tf32 half of bf16; L2 50 MB: data "
    "sheet",
)  # fmt: skip

DEVICES = {
    "h200": H200,
    "h100": replace(
        H200, memory=3.35e12,
        source="H100 SXM data sheet (memory 3.35 TB/s, L2 50 MB); the rest as H200, which has the "
        "same processor",
    ),
    "a100": Device(
        108, 312e12, 156e12, 2.04e12, 67e9, 40e6, 3e-6, 1e-6, 80,
        "A100 80 GB data sheet; L2 5120 bytes per clock at 1.41 GHz (A100 white paper) over 108; "
        "launch and barrier assumed as H200",
    ),
    "mi300x": Device(
        304, 1307e12, 654e12, 5.3e12, 113e9, 4e6, 3e-6, 1e-6, 0,
        "MI300X data sheet; L2 2048 bytes per clock and die at 2.1 GHz over 38 units, 4 MB per die "
        "(CDNA 3 white paper); launch and barrier assumed as H200",
    ),
}  # fmt: skip

HOST = 10e-6
"""Seconds that the host takes to launch a program of this many arguments (assumed)."""

LATENCY = 0.5e-6
"""Seconds from the last load of a phase to the first of the next, inside a program (assumed)."""

EFFORT = {64: {16: 1.0, 32: 2.1, 64: 3.0}, 128: {16: 1.0, 32: 1.5, 64: 3.1}}
"""Of a cooperative program's step by its rows, for groups up to so many channels: measured on an
H100 at widths 256 and 500."""

PRODUCTS = {"modality": 2, "fusion": 2}
PHASES = {"forward": 3, "adjoint": 4}
MEETINGS = 3
STEPS = {"modality": 11, "fusion": 14}
"""To a relative residual of 1e-3 at the initial parameters, from the design's measurements."""


@dataclass(frozen=True)
class Prediction:
    """Of one solve.

    Attributes:
        block, schedule: what is solved, and how.
        programs, waves: in all, and after one another.
        bytes, operations: of one program and step.
        step, solve: seconds.
        limiter: "L2", "matrix", "memory" or "latency", the largest part of a step.
    """

    block: str
    schedule: str
    programs: int
    waves: int
    bytes: float
    operations: float
    step: float
    solve: float
    limiter: str


def predict(
    block: str, rows: int, dim: int, modalities: int, device: Device, config: Config, *,
    groups: int = 4, memory: int = 5, low: bool = True, adjoint: bool = False,
    steps: int | None = None,
) -> Prediction:  # fmt: skip
    """The cost of one solve.

    Args:
        block: "modality" (all N at once) or "fusion".
        rows, dim, modalities, groups: R, d, N, G.
        device, config: constants and tiles.
        memory: m of Anderson mixing.
        low: bfloat16 products, else tf32 ones of fp32 weights.
        adjoint: of the backward solve.
        steps: None: `STEPS`.

    Raises:
        ValueError: for an unknown block, sizes below 1, or a group wider than a tile may be.
    """
    if block not in PRODUCTS:
        raise ValueError(f"block: got {block!r}, expected one of {', '.join(PRODUCTS)}")
    for name, value in (("rows", rows), ("modalities", modalities)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    layout = Layout(dim, groups)
    if layout.padded > MAX_PADDED:
        raise ValueError(
            f"dim {dim} in {groups} groups: got {layout.group} channels per group, the GPU "
            f"programs have at most {MAX_PADDED}"
        )
    width, share = layout.width, 1 if config.schedule == "row" else groups
    count = modalities if block == "modality" else 1
    programs = math.ceil(rows / config.rows) * count * share
    waves = math.ceil(programs / device.multiprocessors)
    products, row_bytes = PRODUCTS[block], config.rows * width * 4
    weights = products * width * width * (2 if low else 4)
    moved = weights / share + products * row_bytes + (4 * memory + 6) * row_bytes / share
    operations = products * 2 * config.rows * width * width / share
    rate = (device.bf16 if low else device.tf32) / device.multiprocessors
    # A matrix instruction of 64 rows takes the same time for fewer.
    rate *= min(1.0, config.rows / 64)
    parts = {"L2": waves * moved / device.l2, "matrix": waves * operations / rate}
    if weights * count > device.cache:
        parts["memory"] = waves * weights * count / device.memory
    phases = PHASES["adjoint" if adjoint else "forward"]
    waiting = phases * LATENCY
    if config.schedule == "cooperative":
        waiting += MEETINGS * device.barrier
    elif config.schedule == "step":
        waiting += phases * max(device.launch, HOST)
    step = max(parts.values()) + waiting
    limiter = max(parts, key=lambda name: parts[name])
    if waiting > parts[limiter]:
        limiter = "latency"
    taken = STEPS[block] if steps is None else steps
    solve = device.launch + taken * step
    return Prediction(
        block, config.schedule, programs, waves, moved, operations, step, solve, limiter
    )


def like(capability: int, processors: int) -> Device:
    """Constants of the known device next to one, with its own number of multiprocessors."""
    known = DEVICES["mi300x" if capability == 0 else "a100" if capability < 90 else "h200"]
    return replace(known, multiprocessors=processors)


@functools.lru_cache(maxsize=1024)
def default_config(
    rows: int, layout: Layout, blocks: int, processors: int, *, adjoint: bool, capability: int,
    half: bool = False,
) -> Config:  # fmt: skip
    """What runs where nothing was tuned.

    From capability 90 on schedule cooperative, which was the fastest at every shape measured on an
    H100, below 100 with so many rows to a program that all are through in the least time, by
    `EFFORT`; else, and where not even one row block fits the device, the shipped schedule with the
    least predicted step, by the constants of the known device next to this one, with its own number
    of multiprocessors.

    Args:
        rows, layout, blocks: R, widths, and the number of blocks (N for the modalities, 1 for
            fusion).
        processors: multiprocessors of the device; 0 in the interpreter, which runs row.
        adjoint, capability, half: as in `config.shipped`.
    """
    known: dict[str, Any] = {
        "adjoint": adjoint, "capability": capability, "padded": layout.padded, "half": half,
    }  # fmt: skip
    if processors == 0 or rows == 0 or blocks == 0:
        return shipped("row", **known)
    device = like(capability, processors)
    slots = processors // (blocks * layout.groups)
    if capability >= 90 and slots:
        tiles = 16
        if capability < 100 and layout.padded <= 128:
            effort = EFFORT[64 if layout.padded <= 64 else 128]
            tiles = min(effort, key=lambda bm: effort[bm] * math.ceil(math.ceil(rows / bm) / slots))
        return shipped("cooperative", **known, rows=tiles)
    costs: dict[Config, float] = {}
    for schedule in shipped_schedules(adjoint, capability, layout.padded):
        config = shipped(schedule, **known)
        p = predict(
            "modality", rows, layout.dim, blocks, device, config, groups=layout.groups,
            adjoint=adjoint,
        )  # fmt: skip
        if schedule != "cooperative" or slots:
            costs[config] = p.step
    return min(costs, key=costs.__getitem__)


def table(rows: int, dim: int, modalities: int, target: str, **options: bool | int) -> str:
    """Predictions of both solves in every schedule for a target of `DEVICES`, as text.

    Raises:
        ValueError: for an unknown target, and as `predict` does.
    """
    if target not in DEVICES:
        raise ValueError(f"target: got {target!r}, expected one of {', '.join(DEVICES)}")
    device = DEVICES[target]
    lines = [
        f"{target}: {rows} rows, width {dim}, {modalities} modalities (predicted, not measured)",
        f"{'block':<10}{'schedule':<13}{'programs':>9}{'waves':>7}{'KB/step':>9}{'us/step':>9}"
        f"{'us/solve':>10}  limiter",
    ]
    for schedule in SCHEDULES:
        for block in PRODUCTS:
            padded = Layout(dim, int(options.get("groups", 4))).padded
            config = shipped(schedule, adjoint=False, capability=device.capability, padded=padded)
            p = predict(block, rows, dim, modalities, device, config, **options)  # type: ignore[arg-type]
            lines.append(
                f"{block:<10}{schedule:<13}{p.programs:>9}{p.waves:>7}{p.bytes / 1e3:>9.0f}"
                f"{1e6 * p.step:>9.1f}{1e6 * p.solve:>10.0f}  {p.limiter}"
            )
    lines.append(f"constants: {device.source}")
    lines.append(
        f"assumed: {1e6 * HOST:g} us of the host per launch, {1e6 * LATENCY:g} us of latency per "
        f"phase; steps to 1e-3: {', '.join(f'{name} {n}' for name, n in STEPS.items())}"
    )
    return "\n".join(lines)
