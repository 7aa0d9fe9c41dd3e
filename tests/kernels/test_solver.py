"""When a row ends: the device function by itself, and solves that restart or stagnate."""

import pytest
import torch
import triton
import triton.language as tl

from deqfusion import Anderson, DEQFusion, Status, functional
from deqfusion.kernels import solves
from deqfusion.kernels.config import SolveOptions, in_registers
from deqfusion.kernels.primitives import ANCHORED, EXACT, NEAR
from deqfusion.kernels.solver import REACH, astray, finish, judge, kind_of
from deqfusion.reference import host
from deqfusion.reference.cell import fusion_cell, gate_constants
from deqfusion.reference.iterate import MAX_RESTARTS, PATIENCE
from tests.kernels.problems import CONFIG, Config, Problem

INF, NAN = float("inf"), float("nan")


@triton.jit
def judge_kernel(
    figures, counts, decided, best_out, step, rtol, atol, RESTART: tl.constexpr,
    ADJOINT: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, 32)
    gn, fn, restarts = tl.load(figures + at), tl.load(figures + 32 + at), tl.load(counts + 64 + at)
    running = tl.load(counts + at) != 0
    improved, ended, code, best, improved_at = judge(
        gn, fn, step, running, tl.load(figures + 64 + at), tl.load(counts + 32 + at), restarts,
        tl.load(counts + 96 + at) != 0, rtol, atol, ADJOINT,
    )  # fmt: skip
    lost = astray(gn, fn, running & (ended == 0), best, restarts, RESTART)
    tl.store(decided + at, improved.to(tl.int32))
    tl.store(decided + 32 + at, tl.where(ended, code, -1))
    tl.store(decided + 64 + at, lost.to(tl.int32))
    tl.store(decided + 96 + at, improved_at)
    tl.store(best_out + at, best)


