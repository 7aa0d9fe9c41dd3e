"""Host networks: encoders around a fusion, and a head; no reading of files, no training."""

from .classifier import ClassifierOutput, MultimodalClassifier

__all__ = ["ClassifierOutput", "MultimodalClassifier"]
