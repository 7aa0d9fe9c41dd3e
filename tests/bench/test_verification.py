"""What verifies the contenders is itself held against the golden vectors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deqfusion import Anderson, DEQFusion, Implicit
from deqfusion.bench import trial as trials
from deqfusion.bench.contenders import BACKWARD, PENALTY, Answer, registry
from deqfusion.bench.contenders.ours import Ours
from deqfusion.bench.contenders.textbook import anderson
from deqfusion.bench.problem import Problem, Shape
from deqfusion.bench.trial import Trial, Truth
from deqfusion.bench.verification import (
    AdjointSystem,
    gradient_error,
    penalty_error,
    verify_state,
)

NORMS = {"norm1": "gn1", "norm2": "gn2", "norm3": "gn3"}


@pytest.fixture(params=["B2_d20_N1", "B8_d32_N3", "B16_d64_N3"])
def golden(request: pytest.FixtureRequest, golden_dir: Path) -> dict[str, np.ndarray]:
    path = golden_dir / f"sigmoid_nores_{request.param}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not among the golden vectors")
    with np.load(path) as case:
        return {key: case[key] for key in case.files}


def stacked(case: dict[str, np.ndarray], group: str, n: int) -> dict[str, Tensor]:
    """The golden arrays of a group ("param" or "grad") under the library's names."""

    def one(name: str) -> Tensor:
        return torch.from_numpy(case[f"{group}/{name}"])

    def stack(layer: str, kind: str) -> Tensor:
        return torch.stack([one(f"func_.branches.{i}.{layer}.{kind}") for i in range(n)])

    found = {
        "injection_weight": torch.cat([one(f"weights.{i}") for i in range(n)]),
        "injection_bias": one("bias"),
    }
    for kind in ("weight", "bias"):
        found[f"modality_{kind}1"] = stack("conv1", kind)
        found[f"modality_{kind}2"] = stack("conv2", kind)
        for ours, theirs in NORMS.items():
            found[f"{ours}_{kind}"] = stack(theirs, kind)
        found[f"gate_{kind}"] = one(f"func_.branches.{n}.gate.{kind}")
        found[f"fusion_{kind}"] = one(f"func_.branches.{n}.fuse.{kind}")
        found[f"fusion_norm_{kind}"] = one(f"func_.branches.{n}.gn3.{kind}")
    return found


def problem_of(case: dict[str, np.ndarray]) -> Problem:
    rows, dim = case["x_0"].shape
    n = sum(key.startswith("x_") and key[2:].isdigit() for key in case)
    problem = Problem(Shape(rows, dim, n))
    problem.parameters = stacked(case, "param", n)
    problem.features = torch.stack([torch.from_numpy(case[f"x_{i}"]) for i in range(n)])
    problem.cotangent = torch.from_numpy(case["w"])
    return problem


def dense_adjoint(system: AdjointSystem) -> Tensor:
    """The adjoint (N + 1, B, d) from a dense solve per row."""
    rows, width = system.right_hand_side.shape
    columns = []
    for unit in torch.eye(width, dtype=torch.float64):
        columns.append(system.cuts[0].vjp(unit.expand(rows, width)))
    transposed = torch.stack(columns, dim=2)
    matrix = torch.eye(width, dtype=torch.float64) - transposed
    return system.problem.unflatten(torch.linalg.solve(matrix, system.right_hand_side))


def test_cell_and_residual(golden: dict[str, np.ndarray]) -> None:
    problem = problem_of(golden)
    cell, features = problem.cell64, problem.features.double()
    found = cell(torch.from_numpy(golden["z_rand"]).double(), features, cell.inject(features))
    expected = torch.from_numpy(golden["cell_z_rand_f64"])
    assert float((found - expected).norm() / expected.norm()) < 1e-11
    fixed = problem.unflatten(torch.from_numpy(golden["z_star_f64"]))
    assert verify_state(problem, fixed) < 1e-11


def test_adjoint_and_gradients(golden: dict[str, np.ndarray]) -> None:
    problem = problem_of(golden)
    fixed = problem.unflatten(torch.from_numpy(golden["z_star_f64"]))
    adjoint = torch.from_numpy(golden["adjoint_f64"])
    system = AdjointSystem(problem, fixed)
    assert system.residual(problem.unflatten(adjoint)) < 1e-11
    found = system.gradients(problem.unflatten(adjoint))
    n = problem.shape.num_modalities
    expected = stacked(golden, "grad", n)
    expected["features"] = torch.stack(
        [torch.from_numpy(golden[f"grad_x_{i}_f64"]) for i in range(n)]
    )
    assert gradient_error(found, expected) < 1e-9


