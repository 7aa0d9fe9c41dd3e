"""A layer's solves on example features, one by one, and what is true of them in float64.

A forward answer z of a block is right when norm(f(z) - z) / norm(f(z)) of every row, in float64,
is at most the solver's tolerance; an adjoint's when dL/dx of every row is within ten tolerances of
a gradient solved in float64 (a residual says less there: how much of it a gradient shows is up to
the problem). Where the dtype or the precision of products allow no better, twice as far off as the
reference is with them, up to a bound. Rows that have no answer in float64, or that the layer as it
is does not solve, by the reference, are left out: nobody else need solve them, and what is allowed
is none of their business.

Blocks are tuned apart, so that each gets the answer of the one before it in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deqfusion import functional, ops, programs
from deqfusion.adjoint import Implicit, Unroll
from deqfusion.functional import FusionParameters, ModalityParameters
from deqfusion.kernels import tuning
from deqfusion.kernels.config import MAX_MEMORY
from deqfusion.kernels.layout import Layout
from deqfusion.kernels.tuning import Choice, Problem
from deqfusion.module import DEQFusion, Features
from deqfusion.reference import adjoint as reference_adjoint
from deqfusion.reference import cell as equations
from deqfusion.reference import solve as reference
from deqfusion.reference.iterate import CONVERGED
from deqfusion.reference.solve import SolverOptions
from deqfusion.solvers import Anderson, Solver

__all__ = ["Answer", "Example", "Way"]

CLOSER = 1e-2
"""Tolerance of what is taken for true, over the solver's."""

LONG = 200
SLACK = 10
"""Factor on the tolerance that rounding may take at most, or `ROUNDINGS` of the products."""

ROUNDINGS = 4
GRADIENT_SLACK = 10
FIXED = 1e-5
"""Tolerance of adjoints that take a fixed number of steps: they may differ by rounding."""

COUNTED = 256
"""Rows on which steps are counted."""

Answer = tuple[Tensor, ...]


@dataclass(frozen=True)
class Way:
    """A way to solve.

    Attributes:
        solve: one of `deqfusion.kernels.tuning.SOLVES`, or "host" for all of them.
        config: of the programs, or of the CPU implementation.
        memory, ladder: of the solver; of an adjoint, its own.
    """

    solve: str
    config: Choice
    memory: int
    ladder: bool


def _double(parameters: Any) -> Any:
    return type(parameters)(*(p.double() for p in parameters))


def _relative(difference: Tensor, scale: Tensor, least: float = 0.0) -> Tensor:
    """Ratio of norms over the last axis; infinite where anything is not finite.

    least: smallest scale of a row, over the largest of all.
    """
    size = scale.norm(dim=-1)
    # A row that is not finite is no measure of the others.
    most = size.nan_to_num(nan=0.0, posinf=0.0).max()
    size = size.clamp_min(torch.finfo(size.dtype).tiny).maximum(least * most)
    return (difference.norm(dim=-1) / size).nan_to_num(nan=torch.inf)


