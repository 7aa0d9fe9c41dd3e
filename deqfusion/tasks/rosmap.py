"""Classification of omics data in MOGONET's layout: ROSMAP, BRCA and others.

Per modality min-max scaling (fitted on the rows that are trained on), a linear encoder with ReLU
and dropout, the fusion, a linear head; Adam on all rows at once. The epoch is chosen on a
stratified part of the training rows, never on test rows.

`train` runs on the folder's own split, or on repeated stratified splits of all its rows, for which
mean and standard error are reported. `evaluate` applies a finished run to the test rows.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data import (
    LabelledModalities,
    MinMaxScaling,
    MogonetData,
    load_mogonet,
    repeated_splits,
    stratified_holdout,
)
from .arguments import real_number, whole_number, whole_numbers
from .classifier import MultimodalClassifier
from .engine import HISTORY_COLUMNS, FitOptions, Rows, TrainingDivergedError, check_penalty, fit
from .metrics import classification_metrics, mean_and_error
from .runs import (
    CheckpointError,
    RunDirectory,
    check_tensors,
    read_config,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)

# The penalty keeps the map contracting while it learns, which costs fewer steps and keeps implicit
# gradients of single rows from dominating. It, width, dropout and learning rate were chosen on
# hold-outs of ROSMAP's training rows.
_JACOBIAN_WEIGHT = 1.0
_DEFAULTS: dict[str, Any] = {
    "modalities": [1, 2, 3],
    "splits": 0,
    "fusion": "deq",
    "dim": 32,
    "tol": 1e-3,
    "dropout": 0.0,
    "epochs": 120,
    "seed": 0,
    "learning_rate": 3e-3,
    "weight_decay": 0.0,
    "batch_size": None,
    "jacobian_weight": None,
    "validation_fraction": 0.2,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deqfusion train rosmap`."""
    files = parser.add_argument_group("files")
    files.add_argument("--data-dir", required=True, type=Path, help="folder in MOGONET's layout")
    files.add_argument("--out", required=True, type=Path, help="folder of the run; must be empty")
    files.add_argument(
        "--resume", action="store_true", help="continue the run in --out, with its options"
    )
    files.add_argument(
        "--modalities", type=whole_numbers, default=None, help="files to read (default 1,2,3)"
    )
    files.add_argument(
        "--splits",
        type=whole_number(0),
        default=None,
        metavar="R",
        help="R repeated stratified splits of all rows instead of the given split",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--fusion", default=None, help="deq (default), concat, sum, gated or weight_tied:K"
    )
    model.add_argument("--dim", type=whole_number(1), default=None, help="width (default 32)")
    model.add_argument(
        "--tol",
        type=real_number(0.0, above=True),
        default=None,
        help="relative tolerance of the equilibrium (default 1e-3)",
    )
    model.add_argument(
        "--dropout",
        type=real_number(0.0, below=1.0),
        default=None,
        help="after each encoder (default 0)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=whole_number(1), default=None, help="default 120")
    training.add_argument("--seed", type=whole_number(0), default=None, help="default 0")
    training.add_argument(
        "--learning-rate", type=real_number(0.0, above=True), default=None, help="default 3e-3"
    )
    training.add_argument("--weight-decay", type=real_number(0.0), default=None, help="default 0")
    training.add_argument(
        "--batch-size", type=whole_number(1), default=None, help="default: all rows"
    )
    training.add_argument(
        "--jacobian-weight",
        type=real_number(0.0),
        default=None,
        help=f"weight of the Jacobian penalty (default {_JACOBIAN_WEIGHT:g} for deq, else 0)",
    )
    training.add_argument(
        "--validation-fraction",
        type=real_number(0.0, above=True, below=1.0),
        default=None,
        help="of the training rows, to choose the epoch (default 0.2)",
    )


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deqfusion evaluate`."""
    parser.add_argument("--checkpoint", required=True, type=Path, help="folder of a finished run")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder in MOGONET's layout")


def run(args: argparse.Namespace) -> int:
    """Train, evaluate on the test rows, and write model, metrics, log and curves to `--out`.

    Returns:
        0, or 1 where the loss became NaN or inf.

    Raises:
        DataError: the data folder is not what it should be.
        CheckpointError: `--out` holds a run that cannot be, or should not be, continued.
        ValueError: options that do not fit together.
    """
    _complete(args)
    data = load_mogonet(args.data_dir, args.modalities)
    config = _config(args, data)
    # Before anything is written.
    check_penalty(_build(config), config["jacobian_weight"])
    try:
        if args.splits:
            _run_splits(args, data, config)
        else:
            folder = RunDirectory.open(args.out, config, resume=args.resume)
            metrics = _run_split(folder, config, data, "training")
            print(_table({"given split": metrics}))
            print(f"run: {args.out}")
    except TrainingDivergedError as error:
        print(f"deqfusion: {error}", file=sys.stderr)
        return 1
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Print the metrics of a finished run on the test rows of a folder.

    Returns:
        0.

    Raises:
        CheckpointError: the run is missing, unfinished, damaged, or somebody else's.
        DataError: the data folder is not what it should be, or does not fit the model.
    """
    folder = RunDirectory(args.checkpoint)
    config = read_config(folder.path)
    try:
        if config.get("splits"):
            raise CheckpointError(
                f"{folder.config}: a run of {config['splits']} splits, "
                "expected one of its split_... folders"
            )
        modalities, widths = _sizes(config["modalities"]), _sizes(config["input_widths"])
        model = _build(config)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder.config}: {type(error).__name__}: {error}, expected the configuration "
            "of a rosmap run"
        ) from error
    if folder.checkpoint.exists() and not folder.model.exists():
        raise CheckpointError(
            f"{folder.model}: no such file, expected a finished run (continue it with --resume)"
        )
    tensors = read_tensors(folder.model, "model")
    blank = tuple(np.zeros(width) for width in widths)
    check_tensors(folder.model, tensors, _tensors(model, MinMaxScaling(blank, blank)))
    model.load_state_dict(
        {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    )
    minimum, span = (
        tuple(tensors[f"scaling/{name}/{index}"].numpy() for index in range(len(widths)))
        for name in ("minimum", "span")
    )

    data = load_mogonet(args.data_dir, modalities)
    got = [view.shape[1] for view in data.test.modalities]
    if (got, data.num_classes) != (widths, config["num_classes"]):
        raise CheckpointError(
            f"{folder.config}: the model takes {widths} features and {config['num_classes']} "
            f"classes, expected {got} and {data.num_classes} as in {args.data_dir}"
        )
    test, name = data.test, "test rows"
    if "split" in config and config.get("data_sha256") == _digest(data):
        # Rows of the folder's own test part were trained on in a split of all rows.
        *_, split = repeated_splits(data, config["split"] + 1, config["seed"])
        test, name = split.test, f"test rows of split {config['split']}"
    print(_table({name: _evaluate(model, MinMaxScaling(minimum, span), test)}))
    return 0


def _complete(args: argparse.Namespace) -> None:
    """Options that were not given: those of the run that is resumed, or else the defaults."""
    stored = {}
    if args.resume and RunDirectory(args.out).config.exists():
        stored = read_config(args.out)
    for name, default in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, stored.get(name, default))
    if args.fusion != stored.get("fusion", args.fusion):
        # That the run has another fusion is the error to report, not its penalty.
        args.jacobian_weight = None


def _config(args: argparse.Namespace, data: MogonetData) -> dict[str, Any]:
    weight = args.jacobian_weight
    if weight is None:
        weight = _JACOBIAN_WEIGHT if args.fusion == "deq" else 0.0
    return {
        "task": "rosmap",
        "modalities": args.modalities,
        "input_widths": [view.shape[1] for view in data.train.modalities],
        "num_classes": data.num_classes,
        "data_sha256": _digest(data),
        "fusion": args.fusion,
        "dim": args.dim,
        "tol": args.tol,
        "dropout": args.dropout,
        "epochs": args.epochs,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "batch_size": args.batch_size,
        "jacobian_weight": weight,
        "validation_fraction": args.validation_fraction,
        "splits": args.splits,
    }


def _digest(data: MogonetData) -> str:
    digest = hashlib.sha256()
    for part in (data.train, data.test):
        for array in (*part.modalities, part.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _sizes(values: Any) -> list[int]:
    if not isinstance(values, list) or not values or not all(type(v) is int for v in values):
        raise ValueError(f"got {values!r}, expected a list of whole numbers")
    return values


def _build(config: Mapping[str, Any]) -> MultimodalClassifier:
    return MultimodalClassifier(
        config["input_widths"],
        config["num_classes"],
        dim=config["dim"],
        fusion=config["fusion"],
        dropout=config["dropout"],
        tol=config["tol"],
    )


def _run_splits(args: argparse.Namespace, data: MogonetData, config: dict[str, Any]) -> None:
    """Train on each of the repeated splits, in folders of their own, and report mean and error."""
    parent = RunDirectory.open(args.out, config, resume=args.resume)
    results = []
    for index, split in enumerate(repeated_splits(data, args.splits, args.seed)):
        options = {**config, "splits": 0, "split": index}
        folder = parent.path / f"split_{index:03d}"
        run_folder = RunDirectory.open(folder, options, resume=args.resume)
        label = f"split {index + 1}/{args.splits}"
        results.append(_run_split(run_folder, options, split, label))
    summary = {}
    for name in results[0]:
        mean, error = mean_and_error(np.array([result[name] for result in results]))
        summary[name] = {"mean": mean, "standard_error": error}

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["split", *results[0]])
            writer.writeheader()
            writer.writerows({"split": i, **result} for i, result in enumerate(results))

    write_atomically(parent.path / "splits.csv", write)
    write_json(parent.path / "metrics.json", summary)
    print(f"{args.splits} stratified splits, {len(data.train)} training and {len(data.test)} test")
    for name, values in summary.items():
        print(f"{name:>14}  {values['mean']:.3f}, standard error {values['standard_error']:.3f}")
    print(f"run: {parent.path}")


def _run_split(
    folder: RunDirectory, config: Mapping[str, Any], data: MogonetData, label: str
) -> dict[str, float]:
    """Train one model and return its metrics on the test rows."""
    seed = config["seed"] + config.get("split", 0)
    kept, held = stratified_holdout(data.train.labels, config["validation_fraction"], seed)
    fitted, validation = data.train.take(kept), data.train.take(held)
    scaling = MinMaxScaling.fit(fitted.modalities)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(config)
    options = FitOptions(
        epochs=config["epochs"],
        learning_rate=config["learning_rate"],
        weight_decay=config["weight_decay"],
        batch_size=config["batch_size"],
        seed=seed,
        jacobian_weight=config["jacobian_weight"],
    )
    train_rows, validation_rows = _rows(fitted, scaling), _rows(validation, scaling)
    result = fit(model, train_rows, validation_rows, options, run=folder, progress=label)
    metrics = _evaluate(model, scaling, data.test)
    write_tensors(folder.model, "model", _tensors(model, scaling))
    epochs = {"epochs": len(result.history), "best_epoch": result.best_epoch}
    write_json(folder.path / "metrics.json", {**metrics, **epochs})
    _draw_curves(folder.path / "curves.png", result.history, result.best_epoch)
    return metrics


def _rows(part: LabelledModalities, scaling: MinMaxScaling) -> Rows:
    inputs = tuple(
        torch.from_numpy(view.astype(np.float32)) for view in scaling.transform(part.modalities)
    )
    return Rows(inputs, torch.from_numpy(part.labels))


def _evaluate(
    model: MultimodalClassifier, scaling: MinMaxScaling, part: LabelledModalities
) -> dict[str, float]:
    rows = _rows(part, scaling)
    return classification_metrics(model.predict(rows.inputs).double().numpy(), part.labels)


def _tensors(model: MultimodalClassifier, scaling: MinMaxScaling) -> dict[str, torch.Tensor]:
    """What `model.safetensors` holds."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for name, arrays in (("minimum", scaling.minimum), ("span", scaling.span)):
        tensors |= {f"scaling/{name}/{i}": torch.from_numpy(a) for i, a in enumerate(arrays)}
    return tensors


def _draw_curves(path: Path, history: NDArray[np.float64], best_epoch: int) -> None:
    # matplotlib takes a second to import: not while arguments are parsed.
    from ..plots import save_png, training_curves

    columns = dict(zip(HISTORY_COLUMNS, history.T, strict=True))
    figure = training_curves(columns, best_epoch=best_epoch)
    write_atomically(path, lambda temporary: save_png(figure, temporary))


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    lines = []
    for name, metrics in rows.items():
        cells = "  ".join(f"{metric} {value:.3f}" for metric, value in metrics.items())
        lines.append(f"{name}: {cells}")
    return "\n".join(lines)
