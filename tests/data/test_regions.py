"""Region features: every published form of a file, and what each fault says."""

import numpy as np
import pytest

from deqfusion.data import DataError
from deqfusion.data.regions import POSITION_WIDTH, RegionFeatures

WIDTH = 8


def export(path, regions, *, drop=(), **changes):
    """A file as MILVLG/bottom-up-attention.pytorch writes it: 400 x 200 pixels."""
    generator = np.random.default_rng(regions)
    corner = generator.random((regions, 2)) * [200, 100]
    content = {
        "x": generator.random((regions, WIDTH), dtype=np.float32),
        "bbox": np.concatenate([corner, corner + np.array([40, 50])], axis=1).astype(np.float32),
        "num_bbox": regions,
        "image_h": 200,
        "image_w": 400,
        "info": {"pickled": True},
    }
    content |= changes
    np.savez_compressed(path, **{key: value for key, value in content.items() if key not in drop})
    return content


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train2014").mkdir()
    export(tmp_path / "train2014" / "COCO_train2014_000000000007.jpg.npz", 3)
    export(tmp_path / "12.npz", 5)
    return tmp_path


def test_reads_what_was_written(folder):
    # Neither is of an image: the last number of the first name is not its end.
    export(folder / "7.npz.old.npz", 2)
    export(folder / "notes.npz", 2)
    regions = RegionFeatures(folder, [7, 12])
    assert regions.width == WIDTH
    np.testing.assert_array_equal(regions.read(7), export(folder / "99.npz", 3)["x"])
    assert regions.read(12).shape == (5, WIDTH)
    assert regions.read(12).dtype == np.float32
    assert RegionFeatures(folder, [12], max_regions=2).read(12).shape == (2, WIDTH)
    with pytest.raises(ValueError, match="max_regions: got 0"):
        RegionFeatures(folder, [7], max_regions=0)


def test_other_published_forms(folder):
    content = export(folder / "99.npz", 5)
    features, boxes = content["x"], content["bbox"]
    forms = {
        # OpenVQA's archives hold the transpose.
        1: {"x": features.T, "bbox": boxes, "num_bbox": 5, "image_w": 400, "image_h": 200},
        2: {"x": features.T, "bbox": boxes},
        3: {"features": features, "boxes": boxes, "num_boxes": np.array([5])},
        4: {"feat": features},
        5: {"features": features, "norm_bb": boxes / [400, 200, 400, 200], "num_bbox": 5},
        6: {"x": features.astype(np.float16)},
    }
    for image, form in forms.items():
        np.savez(folder / f"butd_{image}.npz", **form)
    regions = RegionFeatures(folder, forms)
    for image in forms:
        np.testing.assert_allclose(regions.read(image), features, rtol=1e-3 * (image == 6))
    positions = [RegionFeatures(folder, [image], positions=True).read(image) for image in (1, 5)]
    np.testing.assert_allclose(positions[0], positions[1], rtol=1e-6)


def test_positions_are_corners_and_area_as_shares_of_the_image(folder):
    regions = RegionFeatures(folder, [7], positions=True)
    assert regions.width == WIDTH + POSITION_WIDTH
    found = regions.read(7)[:, WIDTH:]
    box = export(folder / "99.npz", 3)["bbox"][0]
    expected = [box[0] / 400, box[1] / 200, box[2] / 400, box[3] / 200, 0.1 * 0.25]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_sha256_is_of_what_is_read(folder):
    before = RegionFeatures(folder, [7, 12]).sha256
    content = export(folder / "12.npz", 5, info={"other": 1})
    assert RegionFeatures(folder, [7, 12]).sha256 == before
    export(folder / "12.npz", 5, bbox=content["bbox"] + 1)
    assert RegionFeatures(folder, [7, 12]).sha256 == before
    export(folder / "12.npz", 5, x=content["x"] + 1)
    assert RegionFeatures(folder, [7, 12]).sha256 != before


def test_missing_folder_and_files(folder):
    with pytest.raises(DataError, match=r"nowhere: no such folder, expected .* each of 2 images"):
        RegionFeatures(folder / "nowhere", [7, 12])
    with pytest.raises(
        DataError, match=r"no file for 2 of 3 images, .* 1\.npz or COCO_train2014_0"
    ):
        RegionFeatures(folder, [1, 7, 2])
    export(folder / "COCO_val2014_000000000012.npz", 5)
    with pytest.raises(DataError, match=r"12\.npz: image 12 has a file already, .*12\.npz; expect"):
        RegionFeatures(folder, [12])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_half_downloaded_file(folder, share):
    path = folder / "12.npz"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"12\.npz: cannot be read .*: is it half downloaded\?"):
        RegionFeatures(folder, [7, 12])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_byte(folder, save):
    path = folder / "12.npz"
    save(path, x=np.random.default_rng(0).random((5, 400)))
    regions = RegionFeatures(folder, [12])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"12\.npz: cannot be read"):
        regions.read(12)


FAULTS = {
    "no features": ({"drop": ("x",)}, r"has keys bbox, .*, expected 'x' or 'features' or 'feat'"),
    "no boxes": ({"drop": ("bbox",)}, r"expected 'bbox' or 'boxes' or 'norm_bb' with boxes, or tr"),
    "no size": ({"drop": ("image_w",)}, r"expected 'image_w' with the image's size"),
    "vector": (
        {"x": np.zeros(8)},
        r"'x': got float64 of shape \(8,\), expected .*\(regions, width",
    ),
    "no regions": ({"x": np.zeros((0, 8))}, r"'x': got float64 of shape \(0, 8\)"),
    "text": ({"x": np.array([["a"]])}, r"'x': got <U1 of shape \(1, 1\)"),
    "other count": ({"num_bbox": 4}, r"shape \(5, 8\), expected 4 regions as in key 'num_bbox'"),
    "counts": ({"num_bbox": np.ones(3)}, r"'num_bbox': got shape \(3,\), expected one number"),
    "other width": ({"x": np.ones((5, 9))}, r"have 9 features, expected 8 as in .*7\.jpg\.npz"),
    "pickled": ({"num_bbox": np.array([None])}, r"cannot be read \(Object arrays cannot be loaded"),
    "nan": ({"x": np.full((5, WIDTH), np.nan)}, r"'x': got float64 with values that are no finite"),
    "other boxes": ({"bbox": np.ones((4, 4))}, r"has 4 boxes, expected one for 5 regions"),
    "flat boxes": ({"bbox": np.ones(5)}, r"'bbox': got shape \(5,\), expected \(regions, 4\)"),
    "image of no size": ({"image_w": 0}, r"image of 0 x 200 pixels, expected a size > 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_key_and_expectation(folder, fault):
    changes, message = FAULTS[fault]
    export(folder / "12.npz", 5, **changes)
    with pytest.raises(DataError, match=rf"12\.npz: .*{message}|12\.npz: {message}") as error:
        RegionFeatures(folder, [7, 12], positions=True).read(12)
    assert "\n" not in str(error.value)
