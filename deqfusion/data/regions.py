"""Bottom-up features: one `.npz` file per image, a feature vector for each of its regions.

What is read of a file, under the names that the published exports use:

    features   `x`, `features` or `feat`        (K, width), or (width, K) as OpenVQA stores it
    boxes      `bbox`, `boxes` or `norm_bb`     (K, 4 or more): x1, y1, x2, y2, in pixels;
                                                `norm_bb` in shares of the image
    number K   `num_bbox` or `num_boxes`        ()
    size       `image_w` and `image_h`          (), in pixels; not for `norm_bb`

Only features have to be there: boxes and size where positions are asked for, and K (else the boxes)
tells in which of its two forms a matrix is. Nothing pickled (`info`) is looked at. The image is
named by the last number of the file's name: `COCO_train2014_000000458752.jpg.npz`, `458752.npz`.

Source: P. Anderson et al., "Bottom-up and top-down attention", CVPR 2018; exports of
MILVLG/openvqa, MILVLG/bottom-up-attention.pytorch and others that are named like them.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError
from .npy import npy_header

_FEATURES = ("x", "features", "feat")
_BOXES = ("bbox", "boxes", "norm_bb")
_COUNTS = ("num_bbox", "num_boxes")
_IMAGE = re.compile(r"([0-9]+)(?:\.(?:jpe?g|png))?\.npz\Z", re.IGNORECASE)
_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
#: Numbers that stand for a region's position: x1, y1, x2, y2 and area, as shares of the image.
POSITION_WIDTH = 5


class RegionFeatures:
    """The region features of a folder's images, read from disk when they are asked for.

    Args:
        folder: `.npz` files, in it or in folders below.
        images: ids of the images that there must be a file for.
        positions: append `POSITION_WIDTH` numbers of each region's box to its features.
        max_regions: keep at most so many, the first; exports list the surest first.

    Attributes:
        width: numbers per region.
        sha256: of the checksums that the files keep of their features and boxes.

    Raises:
        DataError: no folder, no file or two for an image; every image's file is opened, and one
            that is cut short, lacks a key or has features of another width is refused.
        ValueError: `max_regions` is below 1.
    """

    def __init__(
        self,
        folder: str | Path,
        images: Iterable[int],
        *,
        positions: bool = False,
        max_regions: int = 100,
    ) -> None:
        if max_regions < 1:
            raise ValueError(f"max_regions: got {max_regions}, expected a number >= 1")
        self.positions, self.max_regions = positions, max_regions
        self._paths = _index(Path(folder), set(images))
        self.width = 0
        first, digest = None, hashlib.sha256()
        for image, path in sorted(self._paths.items()):
            width, checksums = _inspect(path, positions)
            digest.update(f"{image} {checksums}\n".encode())
            if first is None:
                first, self.width = path, width
            elif width != self.width:
                raise DataError(
                    f"{path}: regions have {width} features, expected {self.width} as in {first}"
                )
        self.sha256 = digest.hexdigest()
        self.width += POSITION_WIDTH * positions

    def read(self, image: int) -> NDArray[np.float32]:
        """Read an image's regions: float32 (K, width), with K from 1 to `max_regions`.

        Raises:
            DataError: the file is damaged, or a number in it is not finite.
        """
        path = self._paths[image]
        try:
            with np.load(path, allow_pickle=False) as archive:
                features = _numbers(path, archive, _present(archive.keys(), _FEATURES))
                boxes = _read_boxes(path, archive) if self.positions else None
                count = _regions(path, archive, features.shape)
        except DataError:
            raise
        except _UNREADABLE as error:
            raise _damaged(path, error) from error
        if features.shape[0] != count:
            features = features.T
        parts = [features] if boxes is None else [features, boxes]
        if boxes is not None and len(boxes) != count:
            raise DataError(f"{path}: has {len(boxes)} boxes, expected one for {count} regions")
        return np.concatenate(parts, axis=1, dtype=np.float32)[: self.max_regions]


def _index(folder: Path, images: set[int]) -> dict[int, Path]:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder, expected one with a .npz file of region features for each "
            f"of {len(images)} images"
        )
    paths: dict[int, Path] = {}
    for path in sorted(folder.rglob("*.npz")):
        match = _IMAGE.search(path.name)
        if match is None or int(match[1]) not in images:
            continue
        earlier = paths.setdefault(int(match[1]), path)
        if earlier != path:
            raise DataError(
                f"{path}: image {int(match[1])} has a file already, {earlier}; expected one"
            )
    missing = sorted(images - paths.keys())
    if missing:
        raise DataError(
            f"{folder}: no file for {len(missing)} of {len(images)} images, expected one such as "
            f"{missing[0]}.npz or COCO_train2014_{missing[0]:012}.jpg.npz"
        )
    return paths


def _inspect(path: Path, positions: bool) -> tuple[int, list[int]]:
    """Width of a file's regions and checksums of its contents, without reading the features."""
    try:
        with zipfile.ZipFile(path) as archive:
            stored = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            key = _present(stored.keys(), _FEATURES)
            if key is None:
                raise _lacking(path, stored.keys(), _FEATURES, "features")
            boxes = _check_boxes(path, stored.keys()) if positions else None
            with archive.open(stored[key]) as stream:
                shape, dtype = npy_header(stream)
        with np.load(path, allow_pickle=False) as loaded:
            _check_features(path, key, shape, dtype)
            regions = _regions(path, loaded, shape)
    except DataError:
        raise
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    checksums = [stored[name].CRC for name in (key, boxes) if name is not None]
    return shape[1] if shape[0] == regions else shape[0], checksums


