"""Sentiment of utterances, -3 to 3, from text, audio and video: CMU-MOSI.

Standardised features (by the utterances that are trained on), one encoder each, the fusion, a
linear head; absolute error. The epoch with the least error on held-out training videos is kept:
an utterance's neighbours in its video would give it away, and test videos are for the report alone.
The choice is a weak one, as the published features know training videos' labels (see `data.mosi`).

With `--text-encoder`, sentences go through a transformer of Hugging Face in place of their
published features, and it is fine-tuned. The authors of DEQ fusion instead fuse two maps of
attention, of BERT's tokens and of word-aligned audio, in the layout of CM-BERT; those aligned
features cannot be had, so figures of theirs are of another input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from ..data.errors import DataError
from ..data.mosi import (
    MOSI_MODALITIES,
    MosiData,
    MosiPart,
    hold_out_videos,
    load_mosi,
    mosi_place,
)
from ..engine import (
    Config,
    Field,
    Objective,
    OptionError,
    Recipe,
    Splits,
    TensorSamples,
    configured_fusion,
    data_sha256,
)
from ..engine.kinds import Kind, OrNull, RealNumber, Sha256, SomeOf, WholeNumber, WholeNumbers
from ..metrics.regression import sentiment_metrics
from ..models.mosi import FEATURE_SCALING, FeatureEncoder, SentimentOutput, SentimentRegressor
from ..models.scaling import InputScaling
from ..models.text import TransformerEncoder

# Of a transformer's configuration: two copies of a model may differ in them.
_OF_A_PLACE = ("_name_or_path", "transformers_version")


class EncoderName(Kind):
    """A transformer's folder or its name on the Hugging Face hub."""

    expected = "a folder or name of a Hugging Face encoder"

    def accepts(self, value: Any) -> bool:
        """Whether it is a text that is not empty."""
        return isinstance(value, str) and bool(value.strip())


class EncoderConfig(Kind):
    """The configuration of a transformer, as its library writes it."""

    expected = "an object with 'model_type'"

    def accepts(self, value: Any) -> bool:
        """Whether it is an object that names its type."""
        return isinstance(value, dict) and isinstance(value.get("model_type"), str)


