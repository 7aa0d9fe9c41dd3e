"""Data sets for the tasks, one file for each published format."""

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
from .regions import RegionFeatures
from .vqa import Question, VQAData, answer_vocabulary, hold_out_images, load_vqa, read_questions

__all__ = [
    "DIGITS_MODALITIES",
    "DataError",
    "DigitsData",
    "DigitsPart",
    "LabelledModalities",
    "MinMaxScaling",
    "MogonetData",
    "Question",
    "RegionFeatures",
    "VQAData",
    "answer_vocabulary",
    "digit_modalities",
    "hold_out_images",
    "load_digits",
    "load_mogonet",
    "load_vqa",
    "read_labels",
    "read_matrix",
    "read_questions",
    "repeated_splits",
    "stratified_holdout",
]
