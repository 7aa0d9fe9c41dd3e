"""Data sets for the tasks, one file for each published format."""

from .digits import DIGITS_MODALITIES, DigitsData, DigitsPart, digit_modalities, load_digits
from .errors import DataError
from .indexed import load_indexed
from .mmimdb import MMIMDB_SPLIT, MMIMDBFile, mmimdb_split
from .mogonet import (
    LabelledModalities,
    MogonetData,
    load_mogonet,
    read_labels,
    read_matrix,
    repeated_splits,
    stratified_folds,
    stratified_holdout,
    stratified_shuffles,
)
from .mosi import MOSI_MODALITIES, MosiData, MosiPart, hold_out_videos, load_mosi
from .multiview import load_multiview
from .regions import RegionFeatures
from .vqa import Question, VQAData, answer_vocabulary, hold_out_images, load_vqa, read_questions

__all__ = [
    "DIGITS_MODALITIES",
    "MMIMDB_SPLIT",
    "MOSI_MODALITIES",
    "DataError",
    "DigitsData",
    "DigitsPart",
    "LabelledModalities",
    "MMIMDBFile",
    "MogonetData",
    "MosiData",
    "MosiPart",
    "Question",
    "RegionFeatures",
    "VQAData",
    "answer_vocabulary",
    "digit_modalities",
    "hold_out_images",
    "hold_out_videos",
    "load_digits",
    "load_indexed",
    "load_mogonet",
    "load_mosi",
    "load_multiview",
    "load_vqa",
    "mmimdb_split",
    "read_labels",
    "read_matrix",
    "read_questions",
    "repeated_splits",
    "stratified_folds",
    "stratified_holdout",
    "stratified_shuffles",
]
