"""The two loops: the one that reads flags and climbs the ladder, and the one that does neither."""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deqfusion import Anderson, Broyden, DEQFusion, Implicit, Phantom, Picard, Status
from deqfusion.reference import accelerate, adjoint, host, iterate, joint, norm, solve

DIM, COUNT = 256, 2


def layer(dim: int = DIM, **options) -> DEQFusion:
    torch.manual_seed(5)
    return DEQFusion(dim, COUNT, **options)


def equilibrium(fusion: DEQFusion, features: torch.Tensor, **options):
    with torch.no_grad():
        return fusion.equilibrium(features, **options)


@pytest.fixture
def bfloat16(monkeypatch):
    """The ladder, whatever this processor is good at."""
    monkeypatch.setattr(solve, "bfloat16_instructions", lambda: "some")


@pytest.fixture
def low_products(monkeypatch, bfloat16):
    """Names of the blocks evaluated with bfloat16 products, in order."""
    names = []

    def count(kind):
        near = kind.near

        def counting(self, z, anchor):
            names.append(kind.__name__)
            return near(self, z, anchor)

        monkeypatch.setattr(kind, "near", counting)

    for kind in (solve.ModalityBlock, solve.FusionBlock, adjoint._LinearBlock):
        count(kind)
    return names


@pytest.mark.parametrize("kind", [None, "AVX512-BF16"])
def test_the_ladder_is_climbed_where_bfloat16_products_are_fast(monkeypatch, low_products, kind):
    monkeypatch.setattr(solve, "bfloat16_instructions", lambda: kind)
    equilibrium(layer(), torch.randn(COUNT, 20, DIM))
    assert bool(low_products) is (kind is not None)


@pytest.mark.parametrize("solver", [Anderson, Picard, Broyden], ids=lambda solver: solver.__name__)
@pytest.mark.parametrize("skip", [False, True])
def test_the_loop_without_flags_gives_the_same_rows(monkeypatch, solver, skip):
    """Also where rows are not finite, restart, or run out of steps."""
    fusion = layer(16, skip=skip, solver=solver(tol=1e-6, max_steps=40)).double()
    features = torch.randn(COUNT, 40, 16, dtype=torch.float64)
    features[0, 3], features[1, 7, 2] = torch.nan, torch.inf
    expected = equilibrium(fusion, features)
    monkeypatch.setattr(solve, "fixed_point", iterate.fixed_point_masked)
    got = equilibrium(fusion, features)
    assert torch.equal(got.stats.status, expected.stats.status)
    assert {Status.CONVERGED, Status.NON_FINITE} <= set(expected.stats.status.unique().tolist())
    settled = expected.stats.status == Status.CONVERGED
    assert torch.equal(got.stats.steps[settled], expected.stats.steps[settled])
    # Of rows that do not settle, rounding decides which of many equally bad iterates is the best.
    error = (got.state - expected.state).norm(dim=-1)[settled]
    assert (error <= 1e-6 * expected.state.norm(dim=-1)[settled]).all()
    assert got.state.isfinite().all()


@pytest.mark.parametrize("together", [True, False], ids=["blocks together", "block by block"])
def test_rows_of_the_ladder_do_not_see_each_other(monkeypatch, low_products, together):
    monkeypatch.setattr(solve, "CHUNK_ELEMENTS", 1 << 19 if together else 40 * DIM)
    fusion = layer()
    features = torch.randn(COUNT, 80, DIM)
    features[:, ::3] *= 0.7
    whole = equilibrium(fusion, features)
    assert whole.stats.converged.all()
    assert len(whole.stats.steps.unique()) > 4, "rows that end together test nothing"
    assert low_products
    order = torch.randperm(80)
    for rows in (order, torch.arange(20, 40), torch.tensor([3]), torch.tensor([4])):
        part = equilibrium(fusion, features[:, rows])
        assert torch.equal(part.stats.steps, whole.stats.steps[:, rows])
        error = (part.state - whole.state[:, rows]).norm(dim=-1)
        assert (error < 1e-4 * part.state.norm(dim=-1)).all()


