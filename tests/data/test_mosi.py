"""CMU-MOSI's folder: what is read and matched, and what each fault in a file says."""

import numpy as np
import pytest

from deqfusion.data.errors import DataError
from deqfusion.data.mosi import hold_out_videos, load_mosi
from tests.data.small_mosi import WIDTHS, edit, write_mosi


@pytest.fixture
def folder(tmp_path):
    write_mosi(tmp_path)
    return tmp_path


def test_reads_what_was_written(tmp_path):
    scores = write_mosi(tmp_path)
    data = load_mosi(tmp_path)
    for part, name in ((data.train, "train"), (data.test, "test")):
        np.testing.assert_array_equal(part.scores, scores[name])
        assert tuple(view.shape[1] for view in part.modalities) == WIDTHS
        assert len(part) == len(scores[name])
        # Features were written around the score, in the same order.
        for view in part.modalities:
            assert np.corrcoef(view.mean(axis=1), part.scores)[0, 1] > 0.9
        for sentence, video in zip(part.sentences, part.videos, strict=True):
            assert sentence.split()[1] == str(video)
    assert not set(data.train.videos) & set(data.test.videos)
    assert data.ambiguous == 0


def test_rows_are_taken_in_every_part(folder):
    whole = load_mosi(folder).train
    taken = whole.take(np.array([5, 2]))
    assert taken.sentences == (whole.sentences[5], whole.sentences[2])
    np.testing.assert_array_equal(taken.scores, whole.scores[[5, 2]])
    np.testing.assert_array_equal(taken.videos, whole.videos[[5, 2]])
    for got, view in zip(taken.modalities, whole.modalities, strict=True):
        np.testing.assert_array_equal(got, view[[5, 2]])


def test_published_files(data_dir):
    data = load_mosi(data_dir / "mosi")
    assert (len(data.train), len(data.test), data.ambiguous) == (1447, 752, 4)
    assert [view.shape[1] for view in data.train.modalities] == [100, 73, 100]
    assert (len(np.unique(data.train.videos)), len(np.unique(data.test.videos))) == (62, 31)
    place = data.test.sentences.index("ANYHOW IT WAS REALLY GOOD")
    assert data.test.scores[place] == 2.4
    shared = np.array([sentence == "I HATED IT" for sentence in data.train.sentences])
    np.testing.assert_allclose(data.train.scores[shared], [-2.8, -2.8])
    np.testing.assert_allclose((data.test.scores >= 0).mean(), 0.621, atol=5e-4)


def test_sentence_with_several_scores_has_their_mean(folder):
    before = load_mosi(folder).train
    # Both on the same side of 0, or the label would contradict one.
    extra = 3.0 if before.scores[0] >= 0 else -3.0
    path = folder / "cmbert_dev.tsv"
    path.write_text(path.read_text() + f"\r\n{before.sentences[0]}\t{extra}")
    data = load_mosi(folder)
    assert data.ambiguous == 1
    assert data.train.scores[0] == (before.scores[0] + extra) / 2
    np.testing.assert_array_equal(data.train.scores[1:], before.scores[1:])


def test_missing_folder_and_files(folder):
    with pytest.raises(DataError, match=r"nowhere: no such folder, expected one with transcripts"):
        load_mosi(folder / "nowhere")
    (folder / "audio_test0.csv").unlink()
    (folder / "cmbert_dev.tsv").unlink()
    with pytest.raises(DataError, match=r"audio_test0\.csv: no such file, nor cmbert_dev\.tsv;"):
        load_mosi(folder)


@pytest.mark.parametrize("name", ["transcripts.csv", "text_train.csv", "video_test0.csv"])
@pytest.mark.parametrize("keep", [0.3, 0.999, 0.0])
def test_truncated_file(folder, name, keep):
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(DataError, match=name):
        load_mosi(folder)


def test_scores_cut_at_a_line_end(folder):
    path = folder / "cmbert_test.tsv"
    path.write_text("\n".join(path.read_text().split("\n")[:-1]))
    with pytest.raises(DataError, match=r"no cmbert_\*\.tsv has a score for 'SENTENCE 9 3', exp"):
        load_mosi(folder)


def test_lengths_that_differ_between_modalities(folder):
    path = folder / "video_train0.csv"
    path.write_text("\n".join(path.read_text().split("\n")[:-3]) + "\n")
    message = r"video_train0\.csv, line 22: the file ends after 22 rows, expected 24, one for each"
    with pytest.raises(DataError, match=message):
        load_mosi(folder)


