"""CMU-MOSI as a recipe: splits by video, what is fitted on which rows, fusions, transformers."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from deqfusion.cli import main
from deqfusion.data import MOSI_MODALITIES
from deqfusion.data.mosi import load_mosi
from deqfusion.engine import OptionError
from deqfusion.engine.config import checked
from deqfusion.engine.kinds import SomeOf
from deqfusion.models.mosi import FeatureEncoder
from deqfusion.models.text import TransformerEncoder
from deqfusion.tasks.mosi import RECIPES, EncoderConfig, EncoderName
from tests.data.small_mosi import WIDTHS, write_mosi
from tests.tasks import small_runs
from tests.tasks.small_runs import everything, measured

RECIPE = RECIPES["mosi"]


def configuration(**options):
    return checked(RECIPE, {"dim": 16, "dropout": 0.0, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mosi")
    write_mosi(path)
    return path


def opened(folder, **options):
    return small_runs.opened(RECIPE, folder, configuration(**options))


def trained(run, steps=30):
    return small_runs.trained(run, torch.optim.Adam, steps)


def test_splits_have_no_video_in_common(folder):
    run = opened(folder, validation_fraction=0.3)
    assert [len(part) for part in run.splits] == [16, 8, 12]
    data = load_mosi(folder)
    # Utterances are told apart by their first feature.
    first = data.train.modalities[0][:, 0].tolist()
    said_in = dict(zip(first, data.train.videos.tolist(), strict=True))
    videos = [
        {said_in[value] for value in everything(part)["inputs"][0][:, 0].tolist()}
        for part in run.splits[:2]
    ]
    assert [len(part) for part in videos] == [4, 2]
    assert not videos[0] & videos[1]
    np.testing.assert_allclose(everything(run.splits.test)["scores"], data.test.scores, rtol=1e-6)


def test_seed_chooses_the_held_out_videos(folder):
    held = [everything(opened(folder, seed=seed).splits.validation)["scores"] for seed in (0, 0, 1)]
    assert torch.equal(held[0], held[1])
    assert not torch.equal(held[0], held[2])


def test_standardised_by_the_rows_that_are_trained_on(folder):
    run = opened(folder)
    for encoder, view in zip(
        run.model.encoders, everything(run.splits.train)["inputs"], strict=True
    ):
        torch.testing.assert_close(encoder.scaling.shift_0, view.double().mean(dim=0))


@pytest.mark.parametrize("fusion", ["gated", "tensor", "attention", "weight_tied:2"])
def test_fusion_by_name(folder, fusion):
    losses = trained(opened(folder, fusion=fusion), steps=3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fusion", ["deq", "sum"])
def test_learns_what_the_features_say(folder, fusion):
    run = opened(folder, fusion=fusion)
    losses = trained(run)
    assert losses[-1] < 0.3 * losses[0]
    metrics = measured(run, run.splits.test)
    assert metrics["acc2_has0"] > 0.8
    assert metrics["pearson"] > 0.8
    assert metrics["mae"] < 1.0


def test_what_the_engine_gets_of_a_solve(folder):
    run = opened(folder)
    objective = RECIPE.objective(run.model, everything(run.splits.train))
    assert objective.fusion is run.model.fusion
    assert len(objective.features) == 3
    penalty = objective.fusion.jacobian_penalty(objective.equilibrium, objective.features)
    assert penalty.item() > 0
    plain = opened(folder, fusion="sum")
    objective = RECIPE.objective(plain.model, everything(plain.splits.train))
    assert objective.equilibrium is objective.fusion is None


def test_loss_is_the_mean_absolute_error(folder):
    run = opened(folder)
    run.model.eval()
    batch = everything(run.splits.validation)
    loss = RECIPE.objective(run.model, batch).loss.item()
    assert loss == pytest.approx(measured(run, run.splits.validation)["mae"], rel=1e-5)


@pytest.mark.parametrize("names", [["audio"], ["video", "text"]])
def test_modalities_are_chosen_and_ordered(folder, names):
    run = opened(folder, modalities=names)
    widths = dict(zip(("text", "audio", "video"), WIDTHS, strict=True))
    assert run.config["input_widths"] == [widths[name] for name in names]
    assert torch.isfinite(RECIPE.objective(run.model, everything(run.splits.train)).loss)


def test_too_few_videos(folder):
    with pytest.raises(OptionError, match=r"validation_fraction: cannot hold out 0\.99 of 6 vid"):
        RECIPE.load(folder, configuration(validation_fraction=0.99))


def test_data_is_known_by_its_content(folder, tmp_path):
    write_mosi(tmp_path)
    digest = opened(folder).config["data_sha256"]
    assert opened(tmp_path).config["data_sha256"] == digest
    path = tmp_path / "video_test0.csv"
    path.write_text(path.read_text().replace('"', '"1', 1).replace('"1-', '"-1', 1))
    assert opened(tmp_path).config["data_sha256"] != digest


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (
            SomeOf(MOSI_MODALITIES),
            [["text"], ["video", "audio"]],
            [[], ["text", "text"], ["smell"], "text"],
        ),
        (EncoderName(), ["bert"], ["", " ", 3, None]),
        (EncoderConfig(), [{"model_type": "bert"}], [{}, {"model_type": 1}, "bert"]),
    ],
)
def test_kinds_of_options(kind, good, bad):
    assert all(map(kind.accepts, good))
    assert not any(map(kind.accepts, bad))
    assert SomeOf(MOSI_MODALITIES)("text,audio") == ["text", "audio"]


def test_encoder_without_text():
    message = r"text_encoder: got 'bert' for modalities audio, expected text among them"
    with pytest.raises(ValueError, match=message):
        configuration(text_encoder="bert", modalities=["audio"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a tiny BERT with random weights, a pooling layer and the words of the sentences."""
    library = pytest.importorskip(
        "transformers", reason="transformers is not installed (the extra text)"
    )
    path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sentence", *map(str, range(10))]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    library.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(1)
    config = library.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    library.BertModel(config).save_pretrained(path)
    return path


