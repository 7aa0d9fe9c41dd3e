"""The tasks beside rosmap whose samples are rows: brca2012, handwritten, cub, and both hosts."""

import json
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat

from deqfusion.cli import main
from deqfusion.engine import checked
from deqfusion.engine.run import load
from deqfusion.engine.runs import read_config
from deqfusion.tasks import TASKS, get_recipe
from deqfusion.tasks.classification import hold_out

_FAST = ["--dim", "8", "--epochs", "2", "--quiet"]


@pytest.fixture
def cancers(tmp_path):
    generator = np.random.default_rng(0)
    kinds = ["LumA", "LumB", "Her2", "Normal"]
    labels = np.arange(40) % 4
    labels[labels == 3] = np.where(np.arange((labels == 3).sum()) < 5, 3, 0)
    for name, width in (("mrna", 4), ("meth", 3), ("mirna", 2)):
        values = generator.random((40, width)) + labels[:, None]
        lines = [f"P{i}," + ",".join(map(str, row)) for i, row in enumerate(values)]
        header = "," + ",".join(f"{name}_{i}" for i in range(width))
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *lines]) + "\n")
    lines = [f"P{i},{label},{kinds[label]}" for i, label in enumerate(labels)]
    (tmp_path / "labels.csv").write_text("\n".join([",label,pam50", *lines]) + "\n")
    return tmp_path


