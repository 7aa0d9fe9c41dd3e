"""The problem every contender solves: parameters, features, loss, and the cell from the equations.

`TextbookCell` is the joint map z -> f(z; x) written with `nn.Linear` and `nn.GroupNorm`, one
modality after the other, as a reader of the paper would write it. It serves twice: in fp32 it is
the cell of the baselines, in fp64 it is what every answer is verified with.

Shapes: B rows, N modalities, width d. A state is (N + 1, B, d), modalities first and the fusion
block last; the baselines carry it flat as (B, (N + 1) d).

Source: arXiv 2306.16645, equations of the purify-then-combine fusion block.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_GROUPS = 4
LOSSES = ("sum", "mean")


@dataclass(frozen=True)
class Shape:
    """Rows, width and number of modalities of one benchmark case."""

    batch: int
    dim: int
    num_modalities: int

    def __post_init__(self) -> None:
        for name in ("batch", "dim", "num_modalities"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % NUM_GROUPS:
            raise ValueError(
                f"shape {self}: its width d must be a multiple of {NUM_GROUPS}, the number of "
                f"groups of the normalisations, got {self.dim}"
            )

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads `"612,500,3"`.

        Args:
            text: rows, width and modalities, separated by commas.

        Returns:
            The shape.

        Raises:
            ValueError: if the text is not three positive integers, or the width does not divide.
        """
        parts = text.split(",")
        try:
            batch, dim, num_modalities = (int(part) for part in parts)
        except ValueError as error:
            raise ValueError(f"shape must be B,d,N (such as 612,500,3), got {text!r}") from error
        return cls(batch, dim, num_modalities)

    def __str__(self) -> str:
        return f"{self.batch},{self.dim},{self.num_modalities}"


class TextbookCell(nn.Module):
    """The joint map, one `nn.Linear` and one `nn.GroupNorm` per line of the equations.

    Args:
        parameters: `Problem.parameters`, copied into separate leaves per modality, because a
            gradient through slices of a stacked weight would cost the baselines extra copies.
        kink: where ReLU starts to pass its input; 0, but for verification beside a kink.
    """

    def __init__(self, parameters: dict[str, Tensor], kink: float = 0.0) -> None:
        super().__init__()
        self.kink = kink
        num_modalities, dim = parameters["modality_bias1"].shape
        self.dim, self.num_modalities = dim, num_modalities

        def linears(stem: str) -> nn.ModuleList:
            return nn.ModuleList(
                _linear(weight, bias)
                for weight, bias in zip(
                    parameters[f"modality_weight{stem}"],
                    parameters[f"modality_bias{stem}"],
                    strict=True,
                )
            )

        def norms(stem: str) -> nn.ModuleList:
            return nn.ModuleList(
                _group_norm(weight, bias)
                for weight, bias in zip(
                    parameters[f"{stem}_weight"], parameters[f"{stem}_bias"], strict=True
                )
            )

        self.linear1, self.linear2 = linears("1"), linears("2")
        self.norm1, self.norm2, self.norm3 = norms("norm1"), norms("norm2"), norms("norm3")
        self.gate = _linear(parameters["gate_weight"], parameters["gate_bias"])
        self.fuse = _linear(parameters["fusion_weight"], parameters["fusion_bias"])
        self.fusion_norm = _group_norm(
            parameters["fusion_norm_weight"], parameters["fusion_norm_bias"]
        )
        self.injection_weight = nn.Parameter(parameters["injection_weight"].detach().clone())
        self.injection_bias = nn.Parameter(parameters["injection_bias"].detach().clone())

    def inject(self, features: Tensor) -> Tensor:
        """Weighted sum of the features: (N, B, d) -> (B, d)."""
        return torch.einsum("n,nbd->bd", self.injection_weight, features) + self.injection_bias

    def forward(self, flat: Tensor, features: Tensor, injected: Tensor) -> Tensor:
        """One step of the joint map.

        Args:
            flat: state (B, (N + 1) d).
            features: (N, B, d).
            injected: `inject(features)`, (B, d).

        Returns:
            The next state, (B, (N + 1) d).
        """
        *modalities, fused = flat.split(self.dim, dim=1)
        purified = self.purify(modalities, features)
        return torch.cat([*purified, self.combine(purified, fused, injected)], dim=1)

    def purify(self, modalities: Sequence[Tensor], features: Tensor) -> list[Tensor]:
        """The modality blocks' steps: N states (B, d) and features (N, B, d) -> N states."""
        purified = []
        for i, state in enumerate(modalities):
            hidden = self.relu(self.norm1[i](self.linear1[i](state)))
            hidden = self.norm2[i](self.linear2[i](hidden) + features[i])
            purified.append(self.norm3[i](self.relu(hidden)))
        return purified

    def relu(self, value: Tensor) -> Tensor:
        """ReLU, or with a kink elsewhere the input where it is above it, else 0."""
        return F.relu(value) if self.kink == 0 else value * (value > self.kink)

    def combine(self, purified: Sequence[Tensor], fused: Tensor, injected: Tensor) -> Tensor:
        """The fusion block's step: N states (B, d), fused (B, d), injected (B, d) -> (B, d)."""
        gated = [torch.sigmoid(self.gate(fused + state)) * fused for state in purified]
        mixed = self.fuse(torch.stack(gated).sum(dim=0)) + injected
        return self.fusion_norm(self.relu(mixed))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def _group_norm(weight: Tensor, bias: Tensor) -> nn.GroupNorm:
    layer = nn.GroupNorm(NUM_GROUPS, weight.shape[0], dtype=weight.dtype, device=weight.device)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


