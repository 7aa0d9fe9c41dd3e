"""This library's Triton programs, one contender per schedule and precision of products.

`ours_row`, `ours_cooperative` and `ours_step` have products of fp32 precision ("highest"); with
`_high` and `_medium` behind the name they have those of `torch.set_float32_matmul_precision`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import ClassVar

import torch

from deqfusion import programs
from deqfusion.kernels.config import SCHEDULES

from .base import CPU, Answer, Unavailable
from .ours import Ours, backend
from .registry import register

PRECISIONS = {"highest": "", "high": "_high", "medium": "_medium"}
RATES = {"high": "tf32", "medium": "bf16"}


class OursPrograms(Ours):
    """The programs in one schedule."""

    schedule: ClassVar[str]
    precision: ClassVar[str]

    @classmethod
    def unavailable(cls, device: torch.device = CPU) -> str | None:
        if device.type == "cpu" and cls.schedule == "cooperative":
            return "no GPU: its programs wait for one another, which an interpreter cannot do"
        try:
            programs.available(device)
        except ValueError as error:
            return str(error)
        return None

    @property
    def rate(self) -> str:
        ladder = super().rate
        return ladder if ladder == "bf16" else RATES.get(self.precision, ladder)

    def context(self) -> AbstractContextManager[object]:
        from deqfusion.kernels.launch import using

        stack = ExitStack()
        stack.enter_context(backend("triton", self.precision))
        stack.enter_context(using(self.schedule))
        return stack

    def run(self, mode: str) -> Answer:
        """As the base's; refuses what ran in another schedule than the one it is named after.

        Raises:
            Unavailable: if so: programs that a device cannot hold at once run in schedule row.
        """
        answer = super().run(mode)
        others = {config.schedule for config in self.configs[mode]} - {self.schedule}
        if others:
            raise Unavailable(
                "more programs than can be resident: ran in schedule " + ", ".join(sorted(others))
            )
        return answer


def _programs(schedule: str, precision: str) -> type[OursPrograms]:
    suffix = PRECISIONS[precision]
    return type(
        f"Ours{schedule.title()}{precision.title()}",
        (OursPrograms,),
        {
            "name": f"ours_{schedule}{suffix}",
            "summary": f"ours, Triton programs in schedule {schedule}, {precision} precision",
            "schedule": schedule,
            "precision": precision,
            "__doc__": f"Schedule {schedule}, products of precision {precision}.",
            "__module__": __name__,
        },
    )


for _schedule in SCHEDULES:
    for _precision in PRECISIONS:
        register(_programs(_schedule, _precision))
