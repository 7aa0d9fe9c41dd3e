"""Programs compiled ahead of time for devices that are not there, and what they need.

    python -m deqfusion.kernels.targets [--target sm_90 ...] [--dim 500 ...] [--precision high ...]
                                        [--schedule row ...] [--rows 32]

Compiles every program in its shipped configurations and prints, per program and target, registers,
stack (bytes spilled per thread), shared memory and the tensor-core instructions of its products.
Precisions are those of `torch.get_float32_matmul_precision()` for float32 features, as
`deqfusion.programs` reads them: "highest" is tf32x3 (ieee on AMD), from width 256 on with the
ladder, "high" is tf32 and "medium" has its steps in float16: their cooperative programs keep a
short history in registers. Cooperative programs are of 16 rows; on sm_90 `cost.default_config`
gives many rows to tiles of up to `cost.EFFORT`, for which there is --rows.

Exit code 1 if a program spills, needs more shared memory than the device has, or multiplies without
tensor cores; 2 for bad options.

Registers, stack and instructions are read from the binaries with the tools inside Triton's wheel;
for AMD devices the compiler's own notes in the assembly say them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import (
    COUNTERS,
    GRADIENT_TILES,
    GRADIENTS,
    INJECTION,
    INJECTION_TILES,
    SCHEDULES,
    Config,
    SolveOptions,
    in_registers,
    shipped,
    shipped_schedules,
)
from .layout import Layout

MOST_SPILLED = 64
"""Bytes per thread. What spills so far are addresses that a program computes before its steps, and
such programs were faster on an H100 than those with shallower products that do not (NOTES.md). None
is read within a product's loop: that is a fault."""


@dataclass(frozen=True)
class Target:
    """A device: Triton's name of it, and the shared memory that a program may have, in bytes."""

    backend: str
    arch: int | str
    warp: int
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}
"""Shared memory: CUDA C++ programming guide, table of compute capabilities (163 and 227 KB per
block); AMD CDNA3 instruction set guide (64 KB of LDS per workgroup)."""

MATMUL_PRECISIONS = ("highest", "high", "medium")
LADDER_WIDTH = 256
"""Of `deqfusion.reference.solve`, which this package does not import."""

PRODUCTS = {
    "modality": (2, 3),
    "fusion": (2, 3, 4),
    "modality adjoint": (2, 3, 5, 6, 9),
    "fusion adjoint": (2, 3, 5, 6, 9, 10),
}
"""Phases of schedule step that multiply."""

