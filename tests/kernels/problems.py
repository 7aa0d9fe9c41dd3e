"""Small problems for the programs, and what the reference makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deqfusion import Anderson, DEQFusion, Implicit, functional
from deqfusion.kernels import solves
from deqfusion.kernels.config import Config, SolveOptions

CONFIG = Config(rows=16, depth=16)


@dataclass
class Problem:
    """A layer with parameters that are not the initial ones, features and gradients.

    Shapes: features (N, R, d), injection (R, d), gradient (N, R, d).
    """

    layer: DEQFusion
    features: torch.Tensor
    injection: torch.Tensor
    gradient: torch.Tensor

    @staticmethod
    def new(dim: int = 16, count: int = 2, rows: int = 3, **cell: Any) -> Problem:
        torch.manual_seed(3)
        cell.setdefault("num_groups", 2)
        layer = DEQFusion(dim, count, **cell)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if "norm" in name or "bias" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        features = 1.5 * torch.randn(count, rows, dim)
        gradient = 1e-3 * torch.randn(count, rows, dim)
        return Problem(layer, features, features.sum(0), gradient)

    @property
    def modality(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.layer.modality_parameters]

    @property
    def fusion(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.layer.fusion_parameters]

    def double(self) -> Problem:
        layer = DEQFusion(
            self.layer.dim, self.layer.num_modalities, dtype=torch.float64,
            **self.layer.options._asdict(),
        )  # fmt: skip
        layer.load_state_dict({k: v.double() for k, v in self.layer.state_dict().items()})
        rest = (self.features, self.injection, self.gradient)
        return Problem(layer, *(t.double() for t in rest))

    def reference(self, solver: Anderson, states: Any = None, **masks: Any) -> dict[str, Any]:
        """Both solves and both adjoints by the CPU implementation; states: where to linearise."""
        layer, cell = self.layer, self.layer.options
        present = masks.pop("present", None)
        init = masks.pop("init", None)
        pair = (None, None) if init is None else (init, init[0])
        with torch.no_grad():
            z = functional.modality_equilibrium(
                self.features, layer.modality_parameters, cell=cell, solver=solver,
                present=present, init=pair[0],
            )  # fmt: skip
            given = z.state if states is None else states[0]
            zf = functional.fusion_equilibrium(
                given, self.injection, layer.fusion_parameters, cell=cell, solver=solver,
                init=pair[1], **masks,
            )  # fmt: skip
            fused = zf.state if states is None else states[1]
            adjoint = Implicit(solver)
            back = functional.modality_adjoint(
                self.gradient, given, self.features, layer.modality_parameters, cell=cell,
                adjoint=adjoint, status=z.status, present=present,
            )  # fmt: skip
            fused_back = functional.fusion_adjoint(
                self.gradient[0], fused, given, self.injection, layer.fusion_parameters,
                cell=cell, adjoint=adjoint, status=zf.status, **masks,
            )  # fmt: skip
        return {"z": z, "zf": zf, "back": back, "fused_back": fused_back}

    def programs(
        self, options: SolveOptions, states: tuple[torch.Tensor, torch.Tensor],
        config: Config = CONFIG, blocks: str = "both", **masks: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """The same by the Triton programs, linearised at the states given.

        blocks: "modality" or "fusion" leaves the other's solves out.
        """
        o, groups = self.layer.options, self.layer.options.num_groups
        present, init = masks.pop("present", None), masks.pop("init", None)
        pair = (None, None) if init is None else (init, init[0])
        cell = groups, o.gate, o.gate_input, o.tail
        found: dict[str, Any] = {}
        if blocks != "fusion":
            z = solves.solve_modality(
                self.features, self.modality, groups, o.skip, options, present=present,
                init=pair[0], config=config,
            )  # fmt: skip
            found["z"] = z
            found["back"] = solves.adjoint_modality(
                self.gradient, states[0], z.status, self.features, self.modality, groups, o.skip,
                options, present=present, config=config,
            )  # fmt: skip
        if blocks != "modality":
            zf = solves.solve_fusion(
                states[0], self.injection, self.fusion, *cell, options, init=pair[1],
                config=config, **masks,
            )  # fmt: skip
            found["zf"] = zf
            found["fused_back"] = solves.adjoint_fusion(
                self.gradient[0], states[1], zf.status, states[0], self.injection, self.fusion,
                *cell, options, config=config, **masks,
            )  # fmt: skip
        return found


def tensors(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What is differentiable in a result, by name."""
    found = {}
    if "z" in result:
        dx, grads, _ = result["back"]
        found |= {"z": result["z"].state, "dx": dx}
        found |= {f"modality {i}": g for i, g in enumerate(grads)}
    if "zf" in result:
        dm, dxf, grads, _ = result["fused_back"]
        found |= {"zf": result["zf"].state.reshape(dxf.shape), "dm": dm, "dxf": dxf}
        found |= {f"fusion {i}": g for i, g in enumerate(grads)}
    return found


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Checks that two results are equal, bit by bit."""
    for name, value in tensors(one).items():
        assert torch.equal(value, tensors(two)[name]), name
    for name, (status, steps) in outcomes(one).items():
        assert torch.equal(status, outcomes(two)[name][0]), name
        assert torch.equal(steps, outcomes(two)[name][1]), name


def outcomes(result: dict[str, Any]) -> dict[str, Any]:
    """(status, steps) of the solves, rows last."""
    found = {}
    for name, value in result.items():
        one = value[-1] if "back" in name else value
        found[name] = one.status.flatten(), one.steps.flatten()
    return found


def compare(
    problem: Problem, options: SolveOptions, config: Config = CONFIG, blocks: str = "both",
    **masks: Any,
) -> Any:  # fmt: skip
    """Programs against fp64: no further off than twice the reference in fp32; steps within 1."""
    solver = Anderson(
        tol=options.rtol, atol=options.atol, max_steps=options.max_steps, memory=options.memory,
        mixing=options.mixing, ladder="off",
    )  # fmt: skip
    exact = problem.double()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in masks.items()}
    truth = exact.reference(solver, **wide)
    states = truth["z"].state.float(), truth["zf"].state.float()
    truth = exact.reference(solver, states=tuple(s.double() for s in states), **wide)
    expected = problem.reference(solver, states=states, **masks)
    got = problem.programs(options, states, config, blocks, **masks)
    for name, (status, steps) in outcomes(got).items():
        assert torch.equal(status, outcomes(expected)[name][0]), name
        assert (steps - outcomes(expected)[name][1]).abs().max() <= 1, name
    true, theirs = tensors(truth), tensors(expected)
    for name, value in tensors(got).items():
        assert value.dtype == torch.float32
        size = true[name].norm()
        error, allowed = ((t.double() - true[name]).norm() for t in (value, theirs[name]))
        # Below a few roundings of fp32 twice an error is chance.
        assert error <= 2 * allowed + 2e-6 * size, (name, error / size, allowed / size)
    return got
