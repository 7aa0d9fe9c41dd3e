"""The command refuses options that what it is asked for does not heed."""

import pytest

from deqfusion.cli import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--predict h200 --budget 3", "--budget: got it with --predict, which has no use for it"),
        ("--predict h200 --limit 3", "--limit: got it with --predict"),
        ("--predict h200 --out x", "--out: got it with --predict"),
        ("--predict h200 --device cpu", "--device: got it with --predict"),
        ("--warm 0/2 --budget 3", "--budget: got it with --warm"),
        ("--warm 0/2 --limit 3", "--limit: got it with --warm"),
        ("--warm 0/2 --no-pictures", "--no-pictures: got it with --warm"),
        ("--list --rounds 3", "--rounds: got it with --list"),
        ("--list --predict h200", "--predict: got it with --list"),
        ("--predict h300", "target: got 'h300', expected one of h200, h100"),
        ("--warm 2/2", "--warm must be K/OF with K from 0 below OF, got '2/2'"),
        ("--across-machines", "--across-machines: got it without --compare, expected both or none"),
    ],
)
def test_options_without_use_are_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *options.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    ["--list --suite quick", "--predict h200 --suite quick --shape 8,64,2",
     "--warm 0/9 --shape 4,8,1 --contenders ours --device cpu --seed 3 --suite quick"],
)  # fmt: skip
def test_those_with_use_are_not(options, capsys):
    assert main(["bench", *options.split()]) == 0
    assert capsys.readouterr().err == ""
