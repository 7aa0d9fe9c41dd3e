"""Packing and unpacking are exact inverses, and padding is zero."""

import pytest
import torch

from deqfusion.kernels.layout import Layout

SHAPES = [(4, 1), (4, 4), (20, 4), (64, 32), (96, 3), (300, 4), (500, 4), (1024, 1), (1024, 32)]


@pytest.mark.parametrize(("dim", "groups"), SHAPES)
def test_round_trip(dim, groups):
    layout = Layout(dim, groups)
    assert layout.padded >= max(16, layout.group)
    assert layout.padded & (layout.padded - 1) == 0
    rows = torch.randn(2, 3, dim)
    packed = layout.pack(rows)
    assert packed.shape == (2, 3, layout.width)
    assert packed.is_contiguous()
    assert torch.equal(layout.unpack(packed), rows)
    assert packed.count_nonzero() == rows.count_nonzero()


@pytest.mark.parametrize(("dim", "groups"), SHAPES[:-2])
def test_weights_multiply_as_they_did(dim, groups):
    layout = Layout(dim, groups)
    weight, rows = torch.randn(2, dim, dim).double(), torch.randn(2, 3, dim).double()
    packed = layout.pack_weight(weight)
    assert packed.shape == (2, layout.width, layout.width)
    assert torch.equal(layout.unpack_weight(packed), weight)
    got = layout.unpack(layout.pack(rows) @ packed.transpose(1, 2))
    torch.testing.assert_close(got, rows @ weight.transpose(1, 2))


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups: got 3 for dim 20, expected a divisor"):
        Layout(20, 3)


@pytest.mark.parametrize(("dim", "groups"), [(4, 1), (20, 4), (48, 3)])
@pytest.mark.parametrize(
    ("backward", "low"), [(False, "bfloat16"), (True, "bfloat16"), (False, "float16"),
                          (True, "float16"), (False, "")],
)  # fmt: skip
def test_packing_in_one_launch(dim, groups, backward, low):
    """The kernel's tensors are the layout's, also of a weight that is half of a wider one."""
    from deqfusion.kernels.packing import Packed, Parameters, packed

    layout = Layout(dim, groups)
    wide = torch.randn(1, dim, 2 * dim)
    one = Parameters(
        [wide[..., :dim], torch.randn(1, dim, dim), wide[..., dim:]],
        [torch.randn(1, dim) for _ in range(4)],
    )
    two = Parameters(
        [torch.randn(3, dim, dim) for _ in range(2)], [torch.randn(3, dim) for _ in range(8)]
    )
    flats = packed(two, layout, other=one, low=low, backward=backward)
    for block, flat in zip((two, one), flats, strict=True):
        shape = len(block.weights), block.weights[0].shape[0], len(block.vectors)
        parts = Packed.of(layout, *shape, low, backward)
        got = Packed(*(part.tensor((flat, flat)) for part in parts))
        forward = layout.pack_weight(torch.stack(list(block.weights)))
        assert torch.equal(got.forward, forward)
        iterated = forward.transpose(-1, -2) if backward else forward
        assert got.backward.numel() == (forward.numel() if backward else 0)
        if backward:
            assert torch.equal(got.backward, iterated)
        if low:
            assert torch.equal(got.low, iterated.to(getattr(torch, low)))
        assert torch.equal(got.vectors, layout.pack(torch.stack(list(block.vectors), 1)))
        assert got.counters.shape == (1024,)
        assert not got.counters.any()
    (alone,) = packed(one, layout, low=low, backward=backward)
    # Without a format nothing is in the place of 16 bits.
    assert torch.equal(alone, flats[1]) is bool(low)
