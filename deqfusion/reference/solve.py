"""One function per forward operator: a whole solve on (N, R, d) tensors.

Features and parameters may be fp64, fp32, bf16 or fp16; 16-bit ones are computed in fp32 and the
results rounded at the end. On a CPU rows are taken in chunks whose history stays in the cache;
chunks do not see each other, and neither do rows.
"""

from __future__ import annotations

import functools
import json
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deqfusion.reference.accelerate import Accelerator, Anderson, Broyden, Picard
from deqfusion.reference.cell import (
    CellOptions,
    FusionParameters,
    ModalityParameters,
    gate_constants,
)
from deqfusion.reference.fusion import FusionBlock
from deqfusion.reference.host import MIN_ROWS, fixed_point
from deqfusion.reference.iterate import (
    COMPACT_BELOW,
    NON_FINITE,
    Block,
    Outcome,
    Settings,
    fixed_point_masked,
)
from deqfusion.reference.modality import ModalityBlock

# Elements of one tensor (K, rows, d) of a chunk: more than so many, and blocks are solved one after
# the other; a block of more, in chunks of rows. A history of ten tensors should stay in L3.
CHUNK_ELEMENTS = 1 << 19
# Below this width the products are too small a part of a step for cheaper ones to pay.
LADDER_WIDTH = 256


class SolverOptions(NamedTuple):
    """A solver in plain values, as an operator's schema takes it.

    `method` is "anderson", "picard" or "broyden"; for an adjoint also "truncated": `max_steps`
    steps damped by `mixing`. `mixing` is Picard's damping as well. `compact_below` is not of the
    solver but of the processor: it changes no answer, and is not encoded.
    """

    method: str
    rtol: float
    atol: float
    max_steps: int
    memory: int
    ridge: float | None
    relative_ridge: bool
    mixing: float
    ladder: bool
    compact_below: float = COMPACT_BELOW

    def encode(self) -> str:
        """One string, as the operators' schemas take it.

        A string is a constant to a tracing compiler, whereas floats become inputs of the graph,
        which nested autograd functions of torch 2.13 cannot share.
        """
        fields = self._asdict()
        del fields["compact_below"]
        return json.dumps(fields)

    @staticmethod
    @functools.cache
    def decode(text: str) -> SolverOptions:
        """The inverse of `encode`."""
        return SolverOptions(**json.loads(text))


class Solution(NamedTuple):
    """Outputs of a solve: state (K, R, d), status, steps int32 and residual fp32 (K, R), and trace
    fp32 (K, R, max_steps or 0, 2) of ||f - z|| and ||f||, NaN where nothing was evaluated."""

    state: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    trace: Tensor


def filling(rows: int, device: torch.device) -> Tensor | None:
    """Row numbers that fill up a small batch on a CPU by repeating its last row; None: enough.

    Libraries sum the products of a few rows in another order than those of many, and where steps
    have low precision a last bit decides how a number is rounded: a row would not be its own.
    """
    if device.type != "cpu" or rows == 0 or rows >= MIN_ROWS:
        return None
    return torch.arange(MIN_ROWS).clamp_(max=rows - 1)


def rows_at(t: Tensor | None, index: Tensor) -> Tensor | None:
    """Rows index of t (K, R, ...)."""
    return None if t is None else t.index_select(1, index)


def first_rows(t: Tensor, rows: int) -> Tensor:
    """The first rows of t (K, R, ...), contiguous."""
    return t[:, :rows].contiguous()


class SplitBlock(Block, Protocol):
    """Stacked blocks that can be cut into fewer blocks, and into chunks of rows."""

    def blocks(self, start: int, stop: int) -> SplitBlock: ...

    def rows(self, start: int, stop: int) -> SplitBlock: ...


@functools.cache
def bfloat16_instructions() -> str | None:
    """How this processor multiplies bfloat16 matrices: "AMX", "AVX512-BF16", "SVE" or None."""
    probes = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    for name, probe in probes.items():
        if getattr(torch.cpu, probe, bool)():
            return name
    return "SVE" if "SVE" in torch.backends.cpu.get_cpu_capability() else None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accelerator_of(o: SolverOptions) -> Accelerator:
    """A fresh accelerator of the solver."""
    if o.method == "broyden":
        return Broyden(o.memory)
    if o.method == "picard" or o.memory == 0:
        return Picard(o.mixing)
    return Anderson(o.memory, o.ridge, o.relative_ridge, o.mixing)


def settings_of(
    o: SolverOptions, tolerance: Tensor | None, example: Tensor, width: int
) -> Settings:
    """When rows end, and whether the ladder is climbed; `tolerance` replaces `o.rtol`."""
    ladder = o.ladder and example.dtype == torch.float32 and width >= LADDER_WIDTH
    ladder = ladder and bfloat16_instructions() is not None
    rtol = o.rtol if tolerance is None else tolerance
    return Settings(rtol, o.atol, o.max_steps, o.relative_ridge, ladder, o.compact_below)


