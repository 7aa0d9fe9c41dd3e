"""Whether a solve of schedule *step* is over, asked without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Ended:
    """Whether all row blocks of a solve have ended, as far as the device has told.

    A count is on its way from the device at any time, and is looked at when it is there: nothing
    waits. Launches that were not needed end at once. Under capture of a CUDA graph it never says
    so, and all steps are launched.
    """

    def __init__(self, counters: Tensor, expected: int) -> None:
        self._counter, self._expected = counters[:1], expected
        self._copy: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def __call__(self) -> bool:
        if self._counter.device.type != "cuda":
            return int(self._counter) == self._expected
        if torch.cuda.is_current_stream_capturing():
            return False
        if self._event is not None and self._copy is not None:
            if not self._event.query():
                return False
            if int(self._copy) == self._expected:
                return True
        self._copy = torch.empty(1, dtype=torch.int32, device="cpu", pin_memory=True)
        self._copy.copy_(self._counter, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()
        return False
