"""MM-IMDB as a recipe, on a small file of the published schema."""

import json

import numpy as np
import pytest
import torch

from deqfusion.cli import main
from deqfusion.data.errors import DataError
from deqfusion.engine.config import checked, complete
from deqfusion.tasks.mmimdb import RECIPES
from tests.data.small_mmimdb import SPLIT, arrays, write_mmimdb
from tests.engine.test_distributed import start
from tests.tasks import small_runs
from tests.tasks.small_runs import everything, measured

pytest.importorskip("h5py", reason="h5py is not installed (the extra hdf5)")

RECIPE = RECIPES["mmimdb"]


def configuration(**options):
    small = {"dim": 16, "dropout": 0.0, "split_sizes": SPLIT, "hidden": [16, 16]}
    return complete(RECIPE, {**small, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mmimdb")
    write_mmimdb(path)
    return path


def opened(folder, **options):
    return small_runs.opened(RECIPE, folder, configuration(**options))


def trained(run, steps):
    return small_runs.trained(run, torch.optim.AdamW, steps)


def test_splits_are_the_rows_of_the_file_in_order(folder):
    run = opened(folder)
    assert [len(part) for part in run.splits] == SPLIT
    batch = run.splits.validation.batch(torch.tensor([3, 0, 3]))
    rows = SPLIT[0] + np.array([3, 0, 3])
    for values, key in zip(
        (*batch["inputs"], batch["genres"]), ("features", "vgg_features", "genres"), strict=True
    ):
        np.testing.assert_array_equal(values, arrays()[key][rows])


@pytest.mark.parametrize("fusion", ["gated", "tensor", "attention", "weight_tied:2"])
def test_fusion_by_name(folder, fusion):
    losses = trained(opened(folder, fusion=fusion), steps=4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": "identity", "skip": True, "tail": "norm_relu"}, {"fusion": "sum"}],
    ids=["deq", "authors", "sum"],
)
def test_learns_what_the_features_say(folder, options):
    run = opened(folder, **options)
    losses = trained(run, steps=8)
    assert losses[-1] < 0.8 * losses[0]
    metrics = measured(run, run.splits.test)
    assert metrics.keys() == {"f1_micro", "f1_macro", "f1_weighted", "f1_samples"}
    assert all(0.0 <= value <= 1.0 for value in metrics.values())


def test_authors_cell_is_built_as_asked(folder):
    run = opened(folder, gate="identity", skip=True, tail="norm_relu")
    options = run.model.fusion.options
    assert (options.gate, options.skip, options.tail) == ("identity", True, "norm_relu")


def test_loss_is_the_mean_over_films_and_genres(folder):
    run = opened(folder)
    run.model.eval()
    batch = everything(run.splits.validation)
    objective = RECIPE.objective(run.model, batch)
    probabilities, genres = RECIPE.predict(run.model, batch)
    by_hand = torch.where(genres == 1, probabilities, 1 - probabilities).log().neg().mean()
    torch.testing.assert_close(objective.loss, by_hand)
    assert objective.fusion is run.model.fusion
    assert len(objective.features) == 2


def test_published_defaults():
    config = checked(RECIPE, {})
    assert config["split_sizes"] == [15552, 2608, 7799]
    assert (config["dim"], config["hidden"], config["dropout"]) == (512, [512, 1024], 0.3)
    assert (config["learning_rate"], config["fusion_rate"]) == (1e-3, 0.1)


@pytest.mark.parametrize(
    ("options", "key", "what"),
    [
        ({"split_sizes": [40, 28]}, "split_sizes", "got 2 numbers, expected 3"),
        ({"hidden": [16]}, "hidden", "got 1 numbers, expected 2"),
        ({"batch_size": 13}, "batch_size", "got 13, which leaves one of 40 films for the last"),
        ({"batch_size": 1}, "batch_size", "got 1, which leaves one of 40 films"),
        ({"split_sizes": [1, 30, 37]}, "batch_size", "got 256, which leaves one of 1 films"),
    ],
)
def test_options_that_do_not_fit(options, key, what):
    got_key, got = RECIPE.fault(configuration(**options))
    assert got_key == key
    assert got.startswith(what)


@pytest.mark.parametrize("split", [[40, 0, 28], [40, 12, 15]])
def test_split_that_does_not_fit_the_file(folder, split):
    with pytest.raises(DataError, match=r"multimodal_imdb\.hdf5: .*expected"):
        RECIPE.load(folder, configuration(split_sizes=split))


def test_a_bad_value_is_found_before_training(tmp_path):
    content = arrays()
    content["vgg_features"][66, 7] = np.nan
    write_mmimdb(tmp_path, content)
    with pytest.raises(DataError, match=r"key 'vgg_features', row 66, column 7: got nan"):
        RECIPE.load(tmp_path, configuration())


_SMALL = ["--split-sizes", "40,12,16", "--hidden", "16,16", "--dim", "16", "--quiet"]


def test_command_trains_and_evaluates(folder, tmp_path, capsys):
    run, files = tmp_path / "run", ["--data-dir", str(folder)]
    options = [*_SMALL, "--epochs", "2", "--batch-size", "20", "--tail", "norm_relu"]
    assert main(["train", "mmimdb", *files, "--out", str(run), *options]) == 0
    written = json.loads((run / "metrics.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(run), *files, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for name in ("f1_micro", "f1_macro", "f1_weighted", "f1_samples"):
        assert printed[name] == pytest.approx(written[name], abs=1e-6)


def test_two_processes_share_a_last_batch_of_three_films(folder, tmp_path):
    options = [*_SMALL, "--epochs", "1", "--device", "cpu", "--batch-size", "37"]
    files = ["--data-dir", str(folder), "--out", str(tmp_path / "run")]
    processes = start(["train", "mmimdb", *files, *options, "--strategy", "ddp"])
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "f1_macro" in outputs[0][0]


def test_command_refuses(folder, tmp_path, capsys):
    files = ["--data-dir", str(folder), "--out", str(tmp_path / "run")]
    assert main(["train", "mmimdb", *files]) == 2
    assert "has 68 rows, expected 25959" in capsys.readouterr().err
    assert main(["train", "mmimdb", *files, *_SMALL, "--batch-size", "13"]) == 2
    assert "--batch-size: got 13, which leaves one of 40 films" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
