"""Learning-rate schedules."""

import pytest

from deqfusion.engine.schedules import rate_factor

_PLAIN = {"schedule": "constant", "warmup": 0.0, "epochs": 10, "step_epochs": 3, "step_factor": 0.5}


def _factors(steps=1, **options):
    config = {**_PLAIN, **options}
    return [
        rate_factor(epoch, step, steps, config)
        for epoch in range(config["epochs"])
        for step in range(steps)
    ]


def test_constant_and_steps():
    assert _factors() == [1.0] * 10
    assert _factors(schedule="step") == [1.0] * 3 + [0.5] * 3 + [0.25] * 3 + [0.125]


def test_cosine_falls_from_one_towards_zero_by_step():
    factors = _factors(steps=4, schedule="cosine")
    assert factors[0] == 1.0
    assert factors[20] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.01
    assert factors == sorted(factors, reverse=True)


def test_warmup_rises_to_one_and_the_cosine_begins_there():
    factors = _factors(steps=2, warmup=2.0)
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    factors = _factors(steps=2, warmup=2.0, schedule="cosine")
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[5] < 1.0
