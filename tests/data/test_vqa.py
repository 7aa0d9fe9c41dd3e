"""VQA v2's files: what is read, what each fault says, which answers and words are told apart."""

import gzip
import json

import pytest

from deqfusion.data import DataError
from deqfusion.data.vqa import (
    Question,
    answer_vocabulary,
    hold_out_images,
    load_vqa,
    read_questions,
)

SUBSET = {"train": 6, "valid": 3, "test": 2}


def annotation(number, *, image=None, answers=("yes",) * 7 + ("no",) * 3):
    return {
        "question_id": number,
        "image_id": number // 10 if image is None else image,
        "question_type": "is the",
        "answer_type": "yes/no",
        "multiple_choice_answer": answers[0],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": place}
            for place, answer in enumerate(answers, start=1)
        ],
    }


def question(number):
    return {"question_id": number, "image_id": number // 10, "question": f"Is the {number} red?"}


def write(path, key, records):
    path.write_text(json.dumps({"info": {}, "license": {}, key: records}))


@pytest.fixture
def pair(tmp_path):
    """Files of three questions, on two images."""
    numbers = [10, 11, 20]
    write(tmp_path / "q.json", "questions", list(map(question, numbers)))
    write(tmp_path / "a.json", "annotations", list(map(annotation, reversed(numbers))))
    return tmp_path / "q.json", tmp_path / "a.json"


@pytest.fixture
def folder(tmp_path):
    """The subset's names, compressed."""
    for offset, (part, count) in enumerate(SUBSET.items()):
        numbers = range(100 * offset, 100 * offset + count)
        for name, key, record in (
            ("questions", "questions", question),
            ("annotatons", "annotations", annotation),
        ):
            path = tmp_path / f"vqa_{name}_{part}.json"
            write(path, key, list(map(record, numbers)))
            (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    return tmp_path


def edit(path, change):
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))


def test_reads_questions_with_their_answers(pair):
    questions = read_questions(*pair)
    assert questions[1] == Question(
        11, 1, "Is the 11 red?", ("yes",) * 7 + ("no",) * 3, "yes", "yes/no", "is the"
    )
    assert [found.question_id for found in questions] == [10, 11, 20]


def test_annotation_of_ids_and_answers_alone(pair):
    def strip(whole):
        for record in whole["annotations"]:
            del record["image_id"], record["multiple_choice_answer"]
            del record["answer_type"], record["question_type"]
        whole["annotations"][0]["answers"][0]["answer"] = "no"

    edit(pair[1], strip)
    found = read_questions(*pair)[2]
    assert (found.common, found.answer_type, found.question_type) == ("yes", None, None)


def test_folders(folder, tmp_path_factory):
    data = load_vqa(folder)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [6, 3, 2]
    assert data.sha256 == load_vqa(folder).sha256
    official = tmp_path_factory.mktemp("official")
    for part, new in (("train", "train2014"), ("valid", "val2014")):
        for name, key in (("questions", "OpenEnded_mscoco"), ("annotatons", "mscoco")):
            content = gzip.decompress((folder / f"vqa_{name}_{part}.json.gz").read_bytes())
            name = name.replace("annotatons", "annotations")
            (official / f"v2_{key}_{new}_{name}.json").write_bytes(content)
    release = load_vqa(official)
    assert (release.train, release.validation, release.test) == (data.train, None, data.validation)
    assert release.sha256 != data.sha256


def test_missing_folder_and_files(folder, tmp_path_factory):
    with pytest.raises(DataError, match=r"nowhere: no such folder, expected one with v2_OpenEnded"):
        load_vqa(folder / "nowhere")
    with pytest.raises(DataError, match=r"holds no questions of VQA v2, expected v2_.*, or vqa_q"):
        load_vqa(tmp_path_factory.mktemp("empty"))
    (folder / "vqa_annotatons_valid.json.gz").unlink()
    with pytest.raises(DataError, match=r"annotatons_valid\.json: no such file, expected vqa_ques"):
        load_vqa(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["vqa_questions_train.json", "vqa_annotatons_test.json"])
@pytest.mark.parametrize("compressed", [False, True])
def test_half_downloaded_file(folder, name, share, compressed):
    path = folder / f"{name}.gz"
    content = path.read_bytes()
    if not compressed:
        path.unlink()
        path, content = folder / name, gzip.decompress(content)
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=rf"{path.name}: .*: is it half downloaded\?"):
        load_vqa(folder)


def test_damaged_byte_in_a_compressed_file(folder):
    path = folder / "vqa_questions_train.json.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"questions_train\.json\.gz: cannot be decompressed"):
        load_vqa(folder)


