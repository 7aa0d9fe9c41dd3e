"""Every check of a user's input, and the wording of its error: what was got, what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from deqfusion.reference.cell import CellOptions, FusionParameters, ModalityParameters
from deqfusion.solution import Equilibrium

__all__ = [
    "boolean",
    "cell_options",
    "choice",
    "count",
    "dtype",
    "equilibrium",
    "features",
    "fits",
    "floating",
    "fraction",
    "fusion_parameters",
    "instance",
    "mask",
    "modality_features",
    "modality_parameters",
    "non_negative",
    "positive",
    "probability",
    "same_device",
    "stack_features",
    "state",
    "tensor",
]

_GATES, _GATE_INPUTS = ("sigmoid", "identity"), ("sum", "concat")
_TAILS = ("relu_norm", "norm_relu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected a number")
    return float(value)


def positive(name: str, value: Any) -> None:
    """A finite number > 0."""
    number = _number(name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}: got {value!r}, expected a finite number > 0")


def non_negative(name: str, value: Any) -> None:
    """A finite number >= 0."""
    number = _number(name, value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name}: got {value!r}, expected a finite number >= 0")


def fraction(name: str, value: Any) -> None:
    """A number in (0, 1]."""
    if not 0 < _number(name, value) <= 1:
        raise ValueError(f"{name}: got {value!r}, expected a number in (0, 1]")


def probability(name: str, value: Any) -> None:
    """A number in [0, 1)."""
    if not 0 <= _number(name, value) < 1:
        raise ValueError(f"{name}: got {value!r}, expected a number in [0, 1)")


def count(name: str, value: Any, minimum: int) -> int:
    """An integer >= `minimum`, NumPy's included; returned as an int."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        shown = "a tensor" if isinstance(value, Tensor) else f"{value!r} ({type(value).__name__})"
        raise TypeError(f"{name}: got {shown}, expected an integer")
    if value < minimum:
        raise ValueError(f"{name}: got {value}, expected an integer >= {minimum}")
    return int(value)


