"""Task "vqa": what a batch holds, which metrics come out, and that it learns from the image."""

import gzip
import json

import numpy as np
import pytest
import torch

from deqfusion.cli import main
from deqfusion.data import DataError
from deqfusion.engine import complete
from deqfusion.tasks import TASKS, get_recipe
from deqfusion.tasks.vqa import FEATURES_FOLDER, RECIPES

RECIPE = RECIPES["vqa"]
COLOURS = ("red", "blue", "green")
WIDTH = 6


def configuration(**options):
    return complete(RECIPE, {"min_answer_count": 1, "dim": 32, "dropout": 0.0, **options})


def ten(answer, others=0):
    return [answer] * (10 - others) + ["none of them"] * others


def write_part(folder, part, images, official=False):
    """Two questions per image: its colour, which its second region tells, and how many are seen."""
    questions, annotations = [], []
    for image in images:
        colour = COLOURS[image % 3]
        for place, (text, answer, kind, start, others) in enumerate(
            (
                ("What colour is the box?", colour, "other", "what", 8 if image % 5 == 0 else 3),
                ("How many boxes are there here?", "Two", "number", "how many", 0),
            )
        ):
            number = 10 * image + place
            questions.append({"image_id": image, "question_id": number, "question": text})
            annotations.append(
                {
                    "image_id": image,
                    "question_id": number,
                    "question_type": start,
                    "answer_type": kind,
                    "multiple_choice_answer": answer,
                    "answers": [{"answer": given} for given in ten(answer, others)],
                }
            )
    names = (f"vqa_questions_{part}.json", f"vqa_annotatons_{part}.json")
    if official:
        names = (f"v2_OpenEnded_mscoco_{part}_questions.json", f"v2_mscoco_{part}_annotations.json")
    (folder / names[0]).write_text(json.dumps({"questions": questions}))
    (folder / names[1]).write_text(json.dumps({"annotations": annotations}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqa")
    (folder / FEATURES_FOLDER).mkdir()
    for part, images in (
        ("train", range(1, 46)),
        ("valid", range(61, 76)),
        ("test", range(76, 91)),
    ):
        write_part(folder, part, images)
        for image in images:
            generator = np.random.default_rng(image)
            features = generator.standard_normal((2 + image % 4, WIDTH), dtype=np.float32)
            features[:, :4] = 0.0
            features[1, :4] = [1.0, *(np.arange(3) == image % 3)]
            boxes = np.ones((len(features), 4))
            np.savez(
                folder / FEATURES_FOLDER / f"COCO_{part}2014_{image:012}.jpg.npz",
                **{"x": features, "bbox": boxes, "num_bbox": len(features)},
                **{"image_w": 10, "image_h": 10},
            )
    return folder


def trained(folder, steps=30, **options):
    """Take steps on the whole training part, and return the metrics of the test part."""
    config = configuration(**options)
    splits, facts = RECIPE.load(folder, config)
    torch.manual_seed(0)
    model = RECIPE.build(config | facts)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    batch = splits.train.batch(torch.arange(len(splits.train)))
    for _ in range(steps):
        optimizer.zero_grad()
        RECIPE.objective(model.train(), batch).loss.backward()
        optimizer.step()
    return evaluate(model, splits.test)


@torch.no_grad()
def evaluate(model, samples):
    rows = torch.arange(len(samples)).split(7)
    return RECIPE.metrics([RECIPE.predict(model.eval(), samples.batch(part)) for part in rows])


def test_batch(folder):
    splits, facts = RECIPE.load(folder, configuration())
    assert [len(part) for part in splits] == [90, 30, 30]
    # Equally frequent colours are in alphabetical order.
    assert {name: facts[name] for name in ("num_answers", "region_width")} == {
        "num_answers": 4,
        "region_width": WIDTH,
    }
    assert all(kind.accepts(facts[name]) for name, kind in RECIPE.facts.items())
    # Images 1 (blue, 3 regions) and 5 (green, 3 regions), then 3 (red, 5 regions).
    batch = splits.train.batch(torch.tensor([0, 8, 5]))
    assert batch["words"].shape == (3, 6)
    assert (batch["words"] > 0).sum(dim=1).tolist() == [5, 5, 6]
    assert batch["places"].tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert batch["counts"].tolist() == [3, 3, 5]
    assert batch["regions"].shape == (3, 5, WIDTH)
    assert (batch["regions"][:2, 3:] == 0).all()
    assert batch["labels"][:, :2].tolist() == [[1, -1], [2, -1], [0, -1]]
    # 7, 2 and 10 of ten annotators; the last are of one mind, and then "Two" is not "2".
    torch.testing.assert_close(batch["targets"][:, 0], torch.tensor([1.0, 2 / 3, 1.0]))
    torch.testing.assert_close(batch["accuracies"][:, 0], torch.tensor([1.0, 0.6, 0.0]))
    assert batch["types"].tolist() == [2, 2, 1]


def test_metrics_are_the_official_accuracy_and_the_baselines(folder):
    splits, facts = RECIPE.load(folder, configuration(image="none"))
    model = RECIPE.build(configuration(image="none") | facts)
    torch.nn.init.zeros_(model.classifier[-1].weight)
    # Says "blue" whatever is asked, right for 5 of the 15 questions for a colour.
    said = torch.tensor([-1.0, 1.0, 0.5, -0.5])
    model.classifier[-1].bias.data.copy_(said)
    metrics = evaluate(model, splits.test)
    blue = [0.6 if image % 5 == 0 else 1.0 for image in range(76, 91) if image % 3 == 1]
    assert metrics["accuracy"] == pytest.approx(sum(blue) / 30)
    assert metrics["accuracy_other"] == pytest.approx(sum(blue) / 15)
    assert metrics["accuracy_number"] == 0.0
    assert np.isnan(metrics["accuracy_yes_no"])
    assert metrics["baseline_yes"] == 0.0
    # The commonest colour is one of three equally frequent ones; every "how many" is missed.
    assert 0 < metrics["baseline_question_type"] <= 5 / 30
    targets = torch.zeros(len(splits.test), 4)
    batch = splits.test.batch(torch.arange(len(splits.test)))
    for row, (labels, values) in enumerate(zip(batch["labels"], batch["targets"], strict=True)):
        for label, value in zip(labels.tolist(), values.tolist(), strict=True):
            if label >= 0:
                targets[row, label] = value
    chance = said.sigmoid()
    loss = -(targets * chance.log() + (1 - targets) * (1 - chance).log()).sum(dim=1).mean()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    objective = RECIPE.objective(model, batch)
    assert objective.loss.item() == pytest.approx(metrics["loss"], rel=1e-5)
    assert (objective.equilibrium, objective.fusion) == (None, None)


@pytest.mark.parametrize("fusion", ["deq", "concat"])
def test_learns_what_only_the_image_tells(folder, fusion):
    metrics = trained(folder, fusion=fusion)
    blind = trained(folder, image="none")
    # Of 15 questions for a colour, 3 were answered by two annotators: 0.6 at best.
    best = (12 + 3 * 0.6) / 15
    assert metrics["accuracy_other"] > 0.9 * best
    assert blind["accuracy_other"] < 0.6 * best


def test_objective_hands_the_solve_to_the_engine(folder):
    config = configuration(positions=True, encoder="transformer")
    splits, facts = RECIPE.load(folder, config)
    assert facts["region_width"] == WIDTH + 5
    model = RECIPE.build(config | facts)
    batch = splits.train.batch(torch.arange(4))
    objective = RECIPE.objective(model, batch)
    assert objective.fusion is model.fusion
    assert objective.equilibrium.fused.shape == (len(batch["places"]), 32)
    penalty = objective.fusion.jacobian_penalty(objective.equilibrium, objective.features)
    (objective.loss + penalty).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_official_release_holds_out_training_images(tmp_path):
    write_part(tmp_path, "train2014", range(1, 41), official=True)
    write_part(tmp_path, "val2014", range(41, 51), official=True)
    config = configuration(image="none", validation_fraction=0.25)
    splits, facts = RECIPE.load(tmp_path, config)
    assert [len(part) for part in splits] == [60, 20, 20]
    assert set(splits.train.images).isdisjoint(splits.validation.images)
    assert splits.test.images[0] == 41
    again, same = RECIPE.load(tmp_path, config)
    assert again.validation.images == splits.validation.images
    assert same == facts


def test_faults(tmp_path):
    write_part(tmp_path, "train2014", range(1, 5), official=True)
    write_part(tmp_path, "val2014", range(5, 9), official=True)
    with pytest.raises(DataError, match=r"features: no such folder, expected one with a \.npz"):
        RECIPE.load(tmp_path, configuration())
    assert RECIPE.fault(configuration()) is None
    key, message = RECIPE.fault(configuration(attention_heads=5))
    assert (key, message) == ("attention_heads", "got 5, expected a divisor of dim, 32")
    assert RECIPE.fault(configuration(attention_heads=5, image="none")) is None


@pytest.mark.parametrize(("option", "value"), [("fusion", "concat"), ("jacobian_weight", 1.0)])
def test_what_concerns_the_fusion_is_refused_where_nothing_is_fused(
    tmp_path, capsys, option, value
):
    assert RECIPE.fault(configuration(**{option: value})) is None
    key, message = RECIPE.fault(configuration(image="none", **{option: value}))
    assert key == option
    assert "with image 'none', with which nothing is fused" in message
    argument = f"--{option.replace('_', '-')}"
    files = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(["train", "vqa", *files, "--image", "none", argument, str(value)]) == 2
    assert f"{argument}: got " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_equilibrium_is_penalised_by_default():
    weights = {
        fusion: configuration(fusion=fusion)["jacobian_weight"] for fusion in ("deq", "concat")
    }
    assert weights == {"deq": 0.1, "concat": 0.0}
    assert configuration(image="none")["jacobian_weight"] == 0.0


@pytest.mark.parametrize("name", TASKS)
def test_every_task_penalises_an_equilibrium_by_default(name):
    assert complete(get_recipe(name), {})["jacobian_weight"] > 0


def test_data_is_known_by_its_features_too(folder):
    facts = RECIPE.load(folder, configuration())[1]
    blind = RECIPE.load(folder, configuration(image="none"))[1]
    assert facts["data_sha256"] != blind["data_sha256"]
    assert facts["data_sha256"] == RECIPE.load(folder, configuration())[1]["data_sha256"]


def test_published_subset(data_dir, tmp_path):
    folder = data_dir / "vqa" / "subset60k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    # Its smallest part, twice, as if it were the official release: the whole takes ten seconds.
    for new in ("train2014", "val2014"):
        for old, name in (
            ("vqa_questions_test", f"v2_OpenEnded_mscoco_{new}_questions"),
            ("vqa_annotatons_test", f"v2_mscoco_{new}_annotations"),
        ):
            content = gzip.decompress((folder / f"{old}.json.gz").read_bytes())
            (tmp_path / f"{name}.json").write_bytes(content)
    config = configuration(image="none", min_answer_count=9, validation_fraction=0.5)
    splits, facts = RECIPE.load(tmp_path, config)
    assert len(splits.train) + len(splits.validation) == len(splits.test) == 2962
    model = RECIPE.build(config | facts)
    metrics = evaluate(model, splits.validation)
    # A third of the questions is for yes or no.
    assert 0.15 < metrics["baseline_yes"] < 0.3
    assert metrics["baseline_yes"] < metrics["baseline_question_type"]


def test_command_trains_and_evaluates(folder, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--dim", "16", "--epochs", "2", "--min-answer-count", "1", "--quiet"]
    data = ["--data-dir", str(folder)]
    assert main(["train", "vqa", *data, "--out", str(out), *options]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["task"], config["region_width"]) == ("vqa", WIDTH)
    capsys.readouterr()
    assert main(["evaluate", *data, "--checkpoint", str(out), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert {"accuracy", "accuracy_number", "baseline_yes"} <= metrics.keys()


def test_evaluate_refuses_other_words_of_the_same_number(folder, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--dim", "16", "--epochs", "1", "--min-answer-count", "1", "--image", "none"]
    data = ["--data-dir", str(folder)]
    assert main(["train", "vqa", *data, "--out", str(out), *options, "--quiet"]) == 0
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.glob("*.json"):
        (other / path.name).write_text(path.read_text().replace("blue", "mauve"))
    capsys.readouterr()
    assert main(["evaluate", "--data-dir", str(other), "--checkpoint", str(out)]) == 2
    assert "the run has vocabulary_sha256 = " in capsys.readouterr().err


def test_command_refuses_in_one_line(tmp_path, capsys):
    write_part(tmp_path, "train2014", range(1, 5), official=True)
    arguments = ["train", "vqa", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "v2_OpenEnded_mscoco_val2014_questions.json: no such file, expected v2_" in error
    assert not (tmp_path / "run").exists()