_TENSOR_CORES = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|v_mfma\w*)")
_SPILL = re.compile(r"\b(LDL|STL)\b")
_LABEL = re.compile(r"(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


_TYPES = {
    **dict.fromkeys(
        ("status", "steps", "solved", "modality_status", "counters", "other_counters", "saved"),
        "*i32",
    ),
    "present": "*i8",
    **dict.fromkeys(
        ("low", "other_low", "low1", "low2", "lowg", "lowf", "lowb1", "lowb2", "lowbg", "lowbf"),
        "*bf16",
    ),
    **dict.fromkeys(
        (
            "rows",
            "padded_rows",
            "max_steps",
            "blocks",
            "columns",
            "s0",
            "s1",
            "s2",
            "other_s0",
            "other_s1",
            "other_s2",
        ),
        "i32",
    ),
    **dict.fromkeys(("rtol", "atol", "ridge", "mixing"), "fp32"),
}
"""Triton's names of the types of the arguments that are not fp32 pointers."""


@dataclass(frozen=True)
class Program:
    """A kernel and what it is specialised on.

    Attributes:
        name: for the report.
        kernel: its name, see `kernels`.
        constants: values of its `tl.constexpr` arguments.
        config: tiles and schedule.
    """

    name: str
    kernel: str
    constants: dict[str, Any]
    config: Config


@dataclass(frozen=True)
class Report:
    """What one program needs on one target; stack and shared in bytes, -1 where not known.

    multiplies: whether it has matrix products; whole_tile: whether theirs should be HGMMA, of 64
    rows on sm_90; inner: instructions that spill or read what was spilled in loops of products.
    """

    program: str
    target: str
    registers: int
    stack: int
    shared: int
    products: dict[str, int]
    multiplies: bool = True
    whole_tile: bool = False
    inner: int = 0

    def faults(self) -> list[str]:
        """Why the program must not be shipped; empty if it may."""
        found = []
        if self.stack > MOST_SPILLED:
            found.append(f"spills {self.stack} bytes per thread")
        if self.inner:
            found.append(f"spills within the loops of its products ({self.inner} instructions)")
        if self.stack < 0:
            found.append("does not say how much it spills")
        limit = TARGETS[self.target].shared
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, the device has {limit}")
        if not self.products and self.multiplies:
            found.append("multiplies without tensor cores")
        if self.whole_tile and self.multiplies and "HGMMA" not in self.products:
            found.append("has 64 rows and no HGMMA")
        return found

    def __str__(self) -> str:
        products = ", ".join(f"{count} {name}" for name, count in sorted(self.products.items()))
        return (
            f"{self.program:<44} {self.target:<7} registers {self.registers:>3}  stack "
            f"{self.stack:>4}  shared {self.shared:>6}  {products or 'no tensor cores'}"
        )


def kernels() -> dict[str, Any]:
    """The kernels by name."""
    from .fusion import fusion_solve_kernel
    from .fusion_adjoint import fusion_adjoint_kernel
    from .gradients import parameter_gradients_kernel
    from .injection import inject_adjoint_kernel, inject_kernel, inject_sums_kernel
    from .modality import modality_solve_kernel
    from .modality_adjoint import modality_adjoint_kernel
    from .packing import pack_kernel

    return {
        "modality": modality_solve_kernel,
        "fusion": fusion_solve_kernel,
        "modality adjoint": modality_adjoint_kernel,
        "fusion adjoint": fusion_adjoint_kernel,
        "parameter gradients": parameter_gradients_kernel,
        "pack": pack_kernel,
        "inject": inject_kernel,
        "inject adjoint": inject_adjoint_kernel,
        "inject sums": inject_sums_kernel,
    }


def phases() -> dict[str, tuple[int, int, int]]:
    """How many phases the start, a step and the end of each solve's kernel are."""
    from . import fusion, fusion_adjoint, modality, modality_adjoint

    return {
        "modality": modality.PHASES,
        "fusion": fusion.PHASES,
        "modality adjoint": modality_adjoint.PHASES,
        "fusion adjoint": fusion_adjoint.PHASES,
    }


DIMS = (128, 500, 768)


def options_of(target: str, precision: str, dim: int) -> SolveOptions:
    """The default solver on a target, at one of `MATMUL_PRECISIONS`."""
    strict = "ieee" if TARGETS[target].backend == "hip" else "tf32x3"
    products = {"highest": strict, "high": "tf32", "medium": "half"}[precision]
    return SolveOptions(precision=products, ladder=dim >= LADDER_WIDTH)


def programs(
    target: str,
    dims: Sequence[int] = DIMS,
    precisions: Sequence[str] = MATMUL_PRECISIONS,
    schedules: Sequence[str] = SCHEDULES,
    rows: int = 16,
) -> list[Program]:
    """The shipped configurations at some widths: N = 3, G = 4, the default solver.

    rows: of a program in the schedules row and cooperative. With all schedules also what has none:
    packing, injection and the parameters' gradients.
    """
    found = []
    for dim in dims:
        layout = Layout(dim, 4)
        for precision in precisions:
            for schedule in schedules:
                found += _solves(target, layout, precision, schedule, rows)
        if set(schedules) == set(SCHEDULES):
            found += _without_schedule(layout)
    return found


def _solves(
    target: str, layout: Layout, precision: str, schedule: str, rows: int
) -> list[Program]:  # fmt: skip
    """Solves and adjoints in a schedule, if it is one of the target's."""
    found = []
    arch = TARGETS[target].arch
    capability = arch if isinstance(arch, int) else 0
    options = options_of(target, precision, layout.dim)
    solve = {
        "DIM": layout.dim, "G": layout.groups, "P": layout.padded, "M": options.slots,
        "RELATIVE": options.relative, "LADDER": options.cheap,
        "PRECISION": options.exact,
    }  # fmt: skip
    modality = {"SKIP": False, "PRESENT": False}
    fusion = {
        "N": 3, "SIGMOID": True, "GATE_MASK": 0, "FUSION_MASK": False, "RELU_LAST": False,
    }  # fmt: skip
    forward = {"INIT": False, "TOLERANCE": False, "TRACE": False}
    for kernel, constants in (
        ("modality", {**modality, **forward}),
        ("fusion", {**fusion, **forward, "STATUS": True}),
        ("modality adjoint", {**modality, "TRUNCATED": False}),
        ("fusion adjoint", {**fusion, "TRUNCATED": False}),
    ):
        adjoint = "adjoint" in kernel
        if schedule not in shipped_schedules(adjoint, capability, layout.padded):
            continue
        config = shipped(
            schedule, adjoint=adjoint, capability=capability, padded=layout.padded, rows=rows,
            half=options.cheap == "half",
        )  # fmt: skip
        tiles = {
            "BM": config.rows, "BK": min(config.depth, layout.padded),
            "COOPERATIVE": schedule == "cooperative",
            "RESIDENT": in_registers(config, layout.padded, options.slots, options.climbs),
        }  # fmt: skip
        together = schedule != "step"
        for phase in (0,) if together else range(1, sum(phases()[kernel]) + 1):
            part = "" if together else f"{phase} "
            name = f"{kernel} {schedule} {part}d={layout.dim} {precision}"
            given = {**solve, **tiles, **constants, "PHASE": phase}
            found.append(Program(name, kernel, given, config))
    return found


def _without_schedule(layout: Layout) -> list[Program]:
    """Packing, injection and the parameters' gradients."""
    found = []
    dim = layout.dim
    packs = {
        "J": 2, "V": 8, "OTHER_J": 2, "OTHER_V": 4, "DIM": dim, "G": layout.groups,
        "P": layout.padded, "BT": 32, "LOW": True, "COUNTERS": COUNTERS, "BACKWARD": True,
    }  # fmt: skip
    found.append(Program(f"pack d={dim}", "pack", packs, Config(warps=4)))
    rows = {"N": 3, "DIM": dim, "PRESENT": True, **INJECTION_TILES}
    for name, constants in (
        ("inject", {**rows, "STACKED": False}),
        ("inject adjoint", rows),
        ("inject sums", {"N": 3, "BM": 128}),
    ):
        found.append(Program(f"{name} d={dim}", name, constants, INJECTION))
    gradients = {**GRADIENT_TILES, "DIM": dim, "G": layout.groups, "P": layout.padded}
    for name, jobs in (
        ("", {"SPLIT": 3, "SHARED": False, "FUSION": False, "OUTPUTS": 6, "V": 8}),
        ("fusion ", {"SPLIT": 1, "SHARED": True, "FUSION": True, "OUTPUTS": 2, "V": 4}),
    ):
        found.append(
            Program(
                f"{name}parameter gradients d={dim}",
                "parameter gradients",
                {**gradients, **jobs},
                GRADIENTS,
            )
        )
    return found


def multiplies(program: Program) -> bool:
    """Whether a program has matrix products: some phases of schedule step have none."""
    if program.kernel in PRODUCTS:
        phase = program.constants["PHASE"]
        return phase == 0 or phase in PRODUCTS[program.kernel]
    return False


def compiled(program: Program, target: str) -> Report:
    """Compiles a program and reads what it needs.

    Raises:
        RuntimeError: under TRITON_INTERPRET, which compiles nothing.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernels()[program.kernel]
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set, expected it unset to compile programs")
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in program.constants else _type(name, program) for name in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in program.constants.items()},
        # Tensors of torch begin at multiples of 16 bytes.
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if signature[name].startswith("*")
        },
    )
    device = TARGETS[target]
    binary = triton.compile(
        source,
        target=GPUTarget(device.backend, device.arch, device.warp),
        options={
            "num_warps": program.config.warps,
            "num_stages": program.config.stages,
            "launch_cooperative_grid": bool(program.constants.get("COOPERATIVE")),
        },
    )
    registers, stack, code = (
        _nvidia(binary.asm["cubin"]) if device.backend == "cuda" else _amd(binary.asm["amdgcn"])
    )
    products: dict[str, int] = {}
    for name in _TENSOR_CORES.findall(code):
        products[name] = products.get(name, 0) + 1
    return Report(
        program.name, target, registers, stack, binary.metadata.shared, products,
        multiplies(program), target == "sm_90" and program.config.rows >= 64,
        spilled_in_products(code),
    )  # fmt: skip


def spilled_in_products(code: str) -> int:
    """Reads and writes of spilled registers in the innermost loops that multiply, of NVIDIA's code.

    AMD's has other instructions, but its notes say what is spilled: so far nothing.
    """
    lines = code.splitlines()
    labels = {found[1]: at for at, line in enumerate(lines) if (found := _LABEL.match(line))}
    loops = {
        (labels[found[1]], at)
        for at, line in enumerate(lines)
        if (found := _BRANCH.search(line)) and labels.get(found[1], at) < at
    }
    count = 0
    for begin, end in loops:
        around = any(begin <= b and e <= end for b, e in loops if (b, e) != (begin, end))
        body = lines[begin:end]
        if not around and any(map(_TENSOR_CORES.search, body)):
            count += sum(map(bool, map(_SPILL.search, body)))
    return count


def _type(name: str, program: Program) -> str:
    """Triton's name of an argument's type."""
    found = _TYPES.get(name, "*fp32")
    half = program.constants.get("LADDER") == "half"
    return "*fp16" if half and found == "*bf16" else found


def _nvidia(cubin: bytes) -> tuple[int, int, str]:
    """Registers and stack bytes per thread, and the machine code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.cubin"
        path.write_bytes(cubin)
        usage = _output([str(tools / "cuobjdump"), "--dump-resource-usage", str(path)])
        code = _output([str(tools / "nvdisasm"), "--print-code", str(path)])
    registers, stack = (
        int(match.group(1)) if (match := re.search(rf"{name}:(\d+)", usage)) else -1
        for name in ("REG", "STACK")
    )
    return registers, stack, code


def _amd(assembly: str) -> tuple[int, int, str]:
    """Vector registers and scratch bytes per thread, and the assembly."""
    registers, stack = (
        int(match.group(1)) if (match := re.search(rf"\.{name}:\s*(\d+)", assembly)) else -1
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, stack, assembly


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m deqfusion.kernels.targets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS), help="repeatable; default: all"
    )
    parser.add_argument(
        "--dim", action="append", type=int, help=f"width, repeatable; default: {DIMS}"
    )
    parser.add_argument(
        "--precision", action="append", choices=MATMUL_PRECISIONS,
        help="of float32 products, repeatable; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--schedule", action="append", choices=SCHEDULES,
        help="repeatable, only its solves; default: all, and what has no schedule",
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=int, default=16, help="of a program, but in schedule step (default: 16)"
    )
    options = parser.parse_args(arguments)
    failed = False
    try:
        found = {
            target: programs(
                target, options.dim or DIMS, options.precision or MATMUL_PRECISIONS,
                options.schedule or SCHEDULES, options.rows,
            )
            for target in options.target or TARGETS
        }  # fmt: skip
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)
    for target, shipped_programs in found.items():
        for program in shipped_programs:
            report = compiled(program, target)
            print(report, flush=True)
            for fault in report.faults():
                failed = True
                print(f"  {report.program} on {target} {fault}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