def test_files_in_another_order(folder):
    path = folder / "audio_train0.csv"
    lines = path.read_text().rstrip("\n").split("\n")
    labels = [line.rpartition(",")[2] for line in lines]
    other = next(place for place, label in enumerate(labels) if label != labels[0])
    lines[0], lines[other] = lines[other], lines[0]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"audio_train0\.csv, line 1, column 5: got label \d, expe"):
        load_mosi(folder)


@pytest.mark.parametrize(
    ("name", "line", "old", "new", "message"),
    [
        ("text_train.csv", 2, '"', '"x', r"text_train\.csv, line 2, column 1: got 'x"),
        ("text_train.csv", 1, ",", ',"nan",', r"line 1, column 2: got 'nan', expected a finite "),
        ("text_train.csv", 3, ",", ',"1",', r"line 3: got 7 values, expected 6 as in line 1"),
        ("audio_test0.csv", 4, '"', '"1e99', r"audio_test0\.csv, line 4, column 1: got '1e99"),
        ("transcripts.csv", 5, '"clip2_0",', "", r"transcripts\.csv, line 5: got 3 fields, exp"),
        ("transcripts.csv", 5, '"2"', '"2.5"', r"line 5, column 3: got '2\.5', expected a video"),
        ("transcripts.csv", 5, '"2","', '"2","7', r"line 5, column 4: got label 7\d, expected 0"),
        ("cmbert_dev.tsv", 1, "label", "score", r"cmbert_dev\.tsv, line 1: got .*, expected 'text"),
        ("cmbert_dev.tsv", 3, "\t", " ", r"cmbert_dev\.tsv, line 3: got 1 fields, expected 2, div"),
        ("cmbert_dev.tsv", 3, "\t", "\t9", r"line 3, column 2: got .* expected a "),
    ],
)
def test_damaged_line(folder, name, line, old, new, message):
    edit(folder / name, line, old, new)
    with pytest.raises(DataError, match=message):
        load_mosi(folder)


def test_index_that_is_no_row_or_twice_there(folder):
    path = folder / "text_test.csv"
    lines = path.read_text().split("\n")
    first = lines[0].partition(",")[0]
    edit(path, 1, first, '"36"')
    with pytest.raises(
        DataError, match=r"text_test\.csv, line 1, column 1: got 36, expected a row"
    ):
        load_mosi(folder)
    edit(path, 1, '"36"', lines[1].partition(",")[0])
    with pytest.raises(DataError, match=r"text_test\.csv, line 1: row \d+ of .* is named 2 times"):
        load_mosi(folder)


def test_video_in_both_parts(folder):
    edit(folder / "transcripts.csv", 36, '"9"', '"1"')
    with pytest.raises(
        DataError, match=r"text_test\.csv: has utterances of video 1, expected none"
    ):
        load_mosi(folder)


def test_score_against_the_label(folder):
    for line, fields in enumerate((folder / "cmbert_dev.tsv").read_text().split("\n"), start=1):
        if line > 1 and float(fields.split("\t")[1]) > 0:
            edit(folder / "cmbert_dev.tsv", line, "\t", "\t-")
            break
    with pytest.raises(DataError, match=r"has score -\d.* and label 1 in transcripts\.csv, expec"):
        load_mosi(folder)


def test_held_out_videos_are_whole_and_seeded():
    videos = np.repeat(np.arange(10), 3)
    kept, held = hold_out_videos(videos, 0.3, seed=1)
    assert len(np.unique(videos[held])) == 3
    assert not set(videos[kept]) & set(videos[held])
    assert sorted([*kept, *held]) == list(range(30))
    np.testing.assert_array_equal(held, hold_out_videos(videos, 0.3, seed=1)[1])
    assert any(len(np.setdiff1d(held, hold_out_videos(videos, 0.3, s)[1])) for s in range(2, 5))


def test_videos_that_cannot_be_held_out():
    with pytest.raises(DataError, match=r"cannot hold out 0\.5 of 1 videos, expected both parts"):
        hold_out_videos(np.zeros(4, int), 0.5, seed=0)
    with pytest.raises(ValueError, match=r"fraction: got 1\.0, expected a number between 0 and 1"):
        hold_out_videos(np.arange(4), 1.0, seed=0)
