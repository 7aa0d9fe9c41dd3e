"""Runs the authors' checkpoints and training scripts on this engine.

The released code (github.com/jinhong-ni/DEQFusion, `DEQ_fusion.py`) names its parameters
`func_.branches.{i}.conv1.weight` and so on, one tensor per modality, where `DEQFusion` stacks the
modalities. `load_official` and `export_official` translate between the two; `OfficialDEQFusion`
has the authors' constructor, call signature and result, and holds its parameters under their
names, so a script needs to change its import and nothing else:

    from deqfusion.compat import OfficialDEQFusion as DEQFusion

Their MM-IMDB script has its own copy of the class, which ends the fusion block with the norm before
the ReLU: it imports `OfficialMMIMDBDEQFusion`.

Differences from the authors' class, each on purpose:

1. Every row of every block stops by itself; theirs stops on the norm of the whole batch.
2. The Anderson ridge is relative to the Gram matrix; theirs adds 1e-4, which switches the
   acceleration off near the solution and makes the backward solve depend on the gradient's scale.
3. The state returned is f(z), where theirs returns z without gradient in evaluation.
4. Gradients flow in evaluation mode as well, if the caller enables them.
5. Dropout draws one mask per solve; theirs draws one per step, which has no fixed point. (Their
   MM-IMDB file declares a dropout of 0.2 but builds its layer with 0, so 0 is the default here.)
6. An unknown solver or stop mode is an error; theirs takes any other solver name for "broyden",
   which then fails on its own two-dimensional state.
7. Nothing is printed.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deqfusion import validation as check
from deqfusion.adjoint import Implicit, Unroll
from deqfusion.module import DEQFusion
from deqfusion.solution import Equilibrium
from deqfusion.solvers import Anderson, Broyden

_logger = logging.getLogger(__name__)

_BRANCH_NAMES = {
    "conv1.weight": "modality_weight1",
    "conv1.bias": "modality_bias1",
    "conv2.weight": "modality_weight2",
    "conv2.bias": "modality_bias2",
    "gn1.weight": "norm1_weight",
    "gn1.bias": "norm1_bias",
    "gn2.weight": "norm2_weight",
    "gn2.bias": "norm2_bias",
    "gn3.weight": "norm3_weight",
    "gn3.bias": "norm3_bias",
}
_FUSION_NAMES = {
    "gate.weight": "gate_weight",
    "gate.bias": "gate_bias",
    "fuse.weight": "fusion_weight",
    "fuse.bias": "fusion_bias",
    "gn3.weight": "fusion_norm_weight",
    "gn3.bias": "fusion_norm_bias",
}
_MARK = "func_.branches."
# The authors' Anderson keeps six iterates, and both solvers guard relative traces by 1e-5.
_OFFICIAL_MEMORY = 6
_TRACE_GUARD = 1e-5
# With stop_mode="abs" only the absolute tolerance may stop a row, but a tolerance must be > 0.
_NO_RELATIVE_STOP = 1e-30
# What their code has, and a checkpoint does not tell; with gates of its shape, "sum" is sure.
_OFFICIAL_OPTIONS = {"gate": "identity", "skip": True, "num_groups": 4}


def _official_layout(num_modalities: int) -> dict[str, tuple[str, int | None]]:
    """Maps each of the authors' names, in their order, to (our name, index into the stack)."""
    layout: dict[str, tuple[str, int | None]] = {"bias": ("injection_bias", None)}
    for i in range(num_modalities):
        for theirs, ours in _BRANCH_NAMES.items():
            layout[f"{_MARK}{i}.{theirs}"] = (ours, i)
    for theirs, ours in _FUSION_NAMES.items():
        layout[f"{_MARK}{num_modalities}.{theirs}"] = (ours, None)
    for i in range(num_modalities):
        layout[f"weights.{i}"] = ("injection_weight", i)
    return layout


def _official_view(parameter: Tensor, index: int | None) -> Tensor:
    """Picks one modality's part of a stacked parameter, in the authors' shape."""
    if index is None:
        return parameter
    part = parameter[index]
    return part.reshape(1) if part.dim() == 0 else part