def test_the_ladder_meets_the_tolerance_of_exact_products(low_products):
    for tol in (1e-2, 1e-3, 1e-5):
        features = torch.randn(COUNT, 30, DIM)
        low_products.clear()
        fusion = layer(solver=Anderson(tol=tol))
        found = equilibrium(fusion, features)
        assert low_products
        assert found.stats.converged.all()
        step = fusion.cell(found.state, features)
        residual = (step - found.state).norm(dim=-1) / step.norm(dim=-1)
        # The returned state is one evaluation beyond the residual that stopped it.
        assert (residual <= tol).all()


@pytest.mark.parametrize("max_steps", [1, 2, 3, 6])
def test_the_ladder_ends_with_an_exact_step(low_products, max_steps):
    """Rows that run out of steps return an exact evaluation, not the start's."""
    features = torch.randn(COUNT, 30, DIM)
    residuals = []
    for ladder in ("auto", "off"):
        solver = Anderson(tol=1e-7, max_steps=max_steps, ladder=ladder)
        stats = equilibrium(layer(solver=solver), features).stats
        assert (stats.status == Status.MAX_STEPS).all()
        assert (stats.steps == max_steps).all()
        residuals.append(stats.residual)
    assert bool(low_products) == (max_steps > 2)
    torch.testing.assert_close(residuals[0], residuals[1], rtol=0.1, atol=0)


def test_rows_that_are_not_finite_leave_the_ladder(low_products):
    fusion = layer()
    features = torch.randn(COUNT, 40, DIM)
    clean = equilibrium(fusion, features)
    spoiled = features.clone()
    spoiled[0, 5] = torch.nan
    found = equilibrium(fusion, spoiled)
    others = torch.arange(40) != 5
    assert found.stats.status[0, 5] == found.stats.status[-1, 5] == Status.NON_FINITE
    assert torch.equal(found.stats.status[:, others], clean.stats.status[:, others])
    assert torch.equal(found.stats.steps[:, others], clean.stats.steps[:, others])


def test_rows_that_cannot_converge_stagnate_on_the_ladder(bfloat16):
    """Below what fp32 resolves, patience ends every row."""
    fusion = layer(solver=Anderson(tol=1e-9, max_steps=400))
    stats = equilibrium(fusion, torch.randn(COUNT, 20, DIM)).stats
    assert (stats.status == Status.STAGNATED).all()
    assert (stats.steps < 200).all()
    assert (stats.residual < 1e-5).all()


def test_gradients_by_the_ladder(low_products):
    """Within what the tolerance allows of gradients by exact products."""
    features, direction = torch.randn(COUNT, 40, DIM), torch.randn(40, DIM)
    grads = []
    for ladder in ("auto", "off"):
        solver = Anderson(tol=1e-4, ladder=ladder)
        fusion = layer(solver=solver, adjoint=Implicit(solver))
        inputs = features.clone().requires_grad_()
        fusion(inputs).backward(direction)
        grads.append((inputs.grad, fusion.modality_weight1.grad))
    assert set(low_products) == {"ModalityBlock", "FusionBlock", "_LinearBlock"}
    for got, expected in zip(*grads, strict=True):
        assert (got - expected).norm() < 2e-3 * expected.norm()


def test_rows_that_leave_the_ladder_too_early_go_on(monkeypatch, low_products):
    monkeypatch.setattr(host, "REACH", 1e3)
    fusion, features = layer(solver=Anderson(tol=1e-5)), torch.randn(COUNT, 40, DIM)
    found = equilibrium(fusion, features)
    expected = equilibrium(layer(solver=Anderson(tol=1e-5, ladder="off")), features)
    assert found.stats.converged.all()
    assert ((found.stats.steps - expected.stats.steps).abs() <= 3).all()
    error = (found.state - expected.state).norm(dim=-1) / expected.state.norm(dim=-1)
    assert error.max() < 1e-4