class MOSIRecipe(Recipe):
    """Regression of CMU-MOSI's sentiment scores."""

    name = "mosi"
    help = "sentiment of utterances from text, audio and video: CMU-MOSI"
    fields: ClassVar = {
        "modalities": Field(SomeOf(MOSI_MODALITIES), list(MOSI_MODALITIES), "what is fused"),
        "validation_fraction": Field(
            RealNumber(0.0, above=True, below=1.0),
            0.2,
            "of the training videos, to choose the epoch",
        ),
        "text_encoder": Field(
            OrNull(EncoderName()),
            None,
            "folder or name of a Hugging Face encoder to read the sentences with",
        ),
        "text_length": Field(WholeNumber(2, 4096), 64, "tokens of a sentence at most"),
        "text_rate": Field(
            RealNumber(0.0, above=True), 0.01, "factor on the learning rate for --text-encoder"
        ),
    }
    defaults: ClassVar = {
        "dim": 32,
        "dropout": 0.3,
        "epochs": 25,
        "batch_size": 64,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
        "jacobian_weight": 1.0,
    }
    facts: ClassVar = {
        "input_widths": WholeNumbers(1, 10_000_000),
        "text_config": OrNull(EncoderConfig()),
        "data_sha256": Sha256(),
    }
    selection = ("mae", "min")

    def fault(self, config: Config) -> tuple[str, str] | None:
        """Return what does not fit together: a text encoder without text."""
        if config["text_encoder"] is not None and "text" not in config["modalities"]:
            return "text_encoder", (
                f"got {config['text_encoder']!r} for modalities "
                f"{','.join(config['modalities'])}, expected text among them"
            )
        return None

    def idle_options(self, config: Config) -> Mapping[str, str]:
        """Options of a text encoder that is not there."""
        names = ("text_length", "text_rate") if config["text_encoder"] is None else ()
        return dict.fromkeys(names, "text_encoder")

    def load(self, data_dir: Path, config: Config) -> tuple[Splits, dict[str, Any]]:
        """Read the folder, hold training videos out, and tokenise where that is asked for."""
        data = load_mosi(data_dir)
        fraction = config["validation_fraction"]
        try:
            kept, held = hold_out_videos(data.train.videos, fraction, config["seed"])
        except DataError as error:
            raise OptionError("validation_fraction", str(error)) from error
        _refuse_outliers(data_dir, data, kept, config)
        name = config["text_encoder"]
        tokenizer = None if name is None else _pretrained("AutoTokenizer", name)
        parts = [data.train.take(kept), data.train.take(held), data.test]
        splits = Splits(*(TensorSamples(_tensors(part, config, tokenizer)) for part in parts))
        text_config = None if name is None else _settings(name)
        widths = [view.shape[1] for view in _views(data.train, config["modalities"])]
        facts = {
            "input_widths": widths,
            "text_config": text_config,
            "data_sha256": data_sha256(_arrays(data)),
        }
        return splits, facts

    def build(self, config: Config) -> nn.Module:
        """Make a `SentimentRegressor`."""
        dim, dropout = config["dim"], config["dropout"]
        encoders: list[nn.Module] = [
            FeatureEncoder(width, dim, dropout) for width in config["input_widths"]
        ]
        if config["text_encoder"] is not None:
            place = config["modalities"].index("text")
            encoders[place] = TransformerEncoder(_blank(config["text_config"]), dim, dropout)
        fusion = configured_fusion(config, len(encoders))
        return SentimentRegressor(encoders, fusion, dim, dropout)

    def prepare(self, model: nn.Module, splits: Splits, config: Config) -> None:
        """Fit the standardisation to the samples to train on; load the transformer's weights."""
        batch = splits.train.batch(torch.arange(len(splits.train)))
        for encoder, view in zip(_encoders(model), batch["inputs"], strict=True):
            if isinstance(encoder, FeatureEncoder):
                encoder.scaling.fit([view])
            elif isinstance(encoder, TransformerEncoder):
                pretrained = _pretrained("AutoModel", config["text_encoder"])
                # It may have a pooling layer that this one lacks, but no less than this one has.
                weights = pretrained.state_dict()
                own = encoder.transformer.state_dict()
                encoder.transformer.load_state_dict({key: weights[key] for key in own})

    def objective(self, model: nn.Module, batch: Any) -> Objective:
        """Absolute error, mean over utterances."""
        output = cast(SentimentOutput, model(batch["inputs"]))
        loss = nn.functional.l1_loss(output.scores.float(), batch["scores"])
        solved = cast(Any, model.fusion) if output.equilibrium is not None else None
        return Objective(loss, output.equilibrium, output.features, solved)

    def predict(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return predicted and true scores, (B,) each."""
        return model(batch["inputs"]).scores.float(), batch["scores"]

    def metrics(self, outputs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Return Acc-7, Acc-2 and F1 by both conventions, MAE and Pearson's correlation."""
        predicted, scores = (torch.cat(parts).numpy() for parts in zip(*outputs, strict=True))
        return sentiment_metrics(predicted, scores)

    def parameter_groups(self, model: nn.Module, config: Config) -> list[dict[str, Any]]:
        """Return the engine's groups, and the transformer's parameters in one of `text_rate`."""
        fine_tuned = [p for transformer in self.shards(model) for p in transformer.parameters()]
        apart = set(map(id, fine_tuned))
        groups = [
            {**group, "params": [p for p in group["params"] if id(p) not in apart]}
            for group in super().parameter_groups(model, config)
        ]
        groups.append({"params": fine_tuned, "rate": config["text_rate"]})
        return [group for group in groups if group["params"]]

    def shards(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the transformer, where there is one."""
        for encoder in _encoders(model):
            if isinstance(encoder, TransformerEncoder):
                yield encoder.transformer


RECIPES = {"mosi": MOSIRecipe()}


def _encoders(model: nn.Module) -> list[nn.Module]:
    return list(cast(SentimentRegressor, model).encoders)


def _arrays(data: MosiData) -> Iterator[NDArray[Any]]:
    for part in (data.train, data.test):
        yield from part.modalities
        yield part.scores
        yield np.frombuffer("\n".join(part.sentences).encode(), dtype=np.uint8)


def _views(part: MosiPart, names: Sequence[str]) -> list[Tensor]:
    return [torch.from_numpy(part.modalities[MOSI_MODALITIES.index(name)]) for name in names]


def _refuse_outliers(folder: Path, data: MosiData, kept: NDArray[np.int64], config: Config) -> None:
    """Refuse features so far outside those that are trained on that a model's numbers overflow."""
    read = config["text_encoder"] is not None
    names = [name for name in config["modalities"] if not (read and name == "text")]
    fitted = _views(data.train.take(kept), names)
    scaling = InputScaling([view.shape[1] for view in fitted], FEATURE_SCALING).fit(fitted)
    for part, rows in (("train", data.train), ("test", data.test)):
        found = scaling.outlier(_views(rows, names))
        if found is not None:
            place = mosi_place(part, names[found.view], found.row, found.column)
            raise DataError(f"{folder / place}: {found}")


def _tensors(part: MosiPart, config: Config, tokenizer: Any) -> dict[str, Any]:
    # In their own precision: float32 ends before what a wide span would scale down.
    inputs: list[Any] = [*_views(part, config["modalities"])]
    if tokenizer is not None:
        tokens = tokenizer(
            list(part.sentences),
            padding="max_length",
            truncation=True,
            max_length=config["text_length"],
            return_tensors="pt",
        )
        place = config["modalities"].index("text")
        inputs[place] = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    return {"inputs": tuple(inputs), "scores": torch.from_numpy(part.scores).float()}


def _pretrained(kind: str, name: str, **options: Any) -> Any:
    """What `transformers` has by that name: AutoTokenizer, AutoConfig or AutoModel."""
    try:
        return getattr(_transformers(), kind).from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OptionError(
            "text_encoder",
            f"got {name!r}, which cannot be loaded ({reason}), expected {EncoderName.expected}",
        ) from error


def _settings(name: str) -> dict[str, Any]:
    """A transformer's configuration as JSON has it, without what changes from place to place."""
    settings = json.loads(json.dumps(_pretrained("AutoConfig", name).to_dict()))
    return {key: settings[key] for key in settings if key not in _OF_A_PLACE}


def _blank(config: Mapping[str, Any]) -> nn.Module:
    """The transformer of a stored configuration, untrained and without a pooling layer."""
    library = _transformers()
    values = dict(config)
    settings = library.AutoConfig.for_model(values.pop("model_type"), **values)
    try:
        return library.AutoModel.from_config(settings, add_pooling_layer=False)
    except TypeError:
        # Not every architecture has one.
        return library.AutoModel.from_config(settings)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise OptionError(
            "text_encoder",
            "needs the library transformers, which is not installed: pip install deqfusion[text]",
        ) from error
    return transformers
