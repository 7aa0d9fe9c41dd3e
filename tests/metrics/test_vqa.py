"""VQA's accuracy: the published examples, the whole table of spellings, averages by hand."""

import hashlib

import numpy as np
import pytest

from deqfusion.metrics.vqa import _SPELLING, answer_accuracy, mean_accuracies, normalise_answer


# The first block is https://visualqa.org/evaluation.html, the others the published code's results.
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Dont", "don't"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("Blue.", "blue"),
        ("3.14", "3.14"),
        ("two", "2"),
        ("a dog", "dog"),
        ("an apple", "apple"),
        ("the end", "end"),
        #
        ("St. Louis", "st louis"),
        ("mr.smith", "mrsmith"),
        ("U.S.A.", "usa"),
        (".5", ".5"),
        ("." * 40, "." * 8),
        #
        ("a red-and-white kite", "red and white kite"),
        ("T-shirt, blue", "t shirt blue"),
        ("1,000 black-and-white", "1000 blackandwhite"),
        ("coca - cola", "coca cola"),
        ("black-and- white", "blackand white"),
        ("black-and -white", "blackand white"),
        ("b/w", "b w"),
        ("who?", "who"),
        ("\tone\nday ", "1 day"),
        #
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("The", ""),
        #
        ("lets", "lets"),
        ("shes", "shes"),
        ("im", "im"),
        ("its", "its"),
        ("y'alld've", "y'all'd've"),
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("cant wont", "can't won't"),
    ],
)
def test_normalisation(answer, expected):
    assert normalise_answer(answer) == expected


def test_table_of_spellings_is_the_published_one():
    # Without the entries that cannot apply to lower-case words or change nothing.
    lines = sorted(f"{wrong} {right}" for wrong, right in _SPELLING.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (len(lines), digest) == (
        114,
        "f2c800b1132e79302dd72686ce8bba16120f1873f98a85561222e89317336e7a",
    )


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_mean_over_the_ways_to_leave_one_annotator_out(matches, expected):
    references = ["red"] * matches + [f"other {number}" for number in range(10 - matches)]
    assert answer_accuracy("red", references) == pytest.approx(expected, abs=1e-12)
    left_out = [references[:place] + references[place + 1 :] for place in range(10)]
    by_hand = np.mean([min(1, nine.count("red") / 3) for nine in left_out])
    assert answer_accuracy("red", references) == pytest.approx(by_hand, abs=1e-12)


def test_answers_are_normalised_where_annotators_differ_and_only_there():
    assert answer_accuracy("2", ["two"] * 4 + ["three"] * 6) == 1.0
    assert answer_accuracy("Two.", ["2"] * 4 + ["three"] * 6) == 1.0
    assert answer_accuracy("2", ["two"] * 10) == 0.0
    assert answer_accuracy(" two\n", ["two"] * 9 + ["two "]) == 1.0
    with pytest.raises(ValueError, match="references: got 1 answers, expected at least 2"):
        answer_accuracy("2", ["2"])


def test_published_questions(data_dir):
    import json

    path = data_dir / "vqa" / "annotations.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    records = json.loads(path.read_text())["annotations"]
    given = [[answer["answer"] for answer in record["answers"]] for record in records]
    # net: 6 of 10, mesh, netting and others: 1 each; pitcher: 9 of 10; orange: all.
    assert [answer_accuracy("net", given[0]), answer_accuracy("mesh", given[0])] == [1.0, 0.3]
    assert [answer_accuracy(said, given[1]) for said in ("pitcher", "catcher")] == [1.0, 0.3]
    assert [answer_accuracy(said, given[2]) for said in ("orange", "an orange")] == [1.0, 0.0]


def test_means_by_answer_type():
    means = mean_accuracies([1.0, 0.0, 0.3, 0.6], ["yes/no", "yes/no", "other", None])
    assert means == pytest.approx(
        {
            "accuracy": 0.475,
            "accuracy_yes_no": 0.5,
            "accuracy_number": np.nan,
            "accuracy_other": 0.3,
        },
        nan_ok=True,
    )
    with pytest.raises(ValueError, match="got 1 and 2, expected as many"):
        mean_accuracies([1.0], [None, None])
    with pytest.raises(ValueError, match="got 0 and 0"):
        mean_accuracies([], [])
