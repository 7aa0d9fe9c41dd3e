"""Data sets for the tasks: one file per published format."""

from .digits import DIGITS_MODALITIES, DigitsData, DigitsPart, digit_modalities, load_digits
from .errors import DataError
from .indexed import load_indexed
from .mogonet import (
    LabelledModalities,
    MinMaxScaling,
    MogonetData,
    load_mogonet,
    read_labels,
    read_matrix,
    repeated_splits,
    stratified_folds,
    stratified_holdout,
    stratified_shuffles,
)
from .multiview import load_multiview

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
    "load_indexed",
    "load_mogonet",
    "load_multiview",
    "read_labels",
    "read_matrix",
    "repeated_splits",
    "stratified_folds",
    "stratified_holdout",
    "stratified_shuffles",
]
