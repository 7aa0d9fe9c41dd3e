"""SUN RGB-D as VoteNet prepares it: point clouds, votes and boxes, with calibration and image.

Of each scene NNNNNN in the folder of a split:

    NNNNNN_pc.npz     `pc` (N, 6): x right, y inward, z up in metres, then colour 0..1
    NNNNNN_votes.npz  `point_votes` (N, 10): whether the point is in a box, three offsets from the
                      point to centres of boxes that it is in
    NNNNNN_bbox.npy   (K, 8): centre, *half* lengths along l, w, h, heading, class; K may be 0

and in `sunrgbd_trainval`

    calib/NNNNNN.txt  rotation R of the camera and intrinsics C, nine numbers a line, by columns
    image/NNNNNN.jpg

A point p is seen at the pixel (u, v) with (q_x, q_y, q_z) = R^T p and (u', v', s) = C (q_x, -q_z,
q_y), u = u'/s, v = v'/s. The heading turns from +x towards -y.

Sources: S. Song, S. Lichtenberg, J. Xiao, SUN RGB-D, 2015; C. Qi et al., Deep Hough Voting for 3D
Object Detection in Point Clouds (VoteNet), 2019, and its `sunrgbd_data.py`, which writes the files.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError
from .npy import npy_header

#: Names of the classes 0 to 9.
SUNRGBD_CLASSES = (
    *("bed", "table", "sofa", "chair", "toilet"),
    *("desk", "dresser", "night_stand", "bookshelf", "bathtub"),
)
#: Median lengths (l, w, h) of the boxes of each class in the training scenes, metres; VoteNet's.
SUNRGBD_SIZES = (
    (2.114256, 1.620300, 0.927272),
    (0.791118, 1.279516, 0.718182),
    (0.923508, 1.867419, 0.845495),
    (0.591958, 0.552978, 0.827272),
    (0.699104, 0.454178, 0.756250),
    (0.695190, 1.346299, 0.736364),
    (0.528526, 1.002642, 1.172878),
    (0.500618, 0.632163, 0.683424),
    (0.404671, 1.071108, 1.688889),
    (0.765840, 1.398258, 0.472728),
)
# In a scene with its own calibration nearly every point is in view: depth and image are one shot.
_SEEN = 0.9
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SceneFiles:
    """Where the files of one scene are."""

    points: Path
    votes: Path
    boxes: Path
    calibration: Path
    image: Path


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        points: float32 (N, 3), metres.
        colors: float32 (N, 3), 0..1.
        votes: float32 (N, 3, 3), three offsets to centres of boxes; 0 for points in no box.
        in_box: bool (N,).
        pixels: float32 (N, 2), where the points are in the image, -1..1 from its left and upper to
            its right and lower edge; beyond that out of view.
        boxes: float32 (K, 7): centre, full lengths, heading.
        classes: int64 (K,), 0 to 9.
        image: uint8 (3, height, width).
    """

    points: NDArray[np.float32]
    colors: NDArray[np.float32]
    votes: NDArray[np.float32]
    in_box: NDArray[np.bool_]
    pixels: NDArray[np.float32]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    image: NDArray[np.uint8]


def find_scenes(
    data_dir: str | Path, labels: str = "v1"
) -> tuple[list[SceneFiles], list[SceneFiles] | None]:
    """Find the scenes of a folder and check that their files are there, whole and of one length.

    Args:
        data_dir: holds `sunrgbd_pc_bbox_votes_50k_LABELS_train` and, for a test split, `..._val`,
            or one folder `votenet_LABELS`; and `sunrgbd_trainval` with `calib` and `image`.
        labels: "v1" or "v2", the version of the boxes.

    Returns:
        Scenes of `_train`, or all of `votenet_LABELS`; scenes of `_val`, or None without it.

    Raises:
        DataError: a missing folder or file, an empty split, a file that is cut short or holds
            something else than the format says. Contents are checked by `read_scene`.
    """
    folder = Path(data_dir)
    train = folder / f"sunrgbd_pc_bbox_votes_50k_{labels}_train"
    test = train.with_name(train.name.replace("_train", "_val"))
    flat = folder / f"votenet_{labels}"
    if not train.is_dir() and not flat.is_dir():
        raise DataError(
            f"{folder}: neither a folder {train.name} nor {flat.name}, expected one of them with "
            "NNNNNN_pc.npz, NNNNNN_votes.npz and NNNNNN_bbox.npy of every scene"
        )
    shots = folder / "sunrgbd_trainval"
    scenes = _scenes_of(train if train.is_dir() else flat, shots)
    return scenes, _scenes_of(test, shots) if train.is_dir() and test.is_dir() else None


