"""Handwritten digits as three modalities, one of which is buried in noise for each image.

The 1,797 images of 8 x 8 pixels (0 to 16) come with scikit-learn: no download. Three views of each
image are computed: its 64 pixels; the magnitudes of its 2-D Fourier transform (40 values, the
half-plane of a real image, log(1 + |F|)); histograms of gradient orientation (8 directions in 3 x 3
overlapping cells of 4 x 4 pixels: 72 values). Every feature is standardised with the mean and
deviation of the clean training images.

Then, image by image, one modality drawn at random has Gaussian noise of `noise` standard deviations
added to every feature. In training, in validation and in test alike: a model must find out by
itself, for each image, which modality it can trust. The drawn index is returned for analysis only.

Source of the images: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DIGITS_MODALITIES = ("pixels", "Fourier magnitudes", "gradient orientations")

_ORIENTATIONS = 8
_CELL = 4
_CELL_STRIDE = 2
_MAX_INTENSITY = 16.0
_SIDE = 8


@dataclass(frozen=True)
class DigitsPart:
    """One part (training, validation or test) of the digits.

    Attributes:
        modalities: three float32 arrays (rows, features): pixels 64, Fourier 40, gradients 72.
        labels: int64 (rows,), 0 to 9.
        corrupted: int64 (rows,), which of the three modalities is buried in noise.
    """

    modalities: tuple[NDArray[np.float32], ...]
    labels: NDArray[np.int64]
    corrupted: NDArray[np.int64]


@dataclass(frozen=True)
class DigitsData:
    """The digits in three disjoint parts, stratified by class."""

    train: DigitsPart
    validation: DigitsPart
    test: DigitsPart


def digit_modalities(images: NDArray[np.floating]) -> tuple[NDArray[np.float64], ...]:
    """Compute the three views of images, before standardisation.

    Args:
        images: (rows, 8, 8), intensities 0 to 16.

    Returns:
        float64 arrays (rows, 64), (rows, 40) and (rows, 72), in the order of `DIGITS_MODALITIES`.

    Raises:
        ValueError: images are not (rows, 8, 8).
    """
    if images.ndim != 3 or images.shape[1:] != (_SIDE, _SIDE):
        raise ValueError(f"images: got shape {images.shape}, expected (rows, {_SIDE}, {_SIDE})")
    scaled = np.asarray(images, dtype=np.float64) / _MAX_INTENSITY
    rows = len(scaled)
    fourier = np.log1p(np.abs(np.fft.rfft2(scaled)))
    return scaled.reshape(rows, -1), fourier.reshape(rows, -1), _orientation_histograms(scaled)


def load_digits(
    seed: int = 0,
    *,
    noise: float = 3.0,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.35,
) -> DigitsData:
    """Read scikit-learn's digits, compute the modalities and corrupt one of them per image.

    Args:
        seed: of the split, of the drawn modalities and of the noise.
        noise: standard deviation of the noise, in standard deviations of the feature; 0 for none.
        validation_fraction, test_fraction: shares of all images; the rest is for training.

    Returns:
        DigitsData with float32 features.

    Raises:
        ValueError: a negative noise, or fractions that leave a part empty.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    if not noise >= 0.0:
        raise ValueError(f"noise: got {noise}, expected a number >= 0")
    if min(validation_fraction, test_fraction) <= 0 or validation_fraction + test_fraction >= 1:
        raise ValueError(
            f"validation_fraction, test_fraction: got {validation_fraction}, {test_fraction}, "
            "expected two positive shares with a sum below 1"
        )
    bunch = sklearn_digits()
    labels = bunch.target.astype(np.int64)
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=test_fraction, stratify=labels, random_state=seed
    )
    train, validation = train_test_split(
        rest,
        test_size=validation_fraction / (1.0 - test_fraction),
        stratify=labels[rest],
        random_state=seed,
    )

    views = digit_modalities(bunch.images)
    standardised = [_standardise(view, train) for view in views]
    generator = np.random.default_rng(seed)
    corrupted = generator.integers(len(views), size=len(labels))
    noisy = []
    for index, view in enumerate(standardised):
        hit = (corrupted == index)[:, None]
        noisy.append(view + noise * hit * generator.standard_normal(view.shape))

    def part(rows: NDArray[np.int64]) -> DigitsPart:
        return DigitsPart(
            tuple(view[rows].astype(np.float32) for view in noisy), labels[rows], corrupted[rows]
        )

    return DigitsData(part(train), part(validation), part(test))


def _standardise(view: NDArray[np.float64], train: NDArray[np.int64]) -> NDArray[np.float64]:
    deviation = view[train].std(axis=0)
    # Border pixels are constant over most images: without a floor, the one test image that differs
    # there would be worth hundreds of deviations.
    floor = 0.05 * deviation.max()
    return (view - view[train].mean(axis=0)) / np.maximum(deviation, floor)


def _orientation_histograms(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Histograms (rows, cells * orientations) of gradient direction, weighted by magnitude."""
    down, right = np.gradient(images, axis=(1, 2))
    magnitude = np.hypot(down, right)
    turn = np.arctan2(down, right) / (2.0 * np.pi) * _ORIENTATIONS
    lower = np.floor(turn)
    share = turn - lower
    lower = lower.astype(np.int64) % _ORIENTATIONS
    # Shared linearly between the two nearest directions, so that a small turn is a small change.
    votes = np.zeros((*images.shape, _ORIENTATIONS))
    np.put_along_axis(votes, lower[..., None], (magnitude * (1.0 - share))[..., None], axis=-1)
    upper = ((lower + 1) % _ORIENTATIONS)[..., None]
    np.put_along_axis(votes, upper, (magnitude * share)[..., None], axis=-1)
    starts = range(0, _SIDE - _CELL + 1, _CELL_STRIDE)
    cells = [
        votes[:, top : top + _CELL, left : left + _CELL].sum(axis=(1, 2))
        for top in starts
        for left in starts
    ]
    return np.concatenate(cells, axis=1)