def chunks_of(shape: torch.Size, device: torch.device) -> list[tuple[slice, list[slice]]]:
    """Which blocks are solved together, each with its chunks of rows."""
    blocks, rows, width = shape
    if device.type != "cpu" or blocks * rows * width <= CHUNK_ELEMENTS:
        return [(slice(0, blocks), [slice(0, rows)])]
    # Equal chunks but for a row, so that none is too small to be worth its steps.
    count = -(-rows * width // CHUNK_ELEMENTS)
    chunks = [slice(k * rows // count, (k + 1) * rows // count) for k in range(count)]
    return [(slice(k, k + 1), chunks) for k in range(blocks)]


def merge(parts: list[list[Outcome]]) -> Outcome:
    """Chunks of rows (inner) and of blocks (outer) put together."""
    rows = [
        part[0] if len(part) == 1 else Outcome(*(torch.cat(column, 1) for column in zip(*part)))  # noqa: B905
        for part in parts
    ]
    return rows[0] if len(rows) == 1 else Outcome(*(torch.cat(column) for column in zip(*rows)))  # noqa: B905


def run_loop(
    block: Block,
    start: Tensor | None,
    o: SolverOptions,
    settings: Settings,
    active: Tensor | None,
    trace: Tensor | None,
    example: Tensor,
) -> Outcome:
    """Solves one chunk by the loop of its device; arguments as `fixed_point_masked` takes them."""
    loop = fixed_point if example.device.type == "cpu" else fixed_point_masked
    return loop(block, start, accelerator_of(o), settings, active, trace, example)


def _new_trace(shape: torch.Size, steps: int, wanted: bool, like: Tensor) -> Tensor:
    size = (*shape[:2], steps if wanted else 0, 2)
    return torch.full(size, torch.nan, dtype=torch.float32, device=like.device)


def solve_rows(
    block: SplitBlock,
    init: Tensor | None,
    o: SolverOptions,
    tolerance: Tensor | None,
    record: bool,
    active: Tensor | None,
    example: Tensor,
    dtype: torch.dtype,
) -> Solution:
    """Solves a block chunk by chunk; the state is returned in `dtype`."""
    settings = settings_of(o, tolerance, example, block.shape[-1])
    trace = _new_trace(block.shape, o.max_steps, record, example)
    parts = []
    for k, chunks in chunks_of(block.shape, example.device):
        some = block.blocks(k.start, k.stop)
        parts.append(
            [
                run_loop(
                    some.rows(r.start, r.stop),
                    None if init is None else init[k, r].to(example.dtype),
                    o,
                    settings,
                    None if active is None else active[k, r],
                    trace[k, r] if record else None,
                    example,
                )
                for r in chunks
            ]
        )
    merged = merge(parts)
    return Solution(merged.state.to(dtype), merged.status, merged.steps, merged.residual, trace)


def solve_modality(
    x: Tensor,
    init: Tensor | None,
    present: Tensor | None,
    p: ModalityParameters,
    cell: CellOptions,
    o: SolverOptions,
    tolerance: Tensor | None,
    record: bool,
) -> Solution:
    """The N modality equilibria of every row.

    Args:
        x: (N, R, d) features.
        init: (N, R, d) or None (zeros), where to start.
        present: bool (N, R) or None; absent modalities are left out (state 0).
        p: parameters in the dtype of x.
        cell, o: options.
        tolerance: () float tensor that takes the place of `o.rtol`, or None.
        record: whether to return the trace.
    """
    rows, index = x.shape[1], filling(x.shape[1], x.device)
    if index is not None:
        init, present = rows_at(init, index), rows_at(present, index)
        x = x.index_select(1, index)
        filled = solve_modality(x, init, present, p, cell, o, tolerance, record)
        return Solution(*(first_rows(t, rows) for t in filled))
    dtype = compute_dtype(x.dtype)
    block = ModalityBlock(x.to(dtype), ModalityParameters(*(t.to(dtype) for t in p)), cell)
    example = x.new_empty(0, dtype=dtype)
    return solve_rows(block, init, o, tolerance, record, present, example, x.dtype)


def solve_fusion(
    modalities: Tensor,
    injection: Tensor,
    modality_status: Tensor | None,
    init: Tensor | None,
    gate_mask: Tensor | None,
    fusion_mask: Tensor | None,
    p: FusionParameters,
    cell: CellOptions,
    o: SolverOptions,
    tolerance: Tensor | None,
    record: bool,
) -> Solution:
    """The fusion equilibrium of every row, as one block (K = 1).

    Args:
        modalities: (N, R, d), z_i*.
        injection: (R, d), x_f.
        modality_status: int32 (N, R) or None; a row with a NON_FINITE one has no answer.
        init: (R, d) or None.
        gate_mask: (N, R, 1 or d) or None, factor on the gates.
        fusion_mask: (R, d) or None, factor on W_f u + b_f.
        p, cell, o, tolerance, record: as in `solve_modality`.
    """
    if modality_status is not None:
        lost = (modality_status == NON_FINITE).any(0).unsqueeze(-1)
        injection = torch.where(lost, torch.nan, injection)
    rows, index = injection.shape[0], filling(injection.shape[0], injection.device)
    if index is not None:
        filled = solve_fusion(
            modalities.index_select(1, index),
            injection[index],
            None,
            None if init is None else init[index],
            rows_at(gate_mask, index),
            None if fusion_mask is None else fusion_mask[index],
            p, cell, o, tolerance, record,
        )  # fmt: skip
        return Solution(*(first_rows(t, rows) for t in filled))
    dtype = compute_dtype(injection.dtype)
    block = fusion_block(modalities, injection, gate_mask, fusion_mask, p, cell, dtype)
    example = injection.new_empty(0, dtype=dtype)
    init = None if init is None else init.unsqueeze(0)
    return solve_rows(block, init, o, tolerance, record, None, example, injection.dtype)


def fusion_block(
    modalities: Tensor,
    injection: Tensor,
    gate_mask: Tensor | None,
    fusion_mask: Tensor | None,
    p: FusionParameters,
    cell: CellOptions,
    dtype: torch.dtype,
) -> FusionBlock:
    """The fusion block in `dtype`, with the gate constants of modalities (N, R, d)."""
    p = FusionParameters(*(t.to(dtype) for t in p))
    masks = (None if m is None else m.to(dtype) for m in (gate_mask, fusion_mask))
    constants = gate_constants(modalities.to(dtype), p, cell)
    return FusionBlock(constants, injection.to(dtype), p, cell, *masks)