def test_transformer_reads_the_sentences(folder, encoder):
    run = opened(folder, text_encoder=str(encoder), text_length=6)
    batch = everything(run.splits.train)
    tokens = batch["inputs"][0]
    # [CLS] sentence, video, utterance [SEP], and one place to spare.
    assert tokens["input_ids"].shape == (len(run.splits.train), 6)
    assert (tokens["input_ids"][:, 1] == 5).all()
    assert (tokens["attention_mask"].sum(dim=1) == 5).all()
    kinds = [type(part) for part in run.model.encoders]
    assert kinds == [TransformerEncoder, FeatureEncoder, FeatureEncoder]
    losses = trained(run, steps=10)
    assert losses[-1] < losses[0]


def test_pretrained_weights_come_by_prepare_alone(folder, encoder):
    run = opened(folder, text_encoder=str(encoder))
    import transformers

    expected = transformers.BertModel.from_pretrained(encoder).state_dict()
    transformer = run.model.encoders[0].transformer
    for name, value in transformer.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert not [name for name in transformer.state_dict() if "pooler" in name]
    # From the configuration alone, also without memory.
    with torch.device("meta"):
        blank = RECIPE.build(run.config)
    shapes = {name: value.shape for name, value in blank.state_dict().items()}
    assert shapes == {name: value.shape for name, value in run.model.state_dict().items()}


def test_transformer_has_a_rate_of_its_own(folder, encoder):
    run = opened(folder, text_encoder=str(encoder), text_rate=0.02)
    groups = RECIPE.parameter_groups(run.model, run.config)
    fine_tuned = list(run.model.encoders[0].transformer.parameters())
    assert [group["rate"] for group in groups][-1] == 0.02
    assert list(map(id, groups[-1]["params"])) == list(map(id, fine_tuned))
    everyone = [id(p) for group in groups for p in group["params"]]
    assert sorted(everyone) == sorted(map(id, run.model.parameters()))
    assert list(RECIPE.shards(run.model)) == [run.model.encoders[0].transformer]


