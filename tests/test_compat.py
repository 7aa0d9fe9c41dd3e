"""The authors' checkpoints and training loop on this engine."""

import copy
import io
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from deqfusion import DEQFusion
from deqfusion.compat import (
    OfficialDEQFusion,
    OfficialMMIMDBDEQFusion,
    export_official,
    load_official,
)
from deqfusion.testing import (
    CellOptions,
    dense_jacobian,
    golden_files,
    load_golden,
    textbook_cell,
)
from deqfusion.testing.golden import stack_official

DIM, COUNT = 32, 2
OFFICIAL = CellOptions(gate="identity", skip=True)


def engine(**options) -> DEQFusion:
    return DEQFusion(DIM, COUNT, gate="identity", skip=True, **options)


def calm(layer: OfficialDEQFusion) -> OfficialDEQFusion:
    """Shrinks the parameters until the map contracts, which as drawn it does not."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if ".gn3." in name or ".gate." in name:
                parameter.mul_(0.5)
    return layer


def checkpoint(prefix: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return {f"{prefix}{k}": torch.randn_like(v) for k, v in export_official(engine()).items()}


class TestCheckpoints:
    @pytest.mark.parametrize("prefix", ["", "module.", "fusion.", "module.fusion.", "a.b.c."])
    def test_prefixes(self, prefix):
        fusion = engine()
        load_official(fusion, checkpoint(prefix))
        for name, value in export_official(fusion).items():
            assert torch.equal(value, checkpoint()[name])

    def test_round_trip_is_bitwise(self):
        first, second = engine(), engine()
        load_official(second, export_official(first))
        for (name, expected), got in zip(
            first.state_dict().items(), second.state_dict().values(), strict=True
        ):
            assert torch.equal(got, expected), name

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, r"got gate='sigmoid', skip=False, expected gate='identity', skip=True as"),
            ({"gate": "identity"}, r"got skip=False, expected skip=True as"),
            (
                {"gate": "identity", "skip": True, "num_groups": 8},
                r"got num_groups=8, expected num_groups=4 as",
            ),
        ],
    )
    def test_other_options_than_the_authors_are_warned_of(self, options, message):
        fusion = DEQFusion(DIM, COUNT, **options)
        with pytest.warns(UserWarning, match=message) as caught:
            load_official(fusion, checkpoint())
        assert caught[0].filename == __file__
        # It is loaded all the same.
        assert torch.equal(fusion.gate_weight, checkpoint()["func_.branches.2.gate.weight"])

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("tail", ["relu_norm", "norm_relu"])
    def test_the_authors_options_are_not(self, tail):
        load_official(engine(tail=tail), checkpoint())

    def test_whole_model_checkpoint(self):
        saved = checkpoint("module.deq_fusion.")
        saved["module.encoder.weight"] = torch.randn(3, 3)
        saved["module.steps"] = torch.tensor(3)
        fusion = engine()
        load_official(fusion, saved)
        assert torch.equal(fusion.gate_weight, checkpoint()["func_.branches.2.gate.weight"])

    def test_missing_unexpected_and_misshapen_keys_are_named_together(self):
        saved = checkpoint("fusion.")
        del saved["fusion.func_.branches.1.gn2.bias"]
        saved["fusion.func_.branches.7.conv1.weight"] = torch.zeros(2)
        saved["fusion.func_.branches.0.conv2.bias"] = torch.zeros(5)
        fusion = engine()
        before = copy.deepcopy(fusion.state_dict())
        with pytest.raises(ValueError, match="expected") as error:
            load_official(fusion, saved)
        message = str(error.value)
        assert "missing: fusion.func_.branches.1.gn2.bias" in message
        assert "unexpected: fusion.func_.branches.7.conv1.weight" in message
        assert "fusion.func_.branches.0.conv2.bias (5,) (expected (32,))" in message
        for name, value in fusion.state_dict().items():
            assert torch.equal(value, before[name]), "a refused checkpoint must change nothing"

    @pytest.mark.parametrize("gone", ["bias", "weights.0"])
    def test_half_an_injection_is_missing(self, gone):
        saved = checkpoint()
        del saved[gone]
        with pytest.raises(ValueError, match=f"missing: {gone}"):
            load_official(engine(), saved)

    def test_brca_checkpoint_sums_the_features(self):
        saved = {k: v for k, v in checkpoint().items() if k.startswith("func_")}
        fusion = engine()
        with torch.no_grad():
            fusion.injection_weight.fill_(3.0)
            fusion.injection_bias.fill_(3.0)
        load_official(fusion, saved)
        assert torch.equal(fusion.injection_weight, torch.ones(COUNT))
        assert torch.equal(fusion.injection_bias, torch.zeros(1))

    @pytest.mark.filterwarnings("ignore:fusion. got gate")
    def test_gate_of_the_other_kind(self):
        wide = DEQFusion(DIM, COUNT, gate_input="concat")
        with pytest.raises(ValueError, match=r"gate\.weight \(32, 32\).*gate_input=\"concat\""):
            load_official(wide, checkpoint())
        with pytest.raises(ValueError, match=r"gate\.weight \(32, 64\).*gate_input=\"sum\""):
            load_official(engine(), export_official(wide))
        load_official(DEQFusion(DIM, COUNT, gate_input="concat"), export_official(wide))

    def test_other_number_of_modalities(self):
        with pytest.raises(ValueError, match=r"missing: .*weights\.2"):
            load_official(DEQFusion(DIM, 3), checkpoint())
        with pytest.raises(ValueError, match=r"unexpected: .*weights\.1"):
            load_official(DEQFusion(DIM, 1), checkpoint())

    def test_two_layers_in_one_checkpoint(self):
        both = {**checkpoint("left."), **{k: v + 1 for k, v in checkpoint("right.").items()}}
        with pytest.raises(ValueError, match=r"left\..*right\.") as error:
            load_official(engine(), both)
        assert "prefix=" in str(error.value)
        fusion = engine()
        load_official(fusion, both, prefix="right.")
        assert torch.equal(fusion.injection_bias, checkpoint()["bias"] + 1)

    @pytest.mark.parametrize("foreign", [{}, {"weight": torch.zeros(3)}])
    def test_foreign_checkpoint(self, foreign):
        with pytest.raises(ValueError, match=r"func_\.branches\.0\.conv1\.weight"):
            load_official(engine(), foreign)

    def test_values_of_the_wrong_type(self):
        saved = checkpoint()
        saved["bias"] = torch.tensor([1])
        with pytest.raises(TypeError, match=r"'bias'.*int64"):
            load_official(engine(), saved)
        with pytest.raises(TypeError, match="mapping"):
            load_official(engine(), [1, 2])
        with pytest.raises(TypeError, match="expected DEQFusion"):
            load_official(nn.Linear(2, 2), saved)
        with pytest.raises(TypeError, match="expected DEQFusion"):
            export_official(nn.Linear(2, 2))

    def test_exported_gradients(self):
        fusion = engine()
        assert not any(value.any() for value in export_official(fusion, grad=True).values())
        fusion(torch.randn(COUNT, 5, DIM)).square().sum().backward()
        got = export_official(fusion, grad=True)
        assert got.keys() == export_official(fusion).keys()
        stacked = stack_official(got, COUNT)
        for name, parameter in fusion.named_parameters():
            assert torch.equal(stacked[name], parameter.grad), name

    def test_export_is_a_copy(self):
        fusion = engine()
        exported = export_official(fusion)
        for value in exported.values():
            value.zero_()
        assert fusion.gate_weight.any()


class TestOfficialLayer:
    def test_state_dict_has_the_authors_names(self):
        layer = OfficialDEQFusion(DIM, COUNT)
        assert list(layer.state_dict()) == list(export_official(engine()))
        assert [n for n, _ in layer.named_parameters()] == list(layer.state_dict())
        layer.load_state_dict(checkpoint())
        for name, value in layer.state_dict().items():
            assert torch.equal(value, checkpoint()[name])

    def test_brca_checkpoint_loads_into_a_model(self):
        saved = {k: v for k, v in checkpoint("deq.").items() if "func_" in k}
        model = nn.ModuleDict({"deq": OfficialDEQFusion(DIM, COUNT)})
        model.load_state_dict(saved)
        assert torch.equal(model["deq"].weights[1], torch.ones(1))
        saved.pop("deq.func_.branches.0.gn1.weight")
        with pytest.raises(RuntimeError, match=r"deq\.func_\.branches\.0\.gn1\.weight"):
            model.load_state_dict(saved)

    def test_initial_parameters(self):
        """The same draws as building the authors' linear layers one after another."""
        torch.manual_seed(9)
        layer = OfficialDEQFusion(DIM, COUNT)
        torch.manual_seed(9)
        for i in range(COUNT):
            for part in ("conv1", "conv2"):
                linear = nn.Linear(DIM, DIM)
                own = layer.func_["branches"][i][part]
                assert torch.equal(own.weight, linear.weight)
                assert torch.equal(own.bias, linear.bias)
        for part in ("gate", "fuse"):
            linear = nn.Linear(DIM, DIM)
            assert torch.equal(layer.func_["branches"][COUNT][part].weight, linear.weight)
        assert torch.equal(torch.rand(3), _next_random(9))

    @pytest.mark.parametrize("solver", ["anderson", "broyden"])
    @pytest.mark.parametrize("stop_mode", ["abs", "rel"])
    def test_result_and_trace(self, solver, stop_mode):
        torch.manual_seed(0)
        layer = calm(OfficialDEQFusion(DIM, COUNT, 90, 91, stop_mode, solver=solver)).double()
        features = [torch.randn(5, DIM, dtype=torch.float64) for _ in range(COUNT)]
        fused, loss, trace = layer.eval()(features)
        assert fused.shape == (5, DIM)
        assert loss.shape == (1, 1)
        assert loss.item() == 0
        assert trace["result"].shape == (5, (COUNT + 1) * DIM)
        assert torch.equal(trace["result"][:, -DIM:], fused)
        assert not trace["result"].requires_grad

        state = trace["result"].reshape(5, COUNT + 1, DIM).transpose(0, 1)
        parameters = stack_official(dict(layer.named_parameters()), COUNT)
        step = textbook_cell(parameters, state, features, OFFICIAL)
        assert (step - state).norm() < 1e-3 * state.norm()

        for name in ("abs_trace", "rel_trace"):
            assert len(trace[name]) == 90
            assert all(isinstance(value, float) for value in trace[name])
            assert np.isfinite(np.array(trace[name])).all()
        chosen = trace[f"{stop_mode}_trace"]
        assert trace["lowest"] == min(chosen) == chosen[trace["nstep"]]
        assert isinstance(trace["nstep"], int)
        # The first evaluation is f(0) - 0, where every block starts.
        first = textbook_cell(parameters, torch.zeros_like(state), features, OFFICIAL)
        assert trace["rel_trace"][0] == pytest.approx(1.0, rel=1e-3)
        modalities = first[:-1].norm().item()
        assert trace["abs_trace"][0] >= modalities * (1 - 1e-9)
        rows = 5 * (COUNT + 1)
        bound = 1e-5 * rows**0.5 if stop_mode == "abs" else 1e-5
        assert trace["lowest"] <= bound * (1 + 1e-6)

    @pytest.mark.skipif(not golden_files(), reason="golden vectors not found")
    @pytest.mark.parametrize(
        "path", [f for f in golden_files() if "official" in f.stem], ids=lambda path: path.stem
    )
    def test_traces_of_the_joint_solve(self, path):
        """Apart from the ridge, `joint=True` is their algorithm: two plain steps come first."""
        case = load_golden(path)
        layer = OfficialDEQFusion(case.dim, case.num_modalities, 8, joint=True).double().eval()
        layer.load_state_dict(case.official)
        _, _, trace = layer(case.features)
        expected = case.arrays["anderson8_abs_trace"][:2]
        assert np.allclose(trace["abs_trace"][:2], expected.numpy(), rtol=1e-6)
        expected = case.arrays["anderson55_rel_trace_f64"][:2]
        assert np.allclose(trace["rel_trace"][:2], expected.numpy(), rtol=1e-6)

    def test_jacobian_loss(self):
        torch.manual_seed(0)
        layer = calm(OfficialDEQFusion(DIM, COUNT, stop_mode="rel", eps=1e-8)).double()
        features = [torch.randn(5, DIM, dtype=torch.float64) for _ in range(COUNT)]
        with torch.no_grad():
            _, loss, _ = layer.train()(features)
        draws = [layer(features)[1] for _ in range(60)]
        assert all(draw.shape == (1, 1) for draw in draws)
        estimates = torch.cat(draws).detach()
        state = layer(features)[2]["result"].reshape(5, COUNT + 1, DIM).transpose(0, 1)
        parameters = stack_official({n: p.detach() for n, p in layer.named_parameters()}, COUNT)
        stacked = torch.stack(features)
        jacobian = dense_jacobian(
            lambda z, rows: textbook_cell(parameters, z, list(stacked[:, rows]), OFFICIAL),
            state.contiguous(),
        )
        exact = jacobian.square().sum() / state.numel()
        error = estimates.std() / len(estimates) ** 0.5
        assert abs(estimates.mean() - exact) < 3 * error
        assert error < 0.2 * exact
        gradient = torch.autograd.grad(draws[0].sum(), layer.func_["branches"][0]["conv1"].weight)
        assert gradient[0].any()
        assert loss.shape == (1, 1)

    def test_weight_tied_steps(self):
        torch.manual_seed(0)
        features = [torch.randn(5, DIM, dtype=torch.float64) for _ in range(COUNT)]
        for steps in (1, 4):
            layer = OfficialDEQFusion(DIM, COUNT, deq=False, num_layers=steps).double()
            fused, loss, trace = layer(features)
            parameters = stack_official(dict(layer.named_parameters()), COUNT)
            state = torch.zeros(COUNT + 1, 5, DIM, dtype=torch.float64)
            for _ in range(steps):
                state = textbook_cell(parameters, state, features, OFFICIAL)
            assert torch.allclose(fused, state[-1], rtol=1e-9, atol=1e-11)
            assert loss.item() == 0
            assert loss.shape == (1, 1)
            assert trace["rel_trace"] == []
            fused.sum().backward()
            assert layer.bias.grad is not None

    def test_given_fusion_feature(self):
        """The authors' BRCA file passes the injected feature in."""
        torch.manual_seed(0)
        layer = calm(OfficialDEQFusion(DIM, COUNT, stop_mode="rel", eps=1e-10)).double().eval()
        features = [torch.randn(5, DIM, dtype=torch.float64) for _ in range(COUNT)]
        given = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
        fused, _, trace = layer(features, given)
        state = trace["result"].reshape(5, COUNT + 1, DIM).transpose(0, 1)
        parameters = stack_official(dict(layer.named_parameters()), COUNT)
        step = textbook_cell(parameters, state, features, OFFICIAL, injection=given)
        assert (step - state).norm() < 1e-8 * state.norm()
        fused.sum().backward()
        assert given.grad.any()
        assert layer.bias.grad is None or not layer.bias.grad.any()
        summed = sum(features)
        assert torch.allclose(layer(features, summed)[0], layer(features)[0], atol=1e-12)

    @pytest.mark.parametrize(
        ("options", "fragments"),
        [
            ({"stop_mode": "both"}, ("stop_mode", "both", "abs", "rel")),
            ({"solver": "newton"}, ("solver", "newton", "anderson", "broyden")),
            ({"num_layers": 0}, ("num_layers", "0")),
            ({"num_layers": 2.0}, ("num_layers", "2.0")),
            ({"f_thres": 0}, ("f_thres", "0")),
            ({"b_thres": 0}, ("b_thres", "0")),
            ({"b_thres": 5.5}, ("b_thres", "5.5")),
            ({"deq": "yes"}, ("deq", "yes")),
            ({"eps": 0}, ("eps", "0")),
            ({"eps": 0, "stop_mode": "rel"}, ("eps", "0")),
            ({"channel_dim": 0}, ("channel_dim", "0")),
            ({"num_modals": "2"}, ("num_modals", "'2'")),
            ({"tail": "relu"}, ("tail", "relu_norm", "norm_relu")),
        ],
    )
    def test_options(self, options, fragments):
        """The error begins with the caller's argument, whatever the engine calls it."""
        sizes = {"channel_dim": DIM, "num_modals": COUNT}
        with pytest.raises((TypeError, ValueError), match="expected") as error:
            OfficialDEQFusion(**{**sizes, **options})
        assert str(error.value).startswith(fragments[0] + ": got ")
        for fragment in fragments:
            assert fragment in str(error.value)

    def test_copies(self):
        layer = OfficialDEQFusion(DIM, COUNT).eval()
        features = [torch.randn(3, DIM) for _ in range(COUNT)]
        expected = layer(features)[0]
        for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(made(features)[0], expected)
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        fresh = OfficialDEQFusion(DIM, COUNT).eval()
        assert fresh.load_state_dict(torch.load(buffer)).missing_keys == []
        assert torch.equal(fresh(features)[0], expected)
        assert isinstance(layer.state_dict(), OrderedDict)
        assert "identity" in repr(layer)


