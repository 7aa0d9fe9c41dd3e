"""Parts of the cell that an analysis holds constant."""

import pytest
import torch
from torch.nn import functional as F

from deqfusion.analysis.extended import WithoutGate, WithoutProjection, extended, fusions_of
from deqfusion.engine import checked, fit
from tests.engine.problem import RECIPE

_ASKED = {"dim": 8, "epochs": 2, "tol": 1e-6, "max_steps": 100, "jacobian_weight": 1.0}


def _trained(extension, **more):
    recipe = extended(RECIPE, extension)
    splits, facts = RECIPE.load(None, {})
    config = {**checked(recipe, {**_ASKED, **more}), **facts}
    model = recipe.build(config)
    recipe.prepare(model, splits, config)
    fit(recipe, model, splits, config)
    inputs = [view.double() for view in splits.test.data[0]]
    with torch.no_grad():
        return model, model.eval()(inputs)


def test_an_extension_is_the_task_otherwise():
    recipe = extended(RECIPE, WithoutGate)
    assert (recipe.name, recipe.selection) == (RECIPE.name, RECIPE.selection)
    assert checked(recipe, {}) == checked(RECIPE, {})
    assert fusions_of(RECIPE.build(checked(RECIPE, {"fusion": "sum"}))) == []


def test_without_gate_every_gate_is_a_half():
    model, output = _trained(WithoutGate)
    (fusion,) = fusions_of(model)
    weights = fusion.modality_weights(output.equilibrium)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5))
    # z_f = GN(ReLU(W_f N/2 z_f + b_f + x_f)): the modality states have no way into it.
    x_f = sum(w * x for w, x in zip(fusion.injection_weight, output.features, strict=True))
    x_f = x_f + fusion.injection_bias
    inner = F.linear(output.equilibrium.fused, fusion.fusion_weight, fusion.fusion_bias) + x_f
    expected = F.group_norm(inner.relu(), 4, fusion.fusion_norm_weight, fusion.fusion_norm_bias)
    solved = output.equilibrium.stats.converged[-1]
    assert solved.float().mean() > 0.5
    fused = output.equilibrium.fused[solved]
    torch.testing.assert_close(fused, expected[solved], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fusion", ["deq", "weight_tied:2"])
def test_without_projection_a_modality_is_its_normalised_feature(fusion):
    weight = {} if fusion == "deq" else {"jacobian_weight": 0.0}
    _, output = _trained(WithoutProjection, fusion=fusion, **weight)
    for x, z in zip(output.features, output.equilibrium.modalities, strict=True):
        expected = F.group_norm(F.group_norm(x, 4).relu(), 4)
        torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("extension", [WithoutGate, WithoutProjection])
def test_only_what_is_held_stays(extension):
    model, _ = _trained(extension)
    (fusion,) = fusions_of(model)
    held = {name for name, parameter in fusion.named_parameters() if not parameter.requires_grad}
    gate = {"gate_weight", "gate_bias"}
    modality = {name for name in held if name.startswith(("modality_", "norm"))}
    assert held == (gate if extension is WithoutGate else modality)
    assert fusion.fusion_bias.requires_grad
    assert len(held) == (2 if extension is WithoutGate else 10)
