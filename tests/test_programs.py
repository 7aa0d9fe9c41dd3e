"""How the operators' arguments become those of the Triton programs."""

from types import SimpleNamespace

import pytest
import torch

from deqfusion import programs

pytest.importorskip("triton", reason="the GPU programs need Triton")
CUDA = torch.device("cuda")


@pytest.fixture
def at(monkeypatch):
    """Sets `torch.get_float32_matmul_precision` for a test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("hip", "device", "expected"),
    [
        (None, (9, 0), {"highest": "tf32x3", "high": "tf32", "medium": "half"}),
        (None, (8, 0), {"highest": "tf32x3", "high": "tf32", "medium": "half"}),
        # Before sm_80 there are no tf32 products.
        (None, (7, 5), {"highest": "ieee", "high": "ieee", "medium": "ieee"}),
        ("6.4", "gfx942:sramecc+", {"highest": "ieee", "high": "tf32", "medium": "half"}),
        ("6.4", "gfx90a", {"highest": "ieee", "high": "ieee", "medium": "ieee"}),
    ],
)
def test_precision_follows_pytorch(monkeypatch, at, hip, device, expected):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: device)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=device)
    )
    for asked, precision in expected.items():
        at(asked)
        assert programs.precision(torch.float32, CUDA) == precision
        # Of 16 bits there are no more to keep.
        assert programs.precision(torch.bfloat16, CUDA) == expected["medium"]


def test_precision_of_the_interpreter(at):
    for asked, precision in (("highest", "ieee"), ("high", "ieee"), ("medium", "ieee")):
        at(asked)
        assert programs.precision(torch.float32, torch.device("cpu")) == precision
