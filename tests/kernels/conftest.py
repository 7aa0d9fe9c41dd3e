"""These tests need Triton, and without a device its interpreter (see `tests/conftest.py`)."""

import pytest

pytest.importorskip("triton", reason="the GPU programs need Triton")
