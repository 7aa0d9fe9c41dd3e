"""`deqfusion analyze convergence`: difference norms by step, against steps taken by hand."""

import numpy as np
import pytest
import torch

from deqfusion import Anderson, DEQFusion, Unroll
from deqfusion.analysis.convergence import _blocks, _trace
from deqfusion.analysis.models import Solved


@pytest.fixture
def part():
    fusion = DEQFusion(8, 2, num_groups=2, gate="identity", skip=True).eval()
    features = [torch.randn(3, 8), torch.randn(3, 8)]
    with torch.no_grad():
        return Solved(fusion.equilibrium(features), features, fusion)


@torch.no_grad()
def test_plain_steps_are_those_of_the_joint_map(part):
    whole = _blocks([_trace(part, {"adjoint": Unroll(6)})])
    state = torch.zeros(3, 3, 8)
    for step in range(6):
        new = part.fusion.cell(state, part.features)
        for place in range(3):
            change, size = (new - state)[place].norm(), new[place].norm()
            assert whole[place]["relative"][step] == pytest.approx(float(change / size), rel=1e-3)
            rms = float(change) / np.sqrt(3)
            assert whole[place]["absolute"][step] == pytest.approx(rms, rel=1e-3)
        state = new


def test_a_stopped_row_keeps_its_norms():
    nan = torch.nan
    relative = torch.tensor([[[1.0, 0.005, nan], [1.0, 0.5, 0.02]]])
    absolute = relative * torch.tensor([[[2.0], [1.0]]])
    more = torch.tensor([[[1.0, 0.001]]])
    (block,) = _blocks([(relative, absolute), (more, more)])
    assert block["rows"] == 3
    assert block["below"] == pytest.approx([0.0, 2 / 3, 2 / 3], abs=1e-4)
    # Sizes are 2, 1 and 1.
    expected = np.sqrt((0.01**2 + 0.02**2 + 0.001**2) / (2**2 + 1 + 1))
    assert block["relative"][2] == pytest.approx(expected, rel=1e-3)


def test_deq_is_traced_by_its_own_solver(part):
    fused = _blocks([_trace(part, {"solver": Anderson(tol=1e-6, max_steps=30, ladder="off")})])[-1]
    plain = _blocks([_trace(part, {"adjoint": Unroll(30)})])[-1]
    assert fused["relative"][0] == pytest.approx(1.0)
    assert fused["relative"] != plain["relative"]
    assert len(fused["relative"]) == 30


def test_command_traces_every_block_of_both(analyze, tmp_path, results):
    more = ("--seeds", "2", "--steps", "20", "--tied", "3")
    assert analyze("convergence", tmp_path, *more) == 0
    (table,) = results(tmp_path, "convergence")["tables"]
    assert table["title"] == "rosmap: relative difference norm of 20 held-out rows"
    found = [(row["name"], row["block"]) for row in table["rows"]]
    blocks = ("modality 1", "modality 2", "fusion")
    names = ("deq", "deq, plain steps", "weight_tied:3")
    assert found == [(name, block) for name in names for block in blocks]
    assert "Jacobian penalty of deq: 100." in (tmp_path / "convergence.txt").read_text()
    records = results(tmp_path, "convergence")["records"]
    curve = records[0]["splits"][0]["more"]["curves"]["deq"]["fusion"]
    assert len(curve["relative"]) == len(curve["below"]) == 20
    # Plain steps take all blocks along, from the start; the solver takes them one after the other.
    plain = records[0]["splits"][0]["more"]["curves"]["deq, plain steps"]["fusion"]
    assert plain["relative"] != curve["relative"]
    (row,) = [r for r in table["rows"] if (r["name"], r["block"]) == ("deq", "fusion")]
    last = [
        r["splits"][0]["more"]["curves"]["deq"]["fusion"]["relative"][-1]
        for r in records
        if r["name"] == "deq"
    ]
    assert row["last"] == pytest.approx(np.mean(last))
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_a_fusion_is_not_asked_for(analyze, tmp_path, capsys):
    assert analyze("convergence", tmp_path / "out", "--set", "fusion=sum") == 2
    assert "fusion: got 'sum', expected none" in capsys.readouterr().err
