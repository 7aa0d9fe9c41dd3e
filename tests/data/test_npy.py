"""Headers of `.npy` files: shape and dtype, and what is refused."""

import io

import numpy as np
import pytest

from deqfusion.data.npy import npy_header


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_shape_and_dtype(version):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.zeros((3, 5), dtype=np.float16), version=version)
    stream.seek(0)
    assert npy_header(stream) == ((3, 5), np.float16)


def test_another_version_and_another_file():
    with pytest.raises(ValueError, match=r"version \(9, 0\) of the \.npy format, expected 1\.0"):
        npy_header(io.BytesIO(b"\x93NUMPY\x09\x00" + bytes(99)))
    with pytest.raises(ValueError, match="magic string"):
        npy_header(io.BytesIO(b"PK" + bytes(99)))
