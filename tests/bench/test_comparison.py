"""The README's table: figures come from files, and from one machine."""

import copy
import json

import pytest

from deqfusion.bench import comparison

TEXT = f"before\n{comparison.BEGIN}old\n{comparison.END}after\n"


def result(threads: int = 1) -> dict:
    def entry(ratio):
        def summary(value):
            return None if value is None else dict.fromkeys(("p20", "median", "p80"), value)

        return {"status": "ok", "seconds": summary(0.01), "ratio": summary(ratio)}

    contenders = {"ours": entry(None), "textbook": entry(2.0), "torchdeq": entry(3.04)}
    contenders["textbook_compiled"] = {"status": "failed", "reason": "missed"}
    case = {"shape": [8, 16, 2], "threads": threads, "contenders": contenders}
    return {
        "format": 2,
        "device": "cpu",
        "suite": {},
        "reference": "ours",
        "environment": {"cpu": "some CPU", "versions": {"torch": "2.13"}},
        "cases": [{**case, "mode": mode} for mode in ("forward", "forward_backward")],
    }


def test_table():
    line = comparison.markdown([result(1), result(2)]).splitlines()[-1]
    half = "10 ms / 10 ms | 2.0 / 2.0 | failed / failed | 3.0 / 3.0"
    assert line == f"| 8, 16, 2 | {half} | {half} |"


def test_refusals():
    other = copy.deepcopy(result())
    other["environment"]["cpu"] = "another"
    with pytest.raises(ValueError, match="different machines"):
        comparison.markdown([result(), other])
    failed = result()
    failed["cases"][0]["contenders"]["ours"]["status"] = "failed"
    with pytest.raises(ValueError, match="ours: failed, expected a time"):
        comparison.markdown([failed])


def test_what_a_file_does_not_have_is_not_measured():
    contenders = {"ours": result()["cases"][0]["contenders"]["ours"]}
    part = {**result(), "cases": [{**result()["cases"][0], "contenders": contenders}]}
    line = comparison.markdown([part]).splitlines()[-1]
    missing = " | ".join(["not measured"] * 3)
    assert line == f"| 8, 16, 2 | 10 ms | {missing} | not measured | {missing} |"


def test_command(tmp_path, capsys):
    file, readme = tmp_path / "a.json", tmp_path / "README.md"
    file.write_text(json.dumps(result()))
    readme.write_text(TEXT)
    assert comparison.main([str(file), "--write", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| 8, 16, 2 | 10 ms | 2.0 | failed | 3.0 |" in text
    file.write_text(json.dumps({**result(), "format": 7}))
    assert comparison.main([str(file)]) == 2
    assert "got format 7, expected 2" in capsys.readouterr().err
    file.write_text(json.dumps(result()))
    readme.write_text("no markers")
    assert comparison.main([str(file), "--write", str(readme)]) == 2
    assert "comparison:begin" in capsys.readouterr().err
    assert readme.read_text() == "no markers"
