"""How a program is cut into tiles, and how its products are rounded."""

from __future__ import annotations

from dataclasses import dataclass

MAX_MEMORY = 8
PRECISIONS = ("ieee", "tf32", "tf32x3", "low")
"""Of products: fp32 as it is, in tensor-core formats of 10 and of 3 times 10 bits, and bfloat16."""


@dataclass(frozen=True)
class RowConfig:
    """Schedule *row*: one program runs the whole solve of some rows.

    Args:
        rows: BM, rows of a program: a power of two, at least 16.
        depth: BK, channels of a product's inner step: a power of two from 16 to the padded group's
            width; more is cut to that.
        warps, stages: as Triton takes them.

    Raises:
        ValueError: naming the field, what was got and what was expected.
    """

    rows: int = 16
    depth: int = 32
    warps: int = 8
    stages: int = 2

    def __post_init__(self) -> None:
        for name in ("rows", "depth"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}: got {value}, expected a power of two, at least 16")
        for name in ("warps", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class SolveOptions:
    """A solve in plain values, as `deqfusion.reference.solve.SolverOptions` names them.

    Args:
        rtol, atol: a row ends at ||g|| <= atol + rtol ||f||.
        max_steps: evaluations at most, >= 1.
        memory: m of Anderson mixing, 0 to 8; 0 and 1 are plain iteration.
        ridge, relative: of the Gram matrix.
        mixing: beta.
        precision: of products, one of `PRECISIONS`.

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

    def __post_init__(self) -> None:
        if not 0 <= self.memory <= MAX_MEMORY:
            raise ValueError(
                f"memory: got {self.memory}, expected 0 to {MAX_MEMORY} in a Triton program "
                "(any on the reference: DEQFUSION_BACKEND=reference)"
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps: got {self.max_steps}, expected at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision: got {self.precision!r}, expected one of {', '.join(PRECISIONS)}"
            )
