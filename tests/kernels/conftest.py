"""These tests need Triton, and without a device its interpreter (see `tests/conftest.py`).

The interpreter of Triton 3.7.1 casts fp32 to bfloat16 by cutting bits off, where devices round to
the nearest. Here it rounds, so that the programs' errors are held against what they will be. It
also looks for overflow in every operation on integers, which takes a quarter of its time: no tensor
here is large enough for that (`tests/gpu` has one).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the GPU programs need Triton")


@pytest.fixture(scope="session", autouse=True)
def like_a_device() -> Iterator[None]:
    """Let the interpreter round as devices do, and look for overflow as little."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    cut_off = interpreter._convert_float

    def rounded(value: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut_off(value, source, target, mode)
        whole = torch.from_numpy(np.ascontiguousarray(value).view(np.float32).copy())
        return whole.to(torch.bfloat16).view(torch.uint16).numpy().reshape(value.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        unwatched = interpreter.InterpreterOptions(sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", unwatched)
        yield
