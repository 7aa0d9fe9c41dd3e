"""What the cost model expects of the ways to solve an example.

How often a block is evaluated is counted, by the reference on some rows of the example; what an
evaluation costs is predicted. Together they rank memories as well as configurations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deqfusion.kernels.candidates import Candidate, candidates
from deqfusion.kernels.config import MAX_MEMORY, MAX_PADDED
from deqfusion.kernels.cost import DEVICES, Device, like
from deqfusion.solvers import Anderson
from deqfusion.tuning.example import Example, Way
from deqfusion.tuning.result import Trial

__all__ = ["MEMORIES", "on_device", "predicted", "ranked"]

MEMORIES = (0, *range(2, MAX_MEMORY + 1))
"""Of `Anderson`, as the programs have them; with 1 it is the plain iteration that it is with 0."""

BEST_MEMORIES = 3

INTERPRETED = "h200"
"""Whose constants are taken in Triton's interpreter, where no time means anything."""


def on_device(device: torch.device) -> tuple[Device, int | None]:
    """Constants of a device that is there, and bytes of shared memory of a program."""
    from deqfusion.kernels import launch

    if device.type != "cuda":
        return DEVICES[INTERPRETED], None
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    return like(launch.capability(device), launch.processors(device)), shared


def on_target(target: str) -> tuple[Device, int]:
    """The same of a device that is not there."""
    from deqfusion.kernels.targets import TARGETS

    device = DEVICES[target]
    arch = device.capability or "gfx942"
    return device, next(t.shared for t in TARGETS.values() if t.arch == arch)


def ranked(
    example: Example, device: Device, shared: int | None
) -> tuple[dict[str, list[Candidate]], dict[str, list[int]]]:
    """Candidates by solve, the most promising first, and the memories to compare.

    Those are for both forward solves the few that should take least together, and the layer's own;
    an adjoint has its own only.

    Raises:
        ValueError: for a width that no program has.
    """
    found: dict[str, list[Candidate]] = {}
    for solve in example.solves:
        own = min(example.own_of(solve)[0], MEMORIES[-1])
        searched = isinstance(example.solver, Anderson) and "adjoint" not in solve
        memories = sorted({own, *(MEMORIES if searched else ())})
        options = example.options(solve)
        found[solve] = candidates(
            solve, example.rows, example.layout, example.modalities, device,
            low=bool(options.cheap), shared=shared,
            steps={m: example.steps(solve, m) for m in memories}, half=options.cheap == "half",
        )  # fmt: skip
        if not found[solve]:
            raise ValueError(
                f"dim {example.layout.dim} in {example.layout.groups} groups: got "
                f"{example.layout.group} channels per group, the GPU programs have at most "
                f"{MAX_PADDED}; DEQFUSION_BACKEND=reference has no limit"
            )
    forward = [solve for solve in example.solves if "adjoint" not in solve]
    first = {
        solve: {m: next(c for c in found[solve] if c.memory == m) for m in _memories(found[solve])}
        for solve in example.solves
    }
    total = {m: sum(first[s][m].seconds for s in forward) for m in first[forward[0]]}
    best = sorted(total, key=lambda m: total[m])[:BEST_MEMORIES]
    own = min(example.own[0], MEMORIES[-1])
    best = list(dict.fromkeys([*best, own]))
    chosen = {s: best if s in forward else list(first[s]) for s in example.solves}
    return {s: [c for c in found[s] if c.memory in chosen[s]] for s in found}, chosen


def _memories(queue: Sequence[Candidate]) -> list[int]:
    return sorted({candidate.memory for candidate in queue})


def predicted(example: Example, target: str, most: int = 5) -> tuple[list[Trial], int]:
    """The most promising ways for a target of `DEVICES` by solve, and the memory with the least
    total.

    Raises:
        ValueError: for what the programs do not have.
    """
    device, shared = on_target(target)
    queues, memories = ranked(example, device, shared)
    trials = []
    for solve, queue in queues.items():
        ladder = example.own_of(solve)[1]
        # Of depth, warps and stages the model has no opinion.
        for c in [c for c in queue if not c.changes][:most]:
            trials.append(Trial(Way(solve, c.config, c.memory, ladder), seconds=c.seconds))
    return trials, memories["modality"][0]
