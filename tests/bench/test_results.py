"""Result files: written whole, and refused in one line if they are none."""

import json
from pathlib import Path

import pytest

from deqfusion.bench import results
from deqfusion.cli import main

COMMITTED = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*.json"))
ENTRY = {
    "status": "ok",
    "reason": "",
    "verified": {"residual": 1e-4, "steps": {"joint": 9}},
    "seconds": {"p20": 1.0, "median": 2.0, "p80": 3.0, "samples": [1.0, 2.0, 3.0]},
    "ratio": None,
}
CASE = {"shape": [8, 16, 2], "threads": 1, "mode": "forward", "target": 1e-3,
        "contenders": {"ours": ENTRY}}  # fmt: skip
RESULT = {
    "format": 2,
    "device": "cpu",
    "suite": {"name": "s", "target": 1e-3, "loss": "sum", "rounds": 3, "seed": 0},
    "environment": {"cpu": "c", "cores": 2, "gpu": None, "date": "d", "versions": {"torch": "2"}},
    "reference": "ours",
    "cases": [CASE],
}


def test_committed_files_are_readable():
    assert COMMITTED
    for path in COMMITTED:
        assert results.read_json(path)["cases"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    results.write_json(RESULT, path)
    with pytest.raises(TypeError):
        results.write_json({"cases": [object()]}, path)
    with pytest.raises(UnicodeEncodeError):
        results.write_text("\udc80", path)
    assert results.read_json(path) == RESULT
    assert list(tmp_path.iterdir()) == [path]


def changed(**fields):
    return json.dumps({**RESULT, **fields})


BAD = {
    "": "got no JSON",
    '{"format": 2': "got no JSON",
    "[]": "got no format",
    "{}": "got no format, expected a result of deqfusion bench",
    changed(format=3): "got format 3, expected 2 (not of deqfusion bench, or of another version)",
    changed(format=1): "got format 1, expected 2",
    changed(format="2"): "got format '2'",
    changed(device=None): "got device 'None', expected a str",
    changed(cases=None): "got cases 'None', expected a list",
    changed(environment=[]): "got environment '[]', expected a dict",
    changed(cases=[7]): "cases[0]: got int, expected an object",
    changed(cases=[{**CASE, "shape": [1, 2]}]): "got shape [1, 2], expected three whole numbers",
    changed(cases=[{**CASE, "threads": "1"}]): "cases[0]: got threads '1', expected a int",
    changed(cases=[{**CASE, "contenders": {"ours": 1}}]): "cases[0]: ours: expected an object",
    changed(cases=[{**CASE, "contenders": {"ours": {**ENTRY, "seconds": {"median": "x"}}}}]): (
        "cases[0]: ours: got times"
    ),
}


@pytest.mark.parametrize(("text", "said"), BAD.items(), ids=range(len(BAD)))
@pytest.mark.parametrize("command", [["plot"], ["bench", "--compare"]], ids=" ".join)
def test_foreign_files_are_refused_and_kept(text, said, command, tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_text(text)
    out = tmp_path / "out"
    assert main([*command, str(path), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert str(path) in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert path.read_text() == text
    assert not out.exists()


@pytest.mark.parametrize("command", [["plot"], ["bench", "--compare"]], ids=" ".join)
def test_a_file_that_is_not_there(command, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main([*command, str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"deqfusion: error: {path}: cannot be read (No such file or directory), expected a JSON "
        "file of deqfusion bench\n"
    )


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "result.json"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match="got no JSON"):
        results.read_json(path)


def test_machines():
    assert results.machine(RESULT) == {"cpu": "c", "cores": "2"}
    environment = {**RESULT["environment"], "gpu": {"name": "H200"}}
    with_gpu = {**RESULT, "environment": environment}
    # A CPU's figures are the same whatever GPU is in the machine.
    assert results.machine(with_gpu) == results.machine(RESULT)
    assert results.machine({**with_gpu, "device": "cuda"})["gpu"] == "H200"
