"""The recipe of SUN RGB-D: samples, splits, detections, and a scene that is learnt by heart."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from deqfusion.cli import main
from deqfusion.data import DataError
from deqfusion.data.sunrgbd import find_scenes
from deqfusion.engine import OptionError, complete
from deqfusion.metrics import points_in_boxes
from deqfusion.models import votenet
from deqfusion.tasks.sunrgbd import SceneSamples, SunRgbdRecipe
from tests.data.scenes import BOXES, write_scene

RECIPE = SunRgbdRecipe()
SMALL = {
    "dim": 32,
    "validation_fraction": 0.0,
    "num_points": 512,
    "augment": False,
    "image_size": [24, 32],
    "image_width": 8,
    "point_width": 16,
    "num_seeds": 64,
    "num_proposals": 16,
}


def config(**options):
    return complete(RECIPE, {**SMALL, **options})


@pytest.fixture
def root(tmp_path):
    write_scene(tmp_path, "000001")
    return tmp_path


def samples(root, **options):
    return SceneSamples(find_scenes(root)[0], 200, (24, 32), **options)


def test_scenes_are_collated_and_padded(root):
    write_scene(root, "000002", boxes=BOXES[:1], count=150)
    write_scene(root, "000003", boxes=np.zeros((0, 8)))
    batch = samples(root, color=True).batch(torch.tensor([2, 0, 1]))
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    assert shapes == {
        "points": (3, 200, 3),
        "features": (3, 200, 4),
        "pixels": (3, 200, 2),
        "image": (3, 3, 24, 32),
        "votes": (3, 200, 3, 3),
        "in_box": (3, 200),
        "boxes": (3, 3, 7),
        "classes": (3, 3),
        "present": (3, 3),
    }
    assert batch["present"].sum(dim=1).tolist() == [0, 3, 1]
    assert batch["classes"].tolist() == [[0, 0, 0], [0, 3, 1], [0, 0, 0]]
    # The height of the floor is 0.
    floor = ~batch["in_box"][1]
    assert batch["features"][1, floor, 0].abs().max() < 1e-4
    # A scene without boxes alone has one padded row.
    assert samples(root).batch(torch.tensor([2]))["present"].tolist() == [[False]]


def test_points_are_drawn_anew_in_training_only(root):
    fixed, drawn = samples(root), samples(root, draw=True)
    first = torch.zeros(1, dtype=torch.int64)
    assert torch.equal(fixed.batch(first)["points"], fixed.batch(first)["points"])
    assert not torch.equal(drawn.batch(first)["points"], drawn.batch(first)["points"])
    # By torch's generator, so that a resumed run draws the same.
    torch.manual_seed(3)
    one = drawn.batch(first)["points"]
    torch.manual_seed(3)
    assert torch.equal(drawn.batch(first)["points"], one)


def test_augmentation_moves_everything_alike(root):
    plain, moved = samples(root), samples(root, augment=True)
    first = torch.zeros(1, dtype=torch.int64)
    before = plain.batch(first)
    mirrored = set()
    for seed in range(8):
        torch.manual_seed(seed)
        after = moved.batch(first)
        growth = (after["boxes"][..., 3:6] / before["boxes"][..., 3:6]).flatten()
        assert growth.max() - growth.min() < 1e-5
        assert 0.85 <= growth[0] <= 1.15
        torch.testing.assert_close(after["features"], before["features"] * growth[0])
        assert torch.equal(after["pixels"], before["pixels"])
        inside = points_in_boxes(before["points"], before["boxes"])
        assert torch.equal(points_in_boxes(after["points"], after["boxes"]), inside)
        ends = after["points"][..., None, :] + after["votes"]
        centers = after["boxes"][..., :3].expand(200, -1, -1)
        gaps = torch.cdist(ends[0], centers).amin(dim=2)
        assert gaps[after["in_box"][0]].max() < 1e-4
        # The part of the length's axis along x, in the box's frame, tells mirrored scenes apart.
        side = torch.linalg.det(
            torch.linalg.lstsq(before["points"][0], after["points"][0]).solution
        )
        mirrored.add(bool(side < 0))
    assert mirrored == {False, True}


def test_headings_point_along_the_length_after_mirroring(root):
    # A point on the front of a box stays on its front or back; which of the two is the heading's.
    plain, moved = samples(root), samples(root, augment=True)
    first = torch.zeros(1, dtype=torch.int64)
    for seed in range(8):
        torch.manual_seed(seed)
        after = moved.batch(first)
        before = plain.batch(first)
        for one, other in zip(before["boxes"][0], after["boxes"][0], strict=True):
            front = torch.stack([one[6].cos(), -one[6].sin(), torch.zeros(())])
            turn = torch.linalg.lstsq(before["points"][0], after["points"][0]).solution
            expected = torch.nn.functional.normalize(front @ turn, dim=0)
            got = torch.stack([other[6].cos(), -other[6].sin(), torch.zeros(())])
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def test_scenes_are_held_out_of_training(tmp_path):
    for index in range(10):
        folder = f"sunrgbd_pc_bbox_votes_50k_v1_{'val' if index > 7 else 'train'}"
        write_scene(tmp_path, f"{index:06}", folder, count=60)
    splits, facts = RECIPE.load(tmp_path, config(validation_fraction=0.25))
    names = [{files.points.name[:6] for files in split.scenes} for split in splits]
    assert [len(part) for part in names] == [6, 2, 2]
    assert names[0] | names[1] == {f"{index:06}" for index in range(8)}
    assert names[2] == {"000008", "000009"}
    assert splits.train.draw
    assert not splits.validation.draw
    assert RECIPE.facts["data_sha256"].accepts(facts["data_sha256"])
    other = RECIPE.load(tmp_path, config(validation_fraction=0.25, seed=1))[0]
    assert {files.points.name[:6] for files in other.validation.scenes} != names[1]


def test_samples_can_be_sent_to_a_spawned_worker(root):
    samples = RECIPE.load(root, config())[0].validation
    sent = pickle.loads(pickle.dumps(samples))
    rows = torch.tensor([0])
    for key, value in samples.batch(rows).items():
        assert torch.equal(sent.batch(rows)[key], value)


def test_too_few_scenes_and_splits_without_boxes(root):
    with pytest.raises(OptionError, match=r"^validation_fraction: cannot hold out 0\.1 of 1 scen"):
        RECIPE.load(root, config(validation_fraction=0.1))
    splits, _ = RECIPE.load(root, config())
    assert splits.test is None
    assert splits.train.scenes == splits.validation.scenes
    np.save(root / "votenet_v1" / "000001_bbox.npy", np.zeros((0, 8)))
    with pytest.raises(DataError, match="votenet_v1: no box in any of 1 scenes"):
        RECIPE.load(root, config())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, None),
        ({"image_size": [24]}, "image_size"),
        ({"num_seeds": 62}, "num_seeds"),
        ({"num_proposals": 65}, "num_proposals"),
        ({"image_width": 12}, "image_width"),
        ({"image_width": 12, "image_encoder": "resnet18"}, None),
        ({"pretrained": True}, "pretrained"),
    ],
)
def test_options_that_do_not_fit(options, key):
    found = RECIPE.fault(config(**options))
    assert (found and found[0]) == key


@pytest.mark.parametrize("name", RECIPE.fields)
def test_defaults_are_of_their_kind(name):
    assert RECIPE.fields[name].kind.accepts(RECIPE.fields[name].default)


class Told(torch.nn.Module):
    """A model that proposes what it was given."""

    def __init__(self, proposals):
        super().__init__()
        self.proposals = proposals
        self.register_buffer("sizes", torch.tensor(votenet_sizes()))

    def forward(self, *_):
        return self.proposals


def votenet_sizes():
    from deqfusion.data.sunrgbd import SUNRGBD_SIZES

    return SUNRGBD_SIZES


def told(boxes, objectness, classes):
    """Proposals (1, P, ...) with given boxes, logits of objectness and classes."""
    count = len(boxes)
    labels = torch.tensor(classes)
    sizes = torch.tensor(votenet_sizes())[labels]
    bins, residuals = votenet.heading_bin(boxes[:, 6], 12)
    one_hot = torch.nn.functional.one_hot
    blank = torch.zeros(1, count, 3)
    return votenet.Proposals(
        *(blank, torch.zeros(1, count).long(), blank, blank),
        centers=boxes[None, :, :3],
        objectness=torch.stack([torch.zeros(count), torch.tensor(objectness)], dim=1)[None],
        heading_logits=9.0 * one_hot(bins, 12)[None],
        heading_residuals=residuals[None, :, None].expand(-1, -1, 12),
        size_logits=9.0 * one_hot(labels, 10)[None],
        size_residuals=(boxes[:, 3:6] / sizes - 1)[None, :, None].expand(-1, -1, 10, 3),
        class_logits=9.0 * one_hot(labels, 10)[None],
        features=(blank, blank),
        equilibrium=None,
    )


def test_detections_are_objects_with_points_and_not_suppressed(root):
    batch = samples(root).batch(torch.tensor([0]))
    true = batch["boxes"][0]
    shifted, empty = true[:1].clone(), true[:1].clone()
    shifted[0, 0] += 0.1
    empty[0, 2] += 10
    boxes = torch.cat([true, shifted, empty, true[1:2]])
    # The bed, the chair, the table, the bed again and less surely, one in the air, and a chair in
    # which it hardly believes: log(0.05 / 0.95) is -2.94.
    proposals = told(boxes, [3.0, 2.0, 1.0, 2.5, 3.0, -3.0], [0, 3, 1, 0, 0, 3])
    (scene,) = RECIPE.predict(Told(proposals), batch)
    assert len(scene["boxes"]) == 30
    torch.testing.assert_close(scene["boxes"][::10], true, atol=1e-5, rtol=1e-5)
    assert scene["classes"][:10].tolist() == list(range(10))
    # Objectness times the class's share.
    share = math.exp(9) / (math.exp(9) + 9)
    sure = 1 / (1 + math.exp(-3))
    assert scene["scores"][0].item() == pytest.approx(sure * share, rel=1e-5)
    metrics = RECIPE.metrics([[scene]])
    assert metrics["map_25"] == metrics["map_50"] == metrics["recall_50"] == 1
    assert metrics["ap_25_bed"] == 1
    assert math.isnan(metrics["ap_25_sofa"])


def test_nothing_is_found_where_nothing_is_believed(root):
    batch = samples(root).batch(torch.tensor([0]))
    proposals = told(batch["boxes"][0], [-9.0, -9.0, -9.0], [0, 3, 1])
    (scene,) = RECIPE.predict(Told(proposals), batch)
    assert scene["boxes"].shape == (0, 7)
    assert RECIPE.metrics([[scene]])["map_25"] == 0


@pytest.mark.parametrize("fusion", ["deq", "gated"])
def test_objectives_are_means_over_scenes(root, fusion):
    write_scene(root, "000002", boxes=np.zeros((0, 8)), seed=1)
    options = config(fusion=fusion)
    splits, _ = RECIPE.load(root, options)
    model = RECIPE.build(options).eval()
    both = RECIPE.objective(model, splits.validation.batch(torch.tensor([0, 1])))
    each = [
        RECIPE.objective(model, splits.validation.batch(torch.tensor([index]))) for index in (0, 1)
    ]
    torch.testing.assert_close(both.loss, (each[0].loss + each[1].loss) / 2, rtol=1e-4, atol=1e-4)
    assert (both.equilibrium is None) == (fusion != "deq")
    if both.equilibrium is not None:
        penalty = both.fusion.jacobian_penalty(both.equilibrium, both.features)
        assert torch.isfinite(penalty)


def test_training_lowers_the_loss(root):
    options = config(num_seeds=32, num_points=256)
    splits, _ = RECIPE.load(root, options)
    batch = splits.validation.batch(torch.tensor([0]))
    model = RECIPE.build(options)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = RECIPE.objective(model, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.median(losses[-5:]) < 0.7 * np.median(losses[:5])


def test_commands_train_and_evaluate(root, tmp_path, capsys):
    out = tmp_path / "run"
    small = [
        *("--validation-fraction", "0", "--num-points", "200", "--num-seeds", "16"),
        *("--num-proposals", "8", "--dim", "16", "--point-width", "8", "--image-size", "24,32"),
        *("--image-width", "8", "--epochs", "2", "--quiet"),
    ]
    assert main(["train", "sunrgbd", "--data-dir", str(root), "--out", str(out), *small]) == 0
    assert (out / "model.safetensors").is_file()
    assert "map_25" in (out / "log.csv").read_text()
    write_scene(root, "000002", "sunrgbd_pc_bbox_votes_50k_v1_train", seed=3)
    write_scene(root, "000003", "sunrgbd_pc_bbox_votes_50k_v1_val", seed=4)
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(out), "--data-dir", str(root), "--json"]) == 0
    assert "map_50" in capsys.readouterr().out


def test_damage_is_one_line_and_code_2(root, tmp_path, capsys):
    path = root / "votenet_v1" / "000001_votes.npz"
    path.write_bytes(path.read_bytes()[:500])
    out = tmp_path / "run"
    command = ["train", "sunrgbd", "--data-dir", str(root), "--out", str(out)]
    assert main([*command, "--validation-fraction", "0"]) == 2
    error = capsys.readouterr().err
    assert f"{path}: cannot be read" in error
    assert error.count("\n") == 1
    assert not out.exists()
