"""The demonstration: fusions compared on handwritten digits of which one modality is noise.

For every image one of three modalities, drawn at random, is buried in noise (see `data.digits`).
Equilibrium fusion is trained beside concatenation, summation, gated fusion and 1, 3 and 10
weight-tied steps of the same cell: same encoders, same head, same data, same number of epochs;
learning rate and epoch are chosen on validation rows, for every fusion and seed alike. Each seed
draws its own split, corruption and parameters, the same for every fusion. Then the equilibrium's
convergence, its modality weights and its speed are measured, and everything goes to one page.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ..data import DIGITS_MODALITIES, DigitsPart, LabelledModalities, load_digits
from ..engine import Config, Field, FitResult, Splits, TensorSamples, checked, data_sha256, fit
from ..engine.kinds import RealNumber, WholeNumber
from ..engine.runs import write_atomically, write_json
from ..models import MultimodalClassifier
from ..module import DEQFusion
from ..ops import checked_implementation
from ..solution import Equilibrium
from ..solvers import Anderson, Picard
from .classification import Classification, samples
from .comparison import FUSIONS, Comparison, DemoOptions

_CLASSES = 10
_TRACE_TOL = 1e-5
_TRACE_STEPS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deqfusion demo`."""
    defaults = DemoOptions()
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument(
        "--epochs",
        type=WholeNumber(1),
        default=defaults.epochs,
        help=f"default {defaults.epochs}",
    )
    parser.add_argument(
        "--seeds",
        type=WholeNumber(1),
        default=len(defaults.seeds),
        metavar="COUNT",
        help=f"seeds 0 to COUNT - 1 (default {len(defaults.seeds)})",
    )
    parser.add_argument(
        "--noise",
        type=RealNumber(0.0),
        default=defaults.noise,
        help=f"of the noisy modality, in standard deviations (default {defaults.noise:g})",
    )
    parser.add_argument("--no-timing", action="store_true", help="leave the timing out")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")


def run(args: argparse.Namespace) -> int:
    """Train, compare, time, write `index.html` and `results.json` to `--out`, print a table.

    Returns:
        0.

    Raises:
        ValueError: a `DEQFUSION_BACKEND` that cannot run.
    """
    from .demo_page import page, table

    checked_implementation(torch.device("cpu"))
    args.out.mkdir(parents=True, exist_ok=True)
    options = DemoOptions(seeds=range(args.seeds), epochs=args.epochs, noise=args.noise)
    threads = torch.get_num_threads()
    _one_thread()
    try:
        comparison = compare(options, workers=min(2, os.cpu_count() or 1), progress=not args.quiet)
    finally:
        torch.set_num_threads(threads)
    timings = [] if args.no_timing else time_fusion(progress=not args.quiet)
    report = args.out / "index.html"
    text = page(comparison, timings)
    write_atomically(report, lambda path: path.write_text(text, encoding="utf-8"))
    write_json(args.out / "results.json", _record(comparison, timings))
    print(table(comparison, timings))
    print(f"report: {report}")
    return 0


def compare(options: DemoOptions, *, workers: int = 1, progress: bool = False) -> Comparison:
    """Train every fusion with every seed and measure it on the test rows.

    Args:
        options: what to train.
        workers: processes; with 1, everything happens in this one.
        progress: show a bar over the runs.

    Returns:
        Comparison; weights and traces only where "deq" is among the fusions.
    """
    jobs = [(seed, name) for seed in options.seeds for name in options.fusions]
    bar = tqdm(total=len(jobs), desc="training", unit="run", disable=not progress)
    results: dict[tuple[int, str], _Run] = {}
    with bar, ExitStack() as stack:
        if workers == 1:
            for job in jobs:
                bar.set_postfix_str(f"{job[1]}, seed {job[0]}")
                results[job] = _train(*job, options)
                bar.update()
        else:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(
                ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread)
            )
            # The longest first, so that no core is left with one at the end.
            order = sorted(jobs, key=lambda job: FUSIONS.index(job[1]))
            futures = {pool.submit(_train, *job, options): job for job in order}
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                bar.update()
    comparison = Comparison(options, runs=[results[job].record for job in jobs])
    solved = [results[job] for job in jobs if job[1] == "deq"]
    if solved:
        tables = zip(*(run.weights for run in solved), strict=True)
        names = ("before training", "after training")
        comparison.weights = {
            name: np.mean(table, axis=0) for name, table in zip(names, tables, strict=True)
        }
        comparison.traces = solved[0].traces
    return comparison


class _Run(NamedTuple):
    """One fusion and seed: its record, and of "deq" weights before and after, and traces."""

    record: dict[str, Any]
    weights: tuple[NDArray[np.float64], ...] = ()
    traces: dict[str, NDArray[np.float64]] = {}  # noqa: RUF012  never changed


def _one_thread() -> None:
    # Products of 128 x 64 gain nothing from a second thread, and lose much on a busy machine.
    torch.set_num_threads(1)


class _Digits(Classification):
    """The digits as a task, of which the demonstration draws the data itself."""

    name = "digits"
    help = "handwritten digits of which one modality is noise"
    fields: ClassVar[Mapping[str, Field]] = {
        **Classification.fields,
        "noise": Field(RealNumber(0.0), 3.0, "of the noisy modality, in standard deviations"),
    }

    def load(self, data_dir: Path, config: Config) -> tuple[Splits, dict[str, Any]]:
        data = load_digits(config["seed"], noise=config["noise"])
        parts = [data.train, data.validation, data.test]
        facts = {
            "input_widths": [view.shape[1] for view in data.train.modalities],
            "num_classes": _CLASSES,
            "data_sha256": data_sha256(view for part in parts for view in part.modalities),
        }
        return Splits(*map(_samples, parts)), facts

    def prepare(self, model: nn.Module, splits: Splits, config: Config) -> None:
        """Leave the features as they are: pixels of unit scale."""