def test_one_bad_row_or_block_is_seen() -> None:
    problem = Problem(Shape(4, 64, 2))
    features = problem.features.double()
    cell = problem.cell64
    injected = cell.inject(features)
    flat, _, converged = anderson(
        lambda z: cell(z, features, injected),
        torch.zeros(4, 192, dtype=torch.float64),
        tol=1e-11,
        max_steps=400,
        ridge=1e-14,
    )
    assert converged
    good = problem.unflatten(flat)
    assert verify_state(problem, good) < 1e-9
    for block in range(3):
        bad = good.clone()
        bad[block, 2] *= 1.01
        assert verify_state(problem, bad) > 1e-3
    bad = good.clone()
    bad[1, 3, 0] = torch.nan
    assert verify_state(problem, bad) == float("inf")


def test_adjoint_residual_is_by_block() -> None:
    problem = Problem(Shape(3, 16, 2))
    system = AdjointSystem(problem, torch.randn(3, 3, 16))
    adjoint = dense_adjoint(system)
    assert system.residual(adjoint) < 1e-9
    # A modality's adjoint is far smaller than the fusion block's: seen against its own norm.
    adjoint[0, 1] *= 1.01
    assert system.residual(adjoint) > 1e-3


def test_either_side_of_a_kink_is_right() -> None:
    problem = Problem(Shape(3, 16, 1))
    # Row 1: the first ReLU of channel 0 sees exactly GN's bias, which is put on either side of 0.
    problem.parameters["modality_weight1"][:] = 0
    problem.parameters["modality_bias1"][:] = 0
    problem.parameters["norm1_bias"][:] = 0.5
    state = torch.randn(2, 3, 16)
    fp32_side, fp64_side = -1e-7, 1e-7
    problem.parameters["norm1_bias"][0, 0] = fp32_side
    adjoint = dense_adjoint(AdjointSystem(problem, state))
    problem.parameters["norm1_bias"][0, 0] = fp64_side
    assert AdjointSystem(problem, state).residual(adjoint) < 1e-4
    problem.parameters["norm1_bias"][0, 0] = 1e-3
    problem.parameters["modality_weight1"] = torch.randn(1, 16, 16)
    assert AdjointSystem(problem, state).residual(adjoint) > 1e-2


