"""Programs compiled for devices that are not there: few spills, tensor cores, memory that fits."""

import os
import re
import subprocess
import sys

import pytest

from deqfusion.kernels.targets import MOST_SPILLED, TARGETS, Report, main


@pytest.mark.parametrize("target", TARGETS)
def test_shipped_configurations(target):
    """Groups of 128 channels, whose tiles need more than narrower ones; on sm_90 also of 256."""
    # A process of its own: the interpreter, under which these tests run, compiles nothing.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    widths = ["--dim", "500", *(["--dim", "768"] if target == "sm_90" else [])]
    done = subprocess.run(
        [sys.executable, "-m", "deqfusion.kernels.targets", "--target", target, *widths],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # Of a width: 4 solves in row, 4 in cooperative (below sm_90 no adjoints), 30 phases of step,
    # one pack, three kernels of the injection and two of the parameters' gradients.
    each = 6 + 30 + (6 if target == "sm_80" else 8)
    assert len(lines) == (2 * each if target == "sm_90" else each)
    for line in lines:
        found = re.search(rf" {target} .*registers +[1-9]\d*  stack +(\d+)  shared +\d", line)
        assert found, line
        assert int(found[1]) <= MOST_SPILLED
    products = [re.search(r"[1-9]\d* (HMMA|HGMMA|UTCHMMA|v_mfma\w*)$", line) for line in lines]
    # Of the phases 16 multiply.
    assert sum(map(bool, products)) == len(lines) - (6 + 14) * len(lines) // each
    # Tiles of 64 rows, which only schedule step has, at width 500.
    assert any("HGMMA" in line for line in lines) is (target == "sm_90")


@pytest.mark.parametrize(
    ("stack", "shared", "products", "fault"),
    [(MOST_SPILLED + 8, 0, {"HMMA": 1}, f"spills {MOST_SPILLED + 8} bytes per thread"),
     (-1, 0, {"HMMA": 1}, "does not say how much it spills"),
     (0, 10**6, {"HMMA": 1}, "needs 1000000 bytes of shared memory"),
     (0, 0, {}, "without tensor cores")],
)  # fmt: skip
def test_faults(stack, shared, products, fault):
    (found,) = Report("program", "sm_90", 100, stack, shared, products).faults()
    assert fault in found
    assert not Report("program", "sm_90", 100, MOST_SPILLED, 0, {"HMMA": 1}).faults()
    assert Report("program", "sm_90", 100, 0, 0, {"HMMA": 1}, whole_tile=True).faults()


def test_a_width_that_groups_do_not_divide(capsys):
    assert main(["--dim", "30"]) == 2
    assert "groups: got 4 for dim 30, expected a divisor of it" in capsys.readouterr().err
