"""The session's fixtures do what the other tests rely on."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_uninitialised_memory_holds_nan(dtype: torch.dtype) -> None:
    like = torch.zeros(2, 3, dtype=dtype)
    allocated = [
        torch.empty(2, 3, dtype=dtype),
        torch.empty((2, 3), dtype=dtype, requires_grad=True),
        torch.empty_like(like),
        torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        torch.empty_permuted((2, 3), (1, 0), dtype=dtype),
        like.new_empty((2, 3)),
        like.new_empty_strided((2, 3), (3, 1)),
    ]
    for tensor in allocated:
        assert tensor.shape == (2, 3)
        assert torch.isnan(tensor).all()


def test_integer_memory_and_written_memory_are_left_alone() -> None:
    assert torch.empty(3, dtype=torch.int32).shape == (3,)
    assert torch.equal(torch.empty(3).fill_(2.0), torch.full((3,), 2.0))


def test_compiled_code_may_allocate() -> None:
    def fill(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out.copy_(x)
        return out + torch.empty(3).fill_(1.0)

    compiled = torch.compile(fill, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(torch.ones(3)), torch.full((3,), 2.0))


def test_each_test_starts_from_the_same_seed() -> None:
    drawn = torch.rand(4)
    torch.manual_seed(0)
    torch.testing.assert_close(drawn, torch.rand(4), rtol=0, atol=0)
