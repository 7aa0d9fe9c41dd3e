"""Programs compiled for devices that are not there: no spills, tensor cores, memory that fits."""

import os
import re
import subprocess
import sys

import pytest

from deqfusion.kernels.targets import TARGETS, Report


@pytest.mark.parametrize("target", TARGETS)
def test_shipped_configurations(target):
    # A process of its own: the interpreter, under which these tests run, compiles nothing.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "deqfusion.kernels.targets", "--target", target],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # Below sm_90 the adjoints, two at two widths, are shipped in schedule row only.
    assert len(lines) == (18 if target == "sm_80" else 22)
    for line in lines:
        assert re.search(rf" {target} .*registers +[1-9]\d*  stack +0  shared +\d", line), line
        if line.startswith("pack"):
            continue
        assert re.search(r"[1-9]\d* (HMMA|HGMMA|UTCHMMA|v_mfma\w*)$", line), line


@pytest.mark.parametrize(
    ("stack", "shared", "products", "fault"),
    [(8, 0, {"HMMA": 1}, "spills 8 bytes per thread"),
     (-1, 0, {"HMMA": 1}, "does not say how much it spills"),
     (0, 10**6, {"HMMA": 1}, "needs 1000000 bytes of shared memory"),
     (0, 0, {}, "without tensor cores")],
)  # fmt: skip
def test_faults(stack, shared, products, fault):
    (found,) = Report("program", "sm_90", 100, stack, shared, products).faults()
    assert fault in found
    assert not Report("program", "sm_90", 100, 0, 0, {"HMMA": 1}).faults()
