"""These tests need Triton, and without a device its interpreter (see `tests/conftest.py`).

The interpreter of Triton 3.7.1 casts fp32 to bfloat16 by cutting bits off, where devices round to
the nearest. Here it rounds, so that the programs' errors are held against what they will be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the GPU programs need Triton")

from triton import language as tl
from triton.runtime import interpreter

_cut_off = interpreter._convert_float


def rounded(value: Any, source: Any, target: Any, mode: Any) -> Any:
    """The interpreter's cast between float types, to the nearest from fp32 to bfloat16."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _cut_off(value, source, target, mode)
    whole = torch.from_numpy(np.ascontiguousarray(value).view(np.float32).copy())
    return whole.to(torch.bfloat16).view(torch.uint16).numpy().reshape(value.shape)


@pytest.fixture(scope="session", autouse=True)
def casts_round() -> Iterator[None]:
    """Let the interpreter round as devices do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        yield
