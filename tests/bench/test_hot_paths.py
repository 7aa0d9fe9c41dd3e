"""The pytest-benchmark cases run, and only where they are asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def collected(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
         *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_cases_run_once_for_correctness() -> None:
    pytest.importorskip("pytest_benchmark")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider",
         "--benchmark-disable", "-k", "64-128-3 and not cuda"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_plain_pytest_leaves_them_alone() -> None:
    configured = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in configured
    assert "hot_paths/test_hot_paths.py" in collected("bench")
