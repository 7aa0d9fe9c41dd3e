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
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data import (
    DataError,
    LabelledModalities,
    MinMaxScaling,
    MogonetData,
    load_mogonet,
    repeated_splits,
    stratified_holdout,
)
from ..engine.runs import (
    CheckpointError,
    RunDirectory,
    check_tensors,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)
from ..engine.training import (
    HISTORY_COLUMNS,
    FitOptions,
    Rows,
    TrainingDivergedError,
    check_penalty,
    fit,
)
from ..metrics import classification_metrics, mean_and_error
from ..models.classifier import MultimodalClassifier
from ..ops import checked_implementation
from .config import FIELDS, fault, read_run

# The penalty keeps the map contracting while it learns, which costs fewer steps and keeps implicit
# gradients of single rows from dominating. It, width, dropout and learning rate were chosen on
# hold-outs of ROSMAP's training rows.
_JACOBIAN_WEIGHT = 1.0
# Of a scaled value: LayerNorm squares what the encoder makes of it, and float32 ends at 3e38.
_LARGEST = 1e17
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
        "--resume",
        action="store_true",
        help="continue the run in --out, with its options (--epochs may change); start it where "
        "there is none",
    )
    files.add_argument(
        "--modalities",
        type=FIELDS["modalities"],
        default=None,
        help="files to read (default 1,2,3)",
    )
    files.add_argument(
        "--splits",
        type=FIELDS["splits"],
        default=None,
        metavar="R",
        help="R repeated stratified splits of all rows instead of the given split",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--fusion", default=None, help="deq (default), concat, sum, gated or weight_tied:K"
    )
    model.add_argument("--dim", type=FIELDS["dim"], default=None, help="width (default 32)")
    model.add_argument(
        "--tol",
        type=FIELDS["tol"],
        default=None,
        help="relative tolerance of the equilibrium (default 1e-3)",
    )
    model.add_argument(
        "--dropout",
        type=FIELDS["dropout"],
        default=None,
        help="after each encoder (default 0)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=FIELDS["epochs"], default=None, help="default 120")
    training.add_argument("--seed", type=FIELDS["seed"], default=None, help="default 0")
    training.add_argument(
        "--learning-rate", type=FIELDS["learning_rate"], default=None, help="default 3e-3"
    )
    training.add_argument(
        "--weight-decay", type=FIELDS["weight_decay"], default=None, help="default 0"
    )
    training.add_argument(
        "--batch-size", type=FIELDS["batch_size"], default=None, help="default: all rows"
    )
    training.add_argument(
        "--jacobian-weight",
        type=FIELDS["jacobian_weight"],
        default=None,
        help=f"weight of the Jacobian penalty (default {_JACOBIAN_WEIGHT:g} for deq, else 0)",
    )
    training.add_argument(
        "--validation-fraction",
        type=FIELDS["validation_fraction"],
        default=None,
        help="of the training rows, to choose the epoch (default 0.2)",
    )


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deqfusion evaluate`."""
    parser.add_argument("--checkpoint", required=True, type=Path, help="folder of a finished run")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder in MOGONET's layout")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Train, evaluate on the test rows, and write model, metrics, log and curves to `--out`.

    Returns:
        0, or 1 where the loss became NaN or inf.

    Raises:
        DataError: the data folder is not what it should be.
        CheckpointError: `--out` holds a run that cannot be, or should not be, continued.
        ValueError: options that do not fit together, or a `DEQFUSION_BACKEND` that cannot run.
    """
    checked_implementation(torch.device("cpu"))
    stored = _complete(args)
    data = load_mogonet(args.data_dir, args.modalities)
    config = _config(args, data)

    def place(key: str) -> str:
        if key in stored and stored[key] == config[key]:
            return f"{args.out / 'config.json'}: {key}"
        return f"--{key.replace('_', '-')}"

    # All of this before anything is written.
    found = fault(config)
    if found is not None:
        raise ValueError(f"{place(found[0])}: {found[1]}")
    with torch.device("meta"):
        model = _build(config)
    check_penalty(model, config["jacobian_weight"])
    _check_memory(model, config["dim"], place("dim"))
    _check_data(args.data_dir, data, config, place("validation_fraction"))
    try:
        if args.splits:
            _run_splits(args, data, config)
        else:
            label = None if args.quiet else "training"
            metrics = _run_split(_open(args, config), config, data, label)
            print(_table({"given split": metrics}))
            print(f"run: {args.out}")
    except TrainingDivergedError as error:
        print(f"deqfusion: {error}", file=sys.stderr)
        return 1
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Print the metrics of a finished run on the test rows of a folder, as text or as JSON.

    Returns:
        0.

    Raises:
        CheckpointError: the run is missing, unfinished, damaged, or somebody else's.
        DataError: the data folder is not what it should be, or does not fit the model.
        ValueError: a `DEQFUSION_BACKEND` that cannot run.
    """
    checked_implementation(torch.device("cpu"))
    folder = RunDirectory(args.checkpoint)
    config = read_run(folder.path)
    if config["splits"]:
        raise CheckpointError(
            f"{folder.config}: a run of {config['splits']} splits, "
            "expected one of its split_... folders"
        )
    widths = config["input_widths"]
    if folder.checkpoint.exists() and not folder.model.exists():
        raise CheckpointError(
            f"{folder.model}: no such file, expected a finished run (continue it with --resume)"
        )
    tensors = read_tensors(folder.model, "model")
    blank = tuple(np.zeros(width) for width in widths)
    # Without memory, until it is known that the file has a model of this size.
    with torch.device("meta"):
        expected = _tensors(_build(config), MinMaxScaling(blank, blank))
    check_tensors(folder.model, tensors, expected)
    model = _build(config)
    model.load_state_dict(
        {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    )
    minimum, span = (
        tuple(tensors[f"scaling/{name}/{index}"].numpy() for index in range(len(widths)))
        for name in ("minimum", "span")
    )
    if not all((values > 0).all() for values in span):
        raise CheckpointError(f"{folder.model}: a 'scaling/span' is not > 0, as all are expected")
    scaling = MinMaxScaling(minimum, span)

    data = load_mogonet(args.data_dir, config["modalities"])
    got = [view.shape[1] for view in data.test.modalities]
    if (got, data.num_classes) != (widths, config["num_classes"]):
        raise CheckpointError(
            f"{folder.config}: the model takes {widths} features and {config['num_classes']} "
            f"classes, expected {got} and {data.num_classes} as in {args.data_dir}"
        )
    test, name = data.test, "test rows"
    if "split" in config and config["data_sha256"] == _digest(data):
        # Rows of the folder's own test part were trained on in a split of all rows.
        *_, split = repeated_splits(data, config["split"] + 1, config["seed"])
        test, name = split.test, f"test rows of split {config['split']}"
    _check_scaled(args.data_dir, config["modalities"], data, test, scaling)
    metrics = _evaluate(model, scaling, test)
    if args.json:
        print(json.dumps({"rows": name, **_json_values(metrics)}, indent=2))
    else:
        print(_table({name: metrics}))
    return 0


def _complete(args: argparse.Namespace) -> dict[str, Any]:
    """Set what was not given to what the run that is resumed has, which is returned, or default."""
    stored = {}
    # A file in place of the folder is refused here, before its lack of options is made up for.
    if args.resume and (args.out.is_file() or RunDirectory(args.out).config.exists()):
        stored = read_run(args.out)
    for name, default in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, stored.get(name, default))
    if args.fusion != stored.get("fusion", args.fusion):
        # That the run has another fusion is the error to report, not its penalty.
        args.jacobian_weight = None
    return stored


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


def _splits(data: MogonetData, config: Mapping[str, Any]) -> Iterator[MogonetData]:
    """The splits that a run trains on: the folder's own, or repeated ones of all rows."""
    if not config["splits"]:
        return iter([data])
    return repeated_splits(data, config["splits"], config["seed"])


def _hold_out(
    split: MogonetData, config: Mapping[str, Any], seed: int
) -> tuple[LabelledModalities, LabelledModalities, MinMaxScaling]:
    """Rows to train on, rows to choose the epoch on, and the scaling fitted on the former."""
    kept, held = stratified_holdout(split.train.labels, config["validation_fraction"], seed)
    fitted = split.train.take(kept)
    return fitted, split.train.take(held), MinMaxScaling.fit(fitted.modalities)


def _seed(config: Mapping[str, Any], split: int) -> int:
    return (config["seed"] + split) % 2**32


def _check_memory(model: MultimodalClassifier, dim: int, place: str) -> None:
    # Parameters, the best ones, gradients and two moments; reserved, not written to.
    numbers = 5 * sum(parameter.numel() for parameter in model.parameters())
    try:
        torch.empty(numbers, dtype=torch.float32)
    except RuntimeError as error:
        raise ValueError(
            f"{place}: got {dim}, which takes {4 * numbers / 2**30:.1f} GiB in training, "
            "expected a model that fits into memory"
        ) from error


def _check_data(folder: Path, data: MogonetData, config: Mapping[str, Any], place: str) -> None:
    """Refuse data that the run could not be trained or evaluated on."""
    for index, split in enumerate(_splits(data, config)):
        try:
            *_, scaling = _hold_out(split, config, _seed(config, index))
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        for part in (split.train, split.test):
            _check_scaled(folder, config["modalities"], data, part, scaling)


def _check_scaled(
    folder: Path,
    numbers: Sequence[int],
    data: MogonetData,
    part: LabelledModalities,
    scaling: MinMaxScaling,
) -> None:
    """Refuse values so far outside the fitted range that the model's numbers overflow."""
    for index, view in enumerate(_rows(part, scaling).inputs):
        # Not `>`: NaN is refused too.
        bad = (~(view.abs() <= _LARGEST)).nonzero()
        if not len(bad):
            continue
        row, column = bad[0].tolist()
        value = part.modalities[index][row, column]
        # A split of all rows has lost their lines.
        for rows, suffix in ((data.train, "tr"), (data.test, "te")):
            lines = np.flatnonzero(rows.modalities[index][:, column] == value)
            if len(lines):
                raise DataError(
                    f"{folder / f'{numbers[index]}_{suffix}.csv'}, line {lines[0] + 1}, column "
                    f"{column + 1}: got {value:g}, which is {view[row, column]:g} on the scale of "
                    f"the rows trained on (0 to 1), expected at most {_LARGEST:g} in size"
                )


def _build(config: Mapping[str, Any]) -> MultimodalClassifier:
    return MultimodalClassifier(
        config["input_widths"],
        config["num_classes"],
        dim=config["dim"],
        fusion=config["fusion"],
        dropout=config["dropout"],
        tol=config["tol"],
    )


def _open(args: argparse.Namespace, config: Mapping[str, Any]) -> RunDirectory:
    folder = RunDirectory.open(args.out, config, resume=args.resume)
    if args.resume and folder.started:
        # A mistyped folder looks like this too, so it is said even where nothing else is.
        message = f"deqfusion: nothing to resume in {args.out}: starting a new run"
        print(message, file=sys.stderr)
    return folder


def _run_splits(args: argparse.Namespace, data: MogonetData, config: dict[str, Any]) -> None:
    """Train on each of the repeated splits, in folders of their own, and report mean and error."""
    parent = _open(args, config)
    results = []
    for index, split in enumerate(_splits(data, config)):
        options = {**config, "splits": 0, "split": index}
        folder = parent.path / f"split_{index:03d}"
        run_folder = RunDirectory.open(folder, options, resume=args.resume, part_of=parent)
        label = f"split {index + 1}/{args.splits}"
        results.append(_run_split(run_folder, options, split, None if args.quiet else label))
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
    write_json(parent.path / "metrics.json", {name: _json_values(s) for name, s in summary.items()})
    splits = "1 stratified split" if args.splits == 1 else f"{args.splits} stratified splits"
    print(f"{splits}, {len(data.train)} training and {len(data.test)} test")
    for name, values in summary.items():
        error = values["standard_error"]
        spread = "" if math.isnan(error) else f", standard error {error:.3f}"
        print(f"{name:>14}  {values['mean']:.3f}{spread}")
    print(f"run: {parent.path}")


def _run_split(
    folder: RunDirectory, config: Mapping[str, Any], data: MogonetData, label: str | None
) -> dict[str, float]:
    """Train one model and return its metrics on the test rows."""
    seed = _seed(config, config.get("split", 0))
    fitted, validation, scaling = _hold_out(data, config, seed)
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
    write_json(folder.path / "metrics.json", {**_json_values(metrics), **epochs})
    _draw_curves(folder.path / "curves.png", result.history, result.best_epoch)
    return metrics


def _rows(part: LabelledModalities, scaling: MinMaxScaling) -> Rows:
    """Rows as the model takes them; inf or NaN where float32 cannot hold a value."""
    views = scaling.transform(part.modalities)
    inputs = tuple(torch.from_numpy(view).float() for view in views)
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


def _json_values(metrics: Mapping[str, float]) -> dict[str, float | None]:
    # NaN is no JSON: a class without rows has no AUC.
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


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
