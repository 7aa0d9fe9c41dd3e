"""Reads the golden vectors: fp64 cells, fixed points and gradients of the authors' code.

The folder is named by the environment variable `DEQFUSION_GOLDEN`; without it, `shared/golden`
beside the checkout is used. Files hold parameters under the authors' names, which are converted
here, independently of `deqfusion.compat`, so that each checks the other. Cases with d = 500 leave
their parameters out; these are drawn again from the recorded seed and verified against sums that
the file holds.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deqfusion.testing.textbook import CellOptions

_BRANCH_PARTS = {
    "modality_weight1": "conv1.weight",
    "modality_bias1": "conv1.bias",
    "modality_weight2": "conv2.weight",
    "modality_bias2": "conv2.bias",
    "norm1_weight": "gn1.weight",
    "norm1_bias": "gn1.bias",
    "norm2_weight": "gn2.weight",
    "norm2_bias": "gn2.bias",
    "norm3_weight": "gn3.weight",
    "norm3_bias": "gn3.bias",
}
_FUSION_PARTS = {
    "gate_weight": "gate.weight",
    "gate_bias": "gate.bias",
    "fusion_weight": "fuse.weight",
    "fusion_bias": "fuse.bias",
    "fusion_norm_weight": "gn3.weight",
    "fusion_norm_bias": "gn3.bias",
}


def find_golden() -> Path | None:
    """Returns the folder of golden vectors, or None where there is none."""
    named = os.environ.get("DEQFUSION_GOLDEN")
    if named:
        return Path(named) if Path(named).is_dir() else None
    beside = Path(__file__).resolve().parents[3] / "shared" / "golden"
    return beside if beside.is_dir() else None


def golden_files() -> list[Path]:
    """Returns the golden files in order of name; empty where the folder is absent."""
    folder = find_golden()
    return sorted(folder.glob("*.npz")) if folder else []


def stack_official(named: dict[str, Tensor], num_modalities: int) -> dict[str, Tensor]:
    """Stacks tensors under the authors' names into the layout of `DEQFusion.state_dict()`."""
    stacked = {
        ours: torch.stack([named[f"func_.branches.{i}.{theirs}"] for i in range(num_modalities)])
        for ours, theirs in _BRANCH_PARTS.items()
    }
    for ours, theirs in _FUSION_PARTS.items():
        stacked[ours] = named[f"func_.branches.{num_modalities}.{theirs}"]
    stacked["injection_weight"] = torch.cat([named[f"weights.{i}"] for i in range(num_modalities)])
    stacked["injection_bias"] = named["bias"]
    return stacked


@dataclass(frozen=True)
class GoldenCase:
    """One golden file in fp64.

    Attributes:
        name: file name without suffix.
        meta: the file's description (kind, gate, residual, B, d, N, seed, ...).
        official: parameters under the authors' names.
        official_grad: dL/dparameter under the authors' names.
        arrays: every other array of the file; floating ones in fp64.
    """

    name: str
    meta: dict[str, Any]
    official: dict[str, Tensor]
    official_grad: dict[str, Tensor]
    arrays: dict[str, Tensor]

    @property
    def num_modalities(self) -> int:
        """N."""
        return int(self.meta["N"])

    @property
    def dim(self) -> int:
        """Width d of one block."""
        return int(self.meta["d"])

    @property
    def options(self) -> CellOptions:
        """The variant of the cell that the file describes."""
        gate = str(self.meta["gate"])
        return CellOptions(
            gate="identity" if gate == "linear" else "sigmoid",
            gate_input="concat" if gate == "concat" else "sum",
            skip=bool(self.meta["residual"]),
            num_groups=int(self.meta["groups"]),
            eps=float(self.meta["gn_eps"]),
        )

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Parameters under the names of `DEQFusion.state_dict()`."""
        return stack_official(self.official, self.num_modalities)

    @property
    def parameter_grad(self) -> dict[str, Tensor]:
        """dL/dparameter under the names of `DEQFusion.state_dict()`."""
        return stack_official(self.official_grad, self.num_modalities)

    @property
    def features(self) -> list[Tensor]:
        """N features (B, d)."""
        return [self.arrays[f"x_{i}"] for i in range(self.num_modalities)]

    def state(self, name: str) -> Tensor:
        """Returns an array (B, (N+1) d) of the file as a state (N+1, B, d)."""
        vector = self.arrays[name]
        return (
            vector.reshape(vector.shape[0], self.num_modalities + 1, self.dim)
            .transpose(0, 1)
            .contiguous()
        )


def _official_shapes(gate: str, dim: int, count: int) -> list[tuple[str, tuple[int, ...]]]:
    """The authors' parameters in the order in which they were drawn."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("bias", (1,))]
    for i in range(count):
        for part in ("conv1", "conv2", "gn1", "gn2", "gn3"):
            weight = (dim, dim) if part.startswith("conv") else (dim,)
            shapes.append((f"func_.branches.{i}.{part}.weight", weight))
            shapes.append((f"func_.branches.{i}.{part}.bias", (dim,)))
    widths = {"gate": (dim, 2 * dim if gate == "concat" else dim), "fuse": (dim, dim)}
    for part in ("gate", "fuse", "gn3"):
        shapes.append((f"func_.branches.{count}.{part}.weight", widths.get(part, (dim,))))
        shapes.append((f"func_.branches.{count}.{part}.bias", (dim,)))
    shapes.extend((f"weights.{i}", (1,)) for i in range(count))
    return shapes


