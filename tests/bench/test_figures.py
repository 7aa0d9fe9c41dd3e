"""Figures that are computed: exponents, operations, the model's floor, memory, and the cases."""

import numpy as np
import pytest
import torch

from deqfusion.bench import contenders, fits, floor, limits, peaks, report, resources, suites, work
from deqfusion.bench.contenders import Answer, ours
from deqfusion.bench.contenders.ours import Ours
from deqfusion.bench.problem import Problem, Shape

SHAPE = Shape(10, 8, 3)


def test_power_law_is_found_exactly():
    x = [1.0, 2.0, 4.0, 16.0]
    fit = fits.power_law(x, [3 * value**1.5 for value in x])
    assert fit["exponent"] == pytest.approx(1.5)
    assert fit["factor"] == pytest.approx(3)
    assert fit["error"] == pytest.approx(0, abs=1e-9)
    assert fit["points"] == 4


def test_standard_error_is_that_of_the_textbook():
    x, y = [1.0, 2.0, 4.0, 8.0], [1.0, 2.3, 3.8, 8.4]
    (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    fit = fits.power_law(x, y)
    assert fit["exponent"] == pytest.approx(slope)
    # polyfit scales by the same k - 2 degrees of freedom.
    assert fit["error"] == pytest.approx(np.sqrt(covariance[0, 0]))


def test_too_few_points_give_no_exponent():
    assert fits.power_law([], []) is None
    assert fits.power_law([1.0, 2.0], [1.0, 2.0]) is None
    assert fits.power_law([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    for x, y in (([1.0], [1.0, 2.0]), ([0.0, 1.0, 2.0], [1.0, 1.0, 1.0])):
        with pytest.raises(ValueError, match="expected positive values"):
            fits.power_law(x, y)


def test_fits_of_cases():
    def case(rows, seconds, factors=("batch",)):
        entry = {"seconds": seconds and {"median": seconds}, "verified": {"steps": {"a": 1}}}
        return {"shape": [rows, 8, 1], "threads": 1, "mode": "forward", "factors": factors,
                "contenders": {"ours": entry}}  # fmt: skip

    cases = [case(1, 1.0), case(2, 4.0), case(4, 16.0), case(8, None), case(8, 9.0, ())]
    (found,) = fits.of_cases(cases)
    assert (found["contender"], found["factor"]) == ("ours", "batch")
    assert found["fit"]["exponent"] == pytest.approx(2)
    assert found["fit"]["points"] == 3
    (found,) = fits.of_cases(cases[:2])
    assert found["fit"] is None
    result = {"fits": [found], "cases": [], "suite": {"target": 1, "loss": "", "rounds": 1}}
    result |= {"environment": {"cpu": "c", "cores": 1}, "reference": "ours", "device": "cpu"}
    assert "not measured" in report.table(result)


def test_operations_of_the_joint_and_of_the_split_solve():
    d, n, rows = 8, 3, 10
    joint = work.count(SHAPE, "forward", {"joint": 5 * rows}, {"joint": 5}, memory=6)
    assert joint["operations"] == 5 * rows * 2 * (3 * n + 1) * d * d
    split = work.count(
        SHAPE, "forward", {"modality": 5 * n * rows, "fusion": 4 * rows},
        {"modality": 5, "fusion": 4}, memory=5,
    )  # fmt: skip
    assert split["operations"] == (5 * n + 4) * rows * 2 * 2 * d * d
    assert split["bytes"] == (
        (5 * n + 4) * rows * 4 * (4 * d + 14 * d) + (5 * n + 4) * 4 * 2 * d * d
    )
    # Rows that leave early take no operations, but the weights are read while one is left.
    fewer = work.count(
        SHAPE, "forward", {"modality": 3 * n * rows, "fusion": 4 * rows},
        {"modality": 5, "fusion": 4}, memory=5,
    )  # fmt: skip
    assert fewer["operations"] < split["operations"]
    assert split["bytes"] - fewer["bytes"] == 2 * n * rows * 4 * 18 * d


def test_what_is_not_known_is_not_counted():
    assert work.count(SHAPE, "forward", {}, {}, 5) is None
    assert work.count(SHAPE, "forward", {"theirs": 3}, {"theirs": 3}, 5) is None
    known = {"modality": 3, "fusion": 3}
    assert work.count(SHAPE, "forward_backward", known, known, 5) is None
    assert work.achieved(None, 1.0, "fp32") is None
    assert work.shares(None, {}) == (None, None)
    counted = work.achieved({"operations": 6.0, "bytes": 4.0}, 2.0, "fp32")
    assert work.shares(counted, {}) == (None, None)
    assert work.shares(counted, {"fp32": 30.0, "copy": 20.0}) == (0.1, 0.1)


def test_evaluations_of_rows_that_differ():
    answer = Answer(torch.zeros(1), {"joint": 4, "fusion": torch.tensor([3, 5])})
    assert answer.steps == {"joint": 4, "fusion": 5}
    assert answer.evaluations(10) == {"joint": 40, "fusion": 8}


def test_counts_match_a_run():
    answer = Ours(Problem(Shape(4, 16, 2)))
    answer.set_tolerances(1e-3, 1e-3)
    found = answer.run("forward_backward")
    assert set(found.steps) == {"modality", "fusion"}
    found.adjoint()
    assert set(found.steps) == set(work.SPLIT)
    assert 0 < found.evaluations(4)["adjoint modality"] <= 2 * 4 * found.steps["adjoint modality"]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("AMD Instinct MI300X", "mi300x"),
        # Other clocks and memory than those of the data sheets that the model has.
        ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-40GB", None), ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA GeForce RTX 4090", None), (None, None), ("", None),
    ],
)  # fmt: skip
def test_devices_that_the_model_knows(name, known):
    assert floor.known_device(name) == known


