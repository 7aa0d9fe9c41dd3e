"""The VQA model: every part learns with every fusion; padding and other rows change nothing."""

import pytest
import torch
from torch import nn

from deqfusion import DEQFusion
from deqfusion.fusions import FUSION_NAMES, build_fusion
from deqfusion.models.vqa import ENCODERS, QuestionEncoder, RegionAttention, VQAModel

WORDS = torch.tensor([[4, 2, 3, 0, 0], [5, 6, 0, 0, 0], [2, 3, 4, 5, 6]])
PLACES = WORDS.flatten().nonzero().squeeze(1)
COUNTS = torch.tensor([3, 1, 2])
DIM, REGION_WIDTH, ANSWERS = 16, 6, 7


def build(fusion="deq", encoder="gru", dropout=0.0):
    torch.manual_seed(0)
    return VQAModel(
        QuestionEncoder(8, DIM, encoder, dropout=dropout),
        DIM,
        ANSWERS,
        RegionAttention(REGION_WIDTH, DIM, dropout=dropout),
        build_fusion(fusion, DIM, 2),
        dropout,
    )


def regions(rows=3):
    return torch.randn(rows, 4, REGION_WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("fusion", [name.replace("K", "3") for name in FUSION_NAMES])
def test_every_fusion_and_encoder_learns(fusion, encoder):
    model = build(fusion, encoder)
    output = model(WORDS, PLACES, regions(), COUNTS)
    assert output.logits.shape == (3, ANSWERS)
    assert [part.shape for part in output.features] == [(10, DIM)] * 2
    output.logits.square().sum().backward()
    # What a softmax over words leaves out.
    silent = {"importance.bias"}
    for name, parameter in model.named_parameters():
        assert name in silent or parameter.grad.abs().max() > 0, name
    assert (model.encoder.words.weight.grad[[0, 1, 7]] == 0).all()


def test_equilibrium_is_solved_for_words_and_not_for_padding():
    output = build()(WORDS, PLACES, regions(), COUNTS)
    assert isinstance(output.fusion, DEQFusion)
    assert output.equilibrium.fused.shape == (10, DIM)
    assert output.equilibrium.stats.converged.all()
    penalty = output.fusion.jacobian_penalty(output.equilibrium, output.features)
    assert penalty > 0
    other = build("concat")(WORDS, PLACES, regions(), COUNTS)
    assert (other.equilibrium, other.fusion) == (None, None)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("fusion", ["deq", "gated", None])
def test_padding_and_other_questions_change_nothing(encoder, fusion):
    torch.manual_seed(0)
    if fusion is None:
        model = VQAModel(QuestionEncoder(8, DIM, encoder), DIM, ANSWERS).eval()
        images = (None, None)
    else:
        model, images = build(fusion, encoder).eval(), (regions(), COUNTS)
    whole = model(WORDS, PLACES, *images).logits
    for row, length in enumerate([3, 2, 5]):
        alone = [None if part is None else part[row : row + 1] for part in images]
        if fusion is not None:
            alone[0] = alone[0][:, : COUNTS[row]]
        one = model(WORDS[row : row + 1, :length], torch.arange(length), *alone).logits
        torch.testing.assert_close(one[0], whole[row], rtol=1e-4, atol=1e-5)


def test_what_stands_behind_the_last_region_is_not_looked_at():
    model, seen = build().eval(), regions()
    before = model(WORDS, PLACES, seen, COUNTS).logits
    for row, count in enumerate(COUNTS.tolist()):
        seen[row, count:] = torch.nan
    torch.testing.assert_close(model(WORDS, PLACES, seen, COUNTS).logits, before)
    seen[0, 2] += 1.0
    after = model(WORDS, PLACES, seen, COUNTS).logits
    assert (after[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(after[1:], before[1:])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_order_of_words_matters(encoder):
    model = VQAModel(QuestionEncoder(8, DIM, encoder), DIM, ANSWERS).eval()
    words = torch.tensor([[2, 3, 4], [4, 3, 2]])
    logits = model(words, torch.arange(6)).logits
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_first_predictions_are_rare():
    model = VQAModel(QuestionEncoder(8, DIM), DIM, 1000).eval()
    assert torch.sigmoid(model(WORDS, PLACES).logits).sum(dim=1).mean() < 3


def test_dropout_only_in_training():
    model = build(dropout=0.5).eval()
    first, second = (model(WORDS, PLACES, regions(), COUNTS).logits for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(WORDS, PLACES, regions(), COUNTS).logits, first)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="kind: got 'lstm', expected one of gru, transformer"):
        QuestionEncoder(8, DIM, "lstm")
    with pytest.raises(ValueError, match="attention, fusion: got one of them"):
        VQAModel(QuestionEncoder(8, DIM), DIM, ANSWERS, fusion=nn.Identity())
    with pytest.raises(ValueError, match="regions: got none, expected some"):
        build()(WORDS, PLACES)
    with pytest.raises(ValueError, match="regions: got some, expected none"):
        VQAModel(QuestionEncoder(8, DIM), DIM, ANSWERS)(WORDS, PLACES, regions(), COUNTS)
