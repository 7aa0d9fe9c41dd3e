"""`Equilibrium` as what a model returns."""

import torch

from deqfusion import Anderson, DEQFusion


def test_a_model_that_returns_its_equilibrium_is_exported(tmp_path):
    """With the penalty and one step of the cell, as a training loop has them; see the README."""

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fusion = DEQFusion(16, 3, solver=Anderson(tol=1e-6))

        def forward(self, features):
            eq = self.fusion.equilibrium(features)
            again = self.fusion.cell(eq.state, features)
            return eq, self.fusion.jacobian_penalty(eq, features), again

    model = Whole().eval()
    program = torch.export.export(model, (torch.randn(3, 5, 16),))
    torch.export.save(program, tmp_path / "model.pt2")
    features = torch.randn(3, 5, 16)
    eq, penalty, again = torch.export.load(tmp_path / "model.pt2").module()(features)
    expected = model.fusion.equilibrium(features)
    torch.testing.assert_close(eq.fused, expected.fused, rtol=1e-4, atol=1e-5)
    assert torch.equal(eq.stats.status, expected.stats.status)
    assert eq.stats.trace is None
    torch.testing.assert_close(again[-1], eq.fused, rtol=1e-3, atol=1e-3)
    assert penalty > 0
