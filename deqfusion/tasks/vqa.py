"""Task "vqa": answers to questions about images, as in VQA v2, by 3129 classes at most.

A folder holds questions and annotations as `deqfusion.data.vqa` reads them, and in `features` a
`.npz` file of region features per image as `deqfusion.data.regions` reads them. With `image` none
the model sees the question alone, the baseline that every figure on VQA is to be held against.

Where the release has no part to choose the epoch by, as the official one, some of the training
images are held out for it; what is reported is of the test part (val2014) at that epoch.

Loss: binary cross-entropy of every answer, summed over answers, with soft targets
min(1, annotators / 3). Metrics: the official accuracy, overall and by answer type, and in the same
run that of two answers without a model: always "yes", and the commonest training answer to
questions that begin alike.

Source: D. Teney et al., "Tips and tricks for visual question answering", CVPR 2018. Different:
annotators are counted after normalising their answers, and answers are chosen from the training
part alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..data.errors import DataError
from ..data.regions import RegionFeatures
from ..data.vqa import NUM_ANSWERS, Question, answer_vocabulary, hold_out_images, load_vqa
from ..data.words import encode_words, word_vocabulary
from ..engine import Config, Field, Objective, OptionError, Recipe, Splits, configured_fusion
from ..engine.kinds import Kind, OneOf, RealNumber, Sha256, Switch, WholeNumber
from ..engine.options import FUSION_ONLY
from ..metrics.vqa import ANSWER_TYPES, answer_accuracy, mean_accuracies, normalise_answer
from ..models.vqa import ENCODERS, QuestionEncoder, RegionAttention, VQAModel

FEATURES_FOLDER = "features"
_BASELINES = ("baseline_yes", "baseline_question_type")


class VQASamples:
    """Questions with what a model is given and what its answers are worth.

    Args:
        questions: of one split.
        words: numbers of words, of `word_vocabulary`.
        answers: to tell apart, of `answer_vocabulary`.
        priors: the commonest training answer by question type; that of None for all others.
        regions: of the images; None for the question alone.
        max_words: of a question.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        words: dict[str, int],
        answers: Sequence[str],
        priors: Mapping[str | None, str],
        regions: RegionFeatures | None,
        max_words: int,
    ) -> None:
        encoded = encode_words([question.text for question in questions], words, max_words)
        self.words, self.lengths = map(torch.from_numpy, encoded)
        self.images = [question.image_id for question in questions]
        self.regions = regions
        numbers = {answer: number for number, answer in enumerate(answers)}
        rows, ten = len(questions), NUM_ANSWERS
        labels = np.full((rows, ten), -1, dtype=np.int64)
        values = np.zeros((2, rows, ten), dtype=np.float32)
        baselines = np.zeros((rows, len(_BASELINES)), dtype=np.float32)
        types = np.full(rows, -1, dtype=np.int64)
        for row, question in enumerate(questions):
            given = Counter(map(normalise_answer, question.answers))
            known = [answer for answer in given if answer in numbers]
            for place, answer in enumerate(known):
                labels[row, place] = numbers[answer]
                accuracy = answer_accuracy(answer, question.answers)
                values[:, row, place] = min(1.0, given[answer] / 3), accuracy
            prior = priors.get(question.question_type, priors[None])
            baselines[row] = [answer_accuracy(said, question.answers) for said in ("yes", prior)]
            if question.answer_type is not None:
                types[row] = ANSWER_TYPES.index(question.answer_type)
        self.labels, self.types = torch.from_numpy(labels), torch.from_numpy(types)
        self.targets, self.accuracies = torch.from_numpy(values)
        self.baselines = torch.from_numpy(baselines)

    def __len__(self) -> int:
        return len(self.words)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Collate questions.

        Returns:
            `words` int64 (B, T) padded by 0 to the longest, `places` int64 (R,) of words in it;
            `labels` int64 (B, 10) of the answers given, -1 for none, with `targets` and
            `accuracies` float32 (B, 10); `types` int64 (B,), -1 for unknown; `baselines` float32
            (B, 2); with images `regions` float32 (B, K, width) and `counts` int64 (B,).

        Raises:
            DataError: an image's file is damaged.
        """
        words = self.words[indices, : int(self.lengths[indices].max())]
        batch = {"words": words, "places": words.flatten().nonzero().squeeze(1)}
        for name in ("labels", "targets", "accuracies", "types", "baselines"):
            batch[name] = getattr(self, name)[indices]
        if self.regions is not None:
            found = [
                torch.from_numpy(self.regions.read(self.images[row])) for row in indices.tolist()
            ]
            batch["regions"] = nn.utils.rnn.pad_sequence(found, batch_first=True)
            batch["counts"] = torch.tensor([len(regions) for regions in found])
        return batch


class VQA(Recipe):
    """Visual question answering on VQA v2."""

    name: ClassVar[str] = "vqa"
    help: ClassVar[str] = "visual question answering: VQA v2, with bottom-up features or without"
    fields: ClassVar[Mapping[str, Field]] = {
        "image": Field(
            OneOf(("regions", "none")),
            "regions",
            f"what is seen: .npz files in {FEATURES_FOLDER}, or none, and then nothing is fused",
        ),
        "positions": Field(Switch(), False, "give the model each region's box"),
        "max_regions": Field(WholeNumber(1, 1000), 100, "regions of an image at most"),
        "encoder": Field(OneOf(ENCODERS), "gru", "of the question"),
        "encoder_layers": Field(WholeNumber(1, 100), 2, "of the transformer"),
        "attention_heads": Field(WholeNumber(1, 1024), 4, "over regions, and of the transformer"),
        "max_words": Field(WholeNumber(1, 1000), 14, "what longer questions are cut to"),
        "min_word_count": Field(WholeNumber(1), 2, "rarer words count as unknown"),
        "min_answer_count": Field(
            WholeNumber(1), 9, "training questions an answer must be the commonest of"
        ),
        "max_answers": Field(WholeNumber(1, 1_000_000), 3129, "classes at most"),
        "validation_fraction": Field(
            RealNumber(0.0, above=True, below=1.0),
            0.05,
            "of the training images, where the release has no part to choose the epoch by",
        ),
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        "dim": 512,
        "dropout": 0.2,
        "batch_size": 256,
        "epochs": 13,
        # That of mmimdb and sunrgbd, whose features are normalised too. On 480 generated questions
        # (width 128, 25 epochs, two seeds) it shortens solves from 6.8 steps to 4.9 and lowers the
        # mean spectral radius from 0.45 to 0.32, with the loss and accuracy of none.
        "jacobian_weight": 0.1,
    }
    facts: ClassVar[Mapping[str, Kind]] = {
        "num_words": WholeNumber(2, 10_000_000),
        "num_answers": WholeNumber(1, 1_000_000),
        "region_width": WholeNumber(0, 1_000_000),
        "vocabulary_sha256": Sha256(),
        "data_sha256": Sha256(),
    }
    selection: ClassVar[tuple[str, Literal["max", "min"]]] = ("accuracy", "max")

    def defaults_for(self, options: Config) -> Mapping[str, Any]:
        """Return the defaults; without an image there is no equilibrium to penalise."""
        if options.get("image") == "none":
            return {**self.defaults, "jacobian_weight": 0.0}
        return self.defaults

    def fault(self, config: Config) -> tuple[str, str] | None:
        """Heads that do not divide the width; a fusion, or its penalty, where nothing is fused."""
        dim, heads = config["dim"], config["attention_heads"]
        if (config["image"] != "none" or config["encoder"] == "transformer") and dim % heads:
            return "attention_heads", f"got {heads}, expected a divisor of dim, {dim}"
        if config["image"] == "none" and config["fusion"] != "deq":
            return "fusion", (
                f"got {config['fusion']!r} with image 'none', with which nothing is fused, "
                "expected the default, 'deq'"
            )
        if config["image"] == "none" and config["jacobian_weight"]:
            return "jacobian_weight", (
                f"got {config['jacobian_weight']:g} with image 'none', with which nothing is "
                "fused, expected 0"
            )
        return None

    def idle_options(self, config: Config) -> Mapping[str, str]:
        """Options of regions and fusion without an image; of a transformer without one."""
        idle = {} if config["encoder"] == "transformer" else {"encoder_layers": "encoder"}
        if config["image"] == "none":
            idle |= dict.fromkeys((*FUSION_ONLY, "positions", "max_regions"), "image")
            if config["encoder"] != "transformer":
                idle["attention_heads"] = "image"
        return idle

    def load(self, data_dir: Path, config: Config) -> tuple[Splits, dict[str, Any]]:
        """Read questions, choose words and answers by the training part, and find the images.

        Raises:
            DataError: see `load_vqa` and `RegionFeatures`.
            OptionError: too few images to hold any out; no answer is frequent enough.
        """
        data = load_vqa(data_dir)
        train, validation = data.train, data.validation
        if validation is None:
            try:
                train, validation = hold_out_images(
                    train, config["validation_fraction"], config["seed"]
                )
            except DataError as error:
                raise OptionError("validation_fraction", str(error)) from error
        elif "data_sha256" not in config and (
            config["validation_fraction"] != self.fields["validation_fraction"].default
        ):
            raise OptionError(
                "validation_fraction",
                f"got {config['validation_fraction']:g}, where it has no effect, as {data_dir} has "
                "a part to choose the epoch by, expected it left out",
            )
        parts = (train, validation, data.test)
        try:
            answers = answer_vocabulary(train, config["min_answer_count"], config["max_answers"])
        except DataError as error:
            raise OptionError("min_answer_count", str(error)) from error
        words = word_vocabulary((question.text for question in train), config["min_word_count"])
        digest, regions = data.sha256, None
        if config["image"] == "regions":
            regions = RegionFeatures(
                data_dir / FEATURES_FOLDER,
                {question.image_id for part in parts for question in part},
                positions=config["positions"],
                max_regions=config["max_regions"],
            )
            digest = hashlib.sha256(f"{digest} {regions.sha256}".encode()).hexdigest()
        priors = _priors(train)
        splits = (
            VQASamples(part, words, answers, priors, regions, config["max_words"]) for part in parts
        )
        facts = {
            "num_words": len(words) + 2,
            "num_answers": len(answers),
            "region_width": 0 if regions is None else regions.width,
            # Other words or answers of the same number would be taken for these.
            "vocabulary_sha256": _digest([list(words.items()), answers]),
            "data_sha256": digest,
        }
        return Splits(*splits), facts

    def build(self, config: Config) -> VQAModel:
        """Make the model; without an image nothing is fused."""
        dim, heads, dropout = config["dim"], config["attention_heads"], config["dropout"]
        encoder = QuestionEncoder(
            config["num_words"],
            dim,
            config["encoder"],
            max_words=config["max_words"],
            heads=heads,
            layers=config["encoder_layers"],
            dropout=dropout,
        )
        if config["image"] == "none":
            return VQAModel(encoder, dim, config["num_answers"], dropout=dropout)
        attention = RegionAttention(config["region_width"], dim, heads=heads, dropout=dropout)
        fusion = configured_fusion(config, 2)
        return VQAModel(encoder, dim, config["num_answers"], attention, fusion, dropout)

    def objective(self, model: nn.Module, batch: dict[str, Tensor]) -> Objective:
        """Summed binary cross-entropy of the answers, a mean over questions."""
        output = _call(model, batch)
        loss = _cross_entropy(output.logits, batch).mean()
        if output.equilibrium is None:
            return Objective(loss)
        return Objective(loss, output.equilibrium, output.features, output.fusion)

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each question's answer is worth, its loss, and what the baselines' are worth."""
        logits = _call(model, batch).logits
        chosen = batch["labels"] == logits.argmax(dim=1, keepdim=True)
        return {
            "loss": _cross_entropy(logits, batch),
            "accuracy": (batch["accuracies"] * chosen).sum(dim=1),
            "types": batch["types"],
            "baselines": batch["baselines"],
        }

    def metrics(self, outputs: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Official accuracies as shares, the loss, and the baselines' accuracies."""
        whole = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
        kinds = [ANSWER_TYPES[kind] if kind >= 0 else None for kind in whole["types"].tolist()]
        baselines = whole["baselines"].double().mean(dim=0).tolist()
        return {
            "loss": whole["loss"].double().mean().item(),
            **mean_accuracies(whole["accuracy"].tolist(), kinds),
            **dict(zip(_BASELINES, baselines, strict=True)),
        }


RECIPES: dict[str, Recipe] = {"vqa": VQA()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _call(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(batch["words"], batch["places"], batch.get("regions"), batch.get("counts"))


def _cross_entropy(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(B,), summed over answers."""
    rows, answers = logits.shape
    # One column more for the places without an answer.
    targets = logits.new_zeros(rows, answers + 1)
    labels = torch.where(batch["labels"] < 0, answers, batch["labels"])
    targets = targets.scatter(1, labels, batch["targets"].to(targets.dtype))[:, :answers]
    return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


def _priors(questions: Sequence[Question]) -> dict[str | None, str]:
    counts: dict[str | None, Counter[str]] = {None: Counter()}
    for question in questions:
        answer = normalise_answer(question.common)
        counts[None][answer] += 1
        if question.question_type is not None:
            counts.setdefault(question.question_type, Counter())[answer] += 1
    return {kind: count.most_common(1)[0][0] for kind, count in counts.items()}
