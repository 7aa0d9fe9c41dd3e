"""The `autotune` command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deqfusion import autotune
from deqfusion.adjoint import Implicit
from deqfusion.engine.kinds import OneOf, RealNumber, WholeNumber, WholeNumbers
from deqfusion.kernels.cost import DEVICES
from deqfusion.kernels.tuning import FARTHEST
from deqfusion.module import DEQFusion
from deqfusion.solvers import Anderson
from deqfusion.tuning.result import FEWEST, Tuned, written

__all__ = ["layer_from_file", "register_commands", "run"]

DIM, MODALITIES, GROUPS, BUDGET = 512, 2, 4, 120.0
DTYPES = ("float32", "bfloat16", "float16", "float64")
PRECISIONS = ("highest", "high", "medium")
_KEY = "modality_weight1"


def register_commands(subparsers: Any) -> None:
    """Add ``autotune`` to the subparsers of an argument parser."""
    description = "find what solves fastest on this device, and keep it for later runs"
    parser = subparsers.add_parser(
        "autotune", help=description,
        description="Finds what solves a layer fastest on this device, at a residual verified in "
        "float64. Tiles and schedules of the Triton programs, on a CPU when rows that ended leave "
        "the work, are kept where every later run looks them up. Anderson's memory, on a CPU its "
        "ladder too, are your solver's: the one to write is printed. A default gives way only to "
        "what is faster beyond the noise.",
    )  # fmt: skip

    def add(name: str, kind: Any, default: Any, help_line: str, **more: Any) -> None:
        shown = "" if default is None else f" (default {default})"
        parser.add_argument(name, type=kind, default=default, help=help_line + shown, **more)

    widths, counts = WholeNumber(1, 1 << 16), WholeNumber(1, 1024)
    add("--dim", widths, None, f"width of the features (default {DIM})", metavar="D")
    add("--modalities", counts, None, f"number of features (default {MODALITIES})", metavar="N")
    parser.add_argument(
        "--batch", type=WholeNumbers(1, 1 << 24), default=[256], metavar="B[,B...]",
        help="rows, for each of which there is a search (default 256)",
    )  # fmt: skip
    groups = WholeNumber(1, 1 << 16)
    words = f"groups of the normalisations (default {GROUPS}, or those of the run)"
    add("--num-groups", groups, None, words, metavar="G")
    # Its name before it was the layer's and that of training.
    old: dict[str, Any] = {"dest": "num_groups", "default": argparse.SUPPRESS}
    parser.add_argument("--groups", type=groups, help=argparse.SUPPRESS, **old)
    add("--dtype", OneOf(DTYPES), DTYPES[0], "of the features", metavar="|".join(DTYPES))
    add(
        "--precision", OneOf(PRECISIONS), None, "of float32 products on a GPU, as "
        "torch.set_float32_matmul_precision takes it; default: highest",
        metavar="|".join(PRECISIONS),
    )  # fmt: skip
    add("--tol", RealNumber(0.0, above=True), 1e-3, "relative residual to reach", metavar="TOL")
    add(
        "--memory", WholeNumber(0, 1 << 20), Anderson().memory, "of your Anderson: what is kept is "
        "for that memory, and for the one found best", metavar="M",
    )  # fmt: skip
    parser.add_argument(
        "--from-module", type=Path, metavar="FILE",
        help="take parameters and sizes from a safetensors file, or with gate, skip and tail the "
        "folder of a run, with a layer in it, instead of random ones",
    )  # fmt: skip
    seconds = RealNumber(0.0, above=True)
    words = f"seconds for every batch, about (default {BUDGET:g})"
    add("--budget", seconds, None, words, metavar="SECONDS")
    add("--device", str, None, "cpu, cuda or cuda:1; default: a GPU where there is one")
    parser.add_argument(
        "--target", metavar="NAME",
        help=f"one of {', '.join(DEVICES)}: rank by the cost model for a device that is not here; "
        "nothing is measured and nothing stored: without --device, --budget and --out",
    )  # fmt: skip
    parser.add_argument(
        "--forward-only", action="store_true", help="leave the solves of backward passes alone"
    )
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--out", type=Path, metavar="DIR",
        help="where to store the result, instead of where it is looked up",
    )  # fmt: skip
    kept.add_argument("--dry-run", action="store_true", help="store nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0; 1 if no way met the tolerance for some batch, or what was found could not be stored,
        which is said on standard error; 130 after an interruption, with what was
        found before it kept.

    Raises:
        ValueError: naming an option and what is possible.
        OSError: if a file cannot be read or written.
    """
    if options.target is not None:
        for name in ("device", "budget", "out"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--{name}: got {getattr(options, name)} with --target, by which nothing is "
                    "measured and nothing stored, expected it left out"
                )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(options.precision or before)
    try:
        return _tune(_layer(options).to(_device(options.device, options.target)), options)
    finally:
        torch.set_float32_matmul_precision(before)