def boolean(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected True or False")


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """One of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")


def cell_options(options: CellOptions, dim: int) -> None:
    """Options that name equations, for width `dim`."""
    if not isinstance(options, CellOptions):
        raise TypeError(f"cell: got {type(options).__name__}, expected CellOptions")
    groups: Any
    skip: Any
    groups, gate, gate_input, skip, tail = options
    # The rest of this finds words for what is wrong.
    if (
        type(groups) is int
        and groups > 0
        and dim % groups == 0
        and gate in _GATES
        and gate_input in _GATE_INPUTS
        and type(skip) is bool
        and tail in _TAILS
    ):
        return
    count("num_groups", options.num_groups, minimum=1)
    if dim % options.num_groups:
        raise ValueError(f"num_groups: got {options.num_groups}, expected a divisor of dim = {dim}")
    choice("gate", options.gate, _GATES)
    choice("gate_input", options.gate_input, _GATE_INPUTS)
    boolean("skip", options.skip)
    choice("tail", options.tail, _TAILS)


def equilibrium(
    name: str, value: Any, modalities: int, dim: int, leading: Sequence[int] | None = None
) -> None:
    """A solved fusion of this layer, and if `leading` is given of features (N, *leading, d)."""
    if not isinstance(value, Equilibrium):
        raise TypeError(
            f"{name}: got {type(value).__name__}, expected what `fusion.equilibrium` returns"
        )
    whose = "this layer" if leading is None else "these features"
    leading = value.fused.shape[:-1] if leading is None else leading
    got = tuple(value.modalities.shape), tuple(value.fused.shape)
    expected = (modalities, *leading, dim), (*leading, dim)
    if got != expected:
        raise ValueError(
            f"{name}: got modalities of shape {got[0]} and a fusion of shape {got[1]}, expected "
            f"{expected[0]} and {expected[1]} as {whose} have"
        )


def instance(name: str, value: Any, kind: type) -> None:
    """An instance of a subclass of `kind` (which is abstract)."""
    if not isinstance(value, kind) or type(value) is kind:
        children: list[type] = kind.__subclasses__()
        names = ", ".join(sorted(child.__name__ for child in children))
        raise TypeError(f"{name}: got {value!r}, expected an instance of one of: {names}")


def stack_features(features: Sequence[Tensor] | Tensor, modalities: int, dim: int) -> Tensor:
    """Checks the modality features, as `modality_features`, and stacks them to (N, ..., d)."""
    parts = modality_features(features, modalities, dim)
    return features if isinstance(features, Tensor) else torch.stack(tuple(parts))


def modality_features(
    features: Sequence[Tensor] | Tensor, modalities: int, dim: int
) -> Sequence[Tensor]:
    """Checks the modality features.

    Args:
        features: a sequence of N tensors (..., d), or one tensor (N, ..., d); floating point, one
            shape, one device.

    Returns:
        N of (..., d).

    Raises:
        ValueError, TypeError: naming the feature, what was got and what was expected.
    """
    if isinstance(features, Tensor):
        _dense("features", features)
        if features.dim() < 2:
            raise ValueError(
                f"features: got a tensor of shape {tuple(features.shape)}, expected (N, ..., d) = "
                f"({modalities}, ..., {dim}), or a sequence of {modalities} tensors (..., {dim})"
            )
        parts: Sequence[Tensor] = features.unbind(0)
    elif isinstance(features, (list, tuple)):
        parts = features
    else:
        raise TypeError(
            f"features: got {type(features).__name__}, expected a sequence of {modalities} tensors "
            f"(..., {dim}) or one tensor ({modalities}, ..., {dim})"
        )
    if len(parts) != modalities:
        got, hint = f"{len(parts)} modalities", ""
        if isinstance(features, Tensor):
            got = f"one tensor of shape {tuple(features.shape)}, which has {got}"
            hint = f"; {as_list(modalities)}"
        raise ValueError(f"features: got {got}, expected {modalities}{hint}")
    for index, part in enumerate(parts):
        if not isinstance(part, Tensor):
            raise TypeError(
                f"features[{index}]: got {type(part).__name__}, expected a tensor (..., {dim})"
            )
        _dense(f"features[{index}]", part)
        if not part.is_floating_point():
            raise TypeError(
                f"features[{index}]: got dtype {part.dtype}, expected a floating-point dtype"
            )
        if part.dim() < 1 or part.shape[-1] != dim:
            raise ValueError(
                f"features[{index}]: got shape {tuple(part.shape)}, expected width {dim} in the "
                f"last dimension: (..., {dim})"
            )
        if part.shape != parts[0].shape:
            raise ValueError(
                f"features[{index}]: got shape {tuple(part.shape)}, expected "
                f"{tuple(parts[0].shape)} as features[0]"
            )
        if part.device != parts[0].device:
            raise ValueError(
                f"features[{index}]: got device {part.device}, expected {parts[0].device} as "
                "features[0]"
            )
    return parts


def _dense(name: str, value: Tensor) -> None:
    """A tensor with an element at every place of its shape."""
    if value.is_nested or value.layout is not torch.strided:
        got = "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
        raise TypeError(f"{name}: got {got}, expected a dense one")


def fits(value: Any, modalities: int, dim: int) -> bool:
    """Whether features are one tensor (N, ..., d), floating point: what there is most often."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and value.dim() > 1
        and value.shape[0] == modalities
        and value.shape[-1] == dim
        and value.is_floating_point()
    )


def as_list(modalities: int) -> str:
    """How features are passed, for who gave one argument for each of them."""
    names = [f"x{index + 1}" for index in range(modalities)]
    if modalities > 4:
        names[2:-1] = ["..."]
    return f"for features, pass a list: fusion([{', '.join(names)}])"


def dtype(name: str, value: Any) -> None:
    """A dtype that the solves compute in."""
    if value not in DTYPES:
        names = [str(each) for each in DTYPES]
        raise TypeError(f"{name}: got {value!r}, expected one of {', '.join(names)}")


def floating(name: str, value: Any) -> None:
    """A floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: got {got}, expected a floating-point tensor")
    _dense(name, value)


def same_device(name: str, tensor: Tensor, device: torch.device, whose: str) -> None:
    """A tensor on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {device} as {whose}")


