"""Data sets for the tasks: readers of published formats, which check them, and splits."""

from .digits import DIGITS_MODALITIES, DigitsData, DigitsPart, digit_modalities, load_digits
from .errors import DataError
from .mmimdb import MMIMDB_SPLIT, MMIMDBFile, mmimdb_split
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
from .mosi import MOSI_MODALITIES, MosiData, MosiPart, hold_out_videos, load_mosi

__all__ = [
    "DIGITS_MODALITIES",
    "MMIMDB_SPLIT",
    "MOSI_MODALITIES",
    "DataError",
    "DigitsData",
    "DigitsPart",
    "LabelledModalities",
    "MMIMDBFile",
    "MinMaxScaling",
    "MogonetData",
    "MosiData",
    "MosiPart",
    "digit_modalities",
    "hold_out_videos",
    "load_digits",
    "load_mogonet",
    "load_mosi",
    "mmimdb_split",
    "read_labels",
    "read_matrix",
    "repeated_splits",
    "stratified_holdout",
]
