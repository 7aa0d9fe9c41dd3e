"""The fusion cell written out from its equations, one `torch.nn.functional` call per term.

Parameters are a mapping with the names of `DEQFusion.state_dict()`. Nothing is hoisted, batched
or reordered: every gate a_i is formed by its own product W_g(z_f + z_i), every modality runs by
itself, and the weighted sum of the features is a loop. In fp64 this is the oracle of the tests.

    modality   h   = ReLU(GN_1(W_1 z_i + b_1))
               z_i = GN_3(ReLU(GN_2(W_2 h + b_2 + x_i) (+ z_i if skip)))
    gate       a_i = sigma(W_g (z_f + z_i) + b_g), or W_g [z_f; z_i] for "concat"
    fusion     z_f = GN_f(ReLU(W_f sum_i a_i * z_f + b_f + x_f))

The gate reads the modality states *after* their own step, as the authors' code does. With the
tail "norm_relu" the fusion block ends in ReLU(GN_f(...)); the modality block keeps its tail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CellOptions:
    """Which of the cell's variants to evaluate; the fields are those of `DEQFusion`."""

    gate: str = "sigmoid"
    gate_input: str = "sum"
    skip: bool = False
    tail: str = "relu_norm"
    num_groups: int = 4
    eps: float = 1e-5


def inject(
    parameters: Mapping[str, Tensor], features: Sequence[Tensor], present: Tensor | None = None
) -> Tensor:
    """Forms the injected fusion feature x_f = sum_i w_i x_i + b.

    Args:
        parameters: `injection_weight` (N,) and `injection_bias` (1,).
        features: N tensors (B, d).
        present: bool (B, N), False where a modality is missing; None if none is.

    Returns:
        x_f, (B, d).
    """
    total = torch.zeros_like(features[0])
    for i, feature in enumerate(features):
        term = parameters["injection_weight"][i] * feature
        if present is not None:
            term = torch.where(present[:, i : i + 1], term, torch.zeros_like(term))
        total = total + term
    return total + parameters["injection_bias"]


def textbook_cell(
    parameters: Mapping[str, Tensor],
    state: Tensor,
    features: Sequence[Tensor],
    options: CellOptions,
    *,
    injection: Tensor | None = None,
    present: Tensor | None = None,
    gate_dropout: Tensor | None = None,
    fusion_dropout: Tensor | None = None,
) -> Tensor:
    """Applies the joint map once.

    Args:
        parameters: stacked parameters under the names of `DEQFusion.state_dict()`.
        state: (N+1, B, d), modalities then fusion.
        features: N tensors (B, d).
        options: the variant of the cell.
        injection: x_f (B, d); formed from the features when None.
        present: bool (B, N), False where a modality is missing, whose next state is 0; None if
            none is.
        gate_dropout: scaled keep mask that multiplies each a_i, broadcastable to (N, B, d).
        fusion_dropout: scaled keep mask (B, d) that multiplies W_f u + b_f.

    Returns:
        The next state, (N+1, B, d), of the state's dtype.
    """
    if injection is None:
        injection = inject(parameters, features, present)

    def norm(values: Tensor, name: str, index: int | None = None) -> Tensor:
        weight, bias = parameters[f"{name}_weight"], parameters[f"{name}_bias"]
        if index is not None:
            weight, bias = weight[index], bias[index]
        return F.group_norm(values, options.num_groups, weight, bias, options.eps)

    def linear(values: Tensor, name: str, index: int | None = None) -> Tensor:
        weight, bias = parameters[f"{name}_weight"], parameters[f"{name}_bias"]
        if index is not None:
            weight, bias = weight[index], bias[index]
        return F.linear(values, weight, bias)

    fused = state[-1]
    next_modalities = []
    gated_sum = torch.zeros_like(fused)
    for i, feature in enumerate(features):
        w1 = F.linear(state[i], parameters["modality_weight1"][i], parameters["modality_bias1"][i])
        hidden = F.relu(norm(w1, "norm1", i))
        w2 = F.linear(hidden, parameters["modality_weight2"][i], parameters["modality_bias2"][i])
        total = norm(w2 + feature, "norm2", i)
        if options.skip:
            total = total + state[i]
        modality = norm(F.relu(total), "norm3", i)
        if present is not None:
            modality = torch.where(present[:, i : i + 1], modality, torch.zeros_like(modality))
        next_modalities.append(modality)

        if options.gate_input == "concat":
            gate = linear(torch.cat([fused, modality], dim=-1), "gate")
        else:
            gate = linear(fused + modality, "gate")
        if options.gate == "sigmoid":
            gate = torch.sigmoid(gate)
        if gate_dropout is not None:
            gate = gate * gate_dropout.expand(len(features), *fused.shape)[i]
        if present is not None:
            gate = torch.where(present[:, i : i + 1], gate, torch.zeros_like(gate))
        gated_sum = gated_sum + gate * fused

    out = linear(gated_sum, "fusion")
    if fusion_dropout is not None:
        out = out * fusion_dropout
    out = out + injection
    if options.tail == "norm_relu":
        next_fused = F.relu(norm(out, "fusion_norm"))
    else:
        next_fused = norm(F.relu(out), "fusion_norm")
    return torch.stack([*next_modalities, next_fused])