def _draw_parameters(meta: dict[str, Any]) -> dict[str, np.ndarray]:
    """Repeats the recorded draw: torch's default distributions from one numpy stream, in fp32."""
    dim, gate = int(meta["d"]), str(meta["gate"])
    # The files were drawn from numpy's legacy stream, which alone reproduces them.
    stream = np.random.RandomState(int(meta["seed"]))
    drawn = {}
    for name, shape in _official_shapes(gate, dim, int(meta["N"])):
        if ".gn" in name or name.startswith("weights.") or name == "bias":
            centre = 1.0 if name.endswith("weight") or name.startswith("weights.") else 0.0
            values = centre + 0.1 * stream.standard_normal(shape)
        else:
            fan_in = 2 * dim if gate == "concat" and ".gate." in name else dim
            values = (2.0 * stream.random_sample(shape) - 1.0) / math.sqrt(fan_in)
        values = values.astype(np.float32)
        if meta["calm"] and (".gn3.weight" in name or ".gate." in name):
            values = values * np.float32(0.5)
        drawn[name] = values
    return drawn


def _check_sums(name: str, values: np.ndarray, expected: np.ndarray) -> None:
    flat = values.astype(np.float64).ravel()
    found = np.array([flat.sum(), (flat * flat).sum(), flat[0], flat[-1]])[: len(expected)]
    if not np.allclose(found, expected, rtol=1e-9, atol=1e-9):
        raise ValueError(f"golden array {name!r}: got sums {found}, expected {expected}")


@lru_cache(maxsize=4)
def load_golden(path: Path) -> GoldenCase:
    """Loads one golden file.

    Args:
        path: a `.npz` file.

    Returns:
        The case, with every floating tensor in fp64.

    Raises:
        ValueError: a redrawn parameter or a low-rank gradient does not match the file's sums.
    """
    with np.load(path, allow_pickle=False) as archive:
        raw = {key: archive[key] for key in archive.files}
    meta = json.loads(str(raw.pop("meta")))
    groups: dict[str, dict[str, np.ndarray]] = {}
    plain: dict[str, np.ndarray] = {}
    for key, values in raw.items():
        group, _, name = key.partition("/")
        if name:
            groups.setdefault(group, {})[name] = values
        else:
            plain[key] = values

    official = groups.get("param") or _draw_parameters(meta)
    for name, sums in groups.get("param_check", {}).items():
        _check_sums(name, official[name], sums)
    gradients = dict(groups["grad"])
    # Weight gradients of the wide cases are stored as exact low-rank factors, A^T B.
    for name, left in groups.get("gradA", {}).items():
        gradients[name] = left.T @ groups["gradB"][name]
        _check_sums(name, gradients[name], groups["grad_check"][name])

    def tensor(values: np.ndarray) -> Tensor:
        converted = torch.from_numpy(np.array(values))
        return converted.double() if converted.is_floating_point() else converted

    return GoldenCase(
        name=path.stem,
        meta=meta,
        official={name: tensor(values) for name, values in official.items()},
        official_grad={name: tensor(values) for name, values in gradients.items()},
        arrays={name: tensor(values) for name, values in plain.items()},
    )
