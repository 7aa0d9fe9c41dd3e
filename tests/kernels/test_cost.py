"""The cost model: its parts, and that it ranks as they say."""

import pytest

from deqfusion.cli import main
from deqfusion.kernels.config import Config
from deqfusion.kernels.cost import DEVICES, LATENCY, predict

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
    assert together.bytes == pytest.approx(alone.bytes / 4)
    assert together.step < alone.step
    small = [predict("fusion", 16, 32, 2, H200, config).step for config in (ROW, TOGETHER)]
    assert small[1] > small[0]


@pytest.mark.parametrize("target", DEVICES)
def test_every_device_says_where_its_constants_come_from(target, capsys):
    assert DEVICES[target].source
    assert main(["bench", "--predict", target, "--shape", "64,128,2"]) == 0
    printed = capsys.readouterr().out
    assert "predicted, not measured" in printed
    assert "cooperative" in printed
    assert DEVICES[target].source in printed


def test_bad_input(capsys):
    assert main(["bench", "--predict", "h300"]) == 2
    assert "target: got 'h300', expected one of h200, h100, a100, mi300x" in capsys.readouterr().err
    with pytest.raises(ValueError, match="block: got 'joint'"):
        predict("joint", 1, 32, 2, H200, ROW)
    with pytest.raises(ValueError, match="rows: got 0"):
        predict("fusion", 0, 32, 2, H200, ROW)
