"""What `bench/gpu_check.sh` rests on, without a GPU: what is left where time is short."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = (ROOT / "bench" / "gpu_check.sh").read_text()


def run(folder: Path, tests: str, *before: str, **environment: str) -> dict[str, str]:
    """Runs tests under the hooks of tests/gpu: what came of each, and of the rest the reason."""
    shutil.copy(ROOT / "tests" / "gpu" / "conftest.py", folder)
    # In another folder, as the golden vectors' tests are.
    for name in ("test_here", "beside/test_there"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(f"import time\n{tests}")
    subprocess.run(
        [*before, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir",
         str(folder), "--junitxml=found.xml", "test_here.py", "beside/test_there.py"],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, check=False,
    )  # fmt: skip
    found = {}
    for case in ElementTree.parse(folder / "found.xml").iter("testcase"):
        skipped = case.find("skipped")
        name = f"{str(case.get('classname')).split('.')[-1]}.{case.get('name')}"
        found[name] = "ok" if skipped is None else str(skipped.get("message"))
    return found


def test_tests_for_which_there_is_no_time_say_so(tmp_path: Path) -> None:
    found = run(
        tmp_path, "def test_a(): time.sleep(0.6)\ndef test_b(): pass", DEQFUSION_SECONDS="0.5"
    )
    assert found.pop("test_here.test_a") == "ok"
    assert len(found) == 3
    assert all("no time left: 0.5 s (DEQFUSION_SECONDS)" in reason for reason in found.values())


@pytest.mark.skipif(shutil.which("timeout") is None, reason="no command timeout")
def test_a_timeout_leaves_what_there_is(tmp_path: Path) -> None:
    tests = "def test_a(): pass\ndef test_b(): time.sleep(60)\ndef test_c(): pass"
    found = run(tmp_path, tests, "timeout", "-k", "20", "6", DEQFUSION_SECONDS="50")
    assert found["test_here.test_a"] == "ok"
    assert "test_there.test_a" not in found


def test_parts_are_all_tests_once(tmp_path: Path) -> None:
    tests = "def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass"
    parts = [run(tmp_path, tests, DEQFUSION_SHARD=f"{part}/4") for part in range(4)]
    assert sorted(map(len, parts)) == [1, 1, 2, 2]
    assert len(set().union(*parts)) == 6


def test_the_times_add_up_to_less_than_nine_minutes() -> None:
    """The warming runs beside the tests, and both sanitizers side by side."""
    limits = [sum(map(int, found)) for found in re.findall(r"timeout -k (\d+) (\d+)", SCRIPT)]
    tests, warming, sanitizers, measurement = limits
    assert tests == warming
    assert tests + sanitizers + measurement <= 540 - 20
    assert int(re.search(r"DEQFUSION_SECONDS=(\d+)", SCRIPT)[1]) < tests
    assert int(re.search(r"--budget (\d+)", SCRIPT)[1]) < measurement
    comment = re.search(r"at most: (\d+) for both, (\d+) for the sanitizers, (\d+) to", SCRIPT)
    assert [int(number) for number in comment.groups()] == [tests, sanitizers, measurement]
