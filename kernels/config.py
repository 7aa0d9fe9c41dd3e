"""How a program is cut into tiles, which schedule runs it, and how its products are rounded."""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_MEMORY = 8
PRECISIONS = ("ieee", "tf32", "tf32x3", "half")
"""Of products: fp32 as it is, in tensor-core formats of 10 and of 3 times 10 bits, and float16 (in
the steps, tf32 elsewhere: as many bits in half as many bytes)."""

COUNTERS = 1024
"""Of meetings, packed with a block; a solve of more row blocks has its own."""

SCHEDULES = ("row", "cooperative", "step")
MAX_PADDED = 1024
"""Channels of a padded group that a tile may have."""


@dataclass(frozen=True)
class Config:
    """Tiles and schedule of a program.

    Args:
        schedule: "row": one program solves some rows; "cooperative": G programs, a group each;
            "step": the same, and a launch for every phase of a step.
        rows: BM, rows of a program: a power of two, at least 16.
        depth: BK, channels of a product's inner step: a power of two, at least 16; more than the
            padded group's width is cut to that.
        warps, stages: as Triton takes them; warps a power of two.

    Raises:
        ValueError: naming the field, what was got and what was expected.
    """

    schedule: str = "row"
    rows: int = 16
    depth: int = 32
    warps: int = 8
    stages: int = 2

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule: got {self.schedule!r}, expected one of {', '.join(SCHEDULES)}"
            )
        for name in ("rows", "depth"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}: got {value}, expected a power of two, at least 16")
        for name in ("warps", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.warps & (self.warps - 1):
            raise ValueError(f"warps: got {self.warps}, expected a power of two")


@dataclass(frozen=True)
class SolveOptions:
    """A solve in plain values.

    Args:
        rtol, atol: a row ends at ||g|| <= atol + rtol ||f||.
        max_steps: evaluations at most, >= 1.
        memory: m of Anderson mixing, 0 to 8; 0 and 1 are plain iteration.
        ridge, relative: of the Gram matrix.
        mixing: beta.
        precision: of products, one of `PRECISIONS`.
        ladder: whether steps far from the tolerance have bfloat16 products.
        truncated: `max_steps` damped steps and no more (phantom gradients); of an adjoint only.

    Raises:
        ValueError: naming the field, what was got and what was expected.
    """

    rtol: float = 1e-3
    atol: float = 0.0
    max_steps: int = 50
    memory: int = 5
    ridge: float = 1e-8
    relative: bool = True
    mixing: float = 1.0
    precision: str = "ieee"
    ladder: bool = False
    truncated: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.memory <= MAX_MEMORY:
            raise ValueError(
                f"memory: got {self.memory}, expected 0 to {MAX_MEMORY} in the Triton programs "
                f"(schedules {', '.join(SCHEDULES)}; any on the reference: "
                "DEQFUSION_BACKEND=reference)"
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps: got {self.max_steps}, expected at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision: got {self.precision!r}, expected one of {', '.join(PRECISIONS)}"
            )

    @property
    def slots(self) -> int:
        """M of the programs: evaluations kept, 0 for plain iteration, 1 for a truncated solve."""
        if self.truncated:
            return 1
        return self.memory if self.memory > 1 else 0

    @property
    def climbs(self) -> bool:
        """Whether there are two kinds of steps: not where products in tf32 take about as long."""
        return self.ladder and not self.truncated and self.precision in ("ieee", "tf32x3")

    @property
    def cheap(self) -> str:
        """LADDER of the programs: how steps multiply in 16 bits, "" if they do not.

        A truncated solve does not: its gradients are of any size, and float16 is not.
        """
        if self.precision == "half":
            return "" if self.truncated else "half"
        return "low" if self.climbs else ""

    @property
    def exact(self) -> str:
        """PRECISION of the programs: of products that are not in 16 bits."""
        return "tf32" if self.precision == "half" else self.precision

    @property
    def low(self) -> str:
        """The format of 16 bits that weights are packed in, "" for none."""
        return {"": "", "half": "float16", "low": "bfloat16"}[self.cheap]

    @property
    def planes(self) -> int:
        """Planes (BM, W) that `cheap` takes of a row block's scratch, see `kernels.solver`."""
        return {"": 0, "half": 1, "low": 5}[self.cheap]

    @property
    def products(self) -> str:
        """Precisions of the products, as tuned entries name them."""
        return self.precision + ("+low" if self.climbs else "")


MOST_HELD = 64
"""Registers of a thread for the history of a resident program."""


def in_registers(config: Config, padded: int, slots: int, climbs: bool) -> bool:
    """Whether programs keep the history in their registers (`kernels.resident`).

    padded, slots, climbs: P, M, and whether there is a ladder.
    """
    held = 2 * (slots - 1) * config.rows * padded
    small = slots > 1 and held <= MOST_HELD * 32 * config.warps
    return small and config.schedule == "cooperative" and not climbs


def shipped(
    schedule: str, *, adjoint: bool, capability: int, padded: int = 128, rows: int = 16,
    half: bool = False,
) -> Config:  # fmt: skip
    """What runs where nothing was tuned.

    Args:
        schedule: of `SCHEDULES`.
        adjoint: whether for a backward solve.
        capability: of a CUDA device, as 80 or 90; 0 for others.
        padded: P, channels of a padded group.
        rows: of a program; schedule step has its own.
        half: whether steps multiply in float16, with as many bytes to a stage.

    With 16 rows nearly without spills (`targets.MOST_SPILLED`) up to groups of 256 channels, with
    the default solver and cell. Below 90 the compiler keeps more of a program in registers, so that
    products are half as deep, adjoints have one stage, and schedule step tiles of 32 x 128 instead
    of 64 x 128, and tiles of 16 x 32 have four warps, as with eight an adjoint spilled within a
    product's loop; wide groups take shallow products and small tiles, above 90 others deeper ones.
    `python -m deqfusion.kernels.targets` tells, and what wider groups spill.
    """
    old, wide = 0 < capability < 90, padded >= 256
    if half:
        # As many bytes of a weight to a stage; on sm_90 as many as were the fastest in tf32, where
        # twice as deep an adjoint would spill more.
        more = {"adjoint": adjoint, "capability": capability, "padded": padded, "rows": rows}
        full = shipped(schedule, **more)  # type: ignore[arg-type]
        if schedule == "cooperative" and 90 <= capability < 100 and not wide:
            # Of 64 rows a stage as deep has no room in the shared memory.
            return full if adjoint else replace(full, depth=128 if rows < 64 else 64)
        if schedule != "row" and adjoint and capability >= 100:
            # Twice as deep the products of the linearisation, which stay in fp32, spilled; wide
            # cooperative ones did so with a single stage.
            return replace(full, stages=2) if wide and schedule == "cooperative" else full
        if schedule == "cooperative" and old:
            # As did those of fusion's constants.
            return full
        return replace(full, depth=2 * full.depth)
    if schedule == "step":
        new = capability >= 100
        most = 4096 if old or (wide and (adjoint or new)) else 8192
        rows = max(16, min(32 if old else 64, most // padded))
        depth = 16 if wide else 64 if new else 32
        warps = 16 if adjoint and wide and (old or new) else 8
        if new and rows * padded < 4096:
            warps = 4
        return Config(schedule, rows, depth=depth, warps=warps, stages=2)
    if old and rows * padded <= 512:
        return Config(schedule, rows, depth=16, warps=4, stages=1 if adjoint else 2)
    depth = 16 if old or wide or (adjoint and capability >= 100) else 32
    stages = 1 if (old and wide) or (adjoint and (old or wide)) else 2
    if schedule == "cooperative" and 90 <= capability < 100:
        stages = 2 if adjoint else 3
        if not wide and rows * padded <= 1024:
            return Config(schedule, rows, depth=depth, warps=4, stages=2)
    return Config(schedule, rows, depth=depth, warps=8, stages=stages)


def shipped_schedules(adjoint: bool, capability: int, padded: int) -> tuple[str, ...]:
    """Schedules that `kernels.cost.default_config` chooses from; arguments as of `shipped`.

    Below capability 90 adjoints and groups of 256 channels are not cooperative, nor are adjoints of
    the latter in schedule row: there they spill.
    """
    if 0 < capability < 90:
        if padded >= 256:
            return ("step",) if adjoint else ("row", "step")
        return ("row", "step") if adjoint else SCHEDULES
    return SCHEDULES


GRADIENTS = Config(warps=4, stages=2)
GRADIENT_TILES = {"BO": 64, "BI": 64, "BV": 64, "BB": 32}
"""Of the parameters' gradients; a width below 64 is one tile."""

INJECTION = Config(warps=8)
INJECTION_TILES = {"BM": 16, "BD": 128}
"""Rows and channels of what a solve starts from, `kernels.injection`."""
