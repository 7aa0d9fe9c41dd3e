"""Image encoders, and reading their maps at points."""

from __future__ import annotations

import sys

import pytest
import torch

from deqfusion.models.images import build_image_encoder, normalised, read_map


def test_maps_are_an_eighth_of_the_image():
    encoder = build_image_encoder("cnn", 16)
    assert encoder(torch.randn(2, 3, 48, 64)).shape == (2, 16, 6, 8)


def test_maps_are_read_where_the_pixels_are():
    # A map whose features are x and y of its cells' middles, -1..1 over the image.
    x, y = torch.meshgrid(
        torch.linspace(-7 / 8, 7 / 8, 8), torch.linspace(-5 / 6, 5 / 6, 6), indexing="xy"
    )
    pixels = torch.tensor([[[0.0, 0.0], [0.5, -0.5], [-0.8, 0.8], [1.5, 0.0], [0.0, -2.0]]])
    read = read_map(torch.stack([x, y])[None], pixels)
    torch.testing.assert_close(read[0, :3], pixels[0, :3])
    assert (read[0, 3:] == 0).all()


def test_bytes_are_normalised():
    image = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = [(1 - mean) / deviation for mean, deviation in ((0.485, 0.229), (0.406, 0.225))]
    got = normalised(image)[0, [0, 2], 0, 0]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_bad_names_and_widths():
    with pytest.raises(ValueError, match="image_encoder: got 'vgg', expected cnn or resnet18"):
        build_image_encoder("vgg", 16)
    with pytest.raises(ValueError, match="width: got 12, expected a multiple of 8"):
        build_image_encoder("cnn", 12)


def test_torchvision_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match="got 'resnet18', which needs torchvision"):
        build_image_encoder("resnet18", 16)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 128), ("resnet50", 512)])
def test_torchvision_encoders(name, width):
    try:
        encoder = build_image_encoder(name, 16)
    except ValueError as error:
        pytest.skip(f"torchvision is optional: {error}")
    assert encoder.width == width
    assert encoder(torch.randn(1, 3, 48, 64)).shape == (1, width, 6, 8)
