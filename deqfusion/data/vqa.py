"""VQA v2: questions and annotations as published, each a JSON file, plain or compressed by gzip.

    {"questions":   [{"question_id", "image_id", "question"}, ...]}
    {"annotations": [{"question_id", "image_id", "question_type", "answer_type",
                      "multiple_choice_answer", "answers": [{"answer", ...}, 10 of them]}, ...]}

Other keys are not looked at. Of an annotation, `question_id` and `answers` must be there; without
`multiple_choice_answer` it is the commonest of the ten. Two sets of names are known: that of
https://visualqa.org/download.html, and `vqa_questions_train.json`, `vqa_annotatons_train.json` (so
spelt), the same for `valid` and `test`, of a published subset without images.

Source: Y. Goyal et al., "Making the V in VQA matter", CVPR 2017.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..metrics.vqa import ANSWER_TYPES, normalise_answer
from .errors import DataError

NUM_ANSWERS = 10


class _Layout(NamedTuple):
    questions: str
    annotations: str
    train: str
    validation: str | None
    test: str


_LAYOUTS = (
    _Layout(
        "v2_OpenEnded_mscoco_{}_questions.json",
        "v2_mscoco_{}_annotations.json",
        "train2014",
        None,
        "val2014",
    ),
    _Layout(
        "vqa_questions_{}.json",
        "vqa_annotatons_{}.json",
        train="train",
        validation="valid",
        test="test",
    ),
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image, and what ten annotators answered.

    Attributes:
        question_id, image_id: as published.
        text: the question.
        answers: ten, as they were given.
        common: the commonest of them.
        answer_type: "yes/no", "number" or "other"; None where the file does not say.
        question_type: its first words, as the file groups them; None where it does not.
    """

    question_id: int
    image_id: int
    text: str
    answers: tuple[str, ...]
    common: str
    answer_type: str | None
    question_type: str | None


@dataclass(frozen=True)
class VQAData:
    """Annotated questions of a folder.

    Attributes:
        train: questions to learn from.
        validation: questions that choose the epoch; None where the release has no such part.
        test: questions to report on: val2014 in the official release, whose test parts are
            published without answers.
        sha256: of the files' content, in the order read.
    """

    train: tuple[Question, ...]
    validation: tuple[Question, ...] | None
    test: tuple[Question, ...]
    sha256: str


def load_vqa(folder: str | Path) -> VQAData:
    """Read the annotated questions of a folder.

    Args:
        folder: holds questions and annotations of every part under one of the known sets of names,
            with or without `.gz`.

    Returns:
        VQAData.

    Raises:
        DataError: a missing folder or file, or a file that does not hold what it should.
    """
    folder = Path(folder)
    layout = _layout(folder)
    digest = hashlib.sha256()
    parts = {}
    for part in (layout.train, layout.validation, layout.test):
        if part is not None:
            questions, annotations = (
                _file(folder, name.format(part)) for name in (layout.questions, layout.annotations)
            )
            parts[part] = read_questions(questions, annotations)
            for path in (questions, annotations):
                digest.update(hashlib.sha256(_content(path)).digest())
    validation = None if layout.validation is None else parts[layout.validation]
    return VQAData(parts[layout.train], validation, parts[layout.test], digest.hexdigest())


def read_questions(questions: str | Path, annotations: str | Path) -> tuple[Question, ...]:
    """Read one part: a file of questions and the file of their annotations.

    Returns:
        Questions with their answers, in the order of the first file.

    Raises:
        DataError: an unreadable, half-downloaded or empty file, a missing key, a value of another
            type, an id that occurs twice or in one file only, or another image in one than in
            the other.
    """
    questions, annotations = Path(questions), Path(annotations)
    annotated = {}
    for where, record in _records(annotations, "annotations"):
        number = _value(where, record, "question_id", int)
        if number in annotated:
            raise DataError(f"{where}: question_id {number} occurs twice, expected it once")
        annotated[number] = _annotation(where, record)
    found: dict[int, Question] = {}
    for where, record in _records(questions, "questions"):
        number, image, text = (
            _value(where, record, key, kind)
            for key, kind in (("question_id", int), ("image_id", int), ("question", str))
        )
        if number in found:
            raise DataError(f"{where}: question_id {number} occurs twice, expected it once")
        if number not in annotated:
            raise DataError(
                f"{where}: question_id {number} has no annotation, expected one in {annotations}"
            )
        annotated_image, answers, common, answer_type, question_type = annotated[number]
        if annotated_image not in (None, image):
            raise DataError(
                f"{where}: question_id {number} has image_id {image}, "
                f"expected {annotated_image} as in {annotations}"
            )
        found[number] = Question(number, image, text, answers, common, answer_type, question_type)
    surplus = next((number for number in annotated if number not in found), None)
    if surplus is not None:
        raise DataError(
            f"{annotations}: annotates question_id {surplus}, expected only the "
            f"{len(found)} of {questions}"
        )
    return tuple(found.values())