# Which file of the pair, what is done to it, what is said.
FAULTS = {
    "no key": (0, lambda w: w.pop("questions"), r"keys 'info', 'license', expected .* 'questions'"),
    "other file": (1, lambda w: w.pop("annotations"), r"an object with key 'annotations'"),
    "empty split": (0, lambda w: w["questions"].clear(), r"'questions' holds no records"),
    "no list": (1, lambda w: w.update(annotations={}), r"'annotations' holds no records"),
    "no object": (0, lambda w: w["questions"].append(3), r"questions\[3\]: got 3, expected an obj"),
    "no text": (
        0,
        lambda w: w["questions"][1].pop("question"),
        r"s\[1\]: key 'question': got only",
    ),
    "text id": (0, lambda w: w["questions"][0].update(question_id="10"), r"got '10', expected a w"),
    "true id": (1, lambda w: w["annotations"][0].update(question_id=True), r"got True, expected a"),
    "twice": (
        0,
        lambda w: w["questions"][1].update(question_id=10),
        r"question_id 10 occurs twice",
    ),
    "twice annotated": (
        1,
        lambda w: w["annotations"].append(w["annotations"][0]),
        r"annotations\[3\]: question_id 20 occurs twice",
    ),
    "no annotation": (
        1,
        lambda w: w["annotations"].pop(),
        r"questions\[0\]: question_id 10 has no annotation, expected one in .*a\.json",
    ),
    "no question": (
        0,
        lambda w: w["questions"].pop(),
        r"a\.json: annotates question_id 20, expected only the 2 of .*q\.json",
    ),
    "other image": (
        1,
        lambda w: w["annotations"][0].update(image_id=7),
        r"question_id 20 has image_id 2, expected 7 as in .*a\.json",
    ),
    "nine answers": (
        1,
        lambda w: w["annotations"][2]["answers"].pop(),
        r"annotations\[2\]: key 'answers': got 9 answers, expected 10",
    ),
    "bare answers": (
        1,
        lambda w: w["annotations"][0].update(answers=["yes"] * 10),
        r"annotations\[0\]\.answers\[0\]: got 'yes', expected an object with key 'answer'",
    ),
    "other answer key": (
        1,
        lambda w: w["annotations"][0]["answers"][4].update(answer=None),
        r"answers\[4\]: key 'answer': got None, expected text",
    ),
    "answers as text": (
        1,
        lambda w: w["annotations"][0].update(answers="yes"),
        r"key 'answers': got 'yes', expected a list",
    ),
    "unknown type": (
        1,
        lambda w: w["annotations"][0].update(answer_type="color"),
        r"key 'answer_type': got 'color', expected one of 'yes/no', 'number', 'other'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_key_and_expectation(pair, fault):
    place, change, message = FAULTS[fault]
    edit(pair[place], change)
    with pytest.raises(DataError, match=message) as error:
        read_questions(*pair)
    assert str(pair[0].parent) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "3", '"questions"'])
def test_json_of_another_shape(pair, content):
    pair[0].write_text(content)
    with pytest.raises(DataError, match=r"q\.json: has no keys, expected an object with key"):
        read_questions(*pair)


def test_binary_file(pair):
    pair[0].write_bytes(b"\x80\x02}q\x00")
    with pytest.raises(DataError, match=r"q\.json: byte 0 is not text, expected JSON"):
        read_questions(*pair)


def test_images_are_held_out_whole_and_by_seed():
    questions = [
        Question(number, number // 3, "", ("a",) * 10, "a", None, None) for number in range(60)
    ]
    kept, held = hold_out_images(questions, 0.25, seed=0)
    assert {part.image_id for part in kept}.isdisjoint(part.image_id for part in held)
    assert len({part.image_id for part in held}) == 5
    assert sorted(part.question_id for part in kept + held) == list(range(60))
    assert hold_out_images(questions, 0.25, seed=0) == (kept, held)
    assert hold_out_images(questions, 0.25, seed=1) != (kept, held)
    with pytest.raises(ValueError, match=r"fraction: got 1\.0"):
        hold_out_images(questions, 1.0, seed=0)
    with pytest.raises(DataError, match="images of 1, expected at least 2"):
        hold_out_images(questions[:3], 0.5, seed=0)


def test_vocabulary_is_of_common_answers_after_normalisation():
    commons = ["two"] * 2 + ["2."] + ["Red"] * 3 + ["blue"] * 2 + ["the"] * 9
    questions = [
        Question(number, 0, "", (common,) * 10, common, None, None)
        for number, common in enumerate(commons)
    ]
    assert answer_vocabulary(questions, min_count=2) == ("2", "red", "blue")
    assert answer_vocabulary(questions, min_count=3) == ("2", "red")
    assert answer_vocabulary(questions, min_count=2, max_answers=1) == ("2",)
    with pytest.raises(DataError, match=r"commonest of 9 training questions \(3 for the most freq"):
        answer_vocabulary(questions)


def test_published_questions(data_dir):
    folder = data_dir / "vqa"
    if not (folder / "questions.json").is_file():
        pytest.skip(f"no {folder / 'questions.json'}")
    questions = read_questions(folder / "questions.json", folder / "annotations.json")
    assert [(found.question_id, found.common) for found in questions] == [
        (458752000, "net"),
        (458752001, "pitcher"),
        (458752002, "orange"),
    ]


def test_published_subset(data_dir):
    folder = data_dir / "vqa" / "subset60k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    # The smallest part: the whole takes several seconds.
    questions = read_questions(
        folder / "vqa_questions_test.json.gz", folder / "vqa_annotatons_test.json.gz"
    )
    assert len(questions) == 2962
    assert set(answer_vocabulary(questions)[:2]) == {"yes", "no"}