class SlowLadder:
    """z -> A z + b with an eigenvalue near 1, as a `LadderBlock` whose cheap products are exact."""

    def __init__(self, matrix, offset):
        self.matrix, self.offset, self.shape = matrix, offset, offset.shape

    def __call__(self, z):
        return self.offset.clone() if z is None else z @ self.matrix.T + self.offset

    def anchored(self, z):
        return self(z), (z,)

    def near(self, z, anchor):
        return self(z)

    def take(self, index):
        return SlowLadder(self.matrix, self.offset[:, index[0]])


def test_rows_near_the_tolerance_keep_accelerating():
    """Whoever left too early is accelerated from there on."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64))[0]
    eigenvalues = torch.linspace(0, 0.5, 64)
    eigenvalues[:2] = torch.tensor([-0.5, 0.99])
    offset = torch.randn(1, 256, 64)
    block = SlowLadder((basis * eigenvalues) @ basis.T, offset)
    climbed, exact = (
        host.fixed_point(
            block, None, accelerate.Anderson(5, None, True, 1.0),
            iterate.Settings(1e-3, 0.0, 50, ladder=ladder), None, None, offset.new_empty(0),
        )
        for ladder in (True, False)
    )  # fmt: skip
    assert (exact.status == Status.CONVERGED).all()
    assert (climbed.status == Status.CONVERGED).all()
    assert climbed.steps.max() <= exact.steps.max() + 3


def test_chunks_are_equal_but_for_a_row():
    for rows, width in ((4097, 8192), (65537, 2048), (612, 500), (1000, 4096)):
        (_, chunks), *_ = solve.chunks_of(torch.Size((2, rows, width)), torch.device("cpu"))
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        assert sum(sizes) == rows
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= host.MIN_ROWS


def test_exact_evaluations_of_the_ladder(monkeypatch, bfloat16):
    """The first, the fifth, and every sixth after it."""
    exact = []
    evaluate = host._Loop.evaluate

    def recording(self, z):
        exact.append(self.exact)
        return evaluate(self, z)

    monkeypatch.setattr(host._Loop, "evaluate", recording)
    equilibrium(layer(solver=Anderson(tol=1e-9, max_steps=18)), torch.randn(COUNT, 20, DIM))
    # The eighteenth, the last step of rows that do not converge, is off the ladder.
    assert [at for at, is_exact in enumerate(exact[:18]) if is_exact] == [0, 4, 10, 16, 17]


def test_min_rows_is_what_the_loop_pads_to(monkeypatch):
    seen = []
    call = solve.ModalityBlock.__call__

    def recording(self, z):
        seen.append(self.shape[1])
        return call(self, z)

    monkeypatch.setattr(solve.ModalityBlock, "__call__", recording)
    equilibrium(layer(16), torch.randn(COUNT, 3, 16))
    assert set(seen) == {host.MIN_ROWS}


class Affine:
    """f(z) = scale * z + offset, one number per row."""

    def __init__(self, scale, offset):
        self.scale, self.offset = scale, offset
        self.shape = offset.shape

    def __call__(self, z):
        return self.offset.clone() if z is None else self.scale * z + self.offset

    def take(self, index):
        rows = index[0]
        return Affine(self.scale[:, rows], self.offset[:, rows])


@pytest.mark.parametrize("loop", [host.fixed_point, iterate.fixed_point_masked])
def test_a_row_that_meets_the_absolute_tolerance_returns_what_met_it(loop):
    """Also where an earlier evaluation had the smaller relative residual."""

    block = Affine(torch.full((1, 20, 1), 0.5), torch.zeros(1, 20, 1))
    settings = iterate.Settings(rtol=1e-30, atol=0.5, max_steps=60, restart=False)
    start = torch.full((1, 20, 1), 100.0)
    outcome = loop(block, start, solve.Picard(1.0), settings, None, None, torch.empty(0))
    assert (outcome.status == Status.CONVERGED).all()
    # The relative residual is 1 in every step, so the first is never improved upon.
    before = 2 * outcome.state
    assert ((outcome.state - before).abs() <= 0.5).all()


@pytest.mark.parametrize("loop", [host.fixed_point, iterate.fixed_point_masked])
def test_a_map_that_is_zero(loop):
    """||g|| / ||f|| is not finite at a start away from 0; the row is."""
    block = Affine(torch.zeros(1, 20, 8), torch.zeros(1, 20, 8))
    settings = iterate.Settings(rtol=1e-3, atol=0.0, max_steps=9)
    start = torch.full((1, 20, 8), 100.0)
    outcome = loop(block, start, solve.Picard(1.0), settings, None, None, torch.empty(0))
    assert (outcome.status == Status.CONVERGED).all()
    assert (outcome.steps == 2).all()
    assert not outcome.state.any()


class Transient:
    """lambda -> J^T lambda, for a J whose powers grow fifty steps long before they vanish."""

    def __init__(self, dim):
        self.matrix = 0.4 * torch.eye(dim) + 0.7 * torch.diag(torch.ones(dim - 1), 1)

    def vjp(self, gradient, low=False):
        return gradient @ self.matrix

    def take(self, index):
        return self


@pytest.mark.parametrize("loop", [host.fixed_point, iterate.fixed_point_masked])
@pytest.mark.parametrize("solver", [Picard, Broyden], ids=lambda solver: solver.__name__)
def test_an_adjoint_that_expands_at_first_converges(monkeypatch, loop, solver):
    """Residuals above that of the start are none to return, but no lack of progress either."""
    monkeypatch.setattr(solve, "fixed_point", loop)
    gradient = torch.eye(32)[:1].repeat(20, 1).unsqueeze(0)
    options = solve.SolverOptions.decode(Implicit(solver(tol=1e-4, max_steps=200)).encoded)
    rows = torch.ones(1, 20, dtype=torch.bool)
    outcome = adjoint._solve_adjoint(Transient(32), gradient, options, rows)
    assert (outcome.status == Status.CONVERGED).all()
    assert (outcome.steps > 1.5 * iterate.PATIENCE).all()
    exact = torch.linalg.solve(torch.eye(32) - Transient(32).matrix.T, gradient.mT).mT
    torch.testing.assert_close(outcome.state, exact, rtol=1e-3, atol=1e-3 * float(exact.max()))


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_gradients_of_any_scale(scale):
    """Squares of the incoming gradient vanish or overflow in fp32; its adjoint does not."""
    fusion = layer(64)
    features, direction = torch.randn(COUNT, 20, 64), torch.randn(20, 64)
    grads = []
    for factor in (1.0, scale):
        inputs = features.clone().requires_grad_()
        fusion(inputs).backward(direction * factor)
        grads.append(inputs.grad / factor)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", [Anderson, Picard, Broyden], ids=lambda solver: solver.__name__)
def test_rows_that_converged_leave_the_work(monkeypatch, solver):
    """Where most rows start at their solution, the steps after the first few cost the others."""
    rows, cold = 128, 20
    fusion = layer(16, solver=solver(tol=1e-5, max_steps=100))
    features = torch.randn(COUNT, rows, 16)
    init = equilibrium(fusion, features).state
    init[:, :cold] = 0
    seen = {solve.ModalityBlock: [], solve.FusionBlock: []}
    for kind, shapes in seen.items():

        def recording(self, z, shapes=shapes, call=kind.__call__):
            shapes.append(self.shape[1])
            return call(self, z)

        monkeypatch.setattr(kind, "__call__", recording)
    stats = equilibrium(fusion, features, init=init).stats
    for shapes, steps in zip(seen.values(), (stats.steps[:-1], stats.steps[-1:]), strict=True):
        assert len(shapes) == steps.max()
        assert shapes[0] == rows
        assert shapes == sorted(shapes, reverse=True)
        # A step takes the rows still running, or at most a third more: fewer are not dropped.
        running = [max(int((block > k).sum()) for block in steps) for k in range(len(shapes))]
        for taken, needed in zip(shapes[1:], running[1:], strict=True):
            least = max(needed, host.MIN_ROWS)
            assert least <= taken <= max(least, needed / iterate.COMPACT_BELOW * COUNT)
        assert shapes[-1] == host.MIN_ROWS
        assert sum(shapes) < rows * len(shapes) / 2


class NoReading(TorchDispatchMode):
    """Fails at every operation for whose result the host would wait for a device."""

    READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.READING and not self.on_a_cpu_only():
            raise AssertionError(f"{func} reads values")
        if name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise AssertionError(f"{func} with a mask reads values")
        return func(*args, **(kwargs or {}))

    @staticmethod
    def on_a_cpu_only() -> bool:
        """Two functions look at a flag where the device is a CPU, which it is here."""
        there = accelerate.Anderson.weights, norm.injected_within_range
        codes = {function.__code__ for function in there}
        return any(frame.f_code in codes for frame, _ in traceback.walk_stack(None))


@pytest.fixture
def unread(monkeypatch) -> NoReading:
    """No reading of values, neither by operations nor past them, in the loop of other devices."""

    def refuse(*_):
        raise AssertionError("values are read")

    for name in ("numpy", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(solve, "fixed_point", iterate.fixed_point_masked)
    return NoReading()


READS = {
    "bool": lambda t: bool(t.any()),
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t[0]),
    "nonzero": lambda t: t.nonzero(),
    "equal": lambda t: torch.equal(t, t + 1),
    "index": lambda t: t[t > 0],
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reading_is_noticed(unread, read):
    """What the next test rests on."""
    with unread, pytest.raises(AssertionError, match="read"):
        read(torch.ones(2))


@pytest.mark.parametrize(
    "solver", [Anderson(max_steps=9), Picard(max_steps=9), Broyden(max_steps=9, memory=3)], ids=repr
)
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
def test_solves_on_other_devices_read_nothing(unread, solver, scheduled, gate):
    """Forward and backward, with rows that converge, that run out of steps and that are lost."""
    fusion = layer(16, skip=True, gate=gate)
    features, init = torch.randn(COUNT, 40, 16), torch.randn(COUNT + 1, 40, 16)
    features[0, 3], features[1, 4] = torch.nan, torch.inf
    present = torch.rand(COUNT, 40) < 0.8
    injection, gate_mask = features.sum(0), present.unsqueeze(-1).float()
    tolerance = torch.tensor(1e-2) if scheduled else None
    pm, pf, cell = fusion.modality_parameters, fusion.fusion_parameters, fusion.options
    o = solve.SolverOptions.decode(solver.encoded)
    with torch.no_grad(), unread:
        z = solve.solve_modality(features, init[:-1], present, pm, cell, o, tolerance, True)
        fused = solve.solve_fusion(
            z.state, injection, z.status, init[-1], gate_mask, injection, pf, cell, o, tolerance,
            True,
        )  # fmt: skip
        joint.solve_joint(
            features, injection, init, present, gate_mask, None, pm, pf, cell, o, tolerance, True
        )
        for backward in (o, solve.SolverOptions.decode(Phantom().encoded)):
            adjoint.adjoint_modality(
                init[:-1], z.state, z.status, features, present, pm, cell, backward
            )
            adjoint.adjoint_fusion(
                init[-1], fused.state[0], fused.status[0], z.state, injection, gate_mask, None,
                pf, cell, backward,
            )  # fmt: skip
    for status in (Status.CONVERGED, Status.NON_FINITE):
        assert (z.status == status).any()
