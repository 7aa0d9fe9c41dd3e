"""What got slower or faster: only beyond the noise of both runs, and on one machine."""

import copy
import json

import pytest

from deqfusion.bench import changes, results, timing
from deqfusion.cli import main
from tests.bench.test_results import ENTRY, RESULT


def result(*samples: float, **entry: object) -> dict:
    found = copy.deepcopy(RESULT)
    low, high = min(samples), max(samples)
    seconds = {"p20": low, "median": sorted(samples)[len(samples) // 2], "p80": high}
    found["cases"][0]["contenders"]["ours"] |= {
        "seconds": {**seconds, "samples": list(samples)}, **entry,
    }  # fmt: skip
    return found


OLD = result(1.0, 1.1, 1.2)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (result(1.3, 1.4, 1.5), "1 slower, 0 faster, 0 within noise"),
        (result(0.7, 0.8, 0.9), "0 slower, 1 faster, 0 within noise"),
        (result(1.1, 1.3, 1.5), "0 slower, 0 faster, 1 within noise"),
        (result(1.2001, 1.2001, 1.2001), "1 slower, 0 faster, 0 within noise"),
        (result(0.9, 0.95, 0.99999), "0 slower, 1 faster, 0 within noise"),
        (result(2.0), "1 of fewer than 3 rounds"),
    ],
)
def test_verdicts(new, said):
    assert said in changes.text(OLD, new)


def test_a_change_is_named_with_both_times():
    text = changes.text(OLD, result(2.2, 2.2, 2.2))
    assert "slower: B=8 d=16 N=2, 1 thread, forward: ours: 2.00 times (1.83 to 2.20); " in text
    assert "1100 ms then, 2200 ms now" in text


def test_a_small_change_is_none_however_sure():
    assert "1 within noise" in changes.text(result(1.0, 1.0, 1.0), result(1.02, 1.02, 1.02))


def test_what_fails_now_is_slower_and_what_is_new_is_not_measured():
    failed = result(1.0, 1.0, 1.0)
    entry = failed["cases"][0]["contenders"]["ours"]
    entry |= {"seconds": None, "status": "failed", "reason": "missed"}
    assert "slower: " in changes.text(OLD, failed)
    assert "failed now (missed)" in changes.text(OLD, failed)
    assert "1 not measured in the old file" in changes.text(failed, OLD)


def test_what_there_was_no_time_for_is_not_slower():
    skipped = result(1.0, 1.0, 1.0)
    entry = skipped["cases"][0]["contenders"]["ours"]
    entry |= {"seconds": None, "status": "skipped", "reason": "the budget of 20 s is spent"}
    text = changes.text(OLD, skipped)
    assert "0 slower, 0 faster" in text
    assert "1 not measured in the new one" in text


def pair(ours: float, machine: float = 1.0, noise: float = 0.0) -> dict:
    """A run in which every round had its own moment, for the textbook and for ours alike."""
    found = copy.deepcopy(RESULT)
    entries = found["cases"][0]["contenders"]
    for name, time in (("textbook", 2.0), ("ours", ours)):
        samples = [
            machine * moment * time * (1 + (name == "ours") * noise * sign)
            for moment, sign in ((1.0, 1), (3.0, -1), (1.5, 1), (2.0, -1), (4.0, 0))
        ]
        entries[name] = {**ENTRY, "seconds": {**timing.summary(samples), "samples": samples}}
    return found


def test_a_machine_that_moved_is_no_change():
    """All took twice as long, in the same rounds; times alone would say so of each."""
    text = changes.text(pair(1.0), pair(1.0, machine=2.0))
    assert "0 slower, 0 faster, 1 within noise (bounds 1.00 to 1.00 times)" in text
    assert "held against textbook, in the same rounds, which takes 2.00 times what it took" in text
    assert "alone" not in text


def test_a_change_is_seen_through_a_machine_that_moved():
    text = changes.text(pair(1.0), pair(1.5, machine=0.5))
    assert "1 slower, 0 faster, 0 within noise" in text
    assert "ours: 1.50 times against textbook (1.50 to 1.50); 2000 ms then, 1500 ms now" in text
    assert "0 slower, 1 faster" in changes.text(pair(1.0), pair(0.5, machine=4.0))


def test_the_bounds_are_of_both_spreads():
    text = changes.text(pair(1.0, noise=0.2), pair(1.2, noise=0.2))
    assert "0 slower, 0 faster, 1 within noise (bounds 0.80 to 1.80 times)" in text


def test_without_an_anchor_times_are_compared_and_that_is_said():
    text = changes.text(OLD, result(1.3, 1.4, 1.5))
    assert "1 by their times alone, with none of textbook, " in text


def test_another_problem_is_not_compared():
    other = copy.deepcopy(OLD)
    other["suite"]["loss"] = "mean"
    assert "1 not measured in the old file" in changes.text(other, OLD)


def test_another_machine_is_refused_unless_asked_for(tmp_path, capsys):
    other = copy.deepcopy(OLD)
    other["environment"]["cpu"] = "another"
    paths = tmp_path / "old.json", tmp_path / "new.json"
    for path, content in zip(paths, (other, OLD), strict=True):
        path.write_text(json.dumps(content))
    arguments = ["plot", str(paths[1]), "--out", str(tmp_path / "out"), "--compare", str(paths[0])]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "cpu 'another' then and 'c' now" in error
    assert "--across-machines" in error
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--across-machines"]) == 0
    assert "DIFFERENT MACHINES" in capsys.readouterr().out


def test_bench_compares_with_its_own_earlier_result(tmp_path, capsys):
    arguments = ["bench", "--device", "cpu", "--shape", "4,32,1", "--rounds", "3"]
    arguments += ["--contenders", "ours", "--no-pictures", "--out", str(tmp_path)]
    assert main(arguments) == 0
    capsys.readouterr()
    # The old file is read before the new one takes its place.
    assert main([*arguments, "--compare", str(tmp_path / "quick.json")]) == 0
    assert " within noise" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["quick.json"]


def test_machines_that_agree():
    changes.check_machines(OLD, OLD, "old.json")
    assert results.machine(OLD) == {"cpu": "c", "cores": "2"}
