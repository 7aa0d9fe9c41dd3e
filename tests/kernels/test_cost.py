"""The cost model: its parts, and that it ranks as they say."""

import pytest

from deqfusion.cli import main
from deqfusion.kernels.config import SCHEDULES, Config, shipped
from deqfusion.kernels.cost import DEVICES, HOST, LATENCY, default_config, predict
from deqfusion.kernels.layout import Layout

H200 = DEVICES["h200"]
ROW, TOGETHER = Config("row"), Config("cooperative")


def test_a_step_by_hand():
    """16 rows of width 512 in schedule row: 1 MB of bfloat16 weights through one processor."""
    got = predict("fusion", 16, 512, 2, H200, ROW, memory=0)
    moved = 2 * 512 * 512 * 2 + (2 + 6) * 16 * 512 * 4
    assert got.bytes == moved
    assert got.operations == 2 * 2 * 16 * 512 * 512
    assert got.step == pytest.approx(moved / 110e9 + 3 * LATENCY)
    assert got.solve == pytest.approx(3e-6 + 14 * got.step)
    assert got.limiter == "L2"
    assert (got.programs, got.waves) == (1, 1)


def test_padding_precision_and_waves_count():
    narrow = predict("modality", 64, 500, 3, H200, ROW)
    assert narrow.bytes == predict("modality", 64, 512, 3, H200, ROW).bytes
    assert predict("modality", 64, 500, 3, H200, ROW, low=False).bytes > 1.5 * narrow.bytes
    many = predict("modality", 64 * 300, 500, 3, H200, ROW)
    assert many.waves == -(-many.programs // 132)
    assert many.step > 20 * narrow.step


def test_groups_apart_stream_less_and_meet():
    alone = predict("fusion", 16, 512, 2, H200, ROW)
    together = predict("fusion", 16, 512, 2, H200, TOGETHER)
    # All read the rows whole, as what they multiply.
    assert together.bytes == pytest.approx(alone.bytes / 4 + 2 * 0.75 * 16 * 512 * 4)
    assert together.step < alone.step
    small = [predict("fusion", 16, 32, 2, H200, config).step for config in (ROW, TOGETHER)]
    assert small[1] > small[0]


def test_a_launch_for_every_phase_pays_for_many_rows():
    step = Config("step", rows=64)
    few, many = (
        [predict("fusion", rows, 512, 2, H200, config).step for config in (ROW, step)]
        for rows in (256, 65536)
    )
    assert few[0] < few[1]
    assert many[0] > 1.3 * many[1]


def test_the_default_where_nothing_was_tuned():
    """Together from capability 90 on, in tiles that leave the fewest and shortest rounds."""
    for rows, dim, count, tiles in (
        (64, 500, 3, 16), (256, 512, 2, 16), (612, 500, 3, 32), (612, 500, 1, 32),
        (16384, 256, 2, 64),
    ):  # fmt: skip
        layout = Layout(dim, 4)
        chosen = default_config(rows, layout, count, 132, adjoint=False, capability=90)
        known = {"adjoint": False, "capability": 90, "padded": layout.padded}
        assert chosen == shipped("cooperative", **known, rows=tiles)
    small = default_config(64, Layout(128, 4), 2, 132, adjoint=False, capability=90)
    assert (small.rows, small.warps) == (16, 4)
    # Not even one row block would be resident.
    many = default_config(64, Layout(512, 64), 3, 132, adjoint=False, capability=90)
    assert many.schedule != "cooperative"
    # Interpreted; nothing to solve.
    for rows, processors in ((64, 0), (0, 132)):
        layout = Layout(512, 4)
        chosen = default_config(rows, layout, 3, processors, adjoint=False, capability=90)
        assert chosen == shipped("row", adjoint=False, capability=90, padded=layout.padded)


def test_the_default_before_capability_90():
    """Where nothing was measured the model chooses."""
    known = {"adjoint": False, "capability": 80}
    for rows, dim, schedule in ((64, 500, "cooperative"), (8192, 512, "step")):
        chosen = default_config(rows, Layout(dim, 4), 3, 108, **known)
        assert chosen == shipped(schedule, padded=Layout(dim, 4).padded, **known)


def test_an_adjoint_has_one_phase_more_and_no_meeting_more():
    for config, more in ((ROW, LATENCY), (TOGETHER, LATENCY), (Config("step"), LATENCY + HOST)):
        forward, adjoint = (
            predict("fusion", 16, 512, 2, H200, config, adjoint=back).step for back in (False, True)
        )
        assert adjoint - forward == pytest.approx(more)


@pytest.mark.parametrize("target", DEVICES)
def test_every_device_says_where_its_constants_come_from(target, capsys):
    assert DEVICES[target].source
    assert main(["bench", "--predict", target, "--shape", "64,128,2"]) == 0
    printed = capsys.readouterr().out
    assert "predicted, not measured" in printed
    assert all(schedule in printed for schedule in SCHEDULES)
    assert DEVICES[target].source in printed


def test_bad_input(capsys):
    assert main(["bench", "--predict", "h300"]) == 2
    assert "target: got 'h300', expected one of h200, h100, a100, mi300x" in capsys.readouterr().err
    with pytest.raises(ValueError, match="block: got 'joint'"):
        predict("joint", 1, 32, 2, H200, ROW)
    with pytest.raises(ValueError, match="rows: got 0"):
        predict("fusion", 0, 32, 2, H200, ROW)