def test_missing_gradient_is_named() -> None:
    with pytest.raises(ValueError, match="gradients missing: b"):
        gradient_error({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4", "a,16,2", "0,16,2", "4,18,2", "4,16,0"])
def test_shapes_that_do_not_parse(text: str) -> None:
    with pytest.raises(ValueError, match="got"):
        Shape.parse(text)


def test_shape_round_trip() -> None:
    assert Shape.parse("612,500,3") == Shape(612, 500, 3)
    assert str(Shape(612, 500, 3)) == "612,500,3"


def test_mean_loss_divides_by_the_batch() -> None:
    total, mean = Problem(Shape(4, 16, 2)), Problem(Shape(4, 16, 2), loss="mean")
    torch.testing.assert_close(mean.cotangent * 4, total.cotangent)
    with pytest.raises(ValueError, match="loss must be one of sum, mean, got 'max'"):
        Problem(Shape(4, 16, 2), loss="max")


BOTH = {"a": torch.ones(3), "b": torch.ones(3)}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["a", "b"])
def test_what_is_not_finite_is_infinitely_wrong(name: str, value: float) -> None:
    bad = {**BOTH, name: torch.tensor([1.0, value, 1.0])}
    assert gradient_error(bad, BOTH) == gradient_error(BOTH, bad) == float("inf")
    assert penalty_error(value, 1.0) == penalty_error(1.0, value) == float("inf")


def test_errors_of_what_is_zero() -> None:
    zero = {name: torch.zeros(3) for name in BOTH}
    assert gradient_error(zero, zero) == penalty_error(0.0, 0.0) == 0.0
    assert gradient_error(BOTH, zero) == penalty_error(1.0, 0.0) == float("inf")
    assert penalty_error(1.5, 1.0) == 0.5


@pytest.fixture(scope="module")
def trial() -> Trial:
    modes = (BACKWARD, PENALTY)
    found = Trial("ours", Problem(Shape(4, 16, 2)), 1e-3, modes)
    assert set(found.status.values()) == {"ok"}, found.reason
    return found


NAMES = ["features", *(name for name, _ in DEQFusion(16, 2, num_groups=4).named_parameters())]


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_nan_in_any_gradient_fails(name: str, keeps: bool, trial: Trial) -> None:
    answer = trial.contender.run(BACKWARD)
    if not keeps:
        answer = dataclasses.replace(answer, adjoint=None)
    assert answer.gradients is not None
    gradients = dict(answer.gradients())
    assert trial.verify(BACKWARD, dataclasses.replace(answer, gradients=lambda: gradients))
    gradients[name] = gradients[name].clone()
    gradients[name].view(-1)[-1] = torch.nan
    assert not trial.verify(BACKWARD, dataclasses.replace(answer, gradients=lambda: gradients))
    assert trial.found[BACKWARD]["gradient_error"] == float("inf")


@pytest.mark.parametrize("what", ["state", "adjoint", "penalty"])
def test_a_nan_elsewhere_in_an_answer_fails(what: str, trial: Trial) -> None:
    answer = trial.contender.run(PENALTY)
    assert answer.adjoint is not None
    assert answer.penalty is not None
    bad = {"state": answer.state.clone(), "adjoint": answer.adjoint(),
           "penalty": answer.penalty.value.clone()}  # fmt: skip
    bad[what].view(-1)[-1] = torch.nan
    penalty = dataclasses.replace(answer.penalty, value=bad["penalty"])
    changed = dataclasses.replace(
        answer, state=bad["state"], adjoint=lambda: bad["adjoint"], penalty=penalty
    )
    assert not trial.verify(PENALTY, changed)


def test_a_miss_that_is_not_a_number_is_one(trial: Trial) -> None:
    trial.found[BACKWARD] = {"residual": 0.0, "gradient_error": float("nan"), "steps": {}}
    assert trial._miss(BACKWARD) == float("inf")


def test_truth_that_did_not_converge_verifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Shape(4, 16, 1))
    assert set(Truth(problem, 1e-3).gradients) == set(NAMES)
    few = Anderson(tol=1e-8, max_steps=5, ladder="off")
    with monkeypatch.context() as patch:
        patch.setattr(trials, "Anderson", lambda **options: few)
        with pytest.raises(RuntimeError, match="no true gradients: residual"):
            _ = Truth(problem, 1e-3).gradients
    # The state converges, its adjoint does not.
    monkeypatch.setattr(trials, "Implicit", lambda solver: Implicit(few))
    with pytest.raises(RuntimeError, match=r"adjoint_residual [0-9.]+e-0[1-4] in fp64"):
        _ = Truth(problem, 1e-3).gradients


@pytest.mark.parametrize("error", [0.4, float("inf"), float("nan")])
def test_what_is_allowed_of_gradients_has_an_end(
    error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = Truth(Problem(Shape(4, 16, 1)), 1e-3)
    assert truth.allowed <= trials.MOST * 1e-3**0.5
    monkeypatch.setattr(trials, "gradient_error", lambda found, expected: error)
    with pytest.raises(RuntimeError, match="no gradients to be held against"):
        _ = Truth(truth.problem, 1e-3).allowed


def test_a_problem_without_truth_fails_what_keeps_no_adjoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Forgetful(Ours):
        name = "forgetful"

        def forward_backward(self, penalty: bool = False) -> Answer:
            return dataclasses.replace(super().forward_backward(penalty), adjoint=None)

    monkeypatch.setitem(registry._REGISTRY, "forgetful", Forgetful)
    monkeypatch.setattr(trials, "TRUE", 1e-15)
    problem = Problem(Shape(4, 16, 1))
    found = Trial("forgetful", problem, 1e-3)
    assert found.status == {"forward": "ok", BACKWARD: "failed"}
    assert found.reason[BACKWARD].startswith("RuntimeError: no true gradients")
    # What keeps its adjoint needs no truth.
    assert set(Trial("ours", problem, 1e-3).status.values()) == {"ok"}
