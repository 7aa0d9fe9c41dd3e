"""Accuracy of VQA v2: an answer is right as far as three of the other annotators gave it.

    accuracy(a) = mean over the 10 ways to leave one annotator out of min(1, matches among 9 / 3)

Where the annotators disagree, answers are compared after normalisation: lower case, punctuation,
articles, number words, missing apostrophes.

Source: https://visualqa.org/evaluation.html and the code published there. What that code does
beyond its description is kept, since published figures contain it:

1. Where all annotators gave the very same answer, nothing is normalised.
2. Punctuation disappears where any stands beside a space or a comma between digits, and becomes a
   space elsewhere; a colon and an apostrophe stay.
3. "none" is the number 0; "let's", "she's" and words with I have no spelling to correct.
4. At most 32 periods are removed.

Different here: an annotator who is left out is one position of the list, not everyone with an
identical record; and accuracies are shares, not percentages rounded to two digits.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np

ANSWER_TYPES = ("yes/no", "number", "other")

# Left to right as the published code tries them; each is looked for in the text as it came.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_COMMA = re.compile("[0-9],[0-9]")
_PERIOD = re.compile(r"\.(?![0-9])")
_MOST_PERIODS = 32
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}

# The spellings wanted. A word that lacks exactly one of their apostrophes is read as them.
_CONTRACTIONS = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't
    needn't oughtn't shan't shouldn't wasn't weren't won't wouldn't
    could've might've must've not've should've they've we've what've where've who've would've you've
    couldn't've hadn't've mightn't've shouldn't've wouldn't've
    he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd
    he'd've it'd've she'd've somebody'd've someone'd've something'd've there'd've they'd've we'd've
    who'd've you'd've
    how'll it'll somebody'll someone'll something'll they'll what'll who'll why'll you'll
    there're they're what're why're you're
    he's how's somebody's someone's that's there's what's when's where's who's why's
    ma'am o'clock 'twas 'ow's'at y'all y'all'll y'all'd've
"""


def _misspellings() -> dict[str, str]:
    # The one entry that takes an apostrophe away.
    found = {"somebody'd": "somebodyd"}
    for word in _CONTRACTIONS.split():
        for place, letter in enumerate(word):
            if letter == "'":
                found[word[:place] + word[place + 1 :]] = word
    return found


_SPELLING = _misspellings()


@functools.lru_cache(maxsize=1 << 17)
def normalise_answer(answer: str) -> str:
    """Bring an answer into the form in which differing answers are compared.

    Args:
        answer: as an annotator or a model gave it.

    Returns:
        Lower-case words separated by single spaces; may be empty ("the" is).
    """
    text = _stripped(answer)
    remove = _DIGITS_COMMA.search(text) is not None
    found = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if remove or beside_space else " ")
    found = _PERIOD.sub("", found, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in found.lower().split())
    return " ".join(_SPELLING.get(word, word) for word in words if word not in _ARTICLES)


def answer_accuracy(answer: str, references: Sequence[str]) -> float:
    """Compute the accuracy of one answer, averaged over leaving each annotator out.

    Args:
        answer: a model's answer.
        references: the annotators' answers, in VQA v2 ten.

    Returns:
        0 to 1: of ten, 0.3, 0.6, 0.9 and 1 for one, two, three and more that agree.

    Raises:
        ValueError: fewer than two references.
    """
    if len(references) < 2:
        raise ValueError(f"references: got {len(references)} answers, expected at least 2")
    given, answer = [_stripped(reference) for reference in references], _stripped(answer)
    if len(set(given)) > 1:
        given, answer = (
            [normalise_answer(reference) for reference in given],
            normalise_answer(answer),
        )
    matches, total = given.count(answer), len(given)
    without_match, without_other = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * without_match + (total - matches) * without_other) / total


def mean_accuracies(accuracies: Iterable[float], types: Iterable[str | None]) -> dict[str, float]:
    """Average accuracies over all questions, and over those of each answer type.

    Args:
        accuracies: one per question, 0 to 1.
        types: its answer type, one of `ANSWER_TYPES`, or None where it is not known.

    Returns:
        `accuracy`, `accuracy_yes_no`, `accuracy_number` and `accuracy_other`, NaN where no question
        is of that type.

    Raises:
        ValueError: no question, or not one type for each.
    """
    values, kinds = np.asarray(list(accuracies), dtype=np.float64), np.asarray(list(types), object)
    if values.shape != kinds.shape or not len(values):
        raise ValueError(
            f"accuracies, types: got {len(values)} and {len(kinds)}, expected as many of both, >= 1"
        )
    means = {"accuracy": float(values.mean())}
    for kind in ANSWER_TYPES:
        chosen = values[kinds == kind]
        means[f"accuracy_{kind.replace('/', '_')}"] = (
            float(chosen.mean()) if len(chosen) else np.nan
        )
    return means


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
