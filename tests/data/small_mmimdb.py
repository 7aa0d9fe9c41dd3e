"""A small file of MM-IMDB's published schema."""

from __future__ import annotations

from pathlib import Path

import numpy as np

#: Rows to train on, for validation and for test.
SPLIT = [40, 12, 16]
#: As published: word2vec, VGG, genres.
WIDTHS = (300, 4096, 23)


def arrays(rows: int = sum(SPLIT), widths: tuple[int, int, int] = WIDTHS) -> dict[str, np.ndarray]:
    """Features that say what the genres are, under the published keys."""
    generator = np.random.default_rng(0)
    genres = (generator.random((rows, widths[2])) < 0.3).astype(np.int32)
    made = {"genres": genres}
    for key, width in (("features", widths[0]), ("vgg_features", widths[1])):
        effect = generator.standard_normal((widths[2], width))
        noise = 0.1 * generator.standard_normal((rows, width))
        made[key] = (genres @ effect + noise).astype(np.float32)
    return made


def write_mmimdb(folder: Path, content: dict[str, np.ndarray] | None = None) -> Path:
    """Write `multimodal_imdb.hdf5` with these arrays, and one that is not read; return its path."""
    import h5py

    content = arrays() if content is None else content
    path = folder / "multimodal_imdb.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in content.items():
            file[key] = values
        file["imdb_ids"] = np.array([b"0000001"] * 3)
    return path
