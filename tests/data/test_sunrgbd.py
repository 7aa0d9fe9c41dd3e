"""SUN RGB-D's files: what is read, and what each fault in a file says."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from deqfusion.data import DataError
from deqfusion.data.sunrgbd import (
    find_scenes,
    project,
    read_boxes,
    read_calibration,
    read_scene,
    scenes_digest,
)
from deqfusion.metrics import points_in_boxes
from tests.data.scenes import BOXES, HEIGHT, WIDTH, write_scene


@pytest.fixture
def root(tmp_path):
    write_scene(tmp_path, "000007")
    return tmp_path


def only(root):
    (files,) = find_scenes(root)[0]
    return files


def test_reads_what_was_written(root):
    scene = read_scene(only(root), (24, 32))
    assert scene.points.shape == scene.colors.shape == (600, 3)
    assert scene.image.shape == (3, 24, 32)
    np.testing.assert_allclose(scene.boxes[:, 3:6], 2 * BOXES[:, 3:6], rtol=1e-6)
    assert scene.classes.tolist() == [0, 3, 1]
    inside = points_in_boxes(torch.from_numpy(scene.points), torch.from_numpy(scene.boxes))
    assert torch.equal(inside.any(dim=0), torch.from_numpy(scene.in_box))
    # Every vote of a point in a box leads to the centre of one that it is in.
    ends = torch.from_numpy(scene.points[:, None] + scene.votes)
    gaps = torch.cdist(ends, torch.from_numpy(scene.boxes[:, :3]).expand(600, -1, -1))
    assert (gaps.amin(dim=2)[torch.from_numpy(scene.in_box)] < 1e-5).all()
    assert (scene.votes[~scene.in_box] == 0).all()


def test_pixels_show_the_colours_of_their_points(root):
    scene = read_scene(only(root), (HEIGHT, WIDTH))
    assert (np.abs(scene.pixels) <= 1).all()
    columns = ((scene.pixels[:, 0] + 1) / 2 * WIDTH).astype(int).clip(0, WIDTH - 1)
    rows = ((scene.pixels[:, 1] + 1) / 2 * HEIGHT).astype(int).clip(0, HEIGHT - 1)
    seen = scene.image[:, rows, columns].T / 255
    # Of points that are not near a nearer one of another colour.
    gaps = np.abs(columns[:, None] - columns).clip(np.abs(rows[:, None] - rows))
    nearer = scene.points[:, 1] < scene.points[:, 1:2]
    other = (scene.colors[:, None] != scene.colors).any(axis=2)
    front = ~((gaps <= 3) & nearer & other).any(axis=1)
    assert front.sum() > 150
    alike = np.abs(seen - scene.colors).max(axis=1) < 0.35
    assert alike[front].mean() > 0.95


def test_points_behind_the_camera_are_out_of_view(root):
    rotation, intrinsics = read_calibration(only(root).calibration)
    pixels = project(np.array([[0.0, 2, 0], [0, -2, 0], [1, 2, 1]]), rotation, intrinsics)
    np.testing.assert_allclose(pixels[0], [WIDTH / 2, HEIGHT / 2])
    assert np.isnan(pixels[1]).all()
    # To the right and up.
    np.testing.assert_allclose(pixels[2], [WIDTH / 2 + 20, HEIGHT / 2 - 20])


def test_centres_of_the_labels_project_into_their_rectangles(data_dir):
    """The published 2-D and 3-D boxes of one scene, seen through its calibration."""
    folder = data_dir / "sunrgbd" / "sunrgbd_trainval"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    lines = [line.split() for line in (folder / "label" / "000001.txt").read_text().splitlines()]
    labels = np.array([line[1:] for line in lines], dtype=float)
    rotation, intrinsics = read_calibration(folder / "calib" / "000001.txt")

    def median_gap(turn):
        gaps = project(labels[:, 4:7], turn, intrinsics) - (labels[:, :2] + labels[:, 2:4] / 2)
        return np.median(np.linalg.norm(gaps, axis=1))

    # In an image of 730 x 530 pixels; two of the rectangles are cut by its edge.
    assert median_gap(rotation) < 30
    assert median_gap(np.eye(3)) > 50
    assert median_gap(rotation.T) > 90


def test_votes_of_the_real_scene_agree_with_its_boxes(data_dir, caplog):
    folder = data_dir / "sunrgbd"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    files = only(folder)
    with caplog.at_level(logging.WARNING):
        scene = read_scene(files, (53, 73))
    inside = points_in_boxes(torch.from_numpy(scene.points), torch.from_numpy(scene.boxes))
    assert (inside.any(dim=0).numpy() == scene.in_box).mean() > 0.9999
    # This sample's image is of another room than its points, which does not go unnoticed.
    assert "calibration and image look like those of another scene" in caplog.text


def test_a_scene_without_boxes_is_read(tmp_path):
    write_scene(tmp_path, "000001", boxes=np.zeros((0, 8)))
    scene = read_scene(only(tmp_path), (24, 32))
    assert scene.boxes.shape == (0, 7)
    assert not scene.in_box.any()
    assert scenes_digest(find_scenes(tmp_path)[0])[1] == 0


def test_published_folders_are_train_and_test(tmp_path):
    for name, part in (("000003", "train"), ("000001", "train"), ("000002", "val")):
        write_scene(tmp_path, name, f"sunrgbd_pc_bbox_votes_50k_v2_{part}")
    train, test = find_scenes(tmp_path, "v2")
    assert [files.points.name for files in train] == ["000001_pc.npz", "000003_pc.npz"]
    assert [files.points.name for files in test] == ["000002_pc.npz"]
    with pytest.raises(DataError, match="neither a folder sunrgbd_pc_bbox_votes_50k_v1_train nor"):
        find_scenes(tmp_path, "v1")


def test_digest_is_of_the_boxes(root):
    before = scenes_digest(find_scenes(root)[0])
    boxes = BOXES.copy()
    boxes[1, 6] += 0.5
    np.save(only(root).boxes, boxes)
    after = scenes_digest(find_scenes(root)[0])
    assert before[0] != after[0]
    assert before[1] == after[1] == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("part", ["points", "votes", "boxes", "calibration", "image"])
def test_a_missing_file_is_named(root, part):
    path = getattr(only(root), part)
    path.unlink()
    with pytest.raises(DataError) as error:
        find_scenes(root)
    assert str(error.value).startswith(f"{path}: no such file, expected one for scene 000007")


@pytest.mark.parametrize("part", ["points", "votes", "boxes", "image"])
def test_a_file_that_is_cut_short_is_named(root, part):
    files = only(root)
    path = getattr(files, part)
    truncate(path)
    with pytest.raises(DataError) as error:
        read_scene(files, (24, 32))
    assert str(error.value).startswith(f"{path}: cannot be read (")
    assert "\n" not in str(error.value)
    if part in ("points", "votes"):
        # Found before training begins, without unpacking anything.
        with pytest.raises(DataError, match=r"expected a whole \.npz file with key"):
            find_scenes(root)


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "votenet_v1").mkdir()
    with pytest.raises(DataError, match="votenet_v1: no scene, expected NNNNNN_pc"):
        find_scenes(tmp_path)


def test_a_wrong_key_is_named(root):
    path = only(root).points
    np.savez(path, points=np.zeros((5, 6)))
    with pytest.raises(DataError, match=r"000007_pc\.npz: got keys \['points'\], expected 'pc'"):
        find_scenes(root)


def test_lengths_must_agree(root):
    path = only(root).votes
    np.savez(path, point_votes=np.zeros((5, 10)))
    with pytest.raises(DataError, match=r"votes\.npz: key 'point_votes': got 5 rows, expected 600"):
        find_scenes(root)


@pytest.mark.parametrize(
    ("part", "key", "values", "message"),
    [
        ("points", "pc", np.zeros((600, 3)), r"key 'pc': got .*\(600, 3\), expected"),
        ("points", "pc", np.full((600, 6), np.nan), "key 'pc': got nan in row 0, column 0"),
        ("points", "pc", np.zeros((0, 6)), "key 'pc': no points, expected at least one"),
        ("points", "pc", np.full((600, 6), "a"), "key 'pc': got <U1 of shape"),
        ("votes", "point_votes", np.full((600, 10), 0.5), "column 0: expected only 0 and 1"),
    ],
)
def test_arrays_are_checked(root, part, key, values, message):
    files = only(root)
    np.savez(getattr(files, part), **{key: values})
    with pytest.raises(DataError, match=message):
        read_scene(files, (24, 32))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (7, 10, "box 1: got class 10, expected a whole number from 0 to 9"),
        (7, 1.5, "box 1: got class 1.5"),
        (4, 0, "box 1: got lengths"),
        (0, np.inf, "boxes: got inf in row 1, column 0"),
    ],
)
def test_boxes_are_checked(root, column, value, message):
    path = only(root).boxes
    boxes = BOXES.copy()
    boxes[1, column] = value
    np.save(path, boxes)
    with pytest.raises(DataError, match=message):
        read_boxes(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 0 0 1 0 0 0 1\n", r"got lines of \[9\] numbers, expected two lines"),
        ("1 0 0 0 1 0 0 0 x\n" * 2, "cannot be read"),
        ("2 0 0 0 1 0 0 0 1\n" * 2, "line 1: no rotation"),
        ("1 0 0 0 1 0 0 0 1\nnan 0 0 0 1 0 0 0 1\n", "line 2: got"),
    ],
)
def test_calibrations_are_checked(tmp_path, text, message):
    path = tmp_path / "000001.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_calibration(path)
