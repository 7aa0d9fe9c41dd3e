"""The modality program of schedule *row*, interpreted, against the CPU implementation."""

import pytest
import torch

from deqfusion import Anderson, DEQFusion, Status
from deqfusion.kernels.config import RowConfig, SolveOptions
from deqfusion.kernels.modality import solve_modality_row

CONFIG = RowConfig(rows=16, depth=16)


def both(dim, count, rows, groups, options, *, skip=False, scale=1.0, **extra):
    """(CPU solution, program's solution) of the same problem."""
    torch.manual_seed(0)
    solver = Anderson(
        tol=options.rtol, atol=options.atol, max_steps=options.max_steps, memory=options.memory,
        mixing=options.mixing, ladder="off",
    )  # fmt: skip
    fusion = DEQFusion(dim, count, num_groups=groups, skip=skip, solver=solver)
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        features = scale * torch.randn(count, rows, dim)
        features = extra.pop("change", lambda x: x)(features)
        present = extra.get("present")
        init = extra.get("init")
        start = None if init is None else torch.cat((init, torch.zeros_like(init[:1])))
        mask = None if present is None else ~present.t()
        expected = fusion.equilibrium(features, init=start, mask=mask)
        if present is not None:
            features = torch.where(present.unsqueeze(-1), features, 0.0)
        got = solve_modality_row(
            features, fusion.modality_parameters, groups, skip, options, CONFIG, init, present
        )
    return expected, got


def agree(expected, got, tolerance, rows=slice(None)):
    stats, last = expected.stats, slice(-1)
    assert torch.equal(got.status[:, rows], stats.status[last][:, rows])
    assert (got.steps - stats.steps[last])[:, rows].abs().max() <= 1
    error = (got.state - expected.modalities).norm(dim=-1)[:, rows]
    assert (error <= tolerance * expected.modalities.norm(dim=-1)[:, rows]).all()


@pytest.mark.parametrize(
    ("dim", "count", "rows", "groups", "memory", "skip"),
    [(64, 2, 17, 4, 5, False), (64, 1, 5, 2, 8, False), (40, 2, 9, 4, 0, False),
     (72, 1, 16, 3, 1, False), (48, 2, 8, 1, 3, False), (64, 1, 8, 4, 5, True)],
)  # fmt: skip
def test_rows_steps_and_statuses(dim, count, rows, groups, memory, skip):
    options = SolveOptions(memory=memory, rtol=1e-4)
    expected, got = both(dim, count, rows, groups, options, skip=skip, scale=1.5)
    agree(expected, got, 1e-4)
    assert (got.residual[got.status == Status.CONVERGED] <= 1e-4).all()


def test_mixing_and_absolute_tolerance():
    options = SolveOptions(mixing=0.7, rtol=1e-5, atol=1e-2, memory=4)
    agree(*both(64, 1, 6, 4, options), 2e-3)


def test_rows_that_are_not_finite_or_run_out_of_steps():
    def spoil(x):
        x[0, 2] = torch.nan
        x[1, 5, 3] = torch.inf
        return x

    expected, got = both(32, 2, 8, 4, SolveOptions(max_steps=6), change=spoil)
    stats = expected.stats
    assert torch.equal(got.status, stats.status[:-1])
    assert got.status[0, 2] == got.status[1, 5] == Status.NON_FINITE
    assert (got.status == Status.MAX_STEPS).any()
    assert not got.state[0, 2].any()
    error = (got.state - expected.modalities).norm(dim=-1)
    assert (error <= 1e-3 * expected.modalities.norm(dim=-1)).all()


def test_warm_start_and_missing_modalities():
    torch.manual_seed(1)
    present = torch.rand(2, 9) > 0.3
    expected, got = both(64, 2, 9, 4, SolveOptions(), present=present, init=torch.randn(2, 9, 64))
    agree(expected, got, 1e-4)
    assert not got.state[~present].any()
    assert (got.steps[~present] == 0).all()


def test_empty_batch():
    expected, got = both(32, 2, 0, 4, SolveOptions())
    assert got.state.shape == expected.modalities.shape == (2, 0, 32)


def test_low_precision_reaches_its_floor():
    """bfloat16 products: within a looser tolerance of the solution in fp32."""
    expected, got = both(64, 1, 8, 4, SolveOptions(rtol=1e-2, precision="low"))
    assert (got.status == Status.CONVERGED).all()
    error = (got.state - expected.modalities).norm(dim=-1)
    assert (error <= 4e-2 * expected.modalities.norm(dim=-1)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"memory": 9}, "memory: got 9, expected 0 to 8"), ({"precision": "fp8"}, "precision: got"),
     ({"max_steps": 0}, "max_steps: got 0")],
)  # fmt: skip
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SolveOptions(**options)


def test_configs_out_of_range():
    with pytest.raises(ValueError, match="rows: got 24, expected a power of two"):
        RowConfig(rows=24)
