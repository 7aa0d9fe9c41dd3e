"""Fusions by name: what each computes, and what is refused."""

import pytest
import torch

from deqfusion import Anderson, DEQFusion
from deqfusion.fusions import FUSION_NAMES, build_fusion

_NAMES = [name.replace("K", "3") for name in FUSION_NAMES]


def _features(count=3, shape=(5, 8)):
    return [torch.randn(shape) for _ in range(count)]


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8)])
def test_same_call_for_all(name, shape):
    fusion, features = build_fusion(name, 8, 3), _features(shape=shape)
    fused = fusion(features)
    assert fused.shape == shape
    torch.testing.assert_close(fusion(torch.stack(features)), fused)


@pytest.mark.parametrize("name", _NAMES)
def test_every_parameter_and_feature_gets_a_gradient(name):
    fusion, features = build_fusion(name, 8, 2), _features(2)
    leaves = [feature.requires_grad_() for feature in features] + list(fusion.parameters())
    (fusion(features) ** 3).sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0


def test_sum_and_concat():
    features = _features()
    torch.testing.assert_close(build_fusion("sum", 8, 3)(features), sum(features))
    concat = build_fusion("concat", 8, 3)
    weights = concat.projection.weight.split(8, dim=1)
    by_hand = sum(x @ w.T for x, w in zip(features, weights, strict=True)) + concat.projection.bias
    torch.testing.assert_close(concat(features), by_hand)


def test_gates_open_and_close():
    gated, features = build_fusion("gated", 8, 2), _features(2)
    with torch.no_grad():
        gated.gates.weight.zero_()
        gated.gates.bias[:8], gated.gates.bias[8:] = 40.0, -40.0
    torch.testing.assert_close(gated(features), features[0])


def test_gates_see_every_modality():
    gated, features = build_fusion("gated", 8, 2), _features(2)
    silent = [features[0], torch.zeros_like(features[1])]
    own = torch.sigmoid(gated.gates(torch.cat(silent, -1)))[:, :8] * features[0]
    torch.testing.assert_close(gated(silent), own)
    assert (gated(features) - own - features[1]).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 4])
def test_weight_tied_is_that_many_steps_of_the_cell(steps):
    fusion, features = build_fusion(f"weight_tied:{steps}", 8, 2), _features(2)
    state = torch.zeros(3, 5, 8)
    for _ in range(steps):
        state = fusion.cell(state, features)
    torch.testing.assert_close(fusion(features), state[-1])


def test_tensor_fusion_is_a_low_rank_product():
    torch.manual_seed(0)
    fusion, features = build_fusion("tensor", 4, 3, rank=2), _features(3, (5, 4))
    with torch.no_grad():
        fusion.bias.normal_()
        fusion.weights.normal_()
    expected = fusion.bias.clone().expand(5, 4)
    for rank in range(2):
        product = torch.ones(5, 4)
        for factor, x in zip(fusion.factors, features, strict=True):
            rows = slice(4 * rank, 4 * rank + 4)
            product = product * (x @ factor.weight[rows].T + factor.bias[rows])
        expected = expected + fusion.weights[rank] * product
    torch.testing.assert_close(fusion(features), expected)


def test_attention_fusion_by_hand_and_tells_modalities_apart():
    torch.manual_seed(0)
    fusion, features = build_fusion("attention", 8, 3, num_heads=1), _features()
    tokens = torch.stack(features, dim=1)
    keys = tokens + fusion.embedding
    query, key, value = fusion.attention.in_proj_weight.split(8)
    scores = (keys @ query.T) @ (keys @ key.T).transpose(1, 2) / 8**0.5
    mixed = scores.softmax(-1) @ (tokens @ value.T) @ fusion.attention.out_proj.weight.T
    torch.testing.assert_close(fusion(features), (tokens + mixed).mean(1))
    with torch.no_grad():
        fusion.embedding.normal_()
    assert (fusion(features) - fusion(features[::-1])).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("tensor", {"rank": 0}, ValueError, "rank: got 0, expected"),
        ("tensor", {"num_heads": 2}, TypeError, "got options \\['num_heads'\\], expected 'rank'"),
        ("attention", {"num_heads": 3}, ValueError, "num_heads: got 3, expected a divisor of dim"),
        ("attention", {"rank": 3}, TypeError, "got options \\['rank'\\], expected 'num_heads'"),
    ],
)
def test_options_of_tensor_and_attention(name, options, kind, message):
    with pytest.raises(kind, match=message):
        build_fusion(name, 8, 2, **options)


def test_deq_takes_options():
    torch.manual_seed(0)
    fusion = build_fusion("deq", 64, 2, solver=Anderson(tol=1e-5), gate_input="concat")
    assert isinstance(fusion, DEQFusion)
    assert fusion.gate_weight.shape == (64, 128)
    features = _features(2, (5, 64))
    equilibrium = fusion.equilibrium(features)
    again = fusion.cell(equilibrium.state, features)
    assert (again - equilibrium.state).norm() < 1e-4 * again.norm()


@pytest.mark.parametrize("name", ["magic", "", "weight_tied", "DEQ"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=f"got '{name}', expected one of deq, concat, sum, gated"):
        build_fusion(name, 8, 2)


@pytest.mark.parametrize("steps", ["0", "-1", "2.5", "", "two"])
def test_bad_number_of_steps(steps):
    with pytest.raises(ValueError, match="expected weight_tied:K with a whole number K >= 1"):
        build_fusion(f"weight_tied:{steps}", 8, 2)


def test_options_that_a_fusion_does_not_have():
    with pytest.raises(TypeError, match=r"got options \['gate'\], expected none"):
        build_fusion("sum", 8, 2, gate="sigmoid")
    with pytest.raises(TypeError, match="which its name already sets"):
        build_fusion("weight_tied:2", 8, 2, adjoint=None)


@pytest.mark.parametrize("name", ["concat", "sum", "gated"])
def test_bad_features(name):
    fusion = build_fusion(name, 8, 2)
    with pytest.raises(ValueError, match="features: got 3 tensors, expected 2"):
        fusion(_features(3))
    with pytest.raises(ValueError, match=r"features\[0\]: got shape \(5, 7\)"):
        fusion(_features(2, (5, 7)))
    with pytest.raises(ValueError, match=r"features\[1\]: got shape \(4, 8\)"):
        fusion([torch.zeros(5, 8), torch.zeros(4, 8)])
    with pytest.raises(ValueError, match="dim: got 0"):
        build_fusion(name, 0, 2)
