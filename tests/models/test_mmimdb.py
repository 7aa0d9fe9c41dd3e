"""Maxout by hand, and the host network of MM-IMDB."""

import pytest
import torch

from deqfusion import DEQFusion
from deqfusion.fusions import ConcatFusion
from deqfusion.models.mmimdb import Maxout, MaxoutClassifier


def test_maxout_is_the_largest_of_its_maps():
    layer = Maxout(2, 3, pieces=4)
    x = torch.randn(5, 2)
    maps = [(x @ layer.maps.weight[k::4].T + layer.maps.bias[k::4]) for k in range(4)]
    torch.testing.assert_close(layer(x), torch.stack(maps).amax(dim=0))


def _classifier(fusion, **options):
    return MaxoutClassifier((6, 9), 5, fusion, dim=8, hidden=(7, 10), **options)


def test_shapes_and_what_was_fused():
    model = _classifier(DEQFusion(8, 2)).eval()
    inputs = (torch.randn(4, 6), torch.randn(4, 9))
    output = model(inputs)
    assert output.logits.shape == (4, 5)
    assert [feature.shape for feature in output.features] == [(4, 8), (4, 8)]
    torch.testing.assert_close(output.logits, model.head(output.equilibrium.fused))
    torch.testing.assert_close(
        output.equilibrium.fused, model.fusion.equilibrium(output.features).fused
    )


def test_a_fusion_without_a_solve_has_no_equilibrium():
    model = _classifier(ConcatFusion(8, 2))
    output = model((torch.randn(4, 6), torch.randn(4, 9)))
    assert output.equilibrium is None
    torch.testing.assert_close(output.logits, model.head(model.fusion(output.features)))


def test_every_parameter_learns():
    model = _classifier(DEQFusion(8, 2, tail="norm_relu", gate="identity", skip=True))
    model((torch.randn(6, 6), torch.randn(6, 9))).logits.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A batch's mean is taken out after the last maxout layer, and with it that layer's bias.
    assert not [name for name in without if "maps.bias" not in name]


def test_published_widths():
    model = MaxoutClassifier((300, 4096), 23, ConcatFusion(512, 2))
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if "maps.weight" in name]
    assert shapes == [(1024, 300), (1024, 512), (2048, 4096), (1024, 1024)]
    assert model.head.weight.shape == (23, 512)


def test_hidden_widths_fit_the_modalities():
    with pytest.raises(ValueError, match=r"hidden: got 1 widths, expected one for each of 2"):
        MaxoutClassifier((6, 9), 5, ConcatFusion(8, 2), hidden=(7,))