class Problem:
    """One benchmark case: fixed random parameters, features and loss.

    Args:
        shape: rows, width, modalities.
        seed: seeds parameters and inputs; the same seed gives the same problem.
        loss: "sum" for sum(fused * w), "mean" for the same divided by the batch, which is what
            a training loss does to the gradient that enters the backward solve.

    Attributes:
        parameters: fp32 tensors under the names of `DEQFusion.state_dict()`, drawn from the
            default initialisation of `nn.Linear`.
        features: (N, B, d) fp32, standard normal.
        cotangent: (B, d) fp32, the derivative of the loss by the fused state.

    Raises:
        ValueError: if the loss is unknown.
    """

    def __init__(self, shape: Shape, seed: int = 0, loss: str = "sum") -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        self.shape, self.seed, self.loss = shape, seed, loss
        generator = torch.Generator().manual_seed(seed)
        n, d = shape.num_modalities, shape.dim
        bound = d**-0.5

        def uniform(*size: int) -> Tensor:
            return torch.empty(*size).uniform_(-bound, bound, generator=generator)

        self.parameters = {
            "modality_weight1": uniform(n, d, d),
            "modality_bias1": uniform(n, d),
            "modality_weight2": uniform(n, d, d),
            "modality_bias2": uniform(n, d),
            "gate_weight": uniform(d, d),
            "gate_bias": uniform(d),
            "fusion_weight": uniform(d, d),
            "fusion_bias": uniform(d),
            "fusion_norm_weight": torch.ones(d),
            "fusion_norm_bias": torch.zeros(d),
            "injection_weight": torch.ones(n),
            "injection_bias": torch.zeros(1),
        }
        for norm in ("norm1", "norm2", "norm3"):
            self.parameters[f"{norm}_weight"] = torch.ones(n, d)
            self.parameters[f"{norm}_bias"] = torch.zeros(n, d)
        self.features = torch.randn(n, shape.batch, d, generator=generator)
        self.cotangent = torch.randn(shape.batch, d, generator=generator)
        if loss == "mean":
            self.cotangent /= shape.batch

    @cached_property
    def cell64(self) -> TextbookCell:
        """The joint map in fp64, for verification."""
        return TextbookCell(self.parameters).double().requires_grad_(False)

    @property
    def penalty_weight(self) -> float:
        """Of the Jacobian penalty in the loss: the mean over a row's entries, as the loss sums."""
        return float(self.shape.batch) if self.loss == "sum" else 1.0

    def to(self, device: torch.device | str) -> Problem:
        """The same problem with its tensors on a device."""
        moved = copy.copy(self)
        moved.__dict__.pop("cell64", None)
        moved.parameters = {name: value.to(device) for name, value in self.parameters.items()}
        moved.features, moved.cotangent = self.features.to(device), self.cotangent.to(device)
        return moved

    def flatten(self, state: Tensor) -> Tensor:
        """(N + 1, B, d) -> (B, (N + 1) d)."""
        return state.transpose(0, 1).flatten(1)

    def unflatten(self, flat: Tensor) -> Tensor:
        """(B, (N + 1) d) -> (N + 1, B, d), a view."""
        return flat.view(flat.shape[0], -1, self.shape.dim).transpose(0, 1)