def _find_prefix(keys: Sequence[str]) -> str:
    prefixes = sorted({key.split(_MARK)[0] for key in keys if _MARK in key})
    if not prefixes:
        shown = ", ".join(repr(key) for key in keys[:3]) or "no keys"
        raise ValueError(
            f"state_dict: got {shown}{', ...' if len(keys) > 3 else ''}, expected the authors' "
            f"names such as '{_MARK}0.conv1.weight', with or without a prefix"
        )
    if len(prefixes) > 1:
        raise ValueError(
            f"state_dict: got fusion layers under the prefixes {prefixes}, expected one; "
            "choose it with prefix="
        )
    return prefixes[0]


def _add_default_injection(found: dict[str, Tensor], names: Sequence[str], like: Tensor) -> None:
    """Completes a checkpoint of the authors' BRCA file, which sums the features unweighted."""
    injection = [name for name in names if name == "bias" or name.startswith("weights.")]
    if not any(name in found for name in injection):
        _logger.info("no injection weights in the checkpoint: the features are summed unweighted")
        for name in injection:
            found[name] = like.new_zeros(1) if name == "bias" else like.new_ones(1)


def load_official(
    fusion: DEQFusion, state_dict: Mapping[str, Any], *, prefix: str | None = None
) -> None:
    """Copies parameters saved by the authors' code into a fusion layer.

    A checkpoint of a whole model loads too: the layer is found by its names, any prefix
    (`fusion.`, `module.`, ...) is dropped, and keys outside the prefix are left alone. A
    checkpoint that has neither `weights.*` nor `bias` comes from the authors' BRCA file, which
    sums the features; it loads as weights 1 and bias 0. Nothing is copied if anything is wrong.

    Args:
        fusion: the layer to fill; its width, number of modalities and gate input decide the
            expected shapes. Other options cannot be told from a checkpoint: the authors' have
            `gate="identity"` and `skip=True`, those of their MM-IMDB file `tail="norm_relu"` too,
            and a layer without gives other answers. The first two, and their 4 groups, are
            compared.
        state_dict: the authors' names to floating-point tensors.
        prefix: which fusion layer to take, where the checkpoint holds several.

    Raises:
        TypeError: `fusion` or `state_dict` is of another type, or a value is no float tensor.
        ValueError: keys are missing, unexpected or of the wrong shape; all of them are named.

    Warns:
        UserWarning: the layer has another gate, skip or number of groups than the authors' code.
    """
    if not isinstance(fusion, DEQFusion):
        raise TypeError(f"fusion: got {type(fusion).__name__}, expected DEQFusion")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: got {type(state_dict).__name__}, expected a mapping")
    if prefix is None:
        prefix = _find_prefix(list(state_dict))
    found = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    own = dict(fusion.named_parameters())
    layout = _official_layout(fusion.num_modalities)
    _add_default_injection(found, list(layout), own["gate_bias"].detach())

    for name, value in found.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"state_dict[{prefix + name!r}]: got {got}, expected a float tensor")
    targets = {name: _official_view(own[ours], index) for name, (ours, index) in layout.items()}
    missing = [prefix + name for name in targets if name not in found]
    unexpected = [prefix + name for name in found if name not in targets]
    shapes = [
        f"{prefix + name} {tuple(found[name].shape)} (expected {tuple(target.shape)})"
        for name, target in targets.items()
        if name in found and found[name].shape != target.shape
    ]
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", shapes),
        )
        if names
    ]
    if problems:
        hint = ""
        if any(".gate.weight" in shape for shape in shapes):
            hint = f'; the layer has gate_input="{fusion.options.gate_input}"'
        raise ValueError(
            f"state_dict does not fit DEQFusion(dim={fusion.dim}, "
            f"num_modalities={fusion.num_modalities}): {'; '.join(problems)}{hint}"
        )
    with torch.no_grad():
        for name, (ours, index) in layout.items():
            destination = own[ours] if index is None else own[ours][index]
            destination.copy_(found[name].reshape(destination.shape))
    own_options = {name: getattr(fusion.options, name) for name in _OFFICIAL_OPTIONS}
    others = [name for name, value in _OFFICIAL_OPTIONS.items() if own_options[name] != value]
    if others:
        got, expected = (
            ", ".join(f"{name}={options[name]!r}" for name in others)
            for options in (own_options, _OFFICIAL_OPTIONS)
        )
        warnings.warn(
            f"fusion: got {got}, expected {expected} as the authors' code has: with other options "
            "the same parameters give other answers",
            stacklevel=2,
        )