def read_boxes(path: str | Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Read a scene's `_bbox.npy`.

    Returns:
        float32 (K, 7) with centre, *full* lengths and heading; int64 (K,) classes 0 to 9.

    Raises:
        DataError: unreadable, cut short, of another shape, or with values that no box has.
    """
    path = Path(path)
    rows = _load(path, lambda: np.load(path, allow_pickle=False), "an array (K, 8)")
    _check_array(path, "boxes", rows, 8)
    classes = rows[:, 7]
    wrong = (classes != np.floor(classes)) | (classes < 0) | (classes >= len(SUNRGBD_CLASSES))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{path}, box {row}: got class {classes[row]:g}, "
            f"expected a whole number from 0 to {len(SUNRGBD_CLASSES) - 1}"
        )
    if (rows[:, 3:6] <= 0).any():
        row = int(np.argmax((rows[:, 3:6] <= 0).any(axis=1)))
        raise DataError(f"{path}, box {row}: got lengths {rows[row, 3:6]}, expected them > 0")
    boxes = rows[:, :7].astype(np.float32)
    boxes[:, 3:6] *= 2
    return boxes, classes.astype(np.int64)


def read_calibration(path: str | Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read a scene's calibration.

    Returns:
        Rotation R and intrinsics C, float64 (3, 3) each.

    Raises:
        DataError: unreadable, or not two lines of nine numbers, or R is no rotation.
    """
    path = Path(path)
    expected = "two lines of nine numbers: rotation and intrinsics, by columns"
    text = _load(path, lambda: path.read_text(encoding="ascii"), expected)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if [len(line) for line in lines] != [9, 9]:
        got = [len(line) for line in lines]
        raise DataError(f"{path}: got lines of {got} numbers, expected {expected}")
    numbers = _load(path, lambda: np.array(lines, dtype=np.float64), expected)
    rotation, intrinsics = (row.reshape(3, 3).T for row in numbers)
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3):
        raise DataError(f"{path}, line 1: no rotation, expected orthogonal columns of length 1")
    if not np.isfinite(intrinsics).all():
        raise DataError(f"{path}, line 2: got {lines[1]}, expected finite numbers")
    return rotation, intrinsics


