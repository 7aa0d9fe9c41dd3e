"""What a solve starts from, by the programs (interpreted) and by the reference."""

import pytest
import torch

from deqfusion.kernels import injection, interpreted
from deqfusion.reference import injection as reference

pytestmark = pytest.mark.skipif(
    not interpreted(), reason="compiled programs run on a device: tests/gpu has their tests"
)


def case(count=3, rows=17, dim=130, dtype=torch.float32, masked=True):
    torch.manual_seed(2)
    features = [torch.randn(rows, dim).to(dtype) for _ in range(count)]
    present = None
    if masked:
        present = torch.rand(count, rows) < 0.6
        present[:, 1] = False
        features[0][~present[0]] = torch.nan
    weight, bias = torch.rand(count).to(dtype), torch.tensor([0.3]).to(dtype)
    return features, present, weight, bias


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("count", "rows", "dim", "dtype"),
    [(3, 17, 130, torch.float32), (1, 1, 4, torch.float32), (9, 3, 8, torch.float32),
     (2, 5, 16, torch.bfloat16)],
)  # fmt: skip
def test_forward_and_gradients(count, rows, dim, dtype, masked):
    features, present, weight, bias = case(count, rows + 1, dim, dtype, masked)
    wide = [f.double() for f in features]
    x, injected = injection.inject(features, present, weight, bias)
    expected = reference.inject(wide, present, weight.double(), bias.double())
    assert (x.dtype, injected.dtype) == (dtype, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True, "check_dtype": False}
    assert torch.equal(x.double(), expected[0])
    torch.testing.assert_close(injected, expected[1], **close)
    gradient, along = torch.randn_like(x), torch.randn_like(injected)
    got = injection.inject_adjoint(gradient, along, x, present, weight, bias)
    true = reference.inject_adjoint(
        gradient.double(), along.double(), x.double(), present, weight.double(), bias.double()
    )
    # Sums cancel: their error is a part of the sum of sizes.
    sizes = reference.inject_adjoint(
        gradient.double(), along.abs().double(), x.abs().double(), present, weight.double(),
        bias.double(),
    )  # fmt: skip
    torch.testing.assert_close(got[0], true[0], **close)
    for value, other, size in zip(got[1:], true[1:], sizes[1:], strict=True):
        assert value.dtype == dtype
        assert ((value - other).abs() <= tolerance * size).all()


def test_rows_that_are_not_finite_add_nothing_where_their_gradient_is_zero():
    features, _, weight, bias = case(masked=False)
    features[1][3] = torch.nan
    x, injected = injection.inject(features, None, weight, bias)
    assert injected[3].isnan().all()
    along = torch.ones_like(injected)
    along[3] = 0.0
    _, dw, db = injection.inject_adjoint(torch.zeros_like(x), along, x, None, weight, bias)
    assert dw.isfinite().all()
    assert db == 16 * 130


def test_no_rows():
    x, injected = injection.inject([torch.randn(0, 4)] * 2, None, torch.ones(2), torch.zeros(1))
    assert x.shape == (2, 0, 4)
    found = injection.inject_adjoint(x, injected, x, None, torch.ones(2), torch.zeros(1))
    assert [t.abs().sum().item() for t in found] == [0.0, 0.0, 0.0]
