"""Measures of the machine are short here: they are tested for being there, not for being right."""

import pytest

from deqfusion.bench import peaks


@pytest.fixture(autouse=True, scope="session")
def short_peaks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peaks, "COPY", {"cpu": 1 << 16, "cuda": 1 << 28})
        patch.setattr(peaks, "WIDTHS", {"cpu": (64,), "cuda": (8192,)})
        patch.setattr(peaks, "RUNS", 1)
        yield
