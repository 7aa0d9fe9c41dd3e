"""What the solvers' options do: mixing, damping, memory, and tolerances that tighten."""

import inspect
import re

import pytest
import torch

import deqfusion
from deqfusion import Anderson, DEQFusion, Picard, Status, ToleranceSchedule

DIM, COUNT, BATCH = 64, 2, 24


def solve(solver):
    """An fp64 layer, the same whatever the solver, and its equilibrium."""
    torch.manual_seed(1)
    fusion = DEQFusion(DIM, COUNT, solver=solver).double()
    features = torch.randn(COUNT, BATCH, DIM, dtype=torch.float64)
    with torch.no_grad():
        return fusion.equilibrium(features)


TIGHT = {"tol": 1e-9, "max_steps": 400}


@pytest.mark.parametrize(
    "solver",
    [
        Anderson(**TIGHT, mixing=0.5),
        Anderson(**TIGHT, mixing=0.9, memory=2),
        Anderson(**TIGHT, memory=0),
        Anderson(**TIGHT, memory=0, mixing=0.5),
        Anderson(**TIGHT, memory=1),
        Anderson(**TIGHT, memory=1, mixing=0.5),
        Picard(**TIGHT, damping=0.5),
    ],
    ids=repr,
)
def test_every_option_reaches_the_fixed_point(solver):
    eq, expected = solve(solver), solve(Anderson(tol=1e-13, max_steps=400))
    assert eq.stats.converged.all()
    error = (eq.state - expected.state).norm(dim=-1) / expected.state.norm(dim=-1)
    assert error.max() < 1e-7


def test_options_that_are_the_same_iteration():
    """Without memory, or with that of one evaluation, there is nothing to mix but a damped step."""

    def steps(solver):
        return solve(solver).stats.steps

    plain, damped = steps(Picard(**TIGHT)), steps(Picard(**TIGHT, damping=0.5))
    for memory in (0, 1):
        assert torch.equal(steps(Anderson(**TIGHT, memory=memory)), plain)
        assert torch.equal(steps(Anderson(**TIGHT, memory=memory, mixing=0.5)), damped)
    accelerated = steps(Anderson(**TIGHT))
    assert (damped > plain).float().mean() > 0.9
    assert (accelerated < plain).float().mean() > 0.9
    assert (steps(Anderson(**TIGHT, mixing=0.5)) != accelerated).float().mean() > 0.5
    assert (steps(Anderson(**TIGHT, memory=2)) != accelerated).float().mean() > 0.5


def test_a_schedule_tightens_as_training_goes_on():
    torch.manual_seed(1)
    start, end, length = 1e-1, 1e-7, 3
    schedule = ToleranceSchedule(start, end, length)
    fusion = DEQFusion(DIM, COUNT, solver=Anderson(tol=schedule, max_steps=200)).double()
    constant = DEQFusion(DIM, COUNT, solver=Anderson(tol=end, max_steps=200)).double()
    constant.load_state_dict(fusion.state_dict())
    features = torch.randn(COUNT, BATCH, DIM, dtype=torch.float64)

    def stats(layer):
        with torch.no_grad():
            return layer.equilibrium(features).stats

    final = stats(constant)
    assert torch.equal(stats(fusion.eval()).steps, final.steps)
    assert fusion.solver_progress == 0
    fusion.train()
    taken = []
    for k in range(length + 2):
        assert fusion.solver_progress == k
        now = stats(fusion)
        tolerance = start * (end / start) ** min(k / length, 1)
        assert (now.status == Status.CONVERGED).all()
        assert now.residual.max() <= tolerance
        # Rows stop as soon as they may, not at a tolerance ahead of its time.
        assert now.residual.max() > tolerance / 10
        taken.append(int(now.steps.sum()))
    assert taken[0] < taken[1] < taken[2] < taken[3] == taken[4]
    assert taken[4] == int(final.steps.sum())
    stats(fusion.eval())
    assert fusion.solver_progress == length + 2


@pytest.mark.parametrize("name", deqfusion.__all__)
def test_classes_that_a_docstring_names_are_exported(name):
    exported = getattr(deqfusion, name)
    parts = vars(exported).values() if inspect.isclass(exported) else ()
    for part in (exported, *parts):
        named = re.findall(r"`([A-Z][a-z]\w+)", inspect.getdoc(part) or "")
        assert set(named) <= set(deqfusion.__all__)
