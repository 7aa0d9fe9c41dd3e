"""CMU-MOSI: utterance features of text, audio and video, with sentiment scores from -3 to 3.

    transcripts.csv                   utterance id, sentence, video number, binary label
    text_{train,test}.csv             row of transcripts.csv (from 0), text features
    audio_{train,test}0.csv           audio features, binary label; lines in the order of the text
    video_{train,test}0.csv           video features, binary label; the same
    cmbert_{train,dev,test}.tsv       sentence, score: a header, then one line per utterance

No line has a header but in the last three. The features are those of context-dependent sentiment
analysis (Poria et al., ACL 2017), fitted on the training videos; the scores are published in the
layout of CM-BERT (Yang et al., ACM MM 2020), without ids and in a split of its own.

Scores are therefore matched by sentence, spaces apart. All 2199 published utterances have one;
four, all to train on, share two sentences ("I HATED IT", "SO IT WAS JUST A LITTLE AWKWARD") of two
scores each, 0.4 apart, and get the sentence's mean. An utterance whose sentence has no score is an
error, since with published files that can only be an incomplete one. So is a score whose sign
contradicts the binary label, which is 1 where the score is >= 0.

The features of text and video were learned from the training videos' labels, and give them away: a
ridge regression on text is right about the side of 0 for 98% of held-out training utterances and
76% of test utterances, on video for 92% and 52%, on audio for 48% and 56%. Held-out training videos
therefore say little about test videos, whatever is chosen by them.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

#: Modalities, in the order in which `MosiPart.modalities` holds them.
MOSI_MODALITIES = ("text", "audio", "video")

_PARTS = ("train", "test")
_SCORE_PARTS = ("train", "dev", "test")
_TRANSCRIPTS = "transcripts.csv"
_LARGEST_SCORE = 3.0


@dataclass(frozen=True)
class MosiPart:
    """Utterances of some videos.

    Attributes:
        modalities: float64 arrays (utterances, features): text, audio, video.
        scores: float64 (utterances,), -3 (strongly negative) to 3 (strongly positive).
        videos: int64 (utterances,), the number of the video that each was said in.
        sentences: what was said, in capitals and without punctuation.
    """

    modalities: tuple[NDArray[np.float64], ...]
    scores: NDArray[np.float64]
    videos: NDArray[np.int64]
    sentences: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: NDArray[np.int64]) -> MosiPart:
        """Return the given utterances, in the given order."""
        return MosiPart(
            tuple(view[rows] for view in self.modalities),
            self.scores[rows],
            self.videos[rows],
            tuple(self.sentences[row] for row in rows),
        )


@dataclass(frozen=True)
class MosiData:
    """The published split of CMU-MOSI.

    Attributes:
        train, test: utterances of different videos.
        ambiguous: utterances whose sentence has several scores, of which theirs is the mean.
    """

    train: MosiPart
    test: MosiPart
    ambiguous: int


@dataclass(frozen=True)
class _Utterance:
    sentence: str
    video: int
    label: int


def load_mosi(folder: str | Path) -> MosiData:
    """Read a folder of CMU-MOSI's utterance features and scores.

    Args:
        folder: holds the files that the module's docstring lists.

    Returns:
        MosiData, unscaled.

    Raises:
        DataError: a missing folder or file, a file that does not hold what it should, files of
            different lengths, a label or score that contradicts another.
    """
    folder = Path(folder)
    _check_files(folder)
    transcripts = _read_transcripts(folder / _TRANSCRIPTS)
    scores = _read_scores(folder)
    parts, used = [], []
    for name in _PARTS:
        rows, part = _read_part(folder, name, transcripts, scores)
        parts.append(part)
        used.append(rows)
    train, test = parts
    shared = np.intersect1d(train.videos, test.videos)
    if shared.size:
        raise DataError(
            f"{folder / 'text_test.csv'}: has utterances of video {shared[0]}, expected none of a "
            "video that text_train.csv has"
        )
    sentences = [transcripts[row].sentence for rows in used for row in rows]
    return MosiData(train, test, sum(len(scores[sentence]) > 1 for sentence in sentences))


def mosi_place(part: str, modality: str, row: int, column: int) -> str:
    """Return file, line and column of a feature of "train" or "test", numbered from 0."""
    if modality == "text":
        # Its first column is a row of the transcripts.
        return f"text_{part}.csv, line {row + 1}, column {column + 2}"
    return f"{modality}_{part}0.csv, line {row + 1}, column {column + 1}"


def hold_out_videos(
    videos: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide utterances into a kept and a held-out part that have no video in common.

    Args:
        videos: int64 (utterances,), the video of each.
        fraction: of the videos to hold out, between 0 and 1.
        seed: of the choice.

    Returns:
        Row indices (kept, held out), int64, ascending.

    Raises:
        DataError: too few videos for both parts to have one.
        ValueError: `fraction` is not between 0 and 1.
    """
    from sklearn.model_selection import GroupShuffleSplit

    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction: got {fraction}, expected a number between 0 and 1")
    splitter = GroupShuffleSplit(1, test_size=fraction, random_state=seed)
    try:
        kept, held = next(splitter.split(videos, groups=videos))
    except ValueError as error:
        raise DataError(
            f"cannot hold out {fraction:g} of {len(np.unique(videos))} videos, "
            "expected both parts to have at least one"
        ) from error
    return np.sort(kept), np.sort(held)


