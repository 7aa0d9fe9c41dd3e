"""Standardisation of features, and the host network of MOSI."""

import torch

from deqfusion import DEQFusion
from deqfusion.fusions import SumFusion
from deqfusion.models.mosi import FeatureEncoder, SentimentRegressor


def test_features_are_standardised_as_fitted():
    encoder = FeatureEncoder(2, 4)
    encoder.project = torch.nn.Identity()
    values = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]])
    encoder.scaling.fit([values])
    standard = encoder(values)
    torch.testing.assert_close(standard.mean(dim=0), torch.zeros(2))
    torch.testing.assert_close(standard.std(dim=0, correction=0), torch.ones(2))


def test_standardisation_travels_with_the_state():
    fitted, blank = (FeatureEncoder(3, 4) for _ in range(2))
    fitted.scaling.fit([torch.randn(9, 3) * 7 + 2])
    blank.load_state_dict(fitted.state_dict())
    x = torch.randn(2, 3)
    torch.testing.assert_close(blank(x), fitted(x), rtol=0, atol=0)


def test_one_score_per_row_and_what_was_fused():
    encoders = [FeatureEncoder(width, 8, dropout=0.5) for width in (5, 3)]
    model = SentimentRegressor(encoders, DEQFusion(8, 2), 8, dropout=0.5).eval()
    output = model((torch.randn(6, 5), torch.randn(6, 3)))
    assert output.scores.shape == (6,)
    torch.testing.assert_close(output.scores, model.head(output.equilibrium.fused)[:, 0])
    output.scores.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    plain = SentimentRegressor(encoders, SumFusion(8, 2), 8)
    assert plain((torch.randn(6, 5), torch.randn(6, 3))).equilibrium is None
