"""The layer's own parts: how it is drawn, and its dropout."""

import pytest
import torch

from deqfusion import Anderson, DEQFusion, Status
from deqfusion.testing import CellOptions, textbook_cell

DIM, COUNT, BATCH = 64, 3, 40


@pytest.mark.parametrize("gate_input", ["sum", "concat"])
def test_parameters_are_drawn_as_linear_layers_draw_theirs(gate_input):
    torch.manual_seed(0)
    fusion = DEQFusion(DIM, COUNT, gate_input=gate_input)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.fill_(torch.nan)
    fusion.reset_parameters()
    width = {"gate": 2 * DIM if gate_input == "concat" else DIM}
    for name, value in fusion.named_parameters():
        if "norm" in name or "injection" in name:
            assert value.eq(1.0 if name.endswith("weight") else 0.0).all(), name
            continue
        # Uniform in +-1/sqrt(inputs), biases too; a sample of so many is this close to it.
        bound = width.get(name.split("_")[0], DIM) ** -0.5
        assert value.abs().max() <= bound, name
        error = value.numel() ** -0.5
        assert value.abs().max() > bound * (1 - 10 / value.numel()), name
        assert abs(value.mean()) < 3 * bound * error, name
        assert abs(value.square().mean() / (bound**2 / 3) - 1) < 3 * error, name
    assert not torch.equal(fusion.modality_weight1[0], fusion.modality_weight1[1])
    before = fusion.fusion_weight.clone()
    fusion.reset_parameters()
    assert not torch.equal(fusion.fusion_weight, before)


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The dropout masks of every solve."""
    masks, draw = [], DEQFusion._masks

    def recording(self, *args):
        masks.append(draw(self, *args))
        return masks[-1]

    monkeypatch.setattr(DEQFusion, "_masks", recording)
    return masks


@pytest.mark.parametrize("joint", [False, True], ids=["split", "joint"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_dropout_is_one_mask_per_solve(drawn, joint, masked):
    """The solution is a fixed point of the cell with the masks drawn, and of no other."""
    torch.manual_seed(0)
    probability = 0.3
    solver = Anderson(tol=1e-9, max_steps=300)
    fusion = DEQFusion(DIM, COUNT, dropout=probability, solver=solver, joint=joint).double()
    features = torch.randn(COUNT, BATCH, DIM, dtype=torch.float64)
    mask = torch.rand(BATCH, COUNT) < 0.3
    mask[:, 0] = False
    present, mask = (~mask, mask) if masked else (None, None)
    with torch.no_grad():
        eq, other = (fusion.equilibrium(features, mask=mask) for _ in range(2))
    (gate, fused), (other_gate, other_fused) = drawn
    assert not torch.equal(gate, other_gate)
    assert not torch.equal(fused, other_fused)
    assert (eq.fused - other.fused).norm() > 0.1 * eq.fused.norm()

    def residual(**dropout):
        step = textbook_cell(
            fusion.state_dict(), eq.state, list(features), CellOptions(), present=present, **dropout
        )
        # Absent modalities are 0 on either side.
        size = step.norm(dim=-1).clamp_min(1e-300)
        return ((step - eq.state).norm(dim=-1) / size)[:, settled]

    settled = (eq.stats.status == Status.CONVERGED).all(0)
    assert settled.float().mean() > 0.8
    assert residual(gate_dropout=gate, fusion_dropout=fused).max() < 1e-8
    assert residual(gate_dropout=other_gate, fusion_dropout=fused)[-1].min() > 1e-3
    assert residual(gate_dropout=gate, fusion_dropout=other_fused)[-1].min() > 1e-3

    kept = gate if present is None else gate[present.t()]
    for values in (kept, fused):
        # What is kept is scaled up, so that the expectation is what it is without dropout.
        assert set(values.unique().tolist()) == {0.0, 1 / (1 - probability)}
        spread = (probability * (1 - probability) / values.numel()) ** 0.5
        assert abs((values == 0).double().mean() - probability) < 4 * spread
    if present is not None:
        assert not gate[~present.t()].any()


def test_no_dropout_in_evaluation(drawn):
    torch.manual_seed(0)
    fusion, plain = DEQFusion(DIM, COUNT, dropout=0.3).eval(), DEQFusion(DIM, COUNT)
    plain.load_state_dict(fusion.state_dict())
    features = torch.randn(COUNT, BATCH, DIM)
    with torch.no_grad():
        assert torch.equal(fusion(features), plain(features))
    assert drawn == [(None, None)] * 2
