"""The suites: which cases, contenders, modes and how many rounds.

A case that varies one factor around a base names it, so that times can be drawn and fitted against
it. Contenders are chosen by device: on a CPU those that are about one, on a GPU all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain

from .contenders import BACKWARD, FORWARD, PENALTY
from .problem import LOSSES, Shape

MODES = (FORWARD, BACKWARD)
DEVICES = ("auto", "cpu", "cuda")

ON_CPU = ("textbook", "textbook_compiled", "torchdeq", "ours")
EAGER = ("textbook", "torchdeq", "ours")
"""Without what compiles for every shape, where there are many."""

SCHEDULES = ("ours_row", "ours_cooperative", "ours_step")
ON_GPU = (
    "textbook",
    "textbook_compiled",
    "textbook_reduce_overhead",
    "textbook_max_autotune",
    "textbook_cudagraph",
    "torchdeq",
    "ours",
    "ours_reference",
    *SCHEDULES,
)
EAGER_ON_GPU = ("textbook", "textbook_cudagraph", "torchdeq", "ours", "ours_reference", *SCHEDULES)


@dataclass(frozen=True)
class Case:
    """One problem of a suite.

    Attributes:
        shape: rows, width, modalities.
        label: what it stands for, where the shape does not say.
        factors: of "batch", "dim", "num_modalities" and "steps", those it is a point of.
        target: relative residual to be met, where it is not the suite's.
        modes: where they are not the suite's.
    """

    shape: Shape
    label: str = ""
    factors: tuple[str, ...] = ()
    target: float | None = None
    modes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Suite:
    """What to measure.

    Attributes:
        name: for the file's name and record.
        cases: the problems.
        contenders: by name, in the order of the table.
        on_gpu: contenders on a GPU; empty: the same.
        modes: what is timed, of `MODES` and `contenders.PENALTY`.
        threads: intra-operator threads of torch, one pass each.
        rounds: samples of every contender.
        loss: "sum" or "mean" over the batch, see `Problem`.
        target: relative residual every row and block must meet, in fp64.
        seed: of parameters and inputs.
        limit: seconds that the samples of a contender may take in one mode of a case on a CPU; more
            is skipped, with the reason. None: no limit.
        budget: seconds for the whole run, as many for each of `threads`; a case that should not end
            in time, and a contender that is not verified in time, are skipped, with the reason.
            None: no bound.
        device: of `DEVICES`; "auto" is a GPU where torch can use one.
        summary: for the list of suites.
    """

    name: str
    cases: tuple[Case, ...]
    contenders: tuple[str, ...]
    on_gpu: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    threads: tuple[int, ...] = (1,)
    rounds: int = 9
    loss: str = "sum"
    target: float = 1e-3
    seed: int = 0
    limit: float | None = None
    budget: float | None = None
    device: str = "auto"
    summary: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.cases or not self.contenders or not self.threads or not self.modes:
            raise ValueError("a suite needs at least one case, contender, mode and thread count")
        if min(self.threads) < 1:
            raise ValueError(f"threads must be at least 1, got {min(self.threads)}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not 0 < self.target < 1:
            raise ValueError(f"target must be between 0 and 1, got {self.target}")
        for name, seconds in (("limit", self.limit), ("budget", self.budget)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} must be above 0 seconds, got {seconds}")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")


def cases(*shapes: Shape) -> tuple[Case, ...]:
    """Cases of nothing but their shape."""
    return tuple(map(Case, shapes))


CPU_SHAPES = (Shape(612, 500, 3), Shape(256, 512, 2), Shape(24, 768, 2), Shape(2048, 128, 2))
GPU_SHAPES = (Shape(612, 500, 3), Shape(256, 512, 2), Shape(64, 128, 2), Shape(16384, 256, 2))
PAPER = (
    Case(Shape(612, 500, 3), "BRCA"),
    Case(Shape(263, 500, 3), "BRCA, test rows"),
    Case(Shape(256, 512, 2)),
    Case(Shape(16, 768, 2)),
    Case(Shape(8 * 1024, 256, 2), "detection: 8 x 1024 tokens"),
    Case(Shape(64 * 100, 512, 2), "question answering: 64 x 100 tokens"),
)
BASE = Shape(256, 256, 2)
"""What a sweep varies one factor of."""

BATCHES = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
WIDTHS = (64, 128, 256, 512, 1024)
MODALITIES = (2, 3, 4, 5, 6)
TARGETS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-4)
"""Beside a suite's own, for the time to a residual."""