def export_official(fusion: DEQFusion, grad: bool = False) -> dict[str, Tensor]:
    """Returns a fusion layer's parameters, or their gradients, under the authors' names.

    Args:
        fusion: the layer to read.
        grad: return gradients instead of values. A parameter that has none gets zeros, so that
            the keys and shapes are the same either way.

    Returns:
        Names in the authors' order to detached copies, which `load_official` takes back bitwise.

    Raises:
        TypeError: `fusion` is of another type.
    """
    if not isinstance(fusion, DEQFusion):
        raise TypeError(f"fusion: got {type(fusion).__name__}, expected DEQFusion")
    source: dict[str, Tensor] = {}
    for name, parameter in fusion.named_parameters():
        if grad:
            gradient = parameter.grad
            source[name] = torch.zeros_like(parameter) if gradient is None else gradient
        else:
            source[name] = parameter
    return {
        name: _official_view(source[ours].detach(), index).clone()
        for name, (ours, index) in _official_layout(fusion.num_modalities).items()
    }


class _Solve(nn.Module):
    """Everything `OfficialDEQFusion` asks of the engine, behind one functional call."""

    def __init__(self, fusion: DEQFusion) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(
        self, features: Sequence[Tensor], injection: Tensor | None, penalty: bool
    ) -> tuple[Equilibrium, Tensor | None]:
        equilibrium = self.fusion.equilibrium(features, injection=injection, trace=True)
        if not penalty:
            return equilibrium, None
        return equilibrium, self.fusion.jacobian_penalty(
            equilibrium, features, probes=2, injection=injection
        )