_RECIPE = _Digits()


def _train(seed: int, name: str, options: DemoOptions) -> _Run:
    splits, facts = _RECIPE.load(Path(), {"seed": seed, "noise": options.noise})
    config, model, result = _fit_best(splits, facts, name, seed, options)
    test = cast(TensorSamples, splits.test)
    with torch.no_grad():
        metrics = _RECIPE.metrics([_RECIPE.predict(model.eval(), test.data)])
    record = {
        "fusion": name,
        "seed": seed,
        "accuracy": metrics["accuracy"],
        "f1_macro": metrics["f1_macro"],
        "learning_rate": config["learning_rate"],
        "best_epoch": result.best_epoch,
        "parameters": sum(p.numel() for p in model.fusion.parameters()),
        "step_seconds": float(np.median(result.column("step_seconds"))),
        "steps": float(result.column("steps").mean()),
        "converged": float(result.column("converged").mean()),
    }
    if name != "deq":
        return _Run(record)
    data = load_digits(seed, noise=options.noise)
    untrained = _model(config)
    weights = mean_weights(untrained, data.test), mean_weights(model, data.test)
    return _Run(record, weights, convergence(model, test.data[0]))


def _model(config: Config) -> MultimodalClassifier:
    """A new model; the same seed gives the same encoders and head to every fusion."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        return cast(MultimodalClassifier, _RECIPE.build(config))


def _fit_best(
    splits: Splits, facts: Config, name: str, seed: int, options: DemoOptions
) -> tuple[Config, MultimodalClassifier, FitResult]:
    """Train with every learning rate; configuration, model and result of the best one."""
    runs = []
    for rate in options.learning_rates:
        asked = {
            "fusion": name,
            "dim": options.dim,
            "dropout": options.dropout,
            "tol": options.tol,
            "epochs": options.epochs,
            "learning_rate": rate,
            "batch_size": options.batch_size,
            "seed": seed,
            "jacobian_weight": options.jacobian_weight if name == "deq" else 0.0,
            "noise": options.noise,
        }
        config = {**checked(_RECIPE, asked), **facts}
        model = _model(config)
        runs.append((config, model, fit(_RECIPE, model, splits, config)))
    return min(runs, key=lambda run: run[2].validation["loss"])


@torch.no_grad()
def mean_weights(model: MultimodalClassifier, part: DigitsPart) -> NDArray[np.float64]:
    """Average a model's modality weights over the rows in which each modality is the noisy one.

    Args:
        model: with fusion "deq".
        part: rows.

    Returns:
        (N, N), rows summing to 1; row: the noisy modality, column: whose weight.
    """
    model.eval()
    solution = model(_samples(part).data[0]).equilibrium
    fusion = cast(DEQFusion, model.fusion)
    weights = fusion.modality_weights(cast(Equilibrium, solution)).double().numpy()
    groups = range(len(part.modalities))
    return np.stack([weights[:, part.corrupted == group].mean(axis=1) for group in groups])


@torch.no_grad()
def convergence(
    model: MultimodalClassifier, inputs: Sequence[Tensor]
) -> dict[str, NDArray[np.float64]]:
    """Trace the residual of the joint state under Anderson and under plain (weight-tied) steps.

    The whole state is one problem here, as in the paper's figure: the block-triangular solve would
    spend different numbers of steps on different blocks.

    Args:
        model: with fusion "deq".
        inputs: one (rows, width_i) per modality.

    Returns:
        name -> (rows, steps) relative residuals, NaN after a row has stopped.
    """
    model.eval()
    solvers = {
        "Anderson": Anderson(tol=_TRACE_TOL, max_steps=_TRACE_STEPS, ladder="off"),
        "weight-tied steps": Picard(tol=_TRACE_TOL, max_steps=_TRACE_STEPS),
    }
    features = model(inputs).features
    traces = {}
    for name, solver in solvers.items():
        joint = DEQFusion(features[0].shape[-1], len(features), solver=solver, joint=True)
        joint.load_state_dict(model.fusion.state_dict())
        trace = joint.eval().equilibrium(features, trace=True).stats.trace
        # One problem, hence the same trace for every block.
        traces[name] = cast(Tensor, trace)[-1].double().numpy()
    return traces


def time_fusion(*, progress: bool = False) -> list[dict[str, Any]]:
    """Time equilibrium fusion against eager PyTorch, on one thread and on all cores up to two.

    Returns:
        Results of `deqfusion.bench.quick_comparison`, one per number of threads.
    """
    from deqfusion.bench import quick_comparison

    counts = sorted({1, min(2, os.cpu_count() or 1)})
    bar = tqdm(counts, desc="timing", unit="run", disable=not progress, dynamic_ncols=True)
    return [
        quick_comparison(batch=256, dim=512, num_modalities=2, threads=threads, rounds=3)
        for threads in bar
    ]


def _samples(part: DigitsPart) -> TensorSamples:
    modalities = tuple(view.astype(np.float64) for view in part.modalities)
    return samples(LabelledModalities(modalities, part.labels))


def _record(comparison: Comparison, timings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    options = {key: getattr(comparison.options, key) for key in DemoOptions.__dataclass_fields__}
    return {
        "options": {**options, "seeds": list(comparison.options.seeds)},
        # NaN is no JSON: a fusion without a solve has no steps.
        "runs": [
            {key: None if value != value else value for key, value in run.items()}
            for run in comparison.runs
        ],
        "modalities": list(DIGITS_MODALITIES),
        "weights": {key: table.tolist() for key, table in comparison.weights.items()},
        "timing": list(timings),
    }
