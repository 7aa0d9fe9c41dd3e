"""The README: its length, its example, and the names it mentions."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deqfusion
from deqfusion import cli
from deqfusion.bench import comparison

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_length() -> None:
    assert len(README.splitlines()) <= 150


def test_example_runs(tmp_path: Path) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    assert examples
    for number, example in enumerate(examples):
        script = tmp_path / f"example{number}.py"
        script.write_text(example)
        done = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr
        accuracy = re.search(r"accuracy ([0-9.]+)", done.stdout)
        # A tenth of the digits would be right by chance.
        assert accuracy is not None
        assert float(accuracy.group(1)) > 0.8


def test_options_table_is_the_signature() -> None:
    table = README.partition("## Options of")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", table, flags=re.MULTILINE)
    parameters = inspect.signature(deqfusion.DEQFusion).parameters
    keyword_only = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert {name: eval(default, vars(deqfusion)) for name, default in rows} == {
        name: keyword_only[name] for name, _ in rows
    }
    # Where the parameters are created is torch's convention, not an option of the fusion.
    assert set(keyword_only) - {"device", "dtype"} == {name for name, _ in rows}


@pytest.mark.parametrize("target", ["demo", "test"])
def test_commands_exist(target: str) -> None:
    assert f"    make {target} " in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_commands_are_named_and_parse() -> None:
    lines = re.findall(r"^    deqfusion (.*?) +#", README, flags=re.MULTILINE)
    commands = [line.split() for line in lines]
    # The demonstration is `make demo`.
    assert {command[0] for command in commands} == set(cli.COMMANDS) - {"demo"}
    for command in commands:
        cli.build_parser(command[0]).parse_args(command)


def test_version_of_the_citation() -> None:
    assert f"version = {{{deqfusion.__version__}}}" in README


def test_comparison_is_drawn_from_the_committed_results() -> None:
    files = sorted((ROOT / "bench" / "results").glob("cpu-*.json"))
    table = comparison.markdown([json.loads(path.read_text()) for path in files])
    assert comparison.replace(README, table) == README
