"""A transformer of Hugging Face as a text encoder: a tiny one with random weights."""

import pytest
import torch

from deqfusion.models.text import TransformerEncoder

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (the extra text)"
)

_SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


def _bert():
    return transformers.BertModel(transformers.BertConfig(**_SIZES), add_pooling_layer=False)


def _distilbert():
    sizes = {"vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
    return transformers.DistilBertModel(transformers.DistilBertConfig(**sizes))


@pytest.mark.parametrize("make", [_bert, _distilbert])
def test_mean_over_tokens_but_not_over_padding(make):
    transformer = make().eval()
    encoder = TransformerEncoder(transformer, 6)
    encoder.project = torch.nn.Identity()
    ids = torch.randint(1, 20, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    encoded = encoder({"input_ids": ids, "attention_mask": mask})
    alone = transformer(input_ids=ids[:1, :3]).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(encoded[:1], alone)
    changed = ids.clone()
    changed[0, 3:] = 7
    again = encoder({"input_ids": changed, "attention_mask": mask})
    torch.testing.assert_close(again, encoded)


def test_projected_and_trained_through():
    encoder = TransformerEncoder(_bert(), 6)
    ids, mask = torch.randint(1, 20, (3, 4)), torch.ones(3, 4, dtype=torch.long)
    encoded = encoder({"input_ids": ids, "attention_mask": mask})
    assert encoded.shape == (3, 6)
    encoded.square().sum().backward()
    # Keys' biases shift every logit of a softmax alike: they have no gradient but rounding.
    assert all(p.grad is not None for p in encoder.parameters())
