"""What the tests of analyses share: small folders of data, and an analysis as a command."""

import json

import pytest

from deqfusion.cli import main
from tests.tasks.conftest import folder

__all__ = ["folder"]

SMALL = ("dim=8", "modalities=1,2", "epochs=2", "tol=1e-2")


@pytest.fixture(scope="session")
def analyze(folder):
    """Run an analysis of task rosmap on the small folder; its exit code."""

    def run(name, out, *more, data=folder, options=SMALL):
        settings = [argument for option in options for argument in ("--set", option)]
        arguments = ["--task", "rosmap", "--data-dir", str(data), "--out", str(out), *settings]
        return main(["analyze", name, *arguments, "--quiet", *more])

    return run


@pytest.fixture(scope="session")
def results():
    """Read an analysis's JSON file from a folder of results."""

    def read(out, name):
        return json.loads((out / f"{name}.json").read_text())

    return read