def test_encoder_that_cannot_be_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers", reason="transformers is not installed (the extra text)")
    with pytest.raises(OptionError, match=r"text_encoder: got '.*', which cannot be loaded \("):
        RECIPE.load(folder, configuration(text_encoder=str(tmp_path)))


def test_without_transformers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(OptionError, match=r"pip install deqfusion\[text\]"):
        RECIPE.load(folder, configuration(text_encoder="bert"))


def test_command_trains_and_evaluates(folder, tmp_path, capsys):
    run = str(tmp_path / "run")
    options = ["--dim", "8", "--epochs", "2", "--modalities", "text,audio", "--quiet"]
    assert main(["train", "mosi", "--data-dir", str(folder), "--out", run, *options]) == 0
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", run, "--data-dir", str(folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for name in ("acc7", "acc2_has0", "acc2_non0", "f1_has0", "f1_non0", "mae", "pearson"):
        assert printed[name] == pytest.approx(written[name], abs=1e-6)


def test_command_with_a_transformer(folder, encoder, tmp_path, capsys):
    run = tmp_path / "run"
    files = ["--data-dir", str(folder)]
    options = ["--fusion", "sum", "--dim", "8", "--epochs", "1", "--quiet"]
    named = ["--text-encoder", str(encoder), "--text-length", "6"]
    assert main(["train", "mosi", *files, "--out", str(run), *options, *named]) == 0
    assert main(["train", "mosi", *files, "--out", str(run), "--resume", "--epochs", "2"]) == 0
    written = json.loads((run / "metrics.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(run), *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mae"] == pytest.approx(written["mae"], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modalities", "text,smell"], "expected distinct ones of text, audio, video"),
        (["--validation-fraction", "0.99"], "--validation-fraction: cannot hold out 0.99 of 6"),
        (["--text-encoder", "bert", "--modalities", "audio"], "--text-encoder: got 'bert' for"),
    ],
)
def test_command_refuses(folder, tmp_path, capsys, options, message):
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(
            main(["train", "mosi", "--data-dir", str(folder), "--out", str(run), *options])
        )
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not run.exists()


def _with(folder, tmp_path, factor, name, rows=slice(None)):
    """A copy of the folder in which some rows' first feature is multiplied."""
    data = tmp_path / "data"
    data.mkdir()
    write_mosi(data)
    lines = [line.split(",") for line in (data / name).read_text().splitlines()]
    column = 1 if name.startswith("text") else 0
    for fields in lines[rows]:
        fields[column] = f'"{float(fields[column].strip(chr(34))) * factor:.17g}"'
    (data / name).write_text("".join(",".join(fields) + "\n" for fields in lines))
    return data


def test_large_features_of_a_wide_span_are_features(folder, tmp_path):
    run = opened(_with(folder, tmp_path, 1e60, "text_train.csv"), modalities=["text"])
    losses = trained(run, steps=3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "line", "column"), [("text_test.csv", 4, 2), ("video_train0.csv", 3, 1)]
)
def test_features_far_outside_those_trained_on(folder, tmp_path, capsys, name, line, column):
    data = _with(folder, tmp_path, 1e30, name, slice(line - 1, line))
    out = tmp_path / "run"
    assert main(["train", "mosi", "--data-dir", str(data), "--out", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert f"{data / name}, line {line}, column {column}: got " in error
    assert "on the scale of the rows trained on, expected at most 1e+17" in error
    assert not out.exists()


@pytest.mark.parametrize("damage", ["missing", "half"])
def test_weights_that_cannot_be_read_leave_no_run(folder, encoder, tmp_path, capsys, damage):
    copy, run = tmp_path / "bert", tmp_path / "new" / "run"
    shutil.copytree(encoder, copy)
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage == "half":
        weights.write_bytes(content[: len(content) // 2])
    options = ["--dim", "8", "--epochs", "1", "--quiet", "--text-encoder", str(copy)]
    assert main(["train", "mosi", "--data-dir", str(folder), "--out", str(run), *options]) == 2
    error = capsys.readouterr().err
    assert f"--text-encoder: got '{copy}', which cannot be loaded (" in error
    assert not run.parent.exists()