class Example:
    """What is to be tuned.

    Args:
        module: the layer.
        features: as the layer takes them; at least one row.
        backward: whether its adjoint solves count.

    Attributes:
        solves: the names of what is solved.
        device: of the features.

    Raises:
        ValueError, TypeError: naming the argument, what was got and what was expected.
    """

    def __init__(self, module: DEQFusion, features: Features, backward: bool) -> None:
        if module.joint:
            raise ValueError("module: got joint=True, expected a layer that solves by blocks")
        if isinstance(module.adjoint, Unroll):
            raise ValueError("module: got adjoint Unroll, expected one with a solve: none is tuned")
        with torch.no_grad():
            rows = module._rows(features, None, None)
        self.x, self.injection = rows.x.contiguous(), rows.injection.contiguous()
        self.cell, self.solver, self.adjoint = module.options, module.solver, module.adjoint
        self.layout = Layout(module.dim, module.options.num_groups)
        self.modalities, self.rows = self.x.shape[:2]
        if self.rows == 0:
            raise ValueError("example_features: got no rows, expected at least one")
        self.device = self.x.device
        self.modality = ModalityParameters(*(p.detach() for p in module.modality_parameters))
        self.fusion = FusionParameters(*(p.detach() for p in module.fusion_parameters))
        self.solves = tuning.SOLVES if backward else tuning.SOLVES[:2]
        self.tolerance = self.solver.final_tol
        self._packed: dict[bool, tuple[Tensor, Tensor]] = {}
        self._allowed: dict[str, float] = {}
        self._solved: dict[str, Tensor] = {}
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            self._find_truth()

    def _find_truth(self) -> None:
        close = Anderson(self.tolerance * CLOSER, max_steps=LONG, memory=8, ladder="off")
        o, cell, dtype = SolverOptions.decode(close.encoded), self.cell, self.x.dtype
        x, injection = self.x.double(), self.injection.double()
        pm, pf = _double(self.modality), _double(self.fusion)
        z = reference.solve_modality(x, None, None, pm, cell, o, None, False)
        self.z = z.state.to(dtype)
        m = self.z.double()
        zf = reference.solve_fusion(
            m, injection, None, None, None, None, pf, cell, o, None, False
        )  # fmt: skip
        self.zf = zf.state[0].to(dtype)
        constants = equations.gate_constants(m, pf, cell)

        def modality_residual(answer: Answer) -> Tensor:
            state = answer[0].double()
            image = equations.modality_cell(state, x, pm, cell)
            return _relative(image - state, image)

        def fusion_residual(answer: Answer) -> Tensor:
            state = answer[0].double()
            image = equations.fusion_cell(state, constants, injection, pf, cell)
            return _relative(image - state, image)

        self._errors: dict[str, Callable[[Answer], Tensor]] = {
            "modality": modality_residual, "fusion": fusion_residual,
        }  # fmt: skip
        own = SolverOptions.decode(self.solver.encoded)
        found = reference.solve_modality(
            self.x, None, None, self.modality, cell, own, None, False
        )  # fmt: skip
        self._allow("modality", (self.z,), z.status, (found.state,), found.status)
        found = reference.solve_fusion(
            self.z, self.injection, None, None, None, None, self.fusion, cell, own, None, False
        )
        self._allow("fusion", (self.zf,), zf.status[0], (found.state[0],), found.status[0])
        if len(self.solves) > 2:
            self._find_true_gradients(o, x, injection, m, pm, pf)

    def _allow(self, name: str, rounded: Answer, true: Tensor, own: Answer, status: Tensor) -> None:
        """How far off an answer may be, and which rows are looked at.

        rounded: the true answer, of which only the rounding is left in rows that have one;
        true: its status; own, status: the reference's.
        """
        tolerance = self.tolerance_of(name)
        most = max(SLACK * tolerance, ROUNDINGS * self._rounding)
        if "adjoint" in name:
            tolerance = GRADIENT_SLACK * max(tolerance, FIXED)
        allowed, errors = tolerance, self._errors[name](own)
        converged = (true == CONVERGED).expand(errors.shape)
        if converged.any():
            allowed = max(allowed, 2 * float(self._errors[name](rounded)[converged].median()))
        claimed = errors[converged & (status == CONVERGED)]
        if claimed.numel() and claimed.median() > allowed:
            # Most say that they met the tolerance, and did so in what their products can tell.
            allowed = 2 * float(claimed.median())
        # Of whatever it is the median: what is far off is no answer.
        allowed = min(allowed, max(tolerance, most))
        self._allowed[name], self._solved[name] = allowed, converged & (errors <= allowed)

    @property
    def _rounding(self) -> float:
        """Of the dtype, or of float32's products where those may be rounded more."""
        eps = torch.finfo(self.x.dtype).eps
        if self.x.dtype != torch.float32:
            return eps
        # tf32 and float16.
        rounded = torch.get_float32_matmul_precision() != "highest"
        return 2.0**-10 if rounded else eps

    def _find_true_gradients(
        self, o: SolverOptions, x: Tensor, injection: Tensor, m: Tensor, pm: ModalityParameters,
        pf: FusionParameters,
    ) -> None:  # fmt: skip
        own = SolverOptions.decode(self.adjoint.encoded)
        if own.method == "truncated":
            o = own
        draw = torch.Generator().manual_seed(0)
        self.gradient = torch.randn(self.x.shape, generator=draw).to(self.x)
        # As of a solve: rows that are NON_FINITE take no part, which none is here.
        status = torch.zeros(self.x.shape[:2], dtype=torch.int32, device=self.device)
        self._status = status, status[0]
        for name in ("modality adjoint", "fusion adjoint"):
            block = name.partition(" ")[0]
            true, outcome = self._reference_adjoint(block, o, x, injection, m, pm, pf)

            def error(answer: Answer, true: Answer = true) -> Tensor:
                found = [
                    _relative(a.double() - t, t, 1e-3) for a, t in zip(answer, true, strict=True)
                ]
                return torch.cat([e.reshape(-1, e.shape[-1]) for e in found])

            self._errors[name] = error
            plain, status = self._reference_adjoint(
                block, own, self.x, self.injection, self.z, self.modality, self.fusion
            )
            if own.method == "truncated":
                # A fixed number of steps ends where it ends.
                outcome = torch.full_like(outcome, CONVERGED)
            self._allow(name, tuple(t.to(self.x.dtype) for t in true), outcome, plain, status)

    def _reference_adjoint(
        self, block: str, o: SolverOptions, x: Tensor, injection: Tensor, m: Tensor,
        pm: ModalityParameters, pf: FusionParameters,
    ) -> tuple[Answer, Tensor]:  # fmt: skip
        gradient = self.gradient.to(x)
        if block == "modality":
            dx, _, outcome = reference_adjoint.adjoint_modality(
                gradient, m, self._status[0], x, None, pm, self.cell, o
            )
            return (dx,), outcome.status
        dm, dx, _, outcome = reference_adjoint.adjoint_fusion(
            gradient[0], self.zf.to(x), self._status[1], m, injection, None, None, pf,
            self.cell, o,
        )  # fmt: skip
        return (dm, dx), outcome.status

    def tolerance_of(self, solve: str) -> float:
        """What a solve is to reach; 0 where it takes a fixed number of steps."""
        if "adjoint" not in solve:
            return self.tolerance
        return self.adjoint.solver.final_tol if isinstance(self.adjoint, Implicit) else 0.0

    @property
    def without_answer(self) -> int:
        """Rows of some block that the layer as it is does not solve."""
        forward = (self._solved[name] for name in tuning.SOLVES[:2])
        return sum(int((~rows).sum()) for rows in forward)

    # --- running ---------------------------------------------------------------------------------

    @property
    def own(self) -> tuple[int, bool]:
        """Memory and ladder of the layer's solver."""
        o = SolverOptions.decode(self.solver.encoded)
        return o.memory, o.ladder

    def own_of(self, solve: str) -> tuple[int, bool]:
        """Memory and ladder of a solve of the layer as it is."""
        if "adjoint" not in solve:
            return self.own
        o = SolverOptions.decode(self.adjoint.encoded)
        return o.memory, o.ladder

    def problem(self, solve: str, memory: int | None = None) -> Problem:
        """What an entry of a solve is for, with the layer's own memory or another."""
        memory = self.own_of(solve)[0] if memory is None else memory
        if solve == "host":
            precision, threads = str(self.x.dtype).removeprefix("torch."), torch.get_num_threads()
        else:
            options, threads = self.options(solve), 0
            precision = options.products
            memory = replace(options, memory=min(memory, MAX_MEMORY)).slots
        dim, groups = self.layout.dim, self.layout.groups
        rows = tuning.bucket(self.rows)
        return Problem(solve, dim, groups, self.modalities, precision, memory, threads, rows)

    def options(self, solve: str) -> Any:
        """A solve's `kernels.config.SolveOptions`; raises ValueError for what programs lack."""
        encoded = self.adjoint.encoded if "adjoint" in solve else self.solver.encoded
        o = SolverOptions.decode(encoded)
        # Of the layer's own memory nothing is asked here; more than programs have is not tried.
        return programs.solve_options(o._replace(memory=min(o.memory, MAX_MEMORY)), self.x)

    def solver_of(self, memory: int, ladder: bool) -> Solver:
        """The layer's solver with another memory and ladder, where it has them."""
        if not isinstance(self.solver, Anderson):
            return self.solver
        return replace(self.solver, memory=memory, ladder="auto" if ladder else "off")

    def call(self, way: Way) -> Callable[[], dict[str, Answer]]:
        """A function that solves and returns answers by name."""
        # A schedule of tolerances is tuned for where it ends.
        solver = replace(self.solver_of(way.memory, way.ladder), tol=self.tolerance)
        self._pack(solver, way.ladder)
        names = self.solves if way.solve == "host" else (way.solve,)

        def run() -> dict[str, Answer]:
            with torch.no_grad(), _with(way.config):
                return {name: self._solve(name, solver, way.ladder) for name in names}

        return run

    def _pack(self, solver: Solver, ladder: bool) -> tuple[Tensor, Tensor]:
        """Both blocks' parameters, packed once."""
        if ladder not in self._packed:
            self._packed[ladder] = functional.pack(self.modality, self.fusion, self.cell, solver)
        return self._packed[ladder]

    def forget(self) -> None:
        """Packs anew from now on: solves that raised leave counters there that are not zero."""
        self._packed.clear()

    def _solve(self, name: str, solver: Solver, ladder: bool) -> Answer:
        cell, adjoint = self.cell, self.adjoint
        if name == "modality":
            packed = self._pack(solver, ladder)[0]
            return (
                functional.modality_equilibrium(
                    self.x, self.modality, cell=cell, solver=solver, packed=packed
                ).state,
            )
        if name == "fusion":
            packed = self._pack(solver, ladder)[1]
            return (
                functional.fusion_equilibrium(
                    self.z, self.injection, self.fusion, cell=cell, solver=solver, packed=packed
                ).state,
            )
        if name == "modality adjoint":
            status = self._status[0]
            return functional.modality_adjoint(
                self.gradient, self.z, self.x, self.modality, cell=cell, adjoint=adjoint,
                status=status,
            )[:1]  # fmt: skip
        return functional.fusion_adjoint(
            self.gradient[0], self.zf, self.z, self.injection, self.fusion, cell=cell,
            adjoint=adjoint, status=self._status[1],
        )[:2]  # fmt: skip

    def judge(self, answers: dict[str, Answer]) -> tuple[float, str | None]:
        """The largest error of the answers in float64, and what is wrong with it, if anything.

        Of forward and adjoint together the forward's, which is a residual.
        """
        worst, fault = 0.0, None
        for name, answer in answers.items():
            solved, allowed = self._solved[name], self._allowed[name]
            if not solved.any():
                return worst, f"{name}: no row that the layer as it is solves, expected some"
            error = float(torch.where(solved, self._errors[name](answer), 0.0).max())
            if "adjoint" not in name or len(answers) == 1:
                worst = max(worst, error)
            if not error <= allowed:
                what = "dL/dx off by" if "adjoint" in name else "residual"
                fault = f"{name}: {what} {error:.2e}, expected at most {allowed:.2e}"
        return worst, fault

    def steps(self, solve: str, memory: int) -> int:
        """Evaluations to the tolerance, of the row that takes most, by the reference."""
        rows = slice(0, COUNTED)
        with torch.no_grad():
            if "adjoint" in solve:
                return self._adjoint_steps(solve, rows)
            o = SolverOptions.decode(self.solver.encoded)._replace(ladder=False)
            o = o._replace(memory=memory) if o.method == "anderson" else o
            if solve == "modality":
                found = reference.solve_modality(
                    self.x[:, rows], None, None, self.modality, self.cell, o, None, False
                )
            else:
                found = reference.solve_fusion(
                    self.z[:, rows], self.injection[rows], None, None, None, None, self.fusion,
                    self.cell, o, None, False,
                )  # fmt: skip
        return max(int(found.steps.max()), 1)

    def _adjoint_steps(self, solve: str, rows: slice) -> int:
        # Which rows have ended says little about m here, which is not searched.
        o = SolverOptions.decode(self.adjoint.encoded)
        if solve == "modality adjoint":
            outcome = reference_adjoint.adjoint_modality(
                self.gradient[:, rows], self.z[:, rows], self._status[0][:, rows],
                self.x[:, rows], None, self.modality, self.cell, o,
            )[-1]  # fmt: skip
        else:
            outcome = reference_adjoint.adjoint_fusion(
                self.gradient[0, rows], self.zf[rows], self._status[1][rows], self.z[:, rows],
                self.injection[rows], None, None, self.fusion, self.cell, o,
            )[-1]  # fmt: skip
        return max(int(outcome.steps.max()), 1)


def _with(config: Choice) -> Any:
    """The context in which solves run with a choice."""
    if isinstance(config, tuning.Host):
        return ops.compacting(config.compact_below)
    from deqfusion.kernels.launch import using

    return using(config)
