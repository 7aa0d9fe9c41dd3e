"""Host networks: encoders around a fusion, and a head; no reading of files, no training."""

from .classifier import ClassifierOutput, MultimodalClassifier
from .mmimdb import Maxout, MaxoutClassifier, MultilabelOutput
from .mosi import FeatureEncoder, SentimentOutput, SentimentRegressor
from .text import TransformerEncoder

__all__ = [
    "ClassifierOutput",
    "FeatureEncoder",
    "Maxout",
    "MaxoutClassifier",
    "MultilabelOutput",
    "MultimodalClassifier",
    "SentimentOutput",
    "SentimentRegressor",
    "TransformerEncoder",
]
