"""Host networks: encoders around a fusion, and a head; no reading of files, no training."""

from .classifier import ClassifierOutput, MultimodalClassifier
from .dynamics import MultimodalDynamics
from .mmimdb import Maxout, MaxoutClassifier
from .mosi import FeatureEncoder, SentimentOutput, SentimentRegressor
from .scaling import SCALINGS, InputScaling
from .text import TransformerEncoder

__all__ = [
    "SCALINGS",
    "ClassifierOutput",
    "FeatureEncoder",
    "InputScaling",
    "Maxout",
    "MaxoutClassifier",
    "MultimodalClassifier",
    "MultimodalDynamics",
    "SentimentOutput",
    "SentimentRegressor",
    "TransformerEncoder",
]
