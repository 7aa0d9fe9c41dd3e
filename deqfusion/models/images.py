"""Image encoders with a map of features an eighth of the image's size, and reading it at points."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: "cnn" is `SmallCNN`; the others are torchvision's up to their second block.
IMAGE_ENCODERS = ("cnn", "resnet18", "resnet50")
# Of ImageNet, which torchvision's weights were trained on; good enough for any photograph.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SmallCNN(nn.Module):
    """Three strided blocks of two convolutions with GroupNorm and ReLU: an eighth of the size.

    GroupNorm, since a step sees few images.

    Args:
        width: channels of the map, a multiple of 8; a quarter and half of it before.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width: got {width}, expected a multiple of 8")
        self.width = width
        widths = (3, width // 4, width // 2, width)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            for source, stride in ((before, 2), (after, 1)):
                convolution = nn.Conv2d(source, after, 3, stride, padding=1, bias=False)
                layers += [convolution, nn.GroupNorm(min(8, after // 2), after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised (B, 3, H, W) to (B, width, about H/8, about W/8)."""
        return self.layers(images)


class ResNetStem(nn.Module):
    """A ResNet of torchvision up to its second block: an eighth of the size.

    Args:
        name: "resnet18" or "resnet50".

    Raises:
        ValueError: torchvision is not installed.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        network = getattr(_torchvision_models(name), name)(weights=None)
        parts = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2")
        for part in parts:
            self.add_module(part, getattr(network, part))
        self.name = name
        self.width = 128 if name == "resnet18" else 512

    def load_imagenet(self) -> None:
        """Load torchvision's ImageNet weights, from its cache or its site.

        Raises:
            OSError: they cannot be had.
        """
        network = getattr(_torchvision_models(self.name), self.name)(weights="DEFAULT")
        weights = network.state_dict()
        self.load_state_dict({name: weights[name] for name in self.state_dict()})

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised (B, 3, H, W) to (B, width, about H/8, about W/8)."""
        for part in self.children():
            images = part(images)
        return images


def build_image_encoder(name: str, width: int) -> SmallCNN | ResNetStem:
    """Build an encoder by its name.

    Args:
        name: one of `IMAGE_ENCODERS`.
        width: of "cnn"; the others have their own.

    Raises:
        ValueError: an unknown name, a bad width, or torchvision is not installed.
    """
    if name not in IMAGE_ENCODERS:
        raise ValueError(f"image_encoder: got {name!r}, expected {' or '.join(IMAGE_ENCODERS)}")
    return SmallCNN(width) if name == "cnn" else ResNetStem(name)


def normalised(images: Tensor) -> Tensor:
    """Return uint8 images (B, 3, H, W) as float32 of about zero mean and unit deviation."""
    mean, deviation = (images.new_tensor(v, dtype=torch.float32) for v in (_MEAN, _DEVIATION))
    return (images / 255 - mean[:, None, None]) / deviation[:, None, None]


def read_map(features: Tensor, pixels: Tensor) -> Tensor:
    """Read a map of features at points, between its cells bilinearly.

    Args:
        features: (B, C, h, w).
        pixels: (B, S, 2), x then y, -1..1 over the image.

    Returns:
        (B, S, C); 0 out of view.
    """
    grid = pixels[:, :, None].to(features.dtype)
    return F.grid_sample(features, grid, align_corners=False).squeeze(-1).mT


def _torchvision_models(name: str) -> Any:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch fails with RuntimeError.
        what = " ".join(str(error).split())
        raise ValueError(
            f"image_encoder: got {name!r}, which needs torchvision ({what}); "
            "expected it installed and of the same build as torch, or 'cnn'"
        ) from error
    return models
