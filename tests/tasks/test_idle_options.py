"""Options that others leave without effect are refused where somebody asks for them."""

import pytest

from deqfusion.cli import main
from deqfusion.engine import complete
from deqfusion.engine.config import without_effect
from deqfusion.tasks import TASKS, get_recipe


def _train(task, tmp_path, *options):
    files = ["--data-dir", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    return main(["train", task, *files, *options])


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("rosmap", "--solver picard --memory 3", "--memory: got 3 with solver 'picard', where"),
        ("rosmap", "--solver broyden --memory 5", "--memory: got 5 with solver 'broyden'"),
        ("rosmap", "--rank 2", "--rank: got 2 with fusion 'deq'"),
        ("rosmap", "--heads 2 --fusion tensor", "--heads: got 2 with fusion 'tensor'"),
        ("rosmap", "--fusion concat --tol 1e-2", "--tol: got 0.01 with fusion 'concat'"),
        ("rosmap", "--fusion concat --skip", "--skip: got True with fusion 'concat'"),
        ("rosmap", "--fusion weight_tied:3 --max-steps 9", "--max-steps: got 9 with fusion 'wei"),
        ("rosmap", "--fusion sum --fusion-rate 2", "--fusion-rate: got 2.0 with fusion 'sum'"),
        ("rosmap", "--tol-steps 9", "--tol-steps: got 9 without tol_start, where"),
        ("rosmap", "--momentum 0.5", "--momentum: got 0.5 with optimizer 'adamw'"),
        ("rosmap", "--schedule cosine --step-factor 0.5", "--step-factor: got 0.5 with schedule"),
        ("vqa", "--image none --positions", "--positions: got True with image 'none'"),
        ("vqa", "--image none --max-regions 9", "--max-regions: got 9 with image 'none'"),
        ("vqa", "--image none --tol 1e-2", "--tol: got 0.01 with image 'none'"),
        ("vqa", "--image none --attention-heads 2", "--attention-heads: got 2 with image"),
        ("vqa", "--encoder-layers 3", "--encoder-layers: got 3 with encoder 'gru'"),
        ("mosi", "--text-rate 0.5", "--text-rate: got 0.5 without text_encoder"),
        ("mosi", "--text-length 9", "--text-length: got 9 without text_encoder"),
        ("sunrgbd", "--image-encoder resnet18 --image-width 32", "--image-width: got 32 with im"),
    ],
)
def test_option_without_effect_is_refused(tmp_path, capsys, task, options, message):
    assert _train(task, tmp_path, *options.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "where it has no effect, expected it left out" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("rosmap", "--fusion weight_tied:3 --tol 1e-2 --skip --fusion-dropout 0.1"),
        ("rosmap", "--tol-start 0.1 --tol-steps 9 --solver picard --fusion-rate 2"),
        ("rosmap", "--optimizer sgd --momentum 0.5 --schedule step --step-epochs 3"),
        ("rosmap", "--fusion tensor --rank 2"),
        ("rosmap", "--fusion attention --heads 2"),
        ("vqa", "--image none --encoder transformer --attention-heads 2 --encoder-layers 1"),
        ("vqa", "--positions --max-regions 9 --attention-heads 2"),
    ],
)
def test_option_with_effect_is_not(tmp_path, capsys, task, options):
    assert _train(task, tmp_path, *options.split()) == 2
    error = capsys.readouterr().err
    assert "no effect" not in error
    assert "nowhere" in error


def test_a_file_may_list_what_is_usual_anyway(tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('fusion = "concat"\nmemory = 5\nrank = 4\n')
    _train("rosmap", tmp_path, "--config", str(recipe))
    assert "nowhere" in capsys.readouterr().err
    recipe.write_text('fusion = "concat"\nmemory = 6\n')
    _train("rosmap", tmp_path, "--config", str(recipe))
    assert f"{recipe}: memory: got 6 with fusion 'concat', where" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_what_is_idle_is_an_option_with_one_to_blame(task):
    recipe = get_recipe(task)
    for fusion in ("deq", "sum", "tensor", "attention", "weight_tied:2"):
        config = complete(recipe, {"fusion": fusion})
        assert without_effect(recipe, config, ()) is None
        name, message = without_effect(recipe, config, config)
        assert name in config
        assert "expected it left out" in message


def test_a_share_of_training_images_where_a_part_is_there(tmp_path, capsys):
    from tests.tasks.test_vqa import write_part

    for part, images in (("train", range(1, 9)), ("valid", range(9, 14)), ("test", range(14, 19))):
        write_part(tmp_path, part, images)
    options = ["--image", "none", "--min-answer-count", "1", "--validation-fraction", "0.3"]
    files = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["train", "vqa", *files, *options]) == 2
    message = f"--validation-fraction: got 0.3, where it has no effect, as {tmp_path} has a part to"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
