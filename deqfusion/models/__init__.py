"""Host networks: encoders around a fusion, and a head; no reading of files, no training."""

from .classifier import ClassifierOutput, MultimodalClassifier
from .dynamics import MultimodalDynamics
from .scaling import SCALINGS, InputScaling

__all__ = [
    "SCALINGS",
    "ClassifierOutput",
    "InputScaling",
    "MultimodalClassifier",
    "MultimodalDynamics",
]
