r"""The equations of the fusion cell, one step, in plain differentiable PyTorch.

    modality   h   = ReLU(GN_1(W_1 z_i + b_1))
               t   = GN_2(W_2 h + b_2 + x_i)            (+ z_i if skip)
               z_i = GN_3(ReLU(t))
    gate       a_i = sigma(W_g (z_f + z_i) + b_g)       (or W_g [z_f ; z_i]; sigma or identity)
    fusion     z_f = GN_f(ReLU(W_f sum_i a_i * z_f + b_f + x_f))

`tail="norm_relu"` exchanges the last two in the fusion block, z_f = ReLU(GN_f(...)), as the
authors' MM-IMDB code does; their modality block is the same in both. Shapes: modality tensors
(N, R, d), fusion tensors (R, d), R rows. Everything here is differentiable twice; the functions
that iterate (`deqfusion.reference.modality`, `.fusion`) are not.

Source: J. Ni et al., "Deep equilibrium multimodal fusion", arXiv 2306.16645, equations 3 to 7.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CellOptions",
    "FusionParameters",
    "ModalityParameters",
    "clear_absent",
    "full_precision",
    "fusion_cell",
    "gate_constants",
    "group_norm",
    "joint_cell",
    "joint_jvp",
    "modality_cell",
]


# Added to every variance, as in the authors' code and torch.nn.GroupNorm.
EPS = 1e-5


class CellOptions(NamedTuple):
    """What selects the equations; every field is a plain value."""

    num_groups: int = 4
    gate: str = "sigmoid"
    gate_input: str = "sum"
    skip: bool = False
    tail: str = "relu_norm"


class ModalityParameters(NamedTuple):
    """Parameters of the N modality blocks, stacked: weights (N, d, d), the others (N, d)."""

    weight1: Tensor
    bias1: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    weight2: Tensor
    bias2: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    norm3_weight: Tensor
    norm3_bias: Tensor


class FusionParameters(NamedTuple):
    """Parameters of the fusion block: gate_weight (d, d) or (d, 2d) with the columns of z_f first,
    weight (d, d), the others (d,)."""

    gate_weight: Tensor
    gate_bias: Tensor
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Without autocast on the device of x. Where there is none no context is made: a program that
    is exported with one cannot be saved."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def bound_of(dtype: torch.dtype) -> float:
    """Up to where numbers are normalised as they are: the square of a sum of them is finite."""
    return 2.0 ** (300 if dtype == torch.float64 else 40)


def within_range(x: Tensor, groups: int, relu: bool = False) -> tuple[Tensor, Tensor]:
    """x (..., d), each group times a power of two that takes it to `bound_of` its dtype.

    A normalisation takes the factor out again, but for EPS, which is nothing beside such a group.
    Where it is one of ReLU(x), with `relu`, negative x, which that takes away, scale nothing.

    Returns:
        x, and the factors (..., G, 1), at most 1.
    """
    grouped = x.unflatten(-1, (groups, -1))
    sizes = grouped.detach()
    largest = (sizes.relu() if relu else sizes.abs()).amax(-1, keepdim=True)
    above = torch.log2(largest / bound_of(x.dtype))
    factor = torch.exp2(-torch.ceil(above).clamp(min=0.0))
    return (grouped * factor).flatten(-2), factor


def normalize(x: Tensor, groups: int) -> Tensor:
    """Zero mean and unit variance (biased) in each of `groups` groups of the last dimension."""
    shape = x.shape
    grouped = x.reshape(*shape[:-1], groups, shape[-1] // groups)
    return F.layer_norm(grouped, grouped.shape[-1:], eps=EPS).reshape(shape)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """GroupNorm over the channels of each row: x (..., d); weight, bias broadcast to it."""
    return normalize(x, groups) * weight + bias


def modality_cell(z: Tensor, x: Tensor, p: ModalityParameters, o: CellOptions) -> Tensor:
    """One step of the modality blocks: z, x (N, R, d) -> (N, R, d)."""

    def affine(name: str) -> tuple[Tensor, Tensor]:
        return getattr(p, name + "_weight").unsqueeze(1), getattr(p, name + "_bias").unsqueeze(1)

    h = torch.baddbmm(p.bias1.unsqueeze(1), z, p.weight1.transpose(1, 2))
    h = F.relu(group_norm(h, *affine("norm1"), o.num_groups))
    u = torch.baddbmm(p.bias2.unsqueeze(1) + x, h, p.weight2.transpose(1, 2))
    u, _ = within_range(u, o.num_groups)
    t = group_norm(u, *affine("norm2"), o.num_groups)
    if o.skip:
        t = t + z
    return group_norm(F.relu(t), *affine("norm3"), o.num_groups)


def gate_weights(p: FusionParameters, o: CellOptions) -> tuple[Tensor, Tensor]:
    """(weight applied to z_f, weight applied to z_i), each (d, d)."""
    if o.gate_input == "concat":
        d = p.gate_weight.shape[0]
        return p.gate_weight[:, :d], p.gate_weight[:, d:]
    return p.gate_weight, p.gate_weight


def gate_constants(modalities: Tensor, p: FusionParameters, o: CellOptions) -> Tensor:
    """c_i = W_gz z_i + b_g, the part of the gate that a fusion solve holds fixed: (N, R, d)."""
    return F.linear(modalities, gate_weights(p, o)[1], p.gate_bias)


def gates(
    z: Tensor, constants: Tensor, p: FusionParameters, o: CellOptions, gate_mask: Tensor | None
) -> Tensor:
    """a_i of z_f = z (R, d) and constants (N, R, d), times the mask (N, R, 1 or d): (N, R, d)."""
    a = constants + F.linear(z, gate_weights(p, o)[0])
    if o.gate == "sigmoid":
        a = torch.sigmoid(a)
    return a if gate_mask is None else a * gate_mask


def fusion_cell(
    z: Tensor,
    constants: Tensor,
    injection: Tensor,
    p: FusionParameters,
    o: CellOptions,
    gate_mask: Tensor | None = None,
    fusion_mask: Tensor | None = None,
) -> Tensor:
    """One step of the fusion block.

    Args:
        z: (R, d) fusion state.
        constants: (N, R, d) from `gate_constants`.
        injection: (R, d), x_f.
        gate_mask: (N, R, 1 or d) factor on the gates: presence and dropout.
        fusion_mask: (R, d) dropout factor on W_f u + b_f.
    """
    u = gates(z, constants, p, o, gate_mask).sum(0) * z
    v = F.linear(u, p.weight, p.bias)
    if fusion_mask is not None:
        v = v * fusion_mask
    v, _ = within_range(v + injection, o.num_groups, o.tail == "relu_norm")
    if o.tail == "norm_relu":
        return F.relu(group_norm(v, p.norm_weight, p.norm_bias, o.num_groups))
    return group_norm(F.relu(v), p.norm_weight, p.norm_bias, o.num_groups)


def joint_cell(
    state: Tensor,
    features: Tensor,
    injection: Tensor,
    pm: ModalityParameters,
    pf: FusionParameters,
    o: CellOptions,
    gate_mask: Tensor | None = None,
    fusion_mask: Tensor | None = None,
) -> Tensor:
    """One step of the joint map: state (N+1, R, d), modalities then fusion, given the new z_i."""
    z = modality_cell(state[:-1], features, pm, o)
    constants = gate_constants(z, pf, o)
    fused = fusion_cell(state[-1], constants, injection, pf, o, gate_mask, fusion_mask)
    return torch.cat((z, fused.unsqueeze(0)))


def _norm_and_jvp(
    x: Tensor, dx: Tensor, weight: Tensor, bias: Tensor, o: CellOptions
) -> tuple[Tensor, Tensor]:
    """`group_norm` of x (..., d), and its derivative there in the direction dx.

    As the solves compute it, and not by PyTorch's kernel as `normalize` does, which gives NaN where
    a variance overflows.
    """
    x, factor = within_range(x, o.num_groups)
    x, dx = (t.unflatten(-1, (o.num_groups, -1)) for t in (x, dx))
    centred, dx = x - x.mean(-1, keepdim=True), dx - dx.mean(-1, keepdim=True)
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + EPS)
    xhat = centred * rstd
    dy = (dx - xhat * (xhat * dx).mean(-1, keepdim=True)) * (rstd * factor)
    return xhat.flatten(-2) * weight + bias, dy.flatten(-2) * weight


def joint_jvp(
    state: Tensor,
    direction: Tensor,
    features: Tensor,
    injection: Tensor,
    pm: ModalityParameters,
    pf: FusionParameters,
    o: CellOptions,
    gate_mask: Tensor | None = None,
    fusion_mask: Tensor | None = None,
) -> Tensor:
    """J v of the joint map: state and direction (N+1, R, d); differentiable in everything.

    Written out, because a forward derivative differentiates once in reverse mode like any other
    function, whereas a vector-Jacobian product would need double backward, which does not compile.
    """
    z, v = state[:-1], direction[:-1]
    w1, w2 = pm.weight1.transpose(1, 2), pm.weight2.transpose(1, 2)
    (n1, b1), (n2, b2), (n3, b3) = (
        (getattr(pm, f"norm{j}_weight").unsqueeze(1), getattr(pm, f"norm{j}_bias").unsqueeze(1))
        for j in (1, 2, 3)
    )
    u1 = torch.baddbmm(pm.bias1.unsqueeze(1), z, w1)
    y1, dy1 = _norm_and_jvp(u1, torch.bmm(v, w1), n1, b1, o)
    u2 = torch.baddbmm(pm.bias2.unsqueeze(1) + features, F.relu(y1), w2)
    t, dt = _norm_and_jvp(u2, torch.bmm(dy1 * (y1 > 0), w2), n2, b2, o)
    if o.skip:
        t, dt = t + z, dt + v
    new, dnew = _norm_and_jvp(F.relu(t), dt * (t > 0), n3, b3, o)

    zf, vf = state[-1], direction[-1]
    wz, wm = gate_weights(pf, o)
    a = gate_constants(new, pf, o) + F.linear(zf, wz)
    da = F.linear(dnew, wm) + F.linear(vf, wz)
    if o.gate == "sigmoid":
        a = torch.sigmoid(a)
        da = da * a * (1 - a)
    if gate_mask is not None:
        a, da = a * gate_mask, da * gate_mask
    s = a.sum(0)
    y = F.linear(s * zf, pf.weight, pf.bias)
    dy = F.linear(da.sum(0) * zf + s * vf, pf.weight)
    if fusion_mask is not None:
        y, dy = y * fusion_mask, dy * fusion_mask
    y = y + injection
    if o.tail == "norm_relu":
        out, dfused = _norm_and_jvp(y, dy, pf.norm_weight, pf.norm_bias, o)
        dfused = dfused * (out > 0)
    else:
        _, dfused = _norm_and_jvp(F.relu(y), dy * (y > 0), pf.norm_weight, pf.norm_bias, o)
    return torch.cat((dnew, dfused.unsqueeze(0)))


def clear_absent(state: Tensor, present: Tensor) -> Tensor:
    """The state (N+1, R, d) with 0 for absent modalities."""
    return torch.cat((torch.where(present.unsqueeze(-1), state[:-1], 0.0), state[-1:]))
