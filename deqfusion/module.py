r"""`DEQFusion`: N modality features in, their fused equilibrium out.

The joint map is block-triangular (z_i sees neither z_f nor z_j), so the layer solves the N modality
equilibria in one batched solve and then the fusion equilibrium with z_i* held fixed; the fixed
point is that of the joint map, which `DEQFusion.cell` evaluates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from deqfusion import diagnostics, functional, regularization
from deqfusion import validation as check
from deqfusion.adjoint import Adjoint, Implicit, Unroll
from deqfusion.functional import CellOptions, FusionParameters, ModalityParameters
from deqfusion.injection import stacked
from deqfusion.reference import cell as equations
from deqfusion.solution import Equilibrium, SolveStats
from deqfusion.solvers import Anderson, Solver, ToleranceSchedule
from deqfusion.unrolled import unrolled_equilibrium

__all__ = ["DEQFusion"]

Features = Sequence[Tensor] | Tensor


class DEQFusion(nn.Module):
    """Deep equilibrium multimodal fusion (Ni et al., arXiv 2306.16645).

    Args:
        dim: width d of every modality feature.
        num_modalities: N >= 1.
        num_groups: groups G of every GroupNorm; divides `dim`.
        gate: "sigmoid", or "identity" as in the authors' released code.
        gate_input: "sum" (W_g (z_f + z_i)) or "concat" (W_g [z_f ; z_i]).
        skip: adds z_i before the last activation of a modality block (the authors' code has it on,
            the paper's equation off).
        tail: "relu_norm" or, for the fusion block of the authors' MM-IMDB code, "norm_relu".
        dropout: probability in [0, 1) on the gates and on the fusion product, in training mode,
            with one mask per solve (a fresh mask per step would have no fixed point).
        solver: `Anderson`, `Picard` or `Broyden`.
        adjoint: backward mode, `Implicit`, `Phantom`, `OneStep` or `Unroll`.
        joint: solves the whole state as one problem, for comparison with the paper's traces;
            slower, same fixed point.
        device, dtype: of the parameters; fp64, fp32, bf16 or fp16.

    A row whose features are not finite has no answer: its output is 0, not NaN, its gradients are
    0, and only its status (`equilibrium(...).stats`) says NON_FINITE.

    Raises:
        ValueError, TypeError: naming the argument, what was got and what was expected.
    """

    def __init__(
        self,
        dim: int,
        num_modalities: int,
        *,
        num_groups: int = 4,
        gate: str = "sigmoid",
        gate_input: str = "sum",
        skip: bool = False,
        tail: str = "relu_norm",
        dropout: float = 0.0,
        solver: Solver = Anderson(),  # noqa: B008
        adjoint: Adjoint = Implicit(),  # noqa: B008
        joint: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim = check.count("dim", dim, minimum=1)
        num_modalities = check.count("num_modalities", num_modalities, minimum=1)
        num_groups = check.count("num_groups", num_groups, minimum=1)
        options = CellOptions(num_groups, gate, gate_input, skip, tail)
        check.cell_options(options, dim)
        check.probability("dropout", dropout)
        check.instance("adjoint", adjoint, Adjoint)
        check.boolean("joint", joint)
        check.dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        self.dim, self.num_modalities = dim, num_modalities
        self.options = options
        self.dropout, self.adjoint, self.joint = dropout, adjoint, joint

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        n, d = num_modalities, dim
        self.modality_weight1, self.modality_bias1 = parameter(n, d, d), parameter(n, d)
        self.norm1_weight, self.norm1_bias = parameter(n, d), parameter(n, d)
        self.modality_weight2, self.modality_bias2 = parameter(n, d, d), parameter(n, d)
        self.norm2_weight, self.norm2_bias = parameter(n, d), parameter(n, d)
        self.norm3_weight, self.norm3_bias = parameter(n, d), parameter(n, d)
        self.gate_weight = parameter(d, 2 * d if gate_input == "concat" else d)
        self.gate_bias = parameter(d)
        self.fusion_weight, self.fusion_bias = parameter(d, d), parameter(d)
        self.fusion_norm_weight, self.fusion_norm_bias = parameter(d), parameter(d)
        self.injection_weight, self.injection_bias = parameter(n), parameter(1)
        self.solver = solver
        self.reset_parameters()

    @property
    def solver(self) -> Solver:
        """The solver; it may be replaced. A tolerance schedule counts in `solver_progress`."""
        return self._solver

    @solver.setter
    def solver(self, solver: Solver) -> None:
        check.instance("solver", solver, Solver)
        self._solver = solver
        scheduled, counts = isinstance(solver.tol, ToleranceSchedule), "solver_progress"
        if scheduled and not hasattr(self, counts):
            self.solver_progress: Tensor
            start = torch.zeros((), dtype=torch.long, device=self.gate_bias.device)
            self.register_buffer(counts, start)
        elif not scheduled and hasattr(self, counts):
            del self.solver_progress

    def reset_parameters(self) -> None:
        """Draws weights and biases as `nn.Linear` does; norms and injection begin at 1 and 0."""
        with torch.no_grad():
            for weight, bias in (
                (self.modality_weight1, self.modality_bias1),
                (self.modality_weight2, self.modality_bias2),
                (self.gate_weight, self.gate_bias),
                (self.fusion_weight, self.fusion_bias),
            ):
                bound = 1 / math.sqrt(weight.shape[-1])
                weight.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)
            for name, value in self.named_parameters():
                if "norm" in name or "injection" in name:
                    value.fill_(1.0 if name.endswith("weight") else 0.0)
            if isinstance(self.solver.tol, ToleranceSchedule):
                self.solver_progress.zero_()

    def extra_repr(self) -> str:
        """Every option that differs from its default, after the two sizes."""
        parts = [f"{self.dim}, {self.num_modalities}"]
        default = CellOptions()
        for name in ("num_groups", "gate", "gate_input", "skip", "tail"):
            if getattr(self.options, name) != getattr(default, name):
                parts.append(f"{name}={getattr(self.options, name)!r}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.joint:
            parts.append("joint=True")
        return ", ".join([*parts, f"solver={self.solver}", f"adjoint={self.adjoint}"])

    @property
    def modality_parameters(self) -> ModalityParameters:
        """The modality blocks' parameters as the functional interface takes them."""
        return ModalityParameters(
            self.modality_weight1, self.modality_bias1, self.norm1_weight, self.norm1_bias,
            self.modality_weight2, self.modality_bias2, self.norm2_weight, self.norm2_bias,
            self.norm3_weight, self.norm3_bias,
        )  # fmt: skip

    @property
    def fusion_parameters(self) -> FusionParameters:
        """The fusion block's parameters as the functional interface takes them."""
        return FusionParameters(
            self.gate_weight, self.gate_bias, self.fusion_weight, self.fusion_bias,
            self.fusion_norm_weight, self.fusion_norm_bias,
        )  # fmt: skip

    def forward(
        self, features: Features, init: Tensor | Equilibrium | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The fused equilibrium z_f* (..., d); arguments as in `equilibrium`."""
        return self._equilibrium(features, init, mask, None, False)[2]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Loads what fits: a layer with a tolerance schedule and one without share checkpoints."""
        key = prefix + "solver_progress"
        if not isinstance(self.solver.tol, ToleranceSchedule):
            state_dict.pop(key, None)
        else:
            state_dict.setdefault(key, self.solver_progress)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def equilibrium(
        self,
        features: Features,
        init: Tensor | Equilibrium | None = None,
        mask: Tensor | None = None,
        *,
        injection: Tensor | None = None,
        trace: bool = False,
    ) -> Equilibrium:
        """Solves for the equilibrium of every row.

        Args:
            features: sequence of N tensors (..., d), or one (N, ..., d); floating point, in the
                parameters' dtype (under autocast any). Leading dimensions are rows.
            init: where to start: a state (N+1, ..., d), modalities then fusion, or an earlier
                equilibrium. None starts from 0, and so does a block of a row that is not finite in
                it.
            mask: bool (..., N), True where a modality is missing; it is left out of x_f and of the
                gate sum, its state is 0, and its features are not looked at. A row must have at
                least one modality: without, it is an error on a CPU (compiled, a RuntimeError) and
                elsewhere, where looking would wait for the device, its fusion is NON_FINITE.
            injection: (..., d), x_f given by the caller in place of sum_i w_i x_i + b.
            trace: records the residual of every evaluation in `stats.trace`.

        Returns:
            The equilibrium; `stats` has shape (N+1, ...).

        Raises:
            ValueError, TypeError: naming the argument, what was got and what was expected.
        """
        leading, z, fused, blocks = self._equilibrium(features, init, mask, injection, trace)
        parts = (
            blocks[0]
            if len(blocks) == 1
            else tuple(torch.cat((a, b.unsqueeze(0))) for a, b in zip(*blocks, strict=True))
        )
        status, steps, residual, *recorded = (
            t.reshape(t.shape[0], *leading, *t.shape[2:]) for t in parts
        )
        stats = SolveStats(status, steps, residual)
        if recorded:
            change, size = recorded[0].unbind(-1)
            relative = torch.where(change == 0, 0.0, change / size)
            stats = SolveStats(status, steps, residual, relative, change)
        return Equilibrium(fused, z.reshape(self.num_modalities, *leading, self.dim), stats, mask)

    def _equilibrium(
        self, features: Features, init: Tensor | Equilibrium | None, mask: Tensor | None,
        injection: Tensor | None, trace: bool,
    ) -> tuple[torch.Size, Tensor, Tensor, Sequence[tuple[Tensor, ...]]]:  # fmt: skip
        """Leading dimensions, modality states (N, R, d), fused state (..., d) and statistics.

        Those are status, steps, residual and, with `trace`, recorded norms (R, T, 2): of the
        modalities (N, R, ...) and of the fusion (R, ...), or in one of all blocks (N+1, R, ...).
        """
        # Autograd differentiates unrolled steps; a joint solve is the reference on every device.
        plain = self.joint or injection is not None or isinstance(self.adjoint, Unroll)
        rows = self._rows(features, mask, injection) if plain else self._start_rows(features, mask)
        start = self._start(init, rows.leading, rows.x.dtype)
        gate_mask, fusion_mask = self._masks(rows.x, rows.present)
        if isinstance(self.adjoint, Unroll):
            whole = unrolled_equilibrium(
                rows.x, rows.injection, self.modality_parameters, self.fusion_parameters,
                cell=self.options, solver=self.solver, steps=self.adjoint.steps, init=start,
                present=rows.present, gate_mask=gate_mask, fusion_mask=fusion_mask,
            )  # fmt: skip
            z, fused, found = whole.state[:-1], whole.state[-1], [whole[1:]]
        else:
            z, fused, found = self._solve(rows, start, gate_mask, fusion_mask, trace)
        blocks = [parts if trace else parts[:3] for parts in found]
        if len(rows.leading) != 1:
            fused = fused.reshape(*rows.leading, self.dim)
        return rows.leading, z, fused, blocks

    def cell(
        self, state: Tensor, features: Features, mask: Tensor | None = None,
        injection: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One step of the joint map, without dropout; differentiable.

        Args:
            state: (N+1, ..., d), modalities then fusion.
            features, mask, injection: as in `equilibrium`.

        Returns:
            (N+1, ..., d).
        """
        rows = self._rows(features, mask, injection)
        check.state(state, self.num_modalities, rows.leading, self.dim, "state")
        with equations.full_precision(rows.x):
            out = equations.joint_cell(
                state.reshape(self.num_modalities + 1, -1, self.dim).to(rows.x.dtype), rows.x,
                rows.injection, self.modality_parameters, self.fusion_parameters, self.options,
                rows.gate_mask,
            )  # fmt: skip
        if rows.present is not None:
            out = equations.clear_absent(out, rows.present)
        return out.reshape(state.shape)

    def jacobian_penalty(
        self, eq: Equilibrium, features: Features, probes: int = 1, mask: Tensor | None = None,
        injection: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Hutchinson estimate of ||J||_F^2 / numel, J the joint map's Jacobian at `eq`.

        See `deqfusion.regularization.jacobian_penalty`. Differentiable with respect to parameters
        and features; the state is held fixed, as in the authors' code.

        Args:
            eq: an equilibrium of these features.
            features, injection: as in `equilibrium`.
            mask: None takes that of `eq`.
            probes: Gaussian probes averaged, >= 1.

        Returns:
            () in the parameters' dtype.
        """
        check.count("probes", probes, minimum=1)
        rows = self._rows_of(eq, features, mask, injection)
        with equations.full_precision(rows.x):
            return regularization.jacobian_penalty(
                eq.state.detach().reshape(self.num_modalities + 1, -1, self.dim).to(rows.x.dtype),
                rows.x, rows.injection, self.modality_parameters, self.fusion_parameters,
                self.options, rows.gate_mask, rows.present, probes,
                eq.stats.status.reshape(self.num_modalities + 1, -1),
            )  # fmt: skip

    def spectral_radius(
        self, eq: Equilibrium, features: Features, steps: int = 50, mask: Tensor | None = None,
        injection: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Spectral radius of the joint map's Jacobian at `eq`, per row (...).

        See `deqfusion.diagnostics.spectral_radius`; `steps` is the dimension of the Krylov space.
        """
        check.count("steps", steps, minimum=1)
        rows = self._rows_of(eq, features, mask, injection)
        state = eq.state.detach().reshape(self.num_modalities + 1, -1, self.dim)
        with equations.full_precision(rows.x):
            return diagnostics.spectral_radius(
                state.to(rows.x.dtype), rows.x, rows.injection, self.modality_parameters,
                self.fusion_parameters, self.options, rows.gate_mask, rows.present, steps,
            ).reshape(rows.leading)  # fmt: skip

    def modality_weights(self, eq: Equilibrium, mask: Tensor | None = None) -> Tensor:
        """How much each modality's gate opens: mean |a_i| over channels, normalised to sum 1.

        Args:
            eq: an equilibrium of this layer.
            mask: as in `equilibrium`, None takes that of `eq`; a missing modality weighs 0.

        Returns:
            (N, ...).
        """
        check.equilibrium("eq", eq, self.num_modalities, self.dim)
        mask = eq.mask if mask is None else mask
        leading = eq.fused.shape[:-1]
        present = None if mask is None else check.mask(mask, leading, self.num_modalities)
        weights = diagnostics.modality_weights(
            eq.modalities.detach().reshape(self.num_modalities, -1, self.dim),
            eq.fused.detach().reshape(-1, self.dim), self.fusion_parameters, self.options,
            None if present is None else present.unsqueeze(-1).to(eq.fused.dtype),
        )  # fmt: skip
        return weights.reshape(self.num_modalities, *leading)

    def _rows(self, features: Features, mask: Tensor | None, injection: Tensor | None) -> _Rows:
        """Checks the inputs and brings them to (N, R, d), by PyTorch operations."""
        x = check.stack_features(features, self.num_modalities, self.dim)
        leading, (x,), present = self._checked((x,), x.shape[1:-1], mask)
        if present is not None:
            # Whatever stands for a missing feature, NaN included, must not reach a product.
            x = torch.where(present.unsqueeze(-1), x, 0.0)
        if injection is None:
            x_f = functional.inject(x, self.injection_weight, self.injection_bias)
        else:
            x_f = self._given(injection, leading, x)
        if present is not None:
            x_f = torch.where(present.any(0).unsqueeze(-1), x_f, torch.nan)
        return _Rows(x, x_f, present, leading)

    def _start_rows(self, features: Features, mask: Tensor | None) -> _Rows:
        """The same by one operator, for solves that give their own gradients."""
        if check.fits(features, self.num_modalities, self.dim):
            whole: Sequence[Tensor] = (cast(Tensor, features),)
            shape = whole[0].shape[1:-1]
        else:
            parts = check.modality_features(features, self.num_modalities, self.dim)
            whole = (features,) if isinstance(features, Tensor) else parts
            shape = parts[0].shape[:-1]
        leading, flat, present = self._checked(whole, shape, mask)
        weight, bias = self.injection_weight, self.injection_bias
        check.tensor("injection_weight", weight, [(self.num_modalities,)], flat[0])
        check.tensor("injection_bias", bias, [(1,)], flat[0])
        x, x_f = stacked(flat, weight, bias, present)
        return _Rows(x, x_f, present, leading)

    def _checked(
        self, features: Sequence[Tensor], leading: torch.Size, mask: Tensor | None
    ) -> tuple[torch.Size, list[Tensor], Tensor | None]:
        """Features (..., R, d) in the parameters' dtype, and the mask's opposite (N, R)."""
        weight = self.modality_weight1
        check.same_device("features", features[0], weight.device, "the parameters")
        kind = functools.reduce(torch.promote_types, (x.dtype for x in features))
        if kind != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            raise TypeError(
                f"features: got dtype {kind}, expected {weight.dtype} as the parameters (or call "
                "under torch.autocast)"
            )
        # The solve chooses its own precisions; autocast only relaxes what comes in.
        flat = [
            x.to(weight.dtype)
            if len(leading) == 1
            else x.to(weight.dtype).reshape(*x.shape[: x.dim() - len(leading) - 1], -1, self.dim)
            for x in features
        ]
        present = None
        if mask is not None:
            present = check.mask(mask, leading, self.num_modalities)
            check.same_device("mask", present, weight.device, "the features")
        return leading, flat, present

    def _given(self, injection: Tensor, leading: torch.Size, x: Tensor) -> Tensor:
        """The caller's injection as (R, d)."""
        check.floating("injection", injection)
        check.same_device("injection", injection, x.device, "the features")
        if tuple(injection.shape) != (*leading, self.dim):
            raise ValueError(
                f"injection: got shape {tuple(injection.shape)}, expected {(*leading, self.dim)}"
            )
        return injection.reshape(x.shape[1:]).to(x.dtype)

    def _rows_of(
        self, eq: Equilibrium, features: Features, mask: Tensor | None, injection: Tensor | None
    ) -> _Rows:
        """The inputs that `eq` is an equilibrium of; `mask` None takes that of `eq`."""
        x = check.stack_features(features, self.num_modalities, self.dim)
        check.equilibrium("eq", eq, self.num_modalities, self.dim, x.shape[1:-1])
        return self._rows(x, eq.mask if mask is None else mask, injection)

    def _start(
        self, init: Tensor | Equilibrium | None, leading: torch.Size, dtype: torch.dtype
    ) -> Tensor | None:
        if init is None:
            return None
        value = init.state if isinstance(init, Equilibrium) else init
        check.state(value, self.num_modalities, leading, self.dim, "init")
        check.same_device("init", value, self.modality_weight1.device, "the parameters")
        value = value.detach().reshape(self.num_modalities + 1, -1, self.dim).to(dtype)
        return torch.where(value.isfinite().all(-1, keepdim=True), value, 0.0)

    def _masks(self, x: Tensor, present: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Factors on the gates (N, R, 1 or d) and on the fusion product (R, d): one per solve."""
        gate = None if present is None else present.unsqueeze(-1).to(x.dtype)
        if not (self.training and self.dropout):
            return gate, None
        keep = 1.0 - self.dropout
        drop = torch.bernoulli(torch.full_like(x, keep)) / keep
        fusion = torch.bernoulli(torch.full_like(x[0], keep)) / keep
        return (drop if gate is None else gate * drop), fusion

    def _tolerance(self) -> Tensor | None:
        """The schedule's tolerance as a tensor; None for a constant one."""
        tol = self.solver.tol
        if not isinstance(tol, ToleranceSchedule) or not self.training:
            return None
        tolerance = tol.at(self.solver_progress)
        self.solver_progress.add_(1)
        return tolerance

    def _solve(
        self, rows: _Rows, start: Tensor | None, gate_mask: Tensor | None,
        fusion_mask: Tensor | None, trace: bool,
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:  # fmt: skip
        tolerance = self._tolerance()
        # No autocast context around operators that switch it off themselves: a program exported
        # with one around them cannot be saved.
        if self.joint:
            whole = functional.joint_equilibrium(
                rows.x, rows.injection, self.modality_parameters, self.fusion_parameters,
                cell=self.options, solver=self.solver, adjoint=self.adjoint, init=start,
                present=rows.present, gate_mask=gate_mask, fusion_mask=fusion_mask,
                tolerance=tolerance, trace=trace,
            )  # fmt: skip
            return whole.state[:-1], whole.state[-1], [whole[1:]]
        modality, fusion = self.modality_parameters, self.fusion_parameters
        packed = functional.pack(modality, fusion, self.options, self.solver)
        z = functional.modality_equilibrium(
            rows.x, modality, cell=self.options, solver=self.solver,
            adjoint=self.adjoint, init=None if start is None else start[:-1],
            present=rows.present, packed=packed[0], tolerance=tolerance, trace=trace,
        )  # fmt: skip
        fused = functional.fusion_equilibrium(
            z.state, rows.injection, fusion, cell=self.options,
            solver=self.solver, adjoint=self.adjoint, modality_status=z.status,
            init=None if start is None else start[-1], gate_mask=gate_mask,
            fusion_mask=fusion_mask, packed=packed[1], tolerance=tolerance, trace=trace,
        )  # fmt: skip
        return z.state, fused.state, [z[1:], fused[1:]]


class _Rows:
    """Checked inputs: x (N, R, d), injection (R, d), present bool (N, R) or None."""

    def __init__(
        self, x: Tensor, injection: Tensor, present: Tensor | None, leading: torch.Size
    ) -> None:
        self.x, self.injection, self.present, self.leading = x, injection, present, leading

    @property
    def gate_mask(self) -> Tensor | None:
        """Presence as a factor on the gates (N, R, 1)."""
        return None if self.present is None else self.present.unsqueeze(-1).to(self.x.dtype)
