"""docs/results.md: what its records say, in the words of the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from deqfusion.analysis import report
from deqfusion.analysis.fusions import FUSIONS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "results.md").read_text(encoding="utf-8")
RECORDS = report.read_results(DOCS / "results.json")


def test_page_is_what_the_records_say() -> None:
    assert report.replace(PAGE, report.markdown(RECORDS)) == PAGE


def test_readme_links_to_the_page() -> None:
    assert "(docs/results.md)" in (DOCS.parent / "README.md").read_text(encoding="utf-8")


def done(analysis: str, task: str) -> set[tuple[str, int]]:
    own = [r for r in RECORDS if (r["analysis"], r["task"]) == (analysis, task)]
    return {(record["name"], record["seed"]) for record in own if record["splits"]}


@pytest.mark.parametrize("task", ["rosmap", "brca2012", "mosi", "handwritten", "cub"])
def test_every_fusion_has_five_seeds(task: str) -> None:
    assert done("fusions", task) == {(name, seed) for name in FUSIONS for seed in range(5)}


@pytest.mark.parametrize("task", ["rosmap", "mosi", "cub"])
def test_changes_of_every_kind_have_five_seeds(task: str) -> None:
    runs = done("ablation", task)
    names = {name for name, _ in runs}
    assert runs == {(name, seed) for name in names for seed in range(5)}
    kinds = ("base", "1 step", "no gate", "no projection", "gate=", "gate_input=", "skip=", "tail=")
    kinds += ("jacobian_weight=", "tol=", "solver=", "memory=", "num_groups=", "adjoint=")
    # What is not of the method, but may be why another fusion does better.
    kinds += ("dropout=", "fusion_rate=")
    assert [k for k in kinds if not any(name.startswith(k) for name in names)] == []


def test_records_are_of_committed_code_and_one_data_set_per_task() -> None:
    assert not any(record["environment"]["commit"].endswith("+changes") for record in RECORDS)
    hashes = {(record["task"], record["data_sha256"]) for record in RECORDS}
    assert len(hashes) == len({record["task"] for record in RECORDS})