def _check_features(path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) != 2 or dtype.kind not in "fiu" or 0 in shape:
        raise DataError(
            f"{path}: key {key!r}: got {dtype} of shape {shape}, expected numbers of shape "
            "(regions, width)"
        )


def _regions(path: Path, archive: Any, shape: tuple[int, ...]) -> int:
    """How many regions a matrix of this shape has; its rows, where the file does not say."""
    key = _present(archive.keys(), _COUNTS) or _present(archive.keys(), _BOXES)
    if key is None:
        return shape[0]
    stated = _numbers(path, archive, key)
    if key in _COUNTS and stated.size != 1:
        raise DataError(f"{path}: key {key!r}: got shape {stated.shape}, expected one number")
    count = len(stated) if key in _BOXES and stated.ndim else int(stated.item())
    if count not in shape:
        raise DataError(
            f"{path}: features of shape {shape}, expected {count} regions as in key {key!r}"
        )
    return count


def _read_boxes(path: Path, archive: Any) -> NDArray[np.float32]:
    """float32 (K, 5): corners and area as shares of the image."""
    key = _check_boxes(path, archive.keys())
    boxes = _numbers(path, archive, key)
    if boxes.ndim != 2 or boxes.shape[1] < 4:
        raise DataError(f"{path}: key {key!r}: got shape {boxes.shape}, expected (regions, 4)")
    corners: NDArray[np.float32] = boxes[:, :4].astype(np.float32)
    if key != "norm_bb":
        width, height = (float(_numbers(path, archive, name)) for name in ("image_w", "image_h"))
        if not (width > 0 and height > 0):
            raise DataError(f"{path}: image of {width:g} x {height:g} pixels, expected a size > 0")
        corners /= np.array([width, height] * 2, dtype=np.float32)
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    return np.concatenate([corners, area[:, None]], axis=1)


def _check_boxes(path: Path, names: Collection[str]) -> str:
    key = _present(names, _BOXES)
    if key is None:
        raise _lacking(path, names, _BOXES, "boxes, or training without positions")
    for size in ("image_w", "image_h"):
        if key != "norm_bb" and size not in names:
            raise _lacking(path, names, (size,), "the image's size, or training without positions")
    return key


def _numbers(path: Path, archive: Any, key: str | None) -> NDArray[Any]:
    values: NDArray[Any] = archive[key]
    if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise DataError(f"{path}: key {key!r}: got {values.dtype} with values that are no finite "
                        "numbers, expected finite numbers")  # fmt: skip
    return values


def _present(names: Collection[str], wanted: tuple[str, ...]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _lacking(path: Path, names: Collection[str], wanted: tuple[str, ...], what: str) -> DataError:
    return DataError(
        f"{path}: has keys {', '.join(sorted(names)) or 'of no name'}, expected "
        f"{' or '.join(map(repr, wanted))} with {what}"
    )


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: cannot be read ({error}), expected a complete .npz file: is it half downloaded?"
    )