STEP = 30
GOING = -1
# ||g||, ||f||, best so far, when it fell, restarts, last step, running;
# improved, status or GOING, lost with restarts on rising residuals, and without.
CASES = {
    "meets the tolerance": ((1e-4, 1.0, 0.5, 29, 0, 0, 1), (1, Status.CONVERGED, 0, 0)),
    "meets it in its last step": ((1e-4, 1.0, 0.5, 29, 0, 1, 1), (1, Status.CONVERGED, 0, 0)),
    "improves": ((0.4, 1.0, 0.5, 29, 0, 0, 1), (1, GOING, 0, 0)),
    "does not improve": ((0.6, 1.0, 0.5, 29, 0, 0, 1), (0, GOING, 0, 0)),
    "rises to nine times": ((4.5, 1.0, 0.5, 29, 0, 0, 1), (0, GOING, 0, 0)),
    "rises to eleven times": ((5.5, 1.0, 0.5, 29, 0, 0, 1), (0, GOING, 1, 0)),
    "rises after all restarts": ((5.5, 1.0, 0.5, 29, MAX_RESTARTS, 0, 1), (0, GOING, 0, 0)),
    "is not finite": ((NAN, 1.0, 0.5, 29, 0, 0, 1), (0, GOING, 1, 1)),
    "is not finite after all": ((INF, 1.0, 0.5, 29, MAX_RESTARTS, 0, 1),
                                (0, Status.NON_FINITE, 1, 1)),
    "never was finite": ((NAN, NAN, INF, 0, 0, 0, 1), (0, Status.NON_FINITE, 1, 1)),
    "has patience left": ((0.6, 1.0, 0.5, STEP - PATIENCE + 1, 0, 0, 1), (0, GOING, 0, 0)),
    "has none": ((0.6, 1.0, 0.5, STEP - PATIENCE, 0, 0, 1), (0, Status.STAGNATED, 0, 0)),
    "runs out of steps": ((0.4, 1.0, 0.5, 29, 0, 1, 1), (1, Status.MAX_STEPS, 0, 0)),
    "does not run": ((1e-4, 1.0, 0.5, 0, 0, 1, 0), (0, GOING, 0, 0)),
}  # fmt: skip
# Improves where it is no adjoint; the first is progress there too.
ABOVE = {
    "is above that of zeros": ((1.2, 3.0, 0.5, STEP - PATIENCE, 0, 0, 1), (0, GOING, 0, 0)),
    "is above it and no nearer":
        ((1.2, 2.0, 0.5, STEP - PATIENCE, 0, 0, 1), (0, Status.STAGNATED, 0, 0)),
    "is above it and meets the tolerance":
        ((1.2, 2e3, 0.5, 29, 0, 0, 1), (1, Status.CONVERGED, 0, 0)),
    "is the first": ((1.0001, 1.0, INF, 0, 0, 0, 1), (1, GOING, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("restart", [True, False])
def test_what_a_residual_decides(restart, adjoint):
    cases = {**CASES, **ABOVE} if adjoint else CASES
    given = torch.tensor([case[0] for case in cases.values()], dtype=torch.float64).T
    rows = given.shape[1]
    figures = torch.zeros(3, 32)
    figures[:, :rows] = given[:3].float()
    counts = torch.zeros(4, 32, dtype=torch.int32)
    # Running, improved at, restarts, last.
    counts[:, :rows] = given[[6, 3, 4, 5]].int()
    decided, best = torch.zeros(4, 32, dtype=torch.int32), torch.zeros(32)
    judge_kernel[(1,)](figures, counts, decided, best, STEP, 1e-3, 0.0, restart, adjoint)
    for row, (name, (before, expected)) in enumerate(cases.items()):
        improved, status, *lost = expected
        got = decided[:, row].tolist()
        assert got[:2] == [improved, status], name
        # Of rows that ended it is of no consequence.
        if status == GOING:
            assert got[2] == lost[0 if restart else 1], name
        nearer = improved or name == "is above that of zeros"
        assert got[3] == (STEP if nearer else before[3]), name
        expected_best = before[0] / before[1] if improved else before[2]
        assert best[row].item() == pytest.approx(expected_best), name


@triton.jit
def kinds_kernel(out, exact):
    zero = tl.min(tl.zeros([16], dtype=tl.int32), 0)
    for step in range(0, 30):
        tl.store(out + step, kind_of(zero + exact, zero + step, "low"))


def test_which_evaluations_are_exact():
    """As the CPU's loop has them, while rows are on the ladder; all of them after."""
    kinds = torch.full((2, 30), -1, dtype=torch.int32)
    for exact in (0, 1):
        kinds_kernel[(1,)](kinds[exact], exact)
    anchored = [
        step == 0
        or (step >= host.FIRST_ANCHOR and (step - host.FIRST_ANCHOR) % host.ANCHOR_EVERY == 0)
        for step in range(30)
    ]
    assert kinds[0].tolist() == [ANCHORED.value if a else NEAR.value for a in anchored]
    assert (kinds[1] == EXACT.value).all()
    assert REACH.value == host.REACH


@triton.jit
def finish_kernel(planes, whole, norms, counts, out, kind, LADDER: tl.constexpr):
    """The end of a step of 16 rows of 16 channels; planes: z, best f and g, f, g, anchors."""
    at = tl.arange(0, 16)
    z, best_f, best_g, f, g, anchors = (
        planes, planes + 256, planes + 512, planes + 768, planes + 1024, planes + 1280,
    )  # fmt: skip
    running = at >= 0
    zero = tl.zeros([16], dtype=tl.int32)
    best = tl.full([16], 0.5, dtype=tl.float32)
    sums = (tl.load(norms + at), tl.load(norms + 16 + at), tl.zeros([16, 8], dtype=tl.float32))
    held = (zero,)
    alive, running, best, _, _, _, _, exact, _, _ = finish(
        held, zero, zero, z, best_f, best_g, f, g, anchors, whole, planes, counts, counts + 16, out,
        out, sums, 7, 50, running, running, best, zero, zero, zero, zero + 7, 0, kind, 1e-3, 0.0,
        0.0, 1.0, 0, 1, 16, 16, 0, 16, True, LADDER, False, False, False, False,
    )  # fmt: skip
    tl.store(counts + 32 + at, alive.to(tl.int32))
    tl.store(counts + 48 + at, running.to(tl.int32))
    tl.store(counts + 64 + at, exact + zero)
    tl.store(out + 16 + at, best)


@pytest.mark.parametrize("kind", [NEAR, ANCHORED])
def test_only_exact_evaluations_end_rows_and_are_their_best(kind):
    planes, whole = torch.randn(6, 16, 16), torch.zeros(16, 16, dtype=torch.bfloat16)
    before = planes.clone()
    norms = torch.ones(2, 16)
    # Within the tolerance; within reach of it; better than the best; not finite.
    norms[0, :4] = torch.tensor([5e-4, 1.5e-3, 0.1, torch.nan])
    norms[0, 4:] = 0.6
    counts, out = torch.full((5, 16), -1, dtype=torch.int32), torch.full((2, 16), -1.0)
    finish_kernel[(1,)](planes, whole, norms.square(), counts, out, kind.value, "low")
    status, _, alive, running, exact = counts
    near = kind is NEAR
    assert status[:4].tolist() == ([-1] * 4 if near else [Status.CONVERGED, -1, -1, -1])
    assert alive[:5].tolist() == [int(near), 1, 1, 1, 1]
    assert running[:5].tolist() == [0, 0, 1, 0, 1]
    assert not exact.any()
    best = [0.5] * 4 if near else [5e-4, 1.5e-3, 0.1, 0.5]
    torch.testing.assert_close(out[1, :4], torch.tensor(best))
    kept = planes[1, :5] == before[3, :5]
    assert kept.all(1).tolist() == ([False] * 5 if near else [True, True, True, False, False])
    # What follows is f, or half a step from the best where the row is lost.
    assert torch.equal(planes[0, 2], before[3, 2])
    torch.testing.assert_close(planes[0, 3], before[1, 3] - 0.5 * before[2, 3])
    origin = planes[5, 2] if near else before[0, 2]
    assert torch.equal(planes[5, 2], origin)
    assert torch.equal(whole[2], (planes[0, 2] - origin).to(torch.bfloat16))


def test_the_factor_in_float16_is_the_next_iterate():
    """Also of a lost row, which goes back; of rows that ended it stays."""
    planes, whole = torch.randn(6, 16, 16), torch.zeros(16, 16, dtype=torch.float16)
    before = planes.clone()
    norms = torch.ones(2, 16)
    norms[0, :2] = torch.tensor([5e-4, torch.nan])
    counts, out = torch.full((5, 16), -1, dtype=torch.int32), torch.full((2, 16), -1.0)
    finish_kernel[(1,)](planes, whole, norms.square(), counts, out, EXACT.value, "half")
    torch.testing.assert_close(planes[0, 1], before[1, 1] - 0.5 * before[2, 1])
    assert torch.equal(whole[1:], planes[0, 1:].half())
    assert not whole[0].any()


SCHEDULES = [CONFIG, Config("step", depth=16)]


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda config: config.schedule)
def test_patience_ends_a_solve_that_cannot_converge(config):
    problem = Problem.new(count=1)
    got = solves.solve_modality(
        problem.features, problem.modality, 2, False, SolveOptions(rtol=1e-12, max_steps=100),
        config=config,
    )  # fmt: skip
    assert (got.status == Status.STAGNATED).all()
    assert (got.steps < 100).all()
    assert (got.residual < 1e-5).all()


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda config: config.schedule)
def test_a_rising_residual_restarts_as_on_the_reference(config):
    """Plain iteration from beside a fixed point that repels, residual by residual."""
    torch.manual_seed(8)
    layer = DEQFusion(8, 1, num_groups=1, gate="identity", dtype=torch.float64)
    p, cell = layer.fusion_parameters, layer.options
    with torch.no_grad():
        layer.gate_weight.mul_(4)
        modality, injection = torch.randn(1, 1, 8).double(), torch.randn(1, 8).double()
        constants = gate_constants(modality, p, cell)

    def step(z):
        return fusion_cell(z.unsqueeze(0), constants, injection, p, cell).squeeze(0)

    z, eye = torch.randn(8).double(), torch.eye(8).double()
    for _ in range(50):
        jacobian = torch.autograd.functional.jacobian(step, z)
        z = z - torch.linalg.solve(jacobian - eye, step(z).detach() - z)
    assert (step(z) - z).norm() < 1e-10
    assert torch.linalg.eigvals(jacobian).abs().max() > 1.5
    start = (z + 1e-4 * torch.randn(8).double()).float().unsqueeze(0)
    layer = layer.float()
    solver = Anderson(tol=1e-9, max_steps=30, memory=0, ladder="off")
    tensors = modality.float(), injection.float()
    with torch.no_grad():
        expected = functional.fusion_equilibrium(
            *tensors, layer.fusion_parameters, cell=cell, solver=solver, init=start, trace=True
        )
        got = solves.solve_fusion(
            *tensors, [t.detach() for t in layer.fusion_parameters], 1, cell.gate, cell.gate_input,
            cell.tail, SolveOptions(rtol=1e-9, max_steps=30, memory=0), init=start, record=True,
            config=config,
        )  # fmt: skip
    residuals, truth = got.trace[0, :, 0], expected.trace[0, :, 0]
    falls = residuals[1:] < 0.3 * residuals[:-1]
    assert falls.sum() >= MAX_RESTARTS, "no restart tests nothing"
    # Of two restarts; what repels magnifies roundings as well.
    torch.testing.assert_close(residuals[:9], truth[:9], rtol=5e-2, atol=0.0)
    assert got.status[0] == expected.status[0]


@pytest.mark.parametrize(
    "config", [*SCHEDULES, Config("cooperative", depth=16)], ids=lambda config: config.schedule
)
def test_a_restart_forgets_the_history(config):
    """A steep gate, in whose fifth evaluation the residual is more than ten times the best."""
    torch.manual_seed(21)
    # Drawn in fp64, and rounded: of these numbers it is known that the residual rises.
    layer = DEQFusion(8, 1, num_groups=1, gate="identity", dtype=torch.float64)
    with torch.no_grad():
        layer.gate_weight.mul_(8)
    modality, injection = torch.randn(1, 1, 8).double(), torch.randn(1, 8).double()
    layer, tensors, cell = layer.float(), (modality.float(), injection.float()), layer.options
    assert in_registers(config, 16, 5, climbs=False) == (config.schedule == "cooperative")
    with torch.no_grad():
        expected = functional.fusion_equilibrium(
            *tensors, layer.fusion_parameters, cell=cell, trace=True,
            solver=Anderson(tol=1e-9, max_steps=9, ladder="off"),
        )  # fmt: skip
        got = solves.solve_fusion(
            *tensors, [t.detach() for t in layer.fusion_parameters], 1, cell.gate, cell.gate_input,
            cell.tail, SolveOptions(rtol=1e-9, max_steps=9), record=True, config=config,
        )  # fmt: skip
    residuals, truth = got.trace[0, :, 0], expected.trace[0, :, 0]
    relative = truth / expected.trace[0, :, 1]
    assert relative[4] > 10 * relative[:4].min(), "no restart tests nothing"
    torch.testing.assert_close(residuals, truth, rtol=5e-2, atol=0.0)


@pytest.mark.parametrize("memory", [0, 5])
def test_an_adjoint_that_expands_falls_back_on_its_gradient(memory):
    """A constant row of features has no variance, and a derivative a hundred times too large."""
    problem = Problem.new(count=1)
    problem.features[0, 1] = -1e9
    solved = problem.reference(Anderson(tol=1e-5))
    given = problem.gradient, solved["z"].state, solved["z"].status, problem.features
    one, full = (
        solves.adjoint_modality(*given, problem.modality, 2, False, options, config=CONFIG)
        for options in (
            SolveOptions(max_steps=1, truncated=True), SolveOptions(memory=memory, max_steps=60),
        )
    )  # fmt: skip
    converged = full[2].status == Status.CONVERGED
    assert converged.tolist() == [[True, False, True]]
    assert full[0][0, 1].norm() <= 2 * one[0][0, 1].norm()
