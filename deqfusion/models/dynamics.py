"""Multimodal Dynamics, the host of the omics tasks: it trusts each feature and modality as needed.

    g_i = sigmoid(V_i x_i)                        gates on the input features
    h_i = dropout(ReLU(LayerNorm(W_i (g_i * x_i))))
    l_i = C_i h_i,   c_i = t_i . h_i              logits and confidence of modality i alone
    logits = head(fusion(c_1 h_1, ..., c_N h_N))

    loss = CE(logits) + sum_i [mean g_i + CE(l_i) + (c_i - p_i)^2],   p_i = softmax(l_i)[label]

The confidence is trained to be the probability that a modality alone gives to the true class
(true class probability), so that an uninformative modality enters the fusion faintly.

Source: Z. Han et al., "Multimodal dynamics: dynamical fusion for trustworthy multimodal
classification", CVPR 2022. Differences: (1) any fusion in place of concatenation; (2) LayerNorm in
the encoders, since an equilibrium of faint features need not exist; (3) p_i is a target only, no
gradient flows into the classifiers through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..fusions import fuse
from .classifier import ClassifierOutput, projection


class MultimodalDynamics(nn.Module):
    """The host network; arguments as those of `MultimodalClassifier`.

    Args:
        input_widths: features of each modality.
        num_classes: classes to tell apart.
        dim: width of the encoded features.
        fusion: a module that maps N tensors (rows, dim) to one.
        dropout: after each encoder.
        scaling: of the inputs; None: none.
    """

    def __init__(
        self,
        input_widths: Sequence[int],
        num_classes: int,
        *,
        dim: int,
        fusion: nn.Module,
        dropout: float = 0.5,
        scaling: nn.Module | None = None,
    ) -> None:
        super().__init__()
        count = len(input_widths)
        self.scaling = scaling
        self.gates = nn.ModuleList(nn.Linear(width, width) for width in input_widths)
        self.encoders = nn.ModuleList(projection(width, dim, dropout) for width in input_widths)
        self.confidences = nn.ModuleList(nn.Linear(dim, 1) for _ in range(count))
        self.classifiers = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(count))
        self.fusion = fusion
        self.head = nn.Linear(dim, num_classes)
        for module in (*self.gates, *self.encoders, *self.confidences, *self.classifiers):
            module.apply(_xavier)
        _xavier(self.head)

    def forward(self, inputs: Sequence[Tensor], *, trace: bool = False) -> ClassifierOutput:
        """Classify rows; arguments and result as of `MultimodalClassifier`."""
        return self._classify(inputs, trace)[0]

    def loss(self, inputs: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, ClassifierOutput]:
        """Return the loss of rows, see the module's docstring, and their classification.

        Args:
            inputs: one (rows, width_i) per modality.
            labels: int64 (rows,).
        """
        output, gates, hidden, confidences = self._classify(inputs, False)
        loss = F.cross_entropy(output.logits, labels)
        for gate, h, confidence, classify in zip(
            gates, hidden, confidences, self.classifiers, strict=True
        ):
            logits = classify(h)
            target = torch.softmax(logits, -1).gather(1, labels.unsqueeze(1)).detach()
            loss = loss + gate.mean() + F.cross_entropy(logits, labels)
            loss = loss + F.mse_loss(confidence, target)
        return loss, output

    def _classify(
        self, inputs: Sequence[Tensor], trace: bool
    ) -> tuple[ClassifierOutput, list[Tensor], list[Tensor], list[Tensor]]:
        if self.scaling is not None:
            inputs = self.scaling(inputs)
        gates = [torch.sigmoid(g(x)) for g, x in zip(self.gates, inputs, strict=True)]
        hidden = [
            encode(gate * x) for encode, gate, x in zip(self.encoders, gates, inputs, strict=True)
        ]
        confidences = [t(h) for t, h in zip(self.confidences, hidden, strict=True)]
        features = tuple(c * h for c, h in zip(confidences, hidden, strict=True))
        fused, equilibrium = fuse(self.fusion, features, trace=trace)
        output = ClassifierOutput(self.head(fused), features, equilibrium)
        return output, gates, hidden, confidences


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(module.bias)