def hold_out_images(
    questions: Sequence[Question], fraction: float, seed: int
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Divide questions into a kept and a held-out part that share no image.

    Args:
        questions: to divide.
        fraction: share of the images held out, between 0 and 1; at least one, not all.
        seed: of the draw.

    Returns:
        Questions (kept, held out), each in the given order.

    Raises:
        DataError: fewer than two images.
        ValueError: `fraction` is not between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction: got {fraction}, expected a number between 0 and 1")
    images = np.unique([question.image_id for question in questions])
    if len(images) < 2:
        raise DataError(f"cannot hold out images of {len(images)}, expected at least 2")
    count = min(max(round(fraction * len(images)), 1), len(images) - 1)
    held = set(np.random.default_rng(seed).choice(images, count, replace=False).tolist())
    return (
        tuple(question for question in questions if question.image_id not in held),
        tuple(question for question in questions if question.image_id in held),
    )


def answer_vocabulary(
    questions: Iterable[Question], min_count: int = 9, max_answers: int = 3129
) -> tuple[str, ...]:
    """Choose the answers to tell apart: those that are often the commonest of a question.

    Args:
        questions: of the training part.
        min_count: in how many questions an answer must be the commonest, after normalisation.
        max_answers: keep no more than the most frequent. Training and validation part of VQA v2
            together have 3129 answers that are the commonest of 9 questions or more, which is the
            number that papers state; the training part alone has fewer.

    Returns:
        Normalised answers, the most frequent first, alphabetical where equally frequent.

    Raises:
        DataError: no answer is frequent enough.
    """
    counts = Counter(normalise_answer(question.common) for question in questions)
    # An answer of articles alone leaves nothing to say.
    counts.pop("", None)
    frequent = [answer for answer, count in counts.items() if count >= min_count]
    if not frequent:
        raise DataError(
            f"no answer is the commonest of {min_count} training questions "
            f"({max(counts.values(), default=0)} for the most frequent of {len(counts)} answers), "
            "expected some: lower min_answer_count"
        )
    return tuple(sorted(frequent, key=lambda answer: (-counts[answer], answer))[:max_answers])


def _layout(folder: Path) -> _Layout:
    def names(layout: _Layout) -> list[str]:
        parts = [part for part in (layout.train, layout.validation, layout.test) if part]
        return [
            name.format(part) for part in parts for name in (layout.questions, layout.annotations)
        ]

    def expected(layout: _Layout) -> str:
        return ", ".join(names(layout))

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with {expected(_LAYOUTS[0])}")
    present = [[_file(folder, name).is_file() for name in names(layout)] for layout in _LAYOUTS]
    layout, there = max(zip(_LAYOUTS, present, strict=True), key=lambda pair: sum(pair[1]))
    if not any(there):
        raise DataError(
            f"{folder}: holds no questions of VQA v2, expected "
            + ", or ".join(map(expected, _LAYOUTS))
            + " (or each with .gz)"
        )
    missing = [name for name, found in zip(names(layout), there, strict=True) if not found]
    if missing:
        raise DataError(
            f"{folder / missing[0]}: no such file, expected {expected(layout)} (or each with .gz)"
        )
    return layout


def _file(folder: Path, name: str) -> Path:
    compressed = folder / f"{name}.gz"
    return compressed if compressed.is_file() and not (folder / name).is_file() else folder / name


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _records(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The list under `key`, each element with the words that say where it is."""
    content = _content(path)
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        whole = json.loads(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be decompressed ({error}), expected a complete gzip file: "
            "is it half downloaded?"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not text, expected JSON") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{path}: is not complete JSON ({error}): is it half downloaded?"
        ) from error
    if not isinstance(whole, dict) or key not in whole:
        found = f"keys {', '.join(map(repr, whole))[:80]}" if isinstance(whole, dict) else "no keys"
        raise DataError(f"{path}: has {found}, expected an object with key {key!r}")
    if not isinstance(whole[key], list) or not whole[key]:
        raise DataError(f"{path}: {key!r} holds no records, expected a list of at least one")
    for index, record in enumerate(whole[key]):
        where = f"{path}, {key}[{index}]"
        if not isinstance(record, dict):
            raise DataError(f"{where}: got {_short(record)}, expected an object")
        yield where, record


def _value(where: str, record: dict[str, Any], key: str, kind: type) -> Any:
    value = record.get(key)
    # The type itself, since True is an int too.
    if type(value) is not kind:
        name = {int: "a whole number", str: "text", list: "a list"}[kind]
        got = _short(value) if key in record else f"only {', '.join(map(repr, record))[:80]}"
        raise DataError(f"{where}: key {key!r}: got {got}, expected {name}")
    return value


def _annotation(
    where: str, record: dict[str, Any]
) -> tuple[int | None, tuple[str, ...], str, str | None, str | None]:
    answers = []
    for index, answer in enumerate(_value(where, record, "answers", list)):
        place = f"{where}.answers[{index}]"
        if not isinstance(answer, dict):
            raise DataError(f"{place}: got {_short(answer)}, expected an object with key 'answer'")
        answers.append(_value(place, answer, "answer", str))
    if len(answers) != NUM_ANSWERS:
        raise DataError(
            f"{where}: key 'answers': got {len(answers)} answers, expected {NUM_ANSWERS}"
        )
    image, common, answer_type, question_type = (
        _value(where, record, key, kind) if key in record else None
        for key, kind in (
            ("image_id", int),
            ("multiple_choice_answer", str),
            ("answer_type", str),
            ("question_type", str),
        )
    )
    if answer_type not in (None, *ANSWER_TYPES):
        raise DataError(
            f"{where}: key 'answer_type': got {answer_type!r}, "
            f"expected one of {', '.join(map(repr, ANSWER_TYPES))}"
        )
    common = Counter(answers).most_common(1)[0][0] if common is None else common
    return image, tuple(answers), common, answer_type, question_type


def _short(value: Any) -> str:
    return repr(value)[:60]