@pytest.fixture
def views(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    cells = np.empty((1, 2), dtype=object)
    for index, width in enumerate((5, 4)):
        cells[0, index] = generator.random((60, width)) + labels[:, None]
    savemat(tmp_path / "handwritten_x.mat", {"X": cells, "Y": labels[:, None]})
    return tmp_path


def test_every_fold_is_once_the_test_part(cancers, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--data-dir", str(cancers), "--out", str(out), "--folds", "3", *_FAST]
    assert main(["train", "brca2012", *options]) == 0
    assert "3 splits: " in capsys.readouterr().out
    assert read_config(out / "split_002")["num_classes"] == 3
    recipe = get_recipe("brca2012")
    config = checked(recipe, {"folds": 3})
    tests = []
    for split in range(3):
        parts, _ = recipe.load(cancers, {**config, "split": split})
        values = [{tuple(row.tolist()) for row in part.data[0][0]} for part in parts]
        assert not values[0] & values[1]
        assert not (values[0] | values[1]) & values[2]
        tests.append(values[2])
    assert len(set.union(*tests)) == sum(map(len, tests)) == 35
    assert (
        main(["evaluate", "--checkpoint", str(out / "split_001"), "--data-dir", str(cancers)]) == 0
    )
    summary = json.loads((out / "metrics.json").read_text())
    assert f"{summary['accuracy']['mean']:.3f}"
    assert "test rows of split 1" in capsys.readouterr().out


def test_normal_tissue_is_a_class_where_asked_for(cancers, tmp_path):
    recipe = get_recipe("brca2012")
    _, facts = recipe.load(cancers, {**checked(recipe, {"normal": True, "folds": 2}), "split": 0})
    assert facts["num_classes"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folds", "20"], "--folds: labels: the smallest class has 10 rows, expected at least"),
        (["--modalities", "protein"], "protein.csv.gz: no such file"),
    ],
)
def test_folds_and_files_that_are_not_there(cancers, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert main(["train", "brca2012", "--data-dir", str(cancers), "--out", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_views_on_repeated_splits(views, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--data-dir", str(views), "--out", str(out), "--splits", "2", *_FAST]
    assert main(["train", "handwritten", *options]) == 0
    assert "2 splits: 38 training, 10 validation, 12 test samples" in capsys.readouterr().out
    assert main(["train", "cub", "--data-dir", str(views), "--out", str(tmp_path / "cub")]) == 2
    assert "got none, expected one cub*.mat" in capsys.readouterr().err
    # Any file by its name.
    file = views / "handwritten_x.mat"
    options = ["--data-dir", str(file), "--out", str(tmp_path / "file"), "--splits", "1", *_FAST]
    assert main(["train", "cub", *options]) == 0


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("meth.csv", "meth_1", "meth_x", "got columns meth_0, meth_x, meth_2 (SHA-256 "),
        ("meth.csv", "meth_1,meth_2", "meth_2,meth_1", "got columns meth_0, meth_2, meth_1 (SHA"),
        ("labels.csv", "Her2", "Basal", "got classes Basal, LumA, LumB (SHA-256 "),
    ],
)
def test_evaluate_refuses_other_columns_of_the_same_number(
    cancers, tmp_path, capsys, name, old, new, message
):
    out, data = tmp_path / "out", ["--data-dir", str(cancers)]
    assert main(["train", "brca2012", *data, "--out", str(out), "--folds", "2", *_FAST]) == 0
    path = cancers / name
    path.write_text(path.read_text().replace(old, new))
    capsys.readouterr()
    assert main(["evaluate", *data, "--checkpoint", str(out / "split_000")]) == 2
    error = capsys.readouterr().err
    assert f"{path}: {message}" in error
    assert "expected those that the run was trained on (SHA-256 " in error


def test_evaluate_refuses_views_whose_columns_may_be_others(views, tmp_path, capsys):
    path, out = views / "handwritten_x.mat", tmp_path / "out"
    options = ["--data-dir", str(path), "--out", str(out), "--splits", "1", *_FAST]
    assert main(["train", "handwritten", *options]) == 0
    evaluate = ["evaluate", "--data-dir", str(path), "--checkpoint", str(out / "split_000")]
    assert main(evaluate) == 0
    content = loadmat(path)
    content["X"][0, 1] = content["X"][0, 1][:, ::-1].copy()
    savemat(path, {key: content[key] for key in ("X", "Y")})
    capsys.readouterr()
    assert main(evaluate) == 2
    error = capsys.readouterr().err
    assert f"{path}: X{{2}}: got values of columns without names (SHA-256 " in error
    assert "expected those that the run was trained on" in error


def test_values_far_outside_those_trained_on(cancers, views, tmp_path, capsys):
    content = loadmat(views / "handwritten_x.mat")
    content["X"][0, 1][6, 2] = 1e25
    path = tmp_path / "far.mat"
    savemat(path, {key: content[key] for key in ("X", "Y")})
    out = tmp_path / "out"
    options = ["--splits", "9", "--out", str(out), "--data-dir"]
    assert main(["train", "cub", *options, str(path)]) == 2
    assert f"{path}: X{{2}}, row 7, column 3: got 1e+25, which is " in capsys.readouterr().err
    lines = (cancers / "meth.csv").read_text().split("\n")
    lines[3] = ",".join([*lines[3].split(",")[:-1], "-1e25"])
    (cancers / "meth.csv").write_text("\n".join(lines))
    options = ["--normal", "--folds", "5", "--out", str(out), "--data-dir"]
    assert main(["train", "brca2012", *options, str(cancers)]) == 2
    message = "meth.csv, row 3 of those in labels.csv, column 'meth_2': got -1e+25, which is "
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_rows_held_out_are_of_seed_and_split():
    held = set()
    for seed, split in ((0, 0), (0, 1), (1, 0), (1, 1)):
        config = {"seed": seed, "split": split, "validation_fraction": 0.2}
        held.add(frozenset(hold_out(np.arange(60) % 2, config)[1]))
    assert len(held) == 4


@pytest.mark.parametrize(
    ("name", "data", "options"),
    [
        ("rosmap", "folder", {"modalities": [1, 2], "splits": 3}),
        ("brca2012", "cancers", {"folds": 3}),
        ("handwritten", "views", {"splits": 3}),
    ],
)
def test_splits_share_what_is_read_once(request, monkeypatch, name, data, options):
    recipe, path = get_recipe(name), request.getfixturevalue(data)
    config, kind = checked(recipe, options), type(recipe)
    with mock.patch.object(kind, "read", autospec=True, side_effect=kind.read) as read:
        loaded = load(recipe, path, config)
    assert read.call_count == 1
    parts = [part for _, splits in loaded.parts for part in splits]
    assert len(parts) == 9
    assert all(part.shared is parts[0].shared for part in parts)
    # Each split as when it is loaded alone.
    for split, (part, splits) in enumerate(loaded.parts):
        alone, facts = recipe.load(path, {**config, "split": split})
        assert part == {**config, **facts, "split": split}
        for one, other in zip(splits, alone, strict=True):
            assert torch.equal(one.data[1], other.data[1])
            assert all(map(torch.equal, one.data[0], other.data[0]))


@pytest.mark.parametrize("fusion", ["deq", "concat"])
def test_multimodal_dynamics_trains_and_evaluates(folder, tmp_path, capsys, fusion):
    out = tmp_path / "out"
    options = ["--data-dir", str(folder), "--modalities", "1,2", "--host", "dynamics", *_FAST]
    assert main(["train", "rosmap", *options, "--out", str(out), "--fusion", fusion]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(out), "--data-dir", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auc"] == metrics["auc"]


@pytest.mark.parametrize("name", TASKS)
def test_defaults_are_of_their_kinds(name):
    recipe = get_recipe(name)
    assert recipe.name == name
    assert recipe.help
    assert not recipe.help.endswith(".")
    for fusion in ("deq", "concat", "sum", "gated", "tensor", "attention", "weight_tied:2"):
        checked(recipe, {"fusion": fusion})


def test_loss_of_multimodal_dynamics_by_hand():
    from deqfusion.fusions import build_fusion
    from deqfusion.models import MultimodalDynamics

    torch.manual_seed(0)
    model = MultimodalDynamics([3, 2], 2, dim=4, fusion=build_fusion("concat", 4, 2), dropout=0.0)
    inputs = (torch.randn(5, 3), torch.randn(5, 2))
    labels = torch.tensor([0, 1, 1, 0, 1])
    loss, output = model.loss(inputs, labels)
    expected = torch.nn.functional.nll_loss(output.logits.log_softmax(-1), labels)
    for index, x in enumerate(inputs):
        gate = torch.sigmoid(model.gates[index](x))
        hidden = model.encoders[index](gate * x)
        logits = model.classifiers[index](hidden)
        confidence = model.confidences[index](hidden).squeeze(1)
        truth = logits.softmax(-1)[torch.arange(5), labels]
        expected = expected + gate.mean() + (confidence - truth).square().mean()
        expected = expected - logits.log_softmax(-1)[torch.arange(5), labels].mean()
        torch.testing.assert_close(output.features[index], confidence.unsqueeze(1) * hidden)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, model.classifiers[0].weight)[0]
    assert grads.abs().max() > 0
