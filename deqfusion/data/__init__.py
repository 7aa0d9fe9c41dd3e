"""Data sets for the tasks: handwritten digits as three modalities, and MOGONET's CSV folders."""

from .digits import DIGITS_MODALITIES, DigitsData, DigitsPart, digit_modalities, load_digits
from .errors import DataError
from .mogonet import (
    LabelledModalities,
    MinMaxScaling,
    MogonetData,
    load_mogonet,
    read_labels,
    read_matrix,
    repeated_splits,
    stratified_holdout,
)

__all__ = [
    "DIGITS_MODALITIES",
    "DataError",
    "DigitsData",
    "DigitsPart",
    "LabelledModalities",
    "MinMaxScaling",
    "MogonetData",
    "digit_modalities",
    "load_digits",
    "load_mogonet",
    "read_labels",
    "read_matrix",
    "repeated_splits",
    "stratified_holdout",
]
