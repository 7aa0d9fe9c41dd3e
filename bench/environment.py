"""What a measurement was made on, to be kept beside its figures."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from deqfusion.kernels import tuning
from deqfusion.reference.solve import bfloat16_instructions

PACKAGES = ("torch", "triton", "numpy", "torchdeq", "deqfusion")


def gpu() -> dict[str, str] | None:
    """Name, driver and CUDA version of the first GPU, or None."""
    if not torch.cuda.is_available():
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
        driver = done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    name = torch.cuda.get_device_name(0)
    return {"name": name, "driver": driver, "cuda": str(torch.version.cuda or torch.version.hip)}


def git_commit() -> str | None:
    """Commit of the source tree this module runs from, "+changes" if it differs, else None."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        # A file that git does not know is no checkout of ours, but somebody's around the package.
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def record() -> dict[str, Any]:
    """Processor, software, load and date, as plain JSON values."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    affinity, found = getattr(os, "sched_getaffinity", None), gpu()
    devices = tuning.host_name(), *([found["name"]] if found else ())
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "system": platform.system(),
        "cpu": tuning.host_name(),
        "gpu": found,
        # Ours takes what was tuned: by device, of how many problems.
        "tuned": {name: sum(n for _, n in tuning.in_force(name)) for name in devices},
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": bfloat16_instructions(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": versions,
        "commit": git_commit(),
    }
