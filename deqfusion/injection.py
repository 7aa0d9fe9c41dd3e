r"""What a solve starts from, differentiable: stacked features, and the injected fusion feature.

x_f = sum_i w_i x_i + b        over the modalities present
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import deqfusion.ops  # noqa: F401  registers the operators
from deqfusion import validation as check

__all__ = ["differentiable_once", "inject", "stack_and_inject"]


class _Once(torch.autograd.Function):
    """Gradients as they are, whose own differentiation is an error.

    `anchors`: whatever they were made of, so that the error is on every way back from them.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(
            "double backward is not supported: an equilibrium can be differentiated once "
            "(adjoint=Unroll(steps) any number of times)"
        )


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a second differentiation an error, whatever it is with respect to.

    `torch.autograd.function.once_differentiable` does so only where the incoming gradient requires
    one: a gradient penalty by parameters would go through, without the solve's part.

    Args:
        backward: of (ctx, saved, *gradients), saved being `ctx.saved_tensors`, which checkpointing
            gives a single time.
    """

    def once(ctx: Any, *gradients: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, saved, *gradients)
        with torch.no_grad():
            outputs = tuple(backward(ctx, saved, *gradients))
        anchors = [t for t in (*saved, *gradients) if t is not None and t.requires_grad]
        return _Once.apply(len(outputs), *outputs, *anchors)

    return once


class _Inject(torch.autograd.Function):
    """sum_i w_i x_i + b; a row whose incoming gradient is 0 adds nothing, even where x is NaN."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (weight.to(x.dtype)[:, None, None] * x).sum(0) + bias.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        dx = weight.to(x.dtype)[:, None, None] * gradient
        terms = torch.where(gradient == 0, 0.0, gradient * x)
        return dx, terms.sum((1, 2)).to(weight.dtype), gradient.sum().reshape(1).to(bias.dtype)


def inject(x: Tensor, weight: Tensor, bias: Tensor, present: Tensor | None = None) -> Tensor:
    """The injected fusion feature x_f = sum_i w_i x_i + b over the modalities present.

    By PyTorch operations, differentiable any number of times; `stack_and_inject` is the operator.

    Args:
        x: (N, R, d).
        weight: (N,).
        bias: (1,).
        present: bool (N, R) or None; x of an absent modality must be finite (0, say).

    Returns:
        (R, d).
    """
    if present is not None:
        x = x * present.unsqueeze(-1).to(x.dtype)
    return _Inject.apply(x, weight, bias)


class _StackAndInject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, present: Tensor | None, weight: Tensor, bias: Tensor, *features: Tensor
    ) -> Any:
        ctx.whole = features[0].dim() == 3
        parts = features[0].unbind(0) if ctx.whole else features
        x, injected = torch.ops.deqfusion.inject(parts, present, weight, bias)
        ctx.save_for_backward(x, present, weight, bias)
        ctx.set_materialize_grads(False)
        return x, injected

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, saved: Sequence[Any], gradient: Tensor | None, injected_gradient: Tensor | None
    ) -> Any:
        x, present, *_ = saved
        weight = bias = None
        if injected_gradient is not None:
            gradient = torch.zeros_like(x) if gradient is None else gradient
            features, weight, bias = torch.ops.deqfusion.inject_adjoint(
                gradient, injected_gradient, *saved
            )
        elif gradient is None:
            return (None,) * len(ctx.needs_input_grad)
        elif present is None:
            features = gradient
        else:
            features = torch.where(present.unsqueeze(-1), gradient, 0.0)
        return (None, weight, bias, *((features,) if ctx.whole else features.unbind(0)))


def stack_and_inject(
    features: Sequence[Tensor] | Tensor, weight: Tensor, bias: Tensor,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a solve starts from, in one operator: stacked features, and `inject` of them.

    Args:
        features: N of (R, d) in one dtype, or one tensor (N, R, d).
        weight: (N,).
        bias: (1,).
        present: bool (N, R) or None; absent features are 0 in x, whatever stands for them.

    Returns:
        x (N, R, d), and x_f (R, d), NaN in rows without a modality. Differentiable once.

    Raises:
        ValueError, TypeError: naming the argument, what was got and what was expected.
    """
    whole = isinstance(features, Tensor)
    if not whole and not (isinstance(features, (list, tuple)) and features):
        raise TypeError(
            f"features: got {type(features).__name__}, expected a tensor (N, R, d) or a list of N "
            "tensors (R, d)"
        )
    parts = (features,) if isinstance(features, Tensor) else tuple(features)
    for part in parts:
        check.features("features", part, "N, R, d" if whole else "R, d")
        check.tensor("features", part, [tuple(parts[0].shape)], parts[0], parts[0].dtype)
    count = parts[0].shape[0] if whole else len(parts)
    check.tensor("weight", weight, [(count,)], parts[0])
    check.tensor("bias", bias, [(1,)], parts[0])
    if present is not None:
        shape = (count, parts[0].shape[-2])
        check.tensor("present", present, [shape], parts[0], torch.bool)
    return stacked(parts, weight, bias, present)


def stacked(
    parts: Sequence[Tensor], weight: Tensor, bias: Tensor, present: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `stack_and_inject`, of arguments known to be right; parts: N of (R, d), or one (N, R, d)
    alone."""
    if torch.compiler.is_compiling():
        # One tensor given twice is refused there, two views of it are not.
        parts = [parts[0], *(part.view_as(part) for part in parts[1:])]
    if torch.is_grad_enabled():
        x, injected = _StackAndInject.apply(present, weight, bias, *parts)
    else:
        parts = parts[0].unbind(0) if parts[0].dim() == 3 else parts
        x, injected = torch.ops.deqfusion.inject(parts, present, weight, bias)
    return x, injected
