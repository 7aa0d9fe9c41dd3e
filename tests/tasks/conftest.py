"""What the tests of the training commands share."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder in MOGONET's layout whose classes can be told apart."""
    path = tmp_path_factory.mktemp("mogonet")
    generator = np.random.default_rng(0)
    for part, rows in (("tr", 40), ("te", 20)):
        labels = np.arange(rows) % 2
        np.savetxt(path / f"labels_{part}.csv", labels)
        for number, width in ((1, 6), (2, 5)):
            values = generator.random((rows, width)) + 0.8 * labels[:, None]
            np.savetxt(path / f"{number}_{part}.csv", values, delimiter=",")
    return path
