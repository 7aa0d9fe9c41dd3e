"""Tasks with more than their options say: what an analysis holds constant, or measures."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..engine import Config, Recipe
from ..module import DEQFusion


def extended(recipe: Recipe, extension: type[Any]) -> Recipe:
    """Return a recipe whose methods are first the extension's, a `Recipe`, then the recipe's."""
    kind = type(extension.__name__, (extension, type(recipe)), {})
    return cast(Recipe, kind())


def fusions_of(model: nn.Module) -> list[DEQFusion]:
    """The equilibrium fusions of a model."""
    return [module for module in model.modules() if isinstance(module, DEQFusion)]


class WithoutGate(Recipe):
    """Gates that are held at 1/2, where sigmoid gates begin: the modalities enter by x_f alone."""

    def build(self, config: Config) -> nn.Module:
        """Make the task's model, with gates that are not learned."""
        model = super().build(config)  # type: ignore[safe-super]
        for fusion in fusions_of(model):
            _hold([fusion.gate_weight, fusion.gate_bias], 0.0)
        return model


class WithoutProjection(Recipe):
    """Modality blocks that learn nothing: z_i = GN(ReLU(GN(x_i)))."""

    def build(self, config: Config) -> nn.Module:
        """Make the task's model, with modality blocks of zero weights and plain norms."""
        model = super().build(config)  # type: ignore[safe-super]
        for fusion in fusions_of(model):
            for name, parameter in fusion.named_parameters():
                if name.startswith("modality_"):
                    _hold([parameter], 0.0)
                elif name.startswith(("norm1_", "norm2_", "norm3_")):
                    _hold([parameter], 1.0 if name.endswith("weight") else 0.0)
        return model


def _hold(parameters: list[nn.Parameter], value: float) -> None:
    for parameter in parameters:
        with torch.no_grad():
            parameter.fill_(value)
        parameter.requires_grad_(False)
