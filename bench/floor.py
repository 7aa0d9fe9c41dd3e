"""The time below which the cost model of the GPU programs sees no solve, where it knows the GPU.

That is `deqfusion.kernels.cost.predict` for the modalities and then the fusion, with the steps that
the solve took, in the configs that it ran in, be they asked for, tuned or fallen back to; of a
backward the steps are not known, and it has none.
"""

from __future__ import annotations

from collections.abc import Mapping

from .contenders import FORWARD
from .contenders.ours import Ours
from .problem import NUM_GROUPS

BLOCKS = ("modality", "fusion")
"""Solves of a forward, in their order."""

NAMES = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "AMD Instinct MI300X": "mi300x",
}
"""Devices whose constants are in `deqfusion.kernels.cost.DEVICES`, as `torch.cuda.get_device_name`
calls them. Others of the family (PCIe, NVL, 40 GB) have other clocks and memory, and no floor."""


def known_device(name: str | None) -> str | None:
    """The cost model's name of a GPU called `name`, None if it has no constants of it."""
    return NAMES.get(name or "")


def seconds(
    contender: object, mode: str, steps: Mapping[str, int], gpu: str | None
) -> float | None:
    """The floor of a solve.

    Args:
        contender: as it ran; only ours on Triton programs have one.
        mode: "forward", or another, which has none.
        steps: of the slowest row, by solve.
        gpu: the device's name.

    Returns:
        Seconds, or None where the model says nothing.
    """
    device_name = known_device(gpu)
    if device_name is None or mode != FORWARD or not isinstance(contender, Ours):
        return None
    if not contender.programs or not set(BLOCKS) <= set(steps):
        return None
    configs = contender.configs.get(mode, ())
    if len(configs) != len(BLOCKS):
        return None
    from deqfusion.kernels import cost

    device, shape = cost.DEVICES[device_name], contender.problem.shape
    return float(
        sum(
            cost.predict(
                block, shape.batch, shape.dim, shape.num_modalities, device, config,
                groups=NUM_GROUPS, low=contender.rate == "bf16", steps=steps[block],
            ).solve
            for block, config in zip(BLOCKS, configs, strict=True)
        )
    )  # fmt: skip