def _next_random(seed: int) -> torch.Tensor:
    """What the generator yields after the layer's linear parts have been drawn."""
    torch.manual_seed(seed)
    for _ in range(2 * COUNT + 2):
        nn.Linear(DIM, DIM)
    return torch.rand(3)


@pytest.mark.parametrize("kind", [OfficialDEQFusion, OfficialMMIMDBDEQFusion])
def test_authors_training_loop(kind, capfd):
    """Their loop: loss + weight * jac_loss, backward, clip, Adam; rel_trace at test."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoders = nn.ModuleList([nn.Linear(10, DIM) for _ in range(COUNT)])
            self.deq_fusion = kind(DIM, COUNT, 55, 56, "abs", dropout=0.2)
            self.head = nn.Linear(DIM, 2)

        def forward(self, data):
            features = [torch.relu(e(x)) for e, x in zip(self.encoders, data, strict=True)]
            fused, jacobian_loss, trace = self.deq_fusion(features)
            return self.head(fused), jacobian_loss, trace

    expected = "norm_relu" if kind is OfficialMMIMDBDEQFusion else "relu_norm"
    assert (f"tail={expected!r}" in repr(kind(DIM, COUNT))) is (expected == "norm_relu")
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (40,))
    data = [torch.randn(40, 10) + 2 * labels[:, None] for _ in range(COUNT)]
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()
    losses = []
    for _ in range(15):
        model.train()
        optimizer.zero_grad()
        logits, jacobian_loss, _ = model(data)
        loss = criterion(logits, labels) + 0.1 * jacobian_loss.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 30)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with torch.no_grad():
        logits, _, trace = model(data)
    assert (logits.argmax(1) == labels).float().mean() > 0.9
    traces = np.array([trace["rel_trace"], trace["rel_trace"]])
    assert traces.shape == (2, 55)
    assert capfd.readouterr().out == ""


def test_what_follows_may_work_in_place():
    torch.manual_seed(0)
    layer, features = OfficialDEQFusion(DIM, COUNT), [torch.randn(4, DIM) for _ in range(COUNT)]
    grads = []
    for relu in (torch.relu, torch.relu_):
        layer.zero_grad()
        relu(layer(features)[0]).sum().backward()
        grads.append([parameter.grad.clone() for parameter in layer.parameters()])
    assert all(map(torch.equal, *grads))