def _tune(layer: DEQFusion, options: argparse.Namespace) -> int:
    """Searches and reports for every number of rows."""
    code = 0
    for rows in options.batch:
        draw = torch.Generator().manual_seed(0)
        shape = layer.num_modalities, rows, layer.dim
        features = torch.randn(shape, generator=draw).to(layer.gate_bias)
        save = not options.dry_run and options.target is None
        found = autotune(
            layer, features, budget=options.budget or BUDGET, backward=not options.forward_only,
            target=options.target, save=save, folder=options.out, progress=not options.quiet,
        )  # fmt: skip
        report(found, layer, rows, random=options.from_module is None)
        if found.interrupted:
            return 130
        if not found.predicted and (found.file is None if save else not found.entries):
            code = 1
    return code


def report(found: Tuned, layer: DEQFusion, rows: int, random: bool) -> None:
    """Prints what was found.

    random: whether the layer's parameters are.
    """
    how = " (predicted, not measured; nothing is stored)" if found.predicted else ""
    sizes = f"{rows} rows, width {layer.dim}, {layer.num_modalities} modalities"
    print(f"{found.device}: {sizes}{how}")
    print(found.table())
    if found.without_answer:
        print(
            f"left out: {found.without_answer} rows of some block that the default does not solve"
        )
    if found.interrupted:
        kept = "" if found.file is None else ": the best so far is kept"
        print(f"interrupted{kept}")
    if not found.entries and not found.predicted:
        print("nothing met the tolerance: nothing is kept")
    if found.entries:
        _report_kept(found)
    if found.solver != layer.solver:
        new, old = written(found.solver), written(layer.solver)
        much = "predicted to be faster" if found.solver_speedup is None else found.solver_speedup
        print(f"solver: {new} instead of {old}: {much}; nobody looks it up, so write")
        print(f"  DEQFusion({layer.dim}, {layer.num_modalities}, solver={new})")
        if random:
            print("found with random parameters: trained ones may want another, --from-module FILE")
    elif found.entries or found.predicted:
        why = "no other is faster beyond the noise"
        if found.predicted:
            why = "no other is predicted to be faster"
        elif found.rounds < FEWEST:
            why = "too little was timed to tell"
        print(f"solver: {written(layer.solver)} is kept: {why}")


