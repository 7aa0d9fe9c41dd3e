"""The suites: which shapes, contenders and how many rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .problem import LOSSES, Shape

MODES = ("forward", "forward_backward")

PAPER_SHAPES = (
    Shape(612, 500, 3),
    Shape(256, 512, 2),
    Shape(24, 768, 2),
    Shape(2048, 128, 2),
)


@dataclass(frozen=True)
class Suite:
    """What to measure.

    Attributes:
        name: for the file's name and record.
        shapes: the cases.
        contenders: by name, in the order of the table.
        threads: intra-operator threads of torch, one pass each.
        rounds: samples of every contender.
        loss: "sum" or "mean" over the batch, see `Problem`.
        target: relative residual every row and block must meet, in fp64.
        seed: of parameters and inputs.
    """

    name: str
    shapes: tuple[Shape, ...]
    contenders: tuple[str, ...]
    threads: tuple[int, ...] = (1,)
    rounds: int = 9
    loss: str = "sum"
    target: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.shapes or not self.contenders or not self.threads:
            raise ValueError("a suite needs at least one shape, contender and thread count")
        if min(self.threads) < 1:
            raise ValueError(f"threads must be at least 1, got {min(self.threads)}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not 0 < self.target < 1:
            raise ValueError(f"target must be between 0 and 1, got {self.target}")


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "quick",
            shapes=(Shape(256, 512, 2), Shape(24, 768, 2)),
            contenders=("textbook", "torchdeq", "ours"),
            rounds=5,
        ),
        Suite(
            "cpu",
            shapes=PAPER_SHAPES,
            contenders=(
                "textbook",
                "textbook_compiled",
                "torchdeq",
                "ours",
                "ours_noladder",
                "ours_absolute_ridge",
                "ours_joint",
            ),
            threads=(1, 2),
        ),
    )
}


def get(name: str, **changes: object) -> Suite:
    """The suite of that name, with the given fields replaced.

    Raises:
        ValueError: if there is none; the message lists those there are. If a change is invalid.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}, expected one of {', '.join(SUITES)}")
    return replace(SUITES[name], **changes)  # type: ignore[arg-type]
