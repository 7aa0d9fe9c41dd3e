"""Options that every task has: what each may be, its default, and the fusion that they describe.

Upper bounds keep a damaged or mistyped number from asking for terabytes or for years.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adjoint import Adjoint, Implicit, OneStep, Phantom
from ..fusions import build_fusion
from ..solvers import Anderson, Broyden, Picard, Solver, ToleranceSchedule
from .kinds import FusionName, OneOf, OrNull, RealNumber, Switch, WholeNumber
from .recipe import Config, Field

_POSITIVE = RealNumber(0.0, above=True)
_SHARE = RealNumber(0.0, below=1.0)
#: What scikit-learn takes.
SEED = WholeNumber(0, 2**32 - 1)

_FUSION: dict[str, Field] = {
    "fusion": Field(FusionName(), "deq", "what fuses the modalities", "fusion"),
    "dim": Field(WholeNumber(1, 8192), 64, "width of the fused features", "fusion"),
    "dropout": Field(_SHARE, 0.0, "after each encoder", "fusion"),
    "fusion_dropout": Field(_SHARE, 0.0, "in deq and weight_tied, one mask a solve", "fusion"),
    "solver": Field(OneOf(("anderson", "picard", "broyden")), "anderson", "of deq", "fusion"),
    "tol": Field(_POSITIVE, 1e-3, "relative tolerance of deq, forward and backward", "fusion"),
    "tol_start": Field(
        OrNull(_POSITIVE), None, "tolerance of the first training step, tightened to tol", "fusion"
    ),
    "tol_steps": Field(WholeNumber(1), 1000, "training steps that this takes", "fusion"),
    "max_steps": Field(WholeNumber(1, 1000), 50, "steps of a solve at most", "fusion"),
    "memory": Field(WholeNumber(0, 50), 5, "earlier steps that Anderson mixes", "fusion"),
    "adjoint": Field(
        OneOf(("implicit", "phantom", "one_step")), "implicit", "backward of deq", "fusion"
    ),
    "gate": Field(OneOf(("sigmoid", "identity")), "sigmoid", "of deq and weight_tied", "fusion"),
    "gate_input": Field(OneOf(("sum", "concat")), "sum", "of deq and weight_tied", "fusion"),
    "skip": Field(Switch(), False, "add z_i in the modality block", "fusion"),
    "tail": Field(OneOf(("relu_norm", "norm_relu")), "relu_norm", "of the fusion block", "fusion"),
    "num_groups": Field(WholeNumber(1, 8192), 4, "groups of the normalisations", "fusion"),
    "rank": Field(WholeNumber(1, 1024), 4, "of tensor fusion", "fusion"),
    "heads": Field(WholeNumber(1, 1024), 4, "of attention fusion", "fusion"),
}

_OPTIMISATION: dict[str, Field] = {
    "epochs": Field(WholeNumber(1, 1_000_000), 50, "passes over the data", "training", fixed=False),
    "seed": Field(SEED, 0, "of parameters, order and dropout", "training"),
    "batch_size": Field(OrNull(WholeNumber(1)), None, "samples a step; none: all", "training"),
    "optimizer": Field(OneOf(("adamw", "adam", "sgd")), "adamw", "what steps", "training"),
    "learning_rate": Field(_POSITIVE, 1e-3, "the highest of the schedule", "training"),
    "fusion_rate": Field(_POSITIVE, 1.0, "factor on the fusion's learning rate", "training"),
    "momentum": Field(_SHARE, 0.9, "of sgd, Nesterov's", "training"),
    "weight_decay": Field(RealNumber(0.0), 0.0, "decoupled for adamw", "training"),
    "schedule": Field(OneOf(("constant", "cosine", "step")), "constant", "of the rate", "training"),
    "warmup": Field(RealNumber(0.0), 0.0, "epochs in which the rate rises from 0", "training"),
    "step_epochs": Field(WholeNumber(1), 30, "epochs between steps of schedule step", "training"),
    "step_factor": Field(RealNumber(0.0, above=True), 0.1, "of each such step", "training"),
    "clip_norm": Field(OrNull(_POSITIVE), 1.0, "largest norm of a gradient", "training"),
    "jacobian_weight": Field(
        OrNull(RealNumber(0.0)), None, "of the Jacobian penalty, with deq", "training"
    ),
    "early_stopping": Field(
        WholeNumber(0), 0, "epochs without a better one until it ends; 0: never", "training"
    ),
}

_MACHINE: dict[str, Field] = {
    "amp": Field(OneOf(("off", "bfloat16", "float16")), "off", "autocast of the model", "machine"),
    "compile": Field(
        Switch(), False, "by torch.compile: half a minute at the first step", "machine", fixed=False
    ),
    "deterministic": Field(Switch(), False, "only operators that repeat to the bit", "machine"),
    "device": Field(OneOf(("auto", "cpu", "cuda")), "auto", "what computes", "machine", False),
    "strategy": Field(
        OneOf(("single", "ddp", "fsdp")), "single", "ddp, fsdp: under torchrun", "machine", False
    ),
    "workers": Field(WholeNumber(0, 256), 0, "processes that read batches", "machine", False),
}

#: The engine's options, in the order in which they are checked and listed.
ENGINE_FIELDS: dict[str, Field] = {**_FUSION, **_OPTIMISATION, **_MACHINE}


_CELL = ("gate", "gate_input", "skip", "tail", "num_groups", "fusion_dropout")
_SOLVE = ("solver", "tol_start", "tol_steps", "max_steps", "memory", "adjoint")
#: Options of what fuses, of which a task that fuses nothing heeds none.
FUSION_ONLY = (*_CELL, *_SOLVE, "tol", "rank", "heads", "fusion_rate")


def idle_options(config: Config) -> dict[str, str]:
    """Return the options that others leave without effect.

    Args:
        config: complete.

    Returns:
        Of each such option the name of the one that is to blame.
    """
    fusion = config["fusion"]
    tied = fusion.startswith("weight_tied:")
    idle = (
        (fusion != "deq" and not tied, "fusion", _CELL),
        (fusion != "deq", "fusion", _SOLVE),
        # What is unrolled has its last change judged by it.
        (fusion != "deq" and not tied, "fusion", ("tol",)),
        (fusion != "tensor", "fusion", ("rank",)),
        (fusion != "attention", "fusion", ("heads",)),
        (fusion == "sum", "fusion", ("fusion_rate",)),
        (fusion == "deq" and config["solver"] != "anderson", "solver", ("memory",)),
        (fusion == "deq" and config["tol_start"] is None, "tol_start", ("tol_steps",)),
        (config["optimizer"] != "sgd", "optimizer", ("momentum",)),
        (config["schedule"] != "step", "schedule", ("step_epochs", "step_factor")),
    )
    return {name: cause for found, cause, names in idle if found for name in names}


def configured_fusion(config: Config, num_modalities: int, dim: int | None = None) -> nn.Module:
    """Build the fusion that a configuration describes.

    Args:
        config: has every fusion option of `ENGINE_FIELDS`.
        num_modalities: N.
        dim: width of the features; None: the option `dim`.

    Returns:
        A module that maps N tensors (..., dim) to one; call it by `fusions.fuse`, which returns
        the equilibrium too where there is one.

    Raises:
        ValueError: options that do not fit together.
    """
    name = config["fusion"]
    options: dict[str, Any] = {}
    if name == "deq" or name.startswith("weight_tied:"):
        options = {key: config[key] for key in ("gate", "gate_input", "skip", "tail", "num_groups")}
        options |= {"dropout": config["fusion_dropout"], "solver": _solver(config)}
    if name == "deq":
        options["adjoint"] = _adjoint(config)
    if name == "tensor":
        options = {"rank": config["rank"]}
    if name == "attention":
        options = {"num_heads": config["heads"]}
    return build_fusion(name, config["dim"] if dim is None else dim, num_modalities, **options)


def _solver(config: Config, *, constant: bool = False) -> Solver:
    tol: float | ToleranceSchedule = config["tol"]
    if config["tol_start"] is not None and not constant:
        tol = ToleranceSchedule(config["tol_start"], config["tol"], config["tol_steps"])
    common: dict[str, Any] = {"tol": tol, "max_steps": config["max_steps"]}
    if config["solver"] == "anderson":
        return Anderson(memory=config["memory"], **common)
    return Picard(**common) if config["solver"] == "picard" else Broyden(**common)


def _adjoint(config: Config) -> Adjoint:
    if config["adjoint"] == "implicit":
        return Implicit(solver=_solver(config, constant=True))
    return Phantom() if config["adjoint"] == "phantom" else OneStep()