def mask(value: Tensor, leading: torch.Size, modalities: int) -> Tensor:
    """Checks the missing-modality mask and returns which are present, as bool (N, rows).

    Args:
        value: bool (..., N), True where a modality is missing; at least one False per row, which
            is checked on a CPU only.
        leading: leading dimensions of the features.

    Raises:
        ValueError, TypeError: on a wrong shape or dtype, or (on a CPU) a row without any modality.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"mask: got {type(value).__name__}, expected a tensor (..., {modalities})")
    _dense("mask", value)
    if value.dtype != torch.bool:
        hint = f"; {as_list(modalities)}" if value.is_floating_point() else ""
        raise TypeError(
            f"mask: got dtype {value.dtype}, expected torch.bool (True = missing){hint}"
        )
    expected = (*leading, modalities)
    if tuple(value.shape) != expected:
        raise ValueError(f"mask: got shape {tuple(value.shape)}, expected {expected}")
    present = ~value.reshape(-1, modalities)
    if value.device.type == "cpu":
        _some_present(present.any(dim=1))
    return present.t().contiguous()


def _some_present(rows: Tensor) -> None:
    """Whether every row has a modality, bool (R,) on the CPU.

    On a GPU reading it would wait for the device, and a failed assertion there leaves the process
    without one: the caller makes such rows NON_FINITE instead.
    """
    rest = "with no modality present (True = missing), expected at least one per row"
    if torch.compiler.is_compiling():
        torch._assert_async(rows.all(), f"mask: got a row {rest}")
    elif not bool(rows.all()):
        raise ValueError(f"mask: got {int((~rows).sum())} of {rows.numel()} rows {rest}")


def features(name: str, value: Any, dims: str) -> None:
    """Features with the dimensions that `dims` lists, in a dtype that the solves compute in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor ({dims})")
    dtype(name, value.dtype)
    if value.dim() != len(dims.split(", ")):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({dims})")


def tensor(
    name: str, value: Any, shapes: Sequence[tuple[int, ...]], like: Tensor,
    kind: torch.dtype | None = None,
) -> None:  # fmt: skip
    """A tensor of one of `shapes` on the device of `like`; of dtype `kind`, None: floating."""
    if (
        isinstance(value, Tensor)
        and value.shape in shapes
        and (value.is_floating_point() if kind is None else value.dtype == kind)
        and value.device == like.device
    ):
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor of {shapes[0]}")
    if kind is None:
        floating(name, value)
    elif value.dtype != kind:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {kind}")
    if tuple(value.shape) not in shapes:
        expected = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected}")
    same_device(name, value, like.device, "the features")


def modality_parameters(value: Any, x: Tensor) -> None:
    """Parameters of the blocks of features x (N, R, d)."""
    n, _, d = x.shape
    shapes = {"weight1": (n, d, d), "weight2": (n, d, d)}
    _parameters(value, ModalityParameters, shapes, (n, d), x)


def fusion_parameters(value: Any, cell: CellOptions, x: Tensor) -> None:
    """Parameters of the fusion of an injection x (R, d)."""
    d = x.shape[1]
    gate = (d, 2 * d if cell.gate_input == "concat" else d)
    _parameters(value, FusionParameters, {"gate_weight": gate, "weight": (d, d)}, (d,), x)


def _parameters(
    value: Any,
    kind: type,
    shapes: Mapping[str, tuple[int, ...]],
    others: tuple[int, ...],
    x: Tensor,
) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"parameters: got {type(value).__name__}, expected {kind.__name__}")
    device = x.device
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    for name, part in zip(fields, cast(Sequence[Any], value), strict=True):
        shape = shapes.get(name, others)
        # Nothing is put into words before something is wrong: this runs at every call.
        if not (
            (type(part) is Parameter or isinstance(part, Tensor))
            and part.shape == shape
            and part.is_floating_point()
            and part.device == device
        ):
            tensor(f"parameters.{name}", part, [shape], x)


def state(value: Tensor, modalities: int, leading: torch.Size, dim: int, name: str) -> None:
    """A floating-point state (N+1, ..., d)."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: got {type(value).__name__}, expected a tensor (N+1, ..., d) or an Equilibrium"
        )
    _dense(name, value)
    expected = (modalities + 1, *leading, dim)
    if tuple(value.shape) != expected:
        # With as many rows as modalities, the first of several arguments passes for all features.
        hint = f"; {as_list(modalities)}" if tuple(value.shape) == (modalities, dim) else ""
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected}{hint}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating-point dtype")
