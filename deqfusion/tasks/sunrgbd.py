"""Detection of furniture in SUN RGB-D: point cloud and image, oriented 3-D boxes, mAP.

The detector is `MultimodalVoteNet`; with `concat` in place of the equilibrium it is the comparison.
The epoch is chosen on training scenes that are held out, by mAP at an IoU of 0.25; the published
`val` scenes are the test split, as in the literature, and are not looked at before.

Detections are found as VoteNet finds them: proposals with objectness above 0.05 and at least 5
points inside, the best of those of a class that overlap by more than an IoU of 0.25; each is
counted for every class, with objectness times the class's probability as score.

That the whole learns at all is seen on a single scene, which this learns by heart (600 steps, 145
seconds of one core; mAP at 0.25 of the chosen epoch 0.93, at 0.5 0.60, for the sample scene of one
table and seven chairs):

    deqfusion train sunrgbd --data-dir DATA --out RUN --validation-fraction 0 --no-augment
        --epochs 600 --warmup 60 --learning-rate 5e-3 --num-points 4096 --num-seeds 256
        --num-proposals 64 --dim 64 --point-width 32 --image-size 96,128 --image-width 16
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..data import DataError
from ..data.sunrgbd import (
    SUNRGBD_CLASSES,
    SUNRGBD_SIZES,
    Scene,
    SceneFiles,
    find_scenes,
    read_scene,
    scenes_digest,
)
from ..engine.kinds import Kind, OneOf, RealNumber, Sha256, Switch, WholeNumber, WholeNumbers
from ..engine.options import configured_fusion
from ..engine.recipe import Config, Field, Objective, OptionError, Recipe, Splits
from ..metrics.boxes import points_in_boxes, suppress
from ..metrics.detection import Detections, detection_metrics
from ..models.images import IMAGE_ENCODERS, ResNetStem, build_image_encoder
from ..models.votenet import MultimodalVoteNet, Proposals, decode_boxes
from ..models.votenet_loss import SceneTargets, votenet_losses

_LEAST_OBJECTNESS, _LEAST_POINTS, _MOST_OVERLAP = 0.05, 5, 0.25
# Of decoded scenes in memory: 3 MB each.
_KEPT_SCENES = 64


class SceneSamples:
    """Scenes, read when they are asked for, each as a random choice of its points.

    Args:
        scenes: where their files are.
        num_points: N.
        image_size: height and width.
        color: whether the points' colours are features, beside their heights.
        draw: choose other points every time; without, a scene's points are always the same.
        augment: mirror, turn (by up to 30 degrees) and scale (0.85 to 1.15) scenes at random.

    Source: VoteNet's `sunrgbd_detection_dataset.py`. Differences: 1. pixels are those of the
    scene as it was shot, so that the image is not augmented; 2. colours are not either.
    """

    def __init__(
        self,
        scenes: Sequence[SceneFiles],
        num_points: int,
        image_size: tuple[int, int],
        *,
        color: bool = False,
        draw: bool = False,
        augment: bool = False,
    ) -> None:
        self.scenes, self.num_points, self.color = list(scenes), num_points, color
        self.draw, self.augment, self.image_size = draw, augment, image_size
        self._read = lru_cache(_KEPT_SCENES)(self._scene)

    def __len__(self) -> int:
        return len(self.scenes)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Read scenes.

        Returns:
            `points` (B, N, 3), `features` (B, N, 1, or 4 with colours), `pixels` (B, N, 2), `image`
            uint8 (B, 3, height, width), and the fields of `SceneTargets`, padded to the scene with
            most boxes.
        """
        chosen = [self._sample(index) for index in indices.tolist()]
        most = max(1, *(len(sample["boxes"]) for sample in chosen))
        for sample in chosen:
            missing = most - len(sample["boxes"])
            sample["boxes"] = nn.functional.pad(sample["boxes"], (0, 0, 0, missing))
            sample["classes"] = nn.functional.pad(sample["classes"], (0, missing))
            sample["present"] = torch.arange(most) < most - missing
        return {key: torch.stack([sample[key] for sample in chosen]) for key in chosen[0]}

    def __getstate__(self) -> dict[str, Any]:
        # A cache cannot be sent to a worker that is spawned; it makes one of its own.
        return {key: value for key, value in self.__dict__.items() if key != "_read"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._read = lru_cache(_KEPT_SCENES)(self._scene)

    def _scene(self, files: SceneFiles) -> Scene:
        return read_scene(files, self.image_size)

    def _sample(self, index: int) -> dict[str, Tensor]:
        scene = self._read(self.scenes[index])
        generator = None if self.draw else torch.Generator().manual_seed(index)
        count = len(scene.points)
        if count >= self.num_points:
            rows = torch.randperm(count, generator=generator)[: self.num_points]
        else:
            rows = torch.randint(count, (self.num_points,), generator=generator)
        points = torch.from_numpy(scene.points)[rows]
        # So low that only a few stray points of noise lie below the floor.
        height = points[:, 2:] - float(np.percentile(scene.points[:, 2], 0.99))
        features = [height, torch.from_numpy(scene.colors)[rows] - 0.5] if self.color else [height]
        sample = {
            "points": points,
            "features": torch.cat(features, dim=1),
            "pixels": torch.from_numpy(scene.pixels)[rows],
            "image": torch.from_numpy(scene.image),
            "votes": torch.from_numpy(scene.votes)[rows],
            "in_box": torch.from_numpy(scene.in_box)[rows],
            "boxes": torch.from_numpy(scene.boxes).clone(),
            "classes": torch.from_numpy(scene.classes),
        }
        return _augmented(sample) if self.augment else sample


class SunRgbdRecipe(Recipe):
    """SUN RGB-D by a VoteNet with fused image features."""

    name: ClassVar[str] = "sunrgbd"
    help: ClassVar[str] = "3-D object detection in SUN RGB-D, in VoteNet's files"
    selection: ClassVar[tuple[str, Literal["max", "min"]]] = ("map_25", "max")
    defaults: ClassVar[Mapping[str, Any]] = {
        "dim": 256,
        "epochs": 180,
        "batch_size": 8,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "clip_norm": 10.0,
        "jacobian_weight": 0.1,
    }
    fields: ClassVar[Mapping[str, Field]] = {
        "labels": Field(OneOf(("v1", "v2")), "v1", "version of the boxes", "files"),
        "validation_fraction": Field(
            RealNumber(0.0, below=1.0),
            0.1,
            "of the training scenes, to choose the epoch; 0: all of them, also trained on, which "
            "only shows whether the model can learn them",
            "files",
        ),
        "num_points": Field(WholeNumber(64, 1_000_000), 20_000, "drawn from a scene", "files"),
        "color": Field(Switch(), False, "points have their colours as features", "files"),
        "augment": Field(Switch(), True, "mirror, turn and scale training scenes", "files"),
        "image_size": Field(WholeNumbers(16, 4096), [264, 352], "height,width", "files"),
        "image_encoder": Field(
            OneOf(IMAGE_ENCODERS), "cnn", "cnn, or of torchvision, if installed", "model"
        ),
        "pretrained": Field(Switch(), False, "begin with torchvision's weights", "model"),
        "image_width": Field(WholeNumber(8, 4096), 64, "of cnn, a multiple of 8", "model"),
        "point_width": Field(WholeNumber(8, 4096), 128, "of the point backbone", "model"),
        "num_seeds": Field(WholeNumber(12, 65_536), 1024, "a multiple of 4", "model"),
        "num_proposals": Field(WholeNumber(1, 65_536), 256, "at most num_seeds", "model"),
        "num_headings": Field(WholeNumber(1, 360), 12, "bins of the heading", "model"),
    }
    facts: ClassVar[Mapping[str, Kind]] = {"data_sha256": Sha256()}

    def fault(self, config: Config) -> tuple[str, str] | None:
        """Return an option that does not fit the others; or None."""
        if len(config["image_size"]) != 2:
            return "image_size", f"got {len(config['image_size'])} numbers, expected height,width"
        if config["num_seeds"] % 4:
            return "num_seeds", f"got {config['num_seeds']}, expected a multiple of 4"
        if config["num_proposals"] > config["num_seeds"]:
            return "num_proposals", (
                f"got {config['num_proposals']}, expected at most {config['num_seeds']} (num_seeds)"
            )
        if config["image_encoder"] == "cnn" and config["image_width"] % 8:
            return "image_width", f"got {config['image_width']}, expected a multiple of 8"
        if config["image_encoder"] == "cnn" and config["pretrained"]:
            return "pretrained", "got true, expected image_encoder of torchvision with it"
        return None

    def idle_options(self, config: Config) -> Mapping[str, str]:
        """The width of a CNN that is not there."""
        return {} if config["image_encoder"] == "cnn" else {"image_width": "image_encoder"}

    def load(self, data_dir: Path, config: Config) -> tuple[Splits, dict[str, Any]]:
        """Find and check all scenes; hold out scenes to choose the epoch by.

        Raises:
            DataError: see `find_scenes`; a split without boxes.
            OptionError: too few scenes to hold any out.
        """
        scenes, test = find_scenes(data_dir, config["labels"])
        fraction, count = config["validation_fraction"], len(scenes)
        order = np.random.default_rng(config["seed"]).permutation(count)
        held = round(fraction * count)
        if fraction > 0 and not 0 < held < count:
            raise OptionError(
                "validation_fraction",
                f"cannot hold out {fraction:g} of {count} scenes in {scenes[0].points.parent}, "
                "expected both parts to have at least one (or a fraction of 0)",
            )
        trained = [scenes[index] for index in sorted(order[held:])]
        chosen = [scenes[index] for index in sorted(order[:held])] if held else trained
        digests = []
        parts = [("trained on", trained), ("to choose the epoch by", chosen), ("test", test)]
        for what, part in parts:
            if part is None:
                continue
            digest, boxes = scenes_digest(part)
            digests.append(digest)
            if boxes == 0:
                raise DataError(
                    f"{part[0].boxes.parent}: no box in any of {len(part)} scenes ({what}), "
                    "expected at least one _bbox.npy with one"
                )
        return (
            Splits(
                self._samples(trained, config, draw=True, augment=config["augment"]),
                self._samples(chosen, config),
                self._samples(test, config) if test is not None else None,
            ),
            {"data_sha256": _joined(digests)},
        )

    def build(self, config: Config) -> nn.Module:
        """Make an untrained `MultimodalVoteNet`."""
        return MultimodalVoteNet(
            configured_fusion(config, 2),
            config["dim"],
            SUNRGBD_SIZES,
            build_image_encoder(config["image_encoder"], config["image_width"]),
            num_features=4 if config["color"] else 1,
            num_seeds=config["num_seeds"],
            num_proposals=config["num_proposals"],
            num_headings=config["num_headings"],
            point_width=config["point_width"],
            dropout=config["dropout"],
        )

    def prepare(self, model: nn.Module, splits: Splits, config: Config) -> None:
        """Load torchvision's weights where they are asked for."""
        if config["pretrained"]:
            encoder = model.get_submodule("image_encoder")
            assert isinstance(encoder, ResNetStem)
            encoder.load_imagenet()

    def objective(self, model: nn.Module, batch: dict[str, Tensor]) -> Objective:
        """VoteNet's loss, the mean of the scenes'."""
        proposals = _proposals(model, batch)
        targets = SceneTargets(*(batch[key] for key in SceneTargets._fields))
        loss = votenet_losses(proposals, targets, model.get_buffer("sizes")).total().mean()
        if proposals.equilibrium is None:
            return Objective(loss)
        fusion: Any = model.get_submodule("fusion")
        return Objective(loss, proposals.equilibrium, proposals.features, fusion)

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Boxes, classes and scores of each scene, with what is there: fields of `Detections`."""
        proposals = _proposals(model, batch)
        boxes = decode_boxes(proposals, model.get_buffer("sizes"))
        objectness = proposals.objectness.softmax(dim=-1)[..., 1]
        labels = proposals.class_logits.argmax(dim=-1)
        shares = proposals.class_logits.softmax(dim=-1)
        filled = points_in_boxes(batch["points"], boxes).sum(dim=-1) >= _LEAST_POINTS
        candidate = filled & (objectness > _LEAST_OBJECTNESS)
        scenes = []
        for row, mine in enumerate(candidate):
            kept = suppress(
                *(boxes[row, mine], objectness[row, mine], labels[row, mine]), _MOST_OVERLAP
            )
            found, share = boxes[row, mine][kept], shares[row, mine][kept]
            count, classes = share.shape
            present = batch["present"][row]
            detections = Detections(
                boxes=found.repeat_interleave(classes, dim=0),
                classes=torch.arange(classes, device=found.device).repeat(count),
                scores=(objectness[row, mine][kept, None] * share).flatten(),
                true_boxes=batch["boxes"][row, present],
                true_classes=batch["classes"][row, present],
            )
            scenes.append(detections._asdict())
        return scenes

    def metrics(self, outputs: Sequence[list[dict[str, Tensor]]]) -> dict[str, float]:
        """Return mAP and mean recall at IoUs of 0.25 and 0.5, and the AP at 0.25 of each class."""
        scenes = [Detections(**scene) for batch in outputs for scene in batch]
        return detection_metrics(scenes, (0.25, 0.5), SUNRGBD_CLASSES)

    def _samples(
        self, scenes: Sequence[SceneFiles], config: Config, **options: bool
    ) -> SceneSamples:
        height, width = config["image_size"]
        return SceneSamples(
            scenes, config["num_points"], (height, width), color=config["color"], **options
        )


RECIPES = {SunRgbdRecipe.name: SunRgbdRecipe()}


def _proposals(model: nn.Module, batch: dict[str, Tensor]) -> Proposals:
    return model(batch["points"], batch["features"], batch["pixels"], batch["image"])


def _joined(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _augmented(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    mirror, turn, growth = torch.rand(3).tolist()
    sign, angle, scale = (
        (-1 if mirror > 0.5 else 1),
        (turn - 0.5) * math.pi / 3,
        0.85 + 0.3 * growth,
    )
    cosine, sine = math.cos(angle), math.sin(angle)
    turned = torch.tensor([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    # Places and offsets alike: the map is linear.
    moved = scale * torch.diag(torch.tensor([sign, 1.0, 1.0])) @ turned.T
    boxes = sample["boxes"].clone()
    boxes[:, :3] = boxes[:, :3] @ moved
    boxes[:, 3:6] *= scale
    # Headings turn from +x towards -y, and mirroring makes -heading of x out of heading of -x.
    boxes[:, 6] = (math.pi - boxes[:, 6] if sign < 0 else boxes[:, 6]) - angle
    features = sample["features"].clone()
    features[:, 0] *= scale
    return sample | {
        "points": sample["points"] @ moved,
        "votes": sample["votes"] @ moved,
        "features": features,
        "boxes": boxes,
    }
