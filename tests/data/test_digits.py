"""Digits: what the modalities are, and that exactly one of them is noise."""

import numpy as np
import pytest

from deqfusion.data import DIGITS_MODALITIES, digit_modalities, load_digits


def test_modalities_are_computed_from_each_image_alone():
    images = np.random.default_rng(0).uniform(0, 16, (5, 8, 8))
    together = digit_modalities(images)
    assert [view.shape for view in together] == [(5, 64), (5, 40), (5, 72)]
    assert len(together) == len(DIGITS_MODALITIES)
    for row in range(5):
        alone = digit_modalities(images[row : row + 1])
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_allclose(one[0], many[row], rtol=1e-12)


def test_fourier_magnitudes_ignore_a_cyclic_shift_and_pixels_do_not():
    images = np.random.default_rng(1).uniform(0, 16, (3, 8, 8))
    pixels, fourier, _ = digit_modalities(images)
    shifted_pixels, shifted_fourier, _ = digit_modalities(np.roll(images, (2, 3), axis=(1, 2)))
    np.testing.assert_allclose(fourier, shifted_fourier, rtol=1e-9)
    assert np.abs(pixels - shifted_pixels).max() > 0.1


def test_orientations_of_a_ramp_point_along_it():
    ramp = np.broadcast_to(np.arange(8.0) * 2, (1, 8, 8))
    histograms = digit_modalities(ramp)[2].reshape(9, 8)
    np.testing.assert_allclose(histograms[:, 1:], 0.0, atol=1e-12)
    np.testing.assert_allclose(histograms[:, 0], 16 * 2 / 16)
    turned = digit_modalities(ramp.transpose(0, 2, 1))[2].reshape(9, 8)
    np.testing.assert_allclose(turned[:, 2], histograms[:, 0])
    np.testing.assert_allclose(np.delete(turned, 2, axis=1), 0.0, atol=1e-12)


def test_one_modality_of_each_row_is_noise_and_the_others_are_untouched():
    clean, noisy = load_digits(3, noise=0.0), load_digits(3, noise=3.0)
    for part in ("train", "validation", "test"):
        before, after = getattr(clean, part), getattr(noisy, part)
        np.testing.assert_array_equal(before.labels, after.labels)
        np.testing.assert_array_equal(before.corrupted, after.corrupted)
        for index, (old, new) in enumerate(zip(before.modalities, after.modalities, strict=True)):
            hit = after.corrupted == index
            np.testing.assert_array_equal(old[~hit], new[~hit])
            spread = (new[hit] - old[hit]).std()
            assert spread == pytest.approx(3.0, rel=0.05)
        shares = np.bincount(after.corrupted, minlength=3) / len(after.labels)
        assert np.abs(shares - 1 / 3).max() < 0.1


def test_parts_are_stratified_and_cover_every_image_once():
    data = load_digits(0, noise=0.0)
    parts = (data.train, data.validation, data.test)
    assert sum(len(part.labels) for part in parts) == 1797
    for part in parts:
        shares = np.bincount(part.labels, minlength=10) / len(part.labels)
        assert np.abs(shares - 0.1).max() < 0.015
        assert all(view.dtype == np.float32 for view in part.modalities)


def test_features_are_standardised_on_clean_training_rows():
    train = load_digits(0, noise=0.0).train
    for view in train.modalities:
        np.testing.assert_allclose(view.mean(axis=0), 0.0, atol=1e-5)
        deviation = view.std(axis=0)
        assert deviation.max() == pytest.approx(1.0, abs=1e-4)


def test_seed_decides_everything():
    first, again, other = load_digits(5), load_digits(5), load_digits(6)
    for one, two in zip(first.test.modalities, again.test.modalities, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first.test.corrupted, other.test.corrupted)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"images: got shape \(8, 8\)"):
        digit_modalities(np.zeros((8, 8)))
    with pytest.raises(ValueError, match="noise: got -1"):
        load_digits(noise=-1.0)
    with pytest.raises(ValueError, match="validation_fraction, test_fraction: got"):
        load_digits(validation_fraction=0.5, test_fraction=0.5)