def _check_files(folder: Path) -> None:
    names = [_TRANSCRIPTS, *(f"text_{part}.csv" for part in _PARTS)]
    names += [f"{modality}_{part}0.csv" for modality in MOSI_MODALITIES[1:] for part in _PARTS]
    names += [f"cmbert_{part}.tsv" for part in _SCORE_PARTS]
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with {', '.join(names)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        also = f", nor {', '.join(missing[1:])}" if missing[1:] else ""
        raise DataError(f"{folder / missing[0]}: no such file{also}; expected {', '.join(names)}")


def _read_transcripts(path: Path) -> list[_Utterance]:
    utterances = []
    for number, fields in _rows(path):
        if len(fields) != 4:
            raise DataError(
                f"{path}, line {number}: got {len(fields)} fields, "
                "expected 4: utterance id, sentence, video, label"
            )
        video, label = (_number(path, number, column, fields[column]) for column in (2, 3))
        if video != int(video):
            raise DataError(
                f"{path}, line {number}, column 3: got {fields[2]!r}, expected a video's number"
            )
        _check_label(path, number, 4, label)
        utterances.append(_Utterance(_normalised(fields[1]), int(video), int(label)))
    return utterances


def _read_scores(folder: Path) -> dict[str, list[float]]:
    """Every sentence's scores, of all three parts: their split is another than the features'."""
    scores = defaultdict(list)
    for part in _SCORE_PARTS:
        path = folder / f"cmbert_{part}.tsv"
        # The published files' last lines have no line end.
        for number, fields in _rows(path, delimiter="\t", complete=False):
            if len(fields) != 2:
                raise DataError(
                    f"{path}, line {number}: got {len(fields)} fields, "
                    "expected 2, divided by a tab: sentence and score"
                )
            if number == 1:
                if fields != ["text", "label"]:
                    raise DataError(f"{path}, line 1: got {fields}, expected 'text' and 'label'")
                continue
            score = _number(path, number, 1, fields[1])
            if abs(score) > _LARGEST_SCORE:
                raise DataError(
                    f"{path}, line {number}, column 2: got {score:g}, expected a score from "
                    f"{-_LARGEST_SCORE:g} to {_LARGEST_SCORE:g}"
                )
            scores[_normalised(fields[0])].append(score)
    return dict(scores)


def _read_part(
    folder: Path, name: str, transcripts: list[_Utterance], scores: dict[str, list[float]]
) -> tuple[list[int], MosiPart]:
    text_path = folder / f"text_{name}.csv"
    text = _matrix(text_path)
    utterances = []
    for line, row in enumerate(text[:, 0], start=1):
        if row != int(row) or not 0 <= row < len(transcripts):
            raise DataError(
                f"{text_path}, line {line}, column 1: got {row:g}, "
                f"expected a row of {_TRANSCRIPTS}, 0 to {len(transcripts) - 1}"
            )
        utterances.append(transcripts[int(row)])
    _check_distinct(text_path, text[:, 0])
    views = [text[:, 1:]]
    for modality in MOSI_MODALITIES[1:]:
        path = folder / f"{modality}_{name}0.csv"
        matrix = _matrix(path)
        if len(matrix) != len(text):
            raise DataError(
                f"{path}, line {len(matrix)}: the file ends after {len(matrix)} rows, "
                f"expected {len(text)}, one for each line of {text_path.name}"
            )
        for line, (label, said) in enumerate(zip(matrix[:, -1], utterances, strict=True), 1):
            if label != said.label:
                raise DataError(
                    f"{path}, line {line}, column {matrix.shape[1]}: got label {label:g}, expected "
                    f"{said.label} as in {_TRANSCRIPTS} for the row that {text_path.name} names"
                )
        views.append(matrix[:, :-1])
    matched = [
        _score(folder, text_path, line, said, scores) for line, said in enumerate(utterances, 1)
    ]
    part = MosiPart(
        tuple(np.ascontiguousarray(view) for view in views),
        np.array(matched),
        np.array([said.video for said in utterances], dtype=np.int64),
        tuple(said.sentence for said in utterances),
    )
    return text[:, 0].astype(int).tolist(), part


def _score(
    folder: Path, path: Path, line: int, said: _Utterance, scores: dict[str, list[float]]
) -> float:
    found = scores.get(said.sentence)
    if not found:
        raise DataError(
            f"{folder}: no cmbert_*.tsv has a score for {said.sentence[:60]!r}, expected one for "
            f"every utterance ({path.name}, line {line}); is one of them cut short?"
        )
    if any((score >= 0) != bool(said.label) for score in found):
        raise DataError(
            f"{folder}: {said.sentence[:60]!r} has score {found[0]:g} in cmbert_*.tsv and label "
            f"{said.label} in {_TRANSCRIPTS}, expected label 1 where the score is >= 0, else 0"
        )
    return float(np.mean(found))


def _matrix(path: Path) -> NDArray[np.float64]:
    """Numbers of a CSV file without header, with an index or label beside at least one feature."""
    rows: list[list[float]] = []
    for number, fields in _rows(path):
        if rows and len(fields) != len(rows[0]):
            raise DataError(
                f"{path}, line {number}: got {len(fields)} values, "
                f"expected {len(rows[0])} as in line 1"
            )
        if len(fields) < 2:
            raise DataError(f"{path}, line {number}: got {len(fields)} value, expected at least 2")
        rows.append(_numbers(path, number, fields))
    return np.array(rows)


def _rows(
    path: Path, *, delimiter: str = ",", complete: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """Lines of a file as fields, numbered from 1; with `complete`, the last one's end is needed."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not text, expected CSV") from error
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    elif complete:
        raise DataError(
            f"{path}, line {len(lines)}: no line end, expected a complete last line: "
            "the file looks truncated"
        )
    if not lines:
        raise DataError(f"{path}: is empty, expected one utterance per line")
    endless = (line.removesuffix("\r") for line in lines)
    if delimiter == ",":
        reader = csv.reader(endless, strict=True)
    else:
        reader = csv.reader(endless, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    try:
        yield from enumerate(reader, start=1)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}, expected CSV") from error


def _numbers(path: Path, number: int, fields: list[str]) -> list[float]:
    return [_number(path, number, column, field) for column, field in enumerate(fields)]


def _number(path: Path, number: int, column: int, field: str) -> float:
    try:
        # float() accepts 1_000, which no CSV file means.
        value = float("_" if "_" in field else field)
    except ValueError:
        value = float("nan")
    if not math.isfinite(value):
        raise DataError(
            f"{path}, line {number}, column {column + 1}: got {field.strip()[:40]!r}, "
            "expected a finite number"
        )
    return value


def _check_label(path: Path, number: int, column: int, label: float) -> None:
    if label not in (0, 1):
        raise DataError(
            f"{path}, line {number}, column {column}: got label {label:g}, expected 0 or 1"
        )


def _check_distinct(path: Path, rows: NDArray[np.float64]) -> None:
    _, first, counts = np.unique(rows, return_index=True, return_counts=True)
    if (counts > 1).any():
        index = int(np.argmax(counts > 1))
        raise DataError(
            f"{path}, line {first[index] + 1}: row {rows[first[index]]:g} of {_TRANSCRIPTS} "
            f"is named {counts[index]} times, expected once"
        )


def _normalised(sentence: str) -> str:
    return " ".join(sentence.split())