class OfficialDEQFusion(nn.Module):
    """The authors' `DEQFusion` class on this engine; see the module docstring for differences.

    Parameters are drawn in the authors' order from the same distributions, so a seed gives the
    same layer, and a checkpoint of theirs loads with a plain `load_state_dict`.

    Args:
        channel_dim: width d of every feature.
        num_modals: number of modalities N.
        f_thres: most cell evaluations of the forward solve, per row.
        b_thres: most steps of the backward solve, per row.
        stop_mode: what `eps` is held against: "abs", the norm of f(z) - z of a row and block, or
            "rel", that norm divided by the norm of f(z).
        deq: False runs `num_layers` weight-tied steps instead of solving for the equilibrium.
        num_layers: number of weight-tied steps.
        solver: "anderson" or "broyden", forward and backward.
        eps: where a row stops. The authors' 1e-5 with "abs" is beyond fp32 for wide features, so
            rows then run to `f_thres` or until they stagnate, as theirs do;
            `stop_mode="rel", eps=1e-3` is several times as fast.
        tail: "relu_norm", or "norm_relu" as in `OfficialMMIMDBDEQFusion`.
        dropout: probability of dropping gates and fused channels while training.
        joint: solve all blocks as one problem, as theirs does, for traces like the paper's.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or an unknown option.
    """

    def __init__(
        self,
        channel_dim: int,
        num_modals: int,
        f_thres: int = 55,
        b_thres: int = 56,
        stop_mode: str = "abs",
        deq: bool = True,
        num_layers: int = 1,
        solver: str = "anderson",
        *,
        eps: float = 1e-5,
        tail: str = "relu_norm",
        dropout: float = 0.0,
        joint: bool = False,
    ) -> None:
        super().__init__()
        if stop_mode not in ("abs", "rel"):
            raise ValueError(f"stop_mode: got {stop_mode!r}, expected 'abs' or 'rel'")
        if solver not in ("anderson", "broyden"):
            raise ValueError(f"solver: got {solver!r}, expected 'anderson' or 'broyden'")
        f_thres = check.count("f_thres", f_thres, minimum=1)
        b_thres = check.count("b_thres", b_thres, minimum=1)
        check.boolean("deq", deq)
        num_layers = check.count("num_layers", num_layers, minimum=1)
        check.positive("eps", eps)
        channel_dim = check.count("channel_dim", channel_dim, minimum=1)
        num_modals = check.count("num_modals", num_modals, minimum=1)
        self.f_thres = f_thres
        self.b_thres = b_thres
        self.stop_mode = stop_mode
        self.deq = deq
        self.num_layers = num_layers

        tol, atol = (eps, 0.0) if stop_mode == "rel" else (_NO_RELATIVE_STOP, eps)
        forward_solver: Anderson | Broyden
        backward_solver: Anderson | Broyden
        if solver == "anderson":
            forward_solver = Anderson(
                tol, atol, max_steps=f_thres, memory=_OFFICIAL_MEMORY, ladder="off"
            )
            backward_solver = Anderson(eps, max_steps=b_thres, memory=_OFFICIAL_MEMORY)
        else:
            forward_solver = Broyden(tol, atol, max_steps=f_thres)
            backward_solver = Broyden(eps, max_steps=b_thres)
        # On the meta device the engine holds no memory: the parameters below take the place of
        # its own in every call. Its initialisation must not move the generator they draw from.
        with torch.device("meta"), torch.random.fork_rng(devices=()):
            engine = DEQFusion(
                channel_dim,
                num_modals,
                gate="identity",
                skip=True,
                tail=tail,
                dropout=dropout,
                solver=forward_solver,
                adjoint=Implicit(backward_solver) if deq else Unroll(num_layers),
                joint=joint,
            )
        # A tuple keeps the engine, whose parameters are placeholders, out of the module tree.
        self._engine = (_Solve(engine),)

        def norm() -> nn.Module:
            return nn.GroupNorm(engine.options.num_groups, channel_dim)

        branches: list[nn.Module] = []
        for _ in range(num_modals):
            parts = {f"conv{k}": nn.Linear(channel_dim, channel_dim) for k in (1, 2)}
            branches.append(nn.ModuleDict({**parts, "gn1": norm(), "gn2": norm(), "gn3": norm()}))
        parts = {name: nn.Linear(channel_dim, channel_dim) for name in ("gate", "fuse")}
        branches.append(nn.ModuleDict({**parts, "gn3": norm()}))
        self.func_ = nn.ModuleDict({"branches": nn.ModuleList(branches)})
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(num_modals)])
        self.bias = nn.Parameter(torch.zeros(1))
        self.register_load_state_dict_pre_hook(_complete_checkpoint)

    def extra_repr(self) -> str:
        """Describes the engine that does the work."""
        return f"stop_mode={self.stop_mode!r}, deq={self.deq}, engine={self._engine[0].fusion}"

    def _engine_parameters(self) -> dict[str, Tensor]:
        """Stacks the parameters into the engine's layout; gradients flow back through it."""
        own = dict(self.named_parameters())
        gathered: dict[str, list[Tensor]] = {}
        stacked: dict[str, Tensor] = {}
        for name, (ours, index) in _official_layout(len(self.weights)).items():
            if index is None:
                stacked[f"fusion.{ours}"] = own[name]
            else:
                gathered.setdefault(ours, []).append(own[name])
        for ours, tensors in gathered.items():
            join = torch.cat if ours == "injection_weight" else torch.stack
            stacked[f"fusion.{ours}"] = join(tensors)
        return stacked

    def forward(
        self, features: Sequence[Tensor], fusion_feature: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Fuses the features.

        Args:
            features: N tensors (B, d).
            fusion_feature: the injected feature (B, d), as the authors' BRCA file passes it; by
                default the weighted sum of the features.

        Returns:
            The fused feature (B, d); the Jacobian loss (1, 1), which is the mean over 2 random
            probes v of ||v^T J||^2 / numel while training with `deq`, and 0 otherwise; and the
            trace of `_official_trace`.

        Raises:
            TypeError: features are no floating-point tensors.
            ValueError: shapes, devices or the number of features do not fit.
        """
        solve = self._engine[0]
        solve.train(self.training)
        penalty = self.training and self.deq
        equilibrium, loss = torch.func.functional_call(
            solve, self._engine_parameters(), (features, fusion_feature, penalty)
        )
        if loss is None:
            loss = equilibrium.fused.new_zeros(())
        if self.deq:
            trace = _official_trace(equilibrium, self.stop_mode, solve.fusion.joint)
        else:
            trace = {
                "nstep": self.num_layers,
                "lowest": math.nan,
                "abs_trace": [],
                "rel_trace": [],
                "result": _official_state(equilibrium),
            }
        # Of its own, as theirs is: a model may go on with it in place.
        return equilibrium.fused.clone(), loss.view(1, 1), trace


class OfficialMMIMDBDEQFusion(OfficialDEQFusion):
    """The class of the authors' MM-IMDB file: `OfficialDEQFusion` with the norm before the ReLU.

    Args:
        args, options: as of `OfficialDEQFusion`, but that `tail` is "norm_relu".
    """

    def __init__(self, *args: Any, tail: str = "norm_relu", **options: Any) -> None:
        super().__init__(*args, tail=tail, **options)


def _complete_checkpoint(
    module: OfficialDEQFusion, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Lets checkpoints of the authors' BRCA file, which has no injection weights, load."""
    names = list(_official_layout(len(module.weights)))
    found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
    if any(name.startswith(_MARK) for name in found):
        _add_default_injection(found, names, module.bias.detach())
        state_dict.update({prefix + name: value for name, value in found.items()})


def _official_state(equilibrium: Equilibrium) -> Tensor:
    """The state as the authors lay it out, (B, (N+1) d), detached."""
    return equilibrium.state.detach().movedim(0, -2).flatten(-2)


def _official_trace(equilibrium: Equilibrium, stop_mode: str, joint: bool) -> dict[str, Any]:
    """Combines the rows' and blocks' residuals into the authors' traces of the whole batch.

    Entry k is what the batch looks like when every row of every block has been evaluated k+1
    times, or has stopped before with the residual it stopped at:

        abs_trace[k] = sqrt(sum of ||f(z) - z||^2 over rows and blocks)
        rel_trace[k] = abs_trace[k] / (1e-5 + sqrt(sum of ||f(z)||^2 over rows and blocks))

    Blocks are solved one after the other here, so the traces show them side by side; with
    `joint=True` there is one block and these are the authors' definitions exactly.

    Returns:
        `abs_trace` and `rel_trace`, lists of `f_thres` floats; `nstep`, the index of the entry
        that is lowest in `stop_mode`, and `lowest`, its value (0 and NaN if none is finite);
        `result`, the state (B, (N+1) d).
    """
    stats = equilibrium.stats
    assert stats.absolute_trace is not None  # every solve here records its trace
    assert stats.trace is not None
    absolute, relative = _hold(stats.absolute_trace), _hold(stats.trace)
    at_rest = equilibrium.state.detach().norm(dim=-1, keepdim=True)
    if joint:
        # One problem, whose statistics stand at every block.
        absolute, relative = absolute[:1], relative[:1]
        at_rest = at_rest.norm(dim=0, keepdim=True)
    # ||f|| is recovered from the two residuals; where both are 0, f(z) = z is the state itself.
    size = torch.where(relative > 0, absolute / relative, at_rest)
    steps = absolute.shape[-1]
    absolute_norm = absolute.reshape(-1, steps).double().norm(dim=0)
    relative_norm = absolute_norm / (_TRACE_GUARD + size.reshape(-1, steps).double().norm(dim=0))
    traces = {"abs": absolute_norm.tolist(), "rel": relative_norm.tolist()}
    finite = [(value, k) for k, value in enumerate(traces[stop_mode]) if math.isfinite(value)]
    lowest, nstep = min(finite, default=(math.nan, 0))
    return {
        "nstep": nstep,
        "lowest": lowest,
        "abs_trace": traces["abs"],
        "rel_trace": traces["rel"],
        "result": _official_state(equilibrium),
    }


def _hold(trace: Tensor) -> Tensor:
    """Replaces the NaN after a row has stopped by the last value before it."""
    steps = torch.arange(trace.shape[-1], device=trace.device).expand_as(trace)
    last = torch.where(trace.isfinite(), steps, 0).cummax(dim=-1).values
    return trace.gather(-1, last)
