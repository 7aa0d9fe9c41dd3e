"""A small folder in the published layout of CMU-MOSI, and edits of its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

#: Features of text, audio and video.
WIDTHS = (5, 4, 3)
_VIDEOS = {"train": range(1, 7), "test": range(7, 10)}
_PER_VIDEO = 4


def write_mosi(folder: Path) -> dict[str, np.ndarray]:
    """Write 24 training utterances of 6 videos and 12 test utterances of 3; return their scores.

    The features say what the score is. Lines of `text_*.csv` are in another order than
    `transcripts.csv`, and scores are spread over three files in yet another, as in the original.
    """
    generator = np.random.default_rng(0)
    transcripts, scored, rows = [], [], {"train": [], "test": []}
    for part, videos in _VIDEOS.items():
        for video in videos:
            for utterance in range(_PER_VIDEO):
                score = round(float(generator.uniform(-3, 3)), 1)
                sentence = f"SENTENCE {video} {utterance}"
                rows[part].append((len(transcripts), score))
                transcripts.append((f"clip{video}_{utterance}", sentence, video, int(score >= 0)))
                scored.append((sentence, score))
    lines = ['"{}","{}","{}","{}"'.format(*fields) for fields in transcripts]
    _write(folder / "transcripts.csv", lines)
    scores = {}
    for part, members in rows.items():
        order = generator.permutation(len(members))
        members = [members[place] for place in order]
        scores[part] = np.array([score for _, score in members])
        features = [
            scores[part][:, None] + 0.5 * generator.standard_normal((len(members), width))
            for width in WIDTHS
        ]
        labels = (scores[part] >= 0).astype(int)
        indices = [row for row, _ in members]
        _write(folder / f"text_{part}.csv", map(_quoted, np.c_[indices, features[0]]))
        for name, values in (("audio", features[1]), ("video", features[2])):
            _write(folder / f"{name}_{part}0.csv", map(_quoted, np.c_[values, labels]))
    for place, part in enumerate(("train", "dev", "test")):
        # Odd spaces are as published; the last line has no end there.
        body = [f"{sentence.replace(' ', '  ')} \t{score}" for sentence, score in scored[place::3]]
        (folder / f"cmbert_{part}.tsv").write_text("\r\n".join(["text\tlabel", *body]))
    return scores


def edit(path: Path, line: int, old: str, new: str) -> None:
    """Replace the first `old` in a line, counted from 1, which must have it."""
    lines = path.read_text().split("\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    path.write_text("\n".join(lines))


def _quoted(values: np.ndarray) -> str:
    return ",".join(f'"{value:.17g}"' for value in values)


def _write(path: Path, lines: object) -> None:
    path.write_text("".join(f"{line}\r\n" for line in lines), newline="")