def _report_kept(found: Tuned) -> None:
    """Says what solves do from now on, and which."""
    if found.speedup is None:
        print(f"default kept: {_why_default(found)}")
    else:
        print(f"kept (*): {found.speedup} as the default, of {len(found.trials)} ways tried")
    if found.file is not None:
        problem = found.entries[0].problem
        low, high = max(problem.rows // FARTHEST, 1), problem.rows * FARTHEST
        threads = f", {problem.threads} thread(s)" if problem.threads else ""
        print(f"looked up by every solve of this width, {low} to {high} rows{threads}:")
        print(f"  {found.file}")


def _why_default(found: Tuned) -> str:
    """What speaks for it, or that nothing speaks against it."""
    if sum(trial.counts for trial in found.trials) == len({t.way.solve for t in found.trials}):
        return "nothing else that meets the tolerance was timed: --budget bounds the search"
    if found.rounds < FEWEST:
        return (
            f"{found.rounds} rounds in turn cannot tell what is faster from noise, {FEWEST} can: "
            "--budget bounds them"
        )
    return "with your solver nothing else is faster beyond the noise"


def _device(name: str | None, target: str | None) -> torch.device:
    if target is not None or name is None:
        found = torch.cuda.is_available() and target is None
        return torch.device("cuda" if found else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: got {name!r}, expected cpu, cuda or cuda:1") from error
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= count
    ):
        raise ValueError(f"--device: got {name!r}, expected cpu or one of {count} CUDA devices")
    return device


def _layer(options: argparse.Namespace) -> DEQFusion:
    """A layer of random parameters, or that of a file."""
    solver = Anderson(tol=options.tol, memory=options.memory)
    kwargs: dict[str, Any] = {"solver": solver, "adjoint": Implicit(solver)}
    groups, sizes = options.num_groups, (options.dim, options.modalities)
    if options.from_module is not None:
        if sizes != (None, None):
            raise ValueError(
                "--from-module: got --dim or --modalities as well, expected the file to say them"
            )
        given = {} if groups is None else {"num_groups": groups}
        layer = layer_from_file(options.from_module, **kwargs, **given)
    else:
        dim, groups = sizes[0] or DIM, groups or GROUPS
        if dim % groups:
            raise ValueError(f"--dim: got {dim}, expected a multiple of --num-groups, {groups}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = DEQFusion(dim, sizes[1] or MODALITIES, num_groups=groups, **kwargs)
    return layer.to(getattr(torch, options.dtype))


def layer_from_file(path: Path, **options: Any) -> DEQFusion:
    """The layer in a safetensors file or in the folder of a run; nothing is unpickled.

    Sizes are those of its tensors, `options` are the layer's others. Of a run its `config.json`
    says how the cell is made; of a file alone nothing does, and what `options` lack is the default.

    Raises:
        ValueError: if it cannot be read, or holds no layer or several.
    """
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        options = {**_cell_of(path), **options}
        path = path / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"--from-module {path}: cannot be read ({str(error).splitlines()[0]}), expected a "
            "safetensors file with a layer, or the folder of a run"
        ) from error
    prefixes = [name.removesuffix(_KEY) for name in tensors if name.endswith(_KEY)]
    # A checkpoint has the parameters of the last epoch, and those of the best.
    prefixes = [p for p in prefixes if p.startswith("best/")] or prefixes
    if len(prefixes) != 1:
        got = ", ".join(prefixes) or "none"
        raise ValueError(f"--from-module {path}: got layers {got}, expected the tensors of one")
    found = {
        name.removeprefix(prefixes[0]): value
        for name, value in tensors.items()
        if name.startswith(prefixes[0])
    }
    return _built(path, found, options)


def _cell_of(run: Path) -> dict[str, Any]:
    """What a run's configuration says of the cell; nothing where it has none."""
    from deqfusion.engine.runs import read_config

    if not (run / "config.json").exists():
        return {}
    config = read_config(run)
    return {name: config[name] for name in ("gate", "skip", "tail", "num_groups") if name in config}


def _built(path: Path, found: dict[str, Tensor], options: dict[str, Any]) -> DEQFusion:
    weight, gate = found[_KEY], found.get("gate_weight")
    if weight.ndim != 3 or gate is None or gate.ndim != 2:
        raise ValueError(
            f"--from-module {path}: got {_KEY} of shape {tuple(weight.shape)}, expected (N, d, d), "
            "with gate_weight (d, d) or (d, 2 d)"
        )
    modalities, dim, _ = weight.shape
    gate_input = "concat" if gate.shape[1] == 2 * dim else "sum"
    layer = DEQFusion(dim, modalities, gate_input=gate_input, **options)
    try:
        # Beside a layer without a name of its own there may be others' tensors.
        layer.load_state_dict({name: found[name] for name in layer.state_dict() if name in found})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--from-module {path}: {reason}") from error
    return layer