def project(
    points: NDArray[Any], rotation: NDArray[np.float64], intrinsics: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Project points into the image.

    Args:
        points: (N, 3), metres.
        rotation, intrinsics: as of `read_calibration`.

    Returns:
        float64 (N, 2), pixels from the left and from the top; NaN for points behind the camera.
    """
    x, y, z = (points.astype(np.float64) @ rotation).T
    u, v, depth = intrinsics @ np.stack([x, -z, y])
    depth = np.where(depth > 0, depth, np.nan)
    return np.stack([u / depth, v / depth], axis=1)


def read_scene(files: SceneFiles, image_size: tuple[int, int]) -> Scene:
    """Read and check one scene.

    Where more than a tenth of the points is out of view, a warning is logged: image and
    calibration are then those of another scene.

    Args:
        files: the scene.
        image_size: height and width to which the image is resized.

    Returns:
        Scene.

    Raises:
        DataError: a file is missing, cut short, or not what the format says.
    """
    from PIL import Image

    points = _read_npz(files.points, "pc", 6)
    votes = _read_npz(files.votes, "point_votes", 10)
    _check_lengths(files, len(points), len(votes))
    if not np.isin(votes[:, 0], (0, 1)).all():
        raise DataError(f"{files.votes}: key 'point_votes', column 0: expected only 0 and 1")
    boxes, classes = read_boxes(files.boxes)

    def decode() -> tuple[tuple[int, int], NDArray[np.uint8]]:
        with Image.open(files.image) as image:
            resized = image.convert("RGB").resize(image_size[::-1], Image.Resampling.BILINEAR)
            return image.size, np.array(resized).transpose(2, 0, 1).copy()

    size, image = _load(files.image, decode, "a whole JPEG image")
    pixels = project(points[:, :3], *read_calibration(files.calibration))
    pixels = np.nan_to_num(2 * (pixels + 0.5) / np.array(size) - 1, nan=2.0)
    seen = (np.abs(pixels) <= 1).all(axis=1).mean()
    if seen < _SEEN:
        _LOG.warning(
            "%s: %.0f%% of the points of %s are in view, expected nearly all: "
            "calibration and image look like those of another scene",
            *(files.calibration, 100 * seen, files.points.name),
        )
    return Scene(
        points=np.ascontiguousarray(points[:, :3], dtype=np.float32),
        colors=np.ascontiguousarray(points[:, 3:], dtype=np.float32),
        votes=votes[:, 1:].reshape(-1, 3, 3).astype(np.float32),
        in_box=votes[:, 0] == 1,
        pixels=pixels.clip(-2, 2).astype(np.float32),
        boxes=boxes,
        classes=classes,
        image=image,
    )


def scenes_digest(scenes: Sequence[SceneFiles]) -> tuple[str, int]:
    """Return a SHA-256 of scenes by names and sizes of the files and contents of the boxes.

    Point clouds are not read for it: all of them are 15 GB.

    Returns:
        Hexadecimal digest; number of boxes.

    Raises:
        DataError: boxes that are not as they should be.
    """
    digest, count = hashlib.sha256(), 0
    for files in scenes:
        boxes, classes = read_boxes(files.boxes)
        for path in (files.points, files.votes, files.calibration, files.image):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(boxes.tobytes() + classes.tobytes())
        count += len(boxes)
    return digest.hexdigest(), count


def _scenes_of(folder: Path, shots: Path) -> list[SceneFiles]:
    suffixes = ("_pc.npz", "_votes.npz", "_bbox.npy")
    names = {
        path.name.removesuffix(suffix)
        for path in folder.iterdir()
        for suffix in suffixes
        if path.name.endswith(suffix)
    }
    if not names:
        raise DataError(f"{folder}: no scene, expected NNNNNN_pc.npz and so on of at least one")
    scenes = []
    for name in sorted(names):
        files = SceneFiles(
            points=folder / f"{name}_pc.npz",
            votes=folder / f"{name}_votes.npz",
            boxes=folder / f"{name}_bbox.npy",
            calibration=shots / "calib" / f"{name}.txt",
            image=shots / "image" / f"{name}.jpg",
        )
        for path in vars(files).values():
            if not path.is_file():
                raise DataError(f"{path}: no such file, expected one for scene {name} of {folder}")
        lengths = [
            _npz_length(path, key, columns)
            for path, key, columns in ((files.points, "pc", 6), (files.votes, "point_votes", 10))
        ]
        _check_lengths(files, *lengths)
        scenes.append(files)
    return scenes


def _npz_length(path: Path, key: str, columns: int) -> int:
    """Length of an array in an `.npz` file by its header, without unpacking it."""

    def header() -> tuple[tuple[int, ...], list[str]]:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if f"{key}.npy" not in names:
                return (), names
            with archive.open(f"{key}.npy") as member:
                return npy_header(member)[0], names

    shape, names = _load(path, header, f"a whole .npz file with key {key!r}")
    _check_key(path, key, [name.removesuffix(".npy") for name in names], columns)
    if len(shape) != 2 or shape[1] != columns or shape[0] == 0:
        raise DataError(
            f"{path}: key {key!r}: got shape {shape}, expected (N, {columns}) with N > 0"
        )
    return shape[0]


def _read_npz(path: Path, key: str, columns: int) -> NDArray[Any]:
    def read() -> tuple[NDArray[Any] | None, list[str]]:
        with np.load(path, allow_pickle=False) as archive:
            return archive.get(key), list(archive)

    values, names = _load(path, read, f"a whole .npz file with key {key!r}")
    _check_key(path, key, names, columns)
    assert values is not None
    _check_array(path, f"key {key!r}", values, columns)
    if len(values) == 0:
        raise DataError(f"{path}: key {key!r}: no points, expected at least one")
    return values


def _load(path: Path, read: Callable[[], Any], expected: str) -> Any:
    # Damaged archives and images raise much besides OSError: whatever it is, the file is at fault.
    try:
        return read()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file, expected {expected}") from error
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read ({what}), expected {expected}") from error


def _check_key(path: Path, key: str, names: list[str], columns: int) -> None:
    if key not in names:
        raise DataError(f"{path}: got keys {names}, expected {key!r} with shape (N, {columns})")


def _check_array(path: Path, place: str, values: Any, columns: int) -> None:
    if values.ndim != 2 or values.shape[1] != columns or values.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: {place}: got {values.dtype} of shape {values.shape}, "
            f"expected numbers of shape (..., {columns})"
        )
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise DataError(
            f"{path}: {place}: got {values[row, column]} in row {row}, column {column}, "
            "expected finite numbers"
        )


def _check_lengths(files: SceneFiles, points: int, votes: int) -> None:
    if points != votes:
        raise DataError(
            f"{files.votes}: key 'point_votes': got {votes} rows, "
            f"expected {points}, one for each point of {files.points.name}"
        )