def to_residuals(shape: Shape) -> tuple[Case, ...]:
    """The same problem to looser and tighter residuals, forward."""
    return tuple(Case(shape, "", ("steps",), target, (FORWARD,)) for target in TARGETS)


def around(
    base: Shape, batches: tuple[int, ...], widths: tuple[int, ...], modalities: tuple[int, ...]
) -> tuple[Case, ...]:
    """Cases that vary one factor of a base each; the base itself, if it is among them, is once."""
    found: dict[Shape, tuple[str, ...]] = {}
    varied = (
        ("batch", (replace(base, batch=value) for value in batches)),
        ("dim", (replace(base, dim=value) for value in widths)),
        ("num_modalities", (replace(base, num_modalities=value) for value in modalities)),
    )
    for factor, shape in chain.from_iterable(((f, s) for s in shapes) for f, shapes in varied):
        found[shape] = (*found.get(shape, ()), factor)
    return tuple(Case(shape, factors=factors) for shape, factors in found.items())


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "quick",
            cases(Shape(256, 512, 2), Shape(24, 768, 2)),
            EAGER,
            EAGER_ON_GPU,
            rounds=5,
            summary="under a minute on two cores",
        ),
        Suite(
            "paper",
            (*PAPER, *to_residuals(PAPER[0].shape)),
            ON_CPU,
            ON_GPU,
            rounds=5,
            limit=240,
            summary="the shapes of the paper's tasks, and the time to a residual",
        ),
        Suite(
            "sweep",
            around(BASE, BATCHES, WIDTHS, MODALITIES),
            EAGER,
            EAGER_ON_GPU,
            rounds=5,
            limit=20,
            summary="batch, width and modalities, one at a time around 256,256,2",
        ),
        Suite(
            "train",
            cases(*(case.shape for case in PAPER[:4])),
            EAGER,
            ON_GPU,
            modes=(BACKWARD, PENALTY),
            rounds=5,
            loss="mean",
            summary="a training step's solve, with and without the Jacobian penalty",
        ),
        Suite(
            "scaling",
            (
                *around(BASE, BATCHES[2:6], WIDTHS[1:], MODALITIES),
                Case(BASE, "", ("steps",), modes=(FORWARD,)),
                *to_residuals(BASE),
            ),
            EAGER,
            EAGER_ON_GPU,
            rounds=5,
            limit=30,
            summary="how time grows with batch, width, modalities and steps: fitted exponents",
        ),
        Suite(
            "cpu",
            cases(*CPU_SHAPES),
            (*ON_CPU, "ours_noladder", "ours_absolute_ridge", "ours_joint"),
            threads=(1, 2),
            device="cpu",
            summary="what the README's table is drawn from",
        ),
        Suite(
            "gpu",
            cases(*GPU_SHAPES),
            # The comparisons that matter most first: for the last there may be no time.
            (
                "textbook",
                "ours",
                "ours_cooperative_medium",
                *SCHEDULES,
                "textbook_reduce_overhead",
                "textbook_cudagraph",
                *(f"{name}_high" for name in SCHEDULES),
                "textbook_high",
                "torchdeq",
                "textbook_compiled",
                "ours_reference",
            ),
            device="cuda",
            summary="every schedule in fp32 and tf32, one in float16, for bench/gpu_check.sh",
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