def test_devices_of_the_floor_are_those_of_the_model():
    from deqfusion.kernels import cost

    assert set(floor.NAMES.values()) == set(cost.DEVICES)


@pytest.mark.parametrize("instructions", ["AMX", None])
def test_products_are_held_against_the_rate_that_they_may_have(monkeypatch, instructions):
    monkeypatch.setattr(ours, "bfloat16_instructions", lambda: instructions)
    kinds = contenders.contenders()

    def rates(dim, device="cpu"):
        found = {}
        for name in ("ours", "ours_reference", "ours_joint", "ours_noladder"):
            contender = kinds[name](Problem(Shape(2, dim, 1)))
            # Where its tensors are is all that it looks at; there is no GPU to move them to.
            contender.features = contender.features.detach().to(device)
            found[name] = contender.rate
        return found

    fast = "bf16" if instructions else "fp32"
    assert rates(256) == {
        "ours": fast, "ours_reference": fast, "ours_joint": "fp32", "ours_noladder": "fp32",
    }  # fmt: skip
    # Below the ladder's width, and in the loop of other devices, there is no ladder.
    assert set(rates(128).values()) == set(rates(256, "meta").values()) == {"fp32"}


def test_programs_climb_the_ladder_on_any_device(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(ours, "bfloat16_instructions", lambda: None)
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    kinds, problem = contenders.contenders(), Problem(Shape(2, 256, 1))
    assert kinds["ours"](problem).rate == kinds["ours_row"](problem).rate == "bf16"
    # The joint solve has no programs.
    joint = kinds["ours_joint"](problem)
    assert joint.rate == joint.rate_of("forward") == "fp32"
    # Its adjoint climbs the ladder, its forward does not: neither rate is that of both.
    assert joint.rate_of("forward_backward") is None


def ran(name, problem):
    contender = contenders.get(name)(problem)
    contender.set_tolerances(1e-2, 1e-2)
    contender.run("forward")
    return contender


def test_floor_is_of_programs_on_a_known_device_and_forward():
    pytest.importorskip("triton")
    problem, steps = Problem(Shape(2, 16, 1)), {"modality": 11, "fusion": 14}
    row = ran("ours_row", problem)
    assert 1e-5 < floor.seconds(row, "forward", steps, "NVIDIA H200") < 1e-2
    assert floor.seconds(row, "forward", steps, None) is None
    assert floor.seconds(row, "forward_backward", steps, "NVIDIA H200") is None
    assert floor.seconds(row, "forward", {"joint": 3}, "NVIDIA H200") is None
    reference = ran("ours_reference", problem)
    assert floor.seconds(reference, "forward", steps, "NVIDIA H200") is None
    # What has not run has no config to predict.
    fresh = contenders.get("ours_row")(problem)
    assert floor.seconds(fresh, "forward", steps, "NVIDIA H200") is None


def test_floor_is_of_the_configs_that_ran(monkeypatch):
    pytest.importorskip("triton")
    from deqfusion.kernels import cost, launch
    from deqfusion.kernels.config import Config

    tuned = {"modality": Config("step", rows=32), "fusion": Config("row", depth=16)}
    monkeypatch.setattr(launch, "_tuned", lambda device, solve, *rest: tuned[solve])
    monkeypatch.setenv("DEQFUSION_BACKEND", "triton")
    problem, steps = Problem(Shape(2, 16, 1)), {"modality": 11, "fusion": 14}
    contender = ran("ours", problem)
    assert contender.configs == {"forward": tuple(tuned.values())}
    expected = sum(
        cost.predict(
            block, 2, 16, 1, cost.DEVICES["h200"], config, low=False, steps=steps[block]
        ).solve
        for block, config in tuned.items()
    )
    assert floor.seconds(contender, "forward", steps, "NVIDIA H200") == pytest.approx(expected)


def test_memory_is_the_peak_of_what_a_run_allocates():
    kept = torch.ones(1 << 20)

    def run():
        first = kept + 1
        second = first + 1
        del first
        return (second * second).sum()

    run()
    found = resources.measure(run, torch.device("cpu"))
    assert found["launches"] is None
    # Two of them at a time, of 4 MB.
    assert found["memory"]["bytes"] == pytest.approx(2 * 4 * (1 << 20), rel=0.01)


def test_peaks():
    found = peaks.measure(torch.device("cpu"))
    assert set(found) == {"copy", "fp32", "bf16"}
    assert min(found.values()) > 0
    assert peaks.best({"copy": 1.0, "fp32": 5.0}, {"copy": 2.0, "fp32": 4.0}) == {
        "copy": 2.0, "fp32": 5.0,
    }  # fmt: skip


def test_a_sweep_varies_one_factor_at_a_time():
    found = suites.around(Shape(16, 64, 2), (8, 16), (64, 128), (2, 3))
    assert {str(case.shape): case.factors for case in found} == {
        "8,64,2": ("batch",),
        "16,64,2": ("batch", "dim", "num_modalities"),
        "16,128,2": ("dim",),
        "16,64,3": ("num_modalities",),
    }
    for name in ("sweep", "scaling"):
        for case in suites.SUITES[name].cases:
            sizes = (case.shape.batch, case.shape.dim, case.shape.num_modalities)
            base = (suites.BASE.batch, suites.BASE.dim, suites.BASE.num_modalities)
            assert sum(a != b for a, b in zip(sizes, base, strict=True)) <= 1
    rows = [case.shape.batch for case in suites.SUITES["sweep"].cases]
    assert (min(rows), max(rows)) == (1, 65536)


def test_limits_go_by_the_two_nearest_smaller_cases():
    limit = limits.Limit(10.0, rounds=5)
    one, two, four, many = (suites.Case(Shape(rows, 64, 2)) for rows in (1, 2, 4, 1000))
    assert limit.note("ours", one, 1.0) is None
    # One size does not say what grows with it.
    assert limit.refuse("ours", many) is None
    assert limit.note("ours", two, 1.001) is None
    assert limit.note("ours", two, 0.5) is None
    # 1.001 s, and 1 ms a row.
    assert limit.refuse("ours", suites.Case(Shape(900, 64, 2))) is None
    assert limit.refuse("ours", suites.Case(Shape(1000, 64, 2))) is None
    said = limit.refuse("ours", suites.Case(Shape(2000, 64, 2)))
    assert said.startswith("5 runs of some 3.0 s (1.0 s at 2,64,2) would exceed the limit of 10 s")
    # The nearest ones count: 0.25 s a row from there on.
    assert limit.note("ours", four, 1.501) is None
    assert limit.refuse("ours", many) is not None
    assert limit.refuse("textbook", many) is None
    assert "5 runs of 2.5 s would exceed the limit of 10 s" in limit.note("ours", many, 2.5)
    free = limits.Limit(None, rounds=5)
    assert free.note("ours", one, 1e9) is free.refuse("ours", many) is None
