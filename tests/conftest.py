"""What every test runs under: poisoned uninitialised memory, fixed seeds, one thread.

Memory from ``torch.empty`` and its relatives is usually zero in a young process, so code that
reads what nobody wrote passes its tests and fails in a long run. Here such memory holds NaN.
The functions are replaced by attribute, for the whole session, because the alternatives change
what is tested: ``torch.utils.deterministic.fill_uninitialized_memory`` only works together with
``torch.use_deterministic_algorithms``, which selects other kernels, and a ``TorchDispatchMode``
switches ``torch.compile`` off. Graphs that ``torch.compile`` builds are left as they are;
operators called from such graphs run their Python implementation and see the poisoned functions.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, and inherited by the processes that tests start. One thread makes
# timings and summation order repeatable and leaves the second core to whatever else runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

# Before Triton is imported: without a device its programs run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent

ALLOCATORS: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap an allocation function so that floating-point memory comes filled with NaN."""

    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        # 8-bit floats have no fill, and some of them no NaN.
        wide_float = tensor.is_floating_point() and tensor.element_size() > 1
        if not torch.compiler.is_compiling() and (wide_float or tensor.is_complex()):
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(scope="session", autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` and its relatives return with NaN (see the module's docstring)."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ALLOCATORS:
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave out what somebody tuned on this machine, here and in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEQFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Run torch with the number of threads in OMP_NUM_THREADS, 1 unless the caller set it."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, in whatever order tests run."""
    random.seed(0)
    # Third-party code under test draws from the global state.
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def shared_folder(variable: str, name: str) -> Path:
    """Return the folder that an environment variable names, or ``../shared/<name>``.

    Skips the test, saying which folder is missing and how to name another.
    """
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / name)
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set {variable} to where the {name} files are")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden vectors: DEQFUSION_GOLDEN, or ``../shared/golden``."""
    return shared_folder("DEQFUSION_GOLDEN", "golden")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data sets: DEQFUSION_DATA, or ``../shared/data``."""
    return shared_folder("DEQFUSION_DATA", "data")
