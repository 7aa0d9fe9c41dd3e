"""A small task for the engine's tests: two modalities whose first features decide the class."""

import torch

from deqfusion.engine import Splits, TensorSamples
from deqfusion.tasks.classification import Classification


def rows(count, seed):
    """Samples of two classes; float32 inputs of 5 and 4 features."""
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(torch.randn(count, width, generator=generator) for width in (5, 4))
    labels = (inputs[0][:, 0] + inputs[1][:, 0] > 0).long()
    return TensorSamples((inputs, labels))


class Problem(Classification):
    name = "problem"
    help = "two modalities"

    def build(self, config):
        return super().build({"input_widths": [5, 4], "num_classes": 2, **config})

    def load(self, data_dir, config):
        facts = {"input_widths": [5, 4], "num_classes": 2, "data_sha256": "0" * 64}
        return Splits(rows(40, 1), rows(20, 2), rows(20, 3)), facts


RECIPE = Problem()


__all__ = ["RECIPE", "Problem", "rows"]
