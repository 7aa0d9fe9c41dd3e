"""Every contender solves a small problem, to the residual and the gradients of fp64."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from deqfusion.bench import contenders
from deqfusion.bench.contenders.textbook import anderson
from deqfusion.bench.contenders.textbook_cudagraph import TextbookCUDAGraph
from deqfusion.bench.problem import Problem, Shape, TextbookCell
from deqfusion.bench.trial import Trial
from deqfusion.bench.verification import AdjointSystem, gradient_error, verify_state

TOL = 1e-5
NAMES = sorted(contenders.contenders())
# The programs are interpreted here, and have a smaller problem (test_programs); max-autotune tunes
# for half a minute.
PROGRAMS = ("ours_row", "ours_cooperative", "ours_step")
CHECKED = [
    name for name in NAMES if not name.startswith(PROGRAMS) and name != "textbook_max_autotune"
]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(Shape(5, 32, 2), seed=3)


def build(name: str, problem: Problem) -> contenders.Contender:
    kind = contenders.get(name)
    reason = kind.unavailable()
    if reason is not None:
        pytest.skip(reason)
    contender = kind(problem)
    contender.set_tolerances(TOL, TOL)
    return contender


@pytest.mark.parametrize("name", CHECKED)
def test_forward_meets_tolerance(name: str, problem: Problem) -> None:
    answer = build(name, problem).run("forward")
    assert answer.state.shape == (3, 5, 32)
    assert not answer.state.requires_grad
    # A row's whole state as one vector hides a block's residual by up to the ratio of their norms.
    assert verify_state(problem, answer.state) < 5 * TOL
    assert all(count > 1 for count in answer.steps.values())


@pytest.mark.parametrize("name", CHECKED)
def test_gradients_are_those_of_fp64(name: str, problem: Problem) -> None:
    answer = build(name, problem).run("forward_backward")
    assert answer.linearised_at is not None
    assert answer.gradients is not None
    assert answer.adjoint is not None
    gradients = answer.gradients()
    system = AdjointSystem(problem, answer.linearised_at, answer.split)
    adjoint = answer.adjoint()
    # Blocks of a joint vector may be above the tolerance by the ratio of their norms.
    assert system.residual(adjoint) < 30 * TOL
    if answer.gradients_at is not None:
        system = AdjointSystem(problem, answer.gradients_at, answer.split)
    assert gradient_error(gradients, system.gradients(adjoint)) < TOL
    assert min(answer.steps.values()) > 1


@pytest.mark.parametrize("name", CHECKED)
def test_gradients_do_not_accumulate(name: str, problem: Problem) -> None:
    contender = build(name, problem)
    found = []
    for _ in range(2):
        answer = contender.run("forward_backward")
        assert answer.gradients is not None
        found.append({key: value.clone() for key, value in answer.gradients().items()})
    first, second = found
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["textbook", "textbook_compiled", "torchdeq", "ours"])
def test_penalty_is_verified_in_fp64(name: str, problem: Problem) -> None:
    build(name, problem)
    modes = (contenders.BACKWARD, contenders.PENALTY)
    trial = Trial(name, problem, 1e-3, modes)
    assert set(trial.status.values()) == {"ok"}, trial.reason
    assert trial.found[contenders.PENALTY]["penalty_error"] < 1e-4
    plain = trial.contender.run(contenders.BACKWARD).gradients()
    before = {key: value.clone() for key, value in plain.items()}
    answer = trial.contender.run(contenders.PENALTY)
    # It is large enough to be seen where it is missing.
    assert gradient_error(answer.gradients(), before) > 1e-2
    without = dataclasses.replace(answer, gradients=lambda: before)
    assert not trial.verify(contenders.PENALTY, without)
    half = dataclasses.replace(answer.penalty, value=answer.penalty.value / 2)
    assert not trial.verify(contenders.PENALTY, dataclasses.replace(answer, penalty=half))


def test_hand_captured_loops_without_a_capture(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off a GPU a replay is the function itself: the composition of the steps is the textbook's."""
    monkeypatch.setattr(TextbookCUDAGraph, "unavailable", classmethod(lambda cls, device: None))
    eager, graphed = (
        Trial(name, problem, 1e-3, (contenders.FORWARD, contenders.BACKWARD, contenders.PENALTY))
        for name in ("textbook", "textbook_cudagraph")
    )
    assert set(graphed.status.values()) == {"ok"}, graphed.reason
    for mode, found in eager.found.items():
        assert graphed.found[mode]["steps"] == found["steps"]
        assert graphed.found[mode]["residual"] == pytest.approx(found["residual"], rel=0.05)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_contenders_can_run(device: str) -> None:
    reasons = {
        name: kind.unavailable(torch.device(device))
        for name, kind in contenders.contenders().items()
    }
    for name in ("textbook_cudagraph", "textbook_reduce_overhead", "textbook_high"):
        assert (reasons[name] is None) == (device == "cuda")
    assert "wait for one another" in str(reasons["ours_cooperative"]) or device == "cuda"
    assert reasons["ours"] is reasons["ours_reference"] is None


def test_contenders_find_the_same_equilibrium(problem: Problem) -> None:
    textbook = build("textbook", problem).forward().state
    ours = build("ours", problem).forward().state
    assert float((textbook - ours).norm() / ours.norm()) < 1e-3


def test_textbook_cell_is_the_library_cell(problem: Problem) -> None:
    from deqfusion import DEQFusion

    module = DEQFusion(32, 2)
    module.load_state_dict(problem.parameters)
    state = torch.randn(3, 5, 32)
    cell = TextbookCell(problem.parameters)
    expected = cell(problem.flatten(state), problem.features, cell.inject(problem.features))
    torch.testing.assert_close(
        problem.flatten(module.cell(state, problem.features)), expected, rtol=1e-4, atol=1e-5
    )


def test_anderson_solves_a_linear_map_and_says_when_not() -> None:
    matrix = torch.tensor([[0.5, 0.2], [0.1, 0.4]], dtype=torch.float64)
    right = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    expected = right @ torch.linalg.inv(torch.eye(2, dtype=torch.float64) - matrix)
    found, steps, converged = anderson(
        lambda z: z @ matrix + right, torch.zeros_like(right), tol=1e-10, ridge=1e-14
    )
    assert converged
    assert steps < 10
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    _, steps, converged = anderson(
        lambda z: z @ matrix + right, torch.zeros_like(right), tol=1e-10, max_steps=3
    )
    assert (steps, converged) == (3, False)


def test_absent_torchdeq_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    reason = contenders.get("torchdeq").unavailable()
    assert reason is not None
    assert "torchdeq" in reason


def test_unknown_contender_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown contender 'theirs', expected one of .*textbook"):
        contenders.get("theirs")
