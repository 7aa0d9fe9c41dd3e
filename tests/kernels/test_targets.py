"""Programs compiled for devices that are not there: few spills, tensor cores, memory that fits."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from deqfusion import programs as operators
from deqfusion.kernels.cost import default_config
from deqfusion.kernels.layout import Layout
from deqfusion.kernels.targets import (
    LADDER_WIDTH,
    MATMUL_PRECISIONS,
    MOST_SPILLED,
    TARGETS,
    Report,
    main,
    options_of,
    programs,
    spilled_in_products,
)
from deqfusion.reference.solve import LADDER_WIDTH as reference_width


def compiled(*options):
    """The lines of a run of the command, in a process of its own: the interpreter, under which
    these tests run, compiles nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "deqfusion.kernels.targets", *options],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in lines:
        found = re.search(r" .*registers +[1-9]\d*  stack +(\d+)  shared +\d", line)
        assert found, line
        assert int(found[1]) <= MOST_SPILLED
    return lines


def products(lines):
    """How many lines have products on tensor cores."""
    found = [re.search(r"[1-9]\d* (HMMA|HGMMA|UTCHMMA|v_mfma\w*)$", line) for line in lines]
    return sum(map(bool, found))


@pytest.mark.parametrize("target", TARGETS)
def test_shipped_configurations(target):
    """What runs at the default precision: groups of 128 channels, whose tiles need more than
    narrower ones, and on sm_90 also of 256."""
    widths = ["--dim", "500", *(["--dim", "768"] if target == "sm_90" else [])]
    lines = compiled("--target", target, "--precision", "highest", *widths)
    # Of a width: 4 solves in row, 4 in cooperative (below sm_90 no adjoints), 30 phases of step,
    # one pack, three kernels of the injection and two of the parameters' gradients.
    each = 6 + 30 + (6 if target == "sm_80" else 8)
    assert len(lines) == (2 * each if target == "sm_90" else each)
    assert all(f" {target} " in line for line in lines)
    # Of the phases 16 multiply.
    assert products(lines) == len(lines) - (6 + 14) * len(lines) // each
    # Tiles of 64 rows, which only schedule step has, at width 500.
    assert any("HGMMA" in line for line in lines) is (target == "sm_90")
    if target == "gfx942":
        # In fp32 itself, with the ladder's bfloat16 products.
        assert any(re.search(r"mfma_\w*_f32\b", line) and "_bf16" in line for line in lines)


@pytest.mark.parametrize(
    ("target", "precision", "count"),
    [("sm_90", "high", 4), ("sm_90", "medium", 4), ("sm_80", "medium", 2)],
)
def test_shipped_configurations_with_their_history_in_registers(target, precision, count):
    """Schedule cooperative in tf32 and float16, on sm_90 the default up to groups of 128; below
    without adjoints."""
    lines = compiled(
        "--target", target, "--precision", precision, "--schedule", "cooperative", "--dim", "500",
    )  # fmt: skip
    assert products(lines) == len(lines) == count
    assert all(f" cooperative d=500 {precision} " in line for line in lines)


def test_shipped_configurations_of_narrow_groups():
    """Tiles of 16 x 32, where registers are few: with eight warps one spilled in a product."""
    lines = compiled(
        "--target", "sm_80", "--precision", "high", "--schedule", "row", "--dim", "128",
    )  # fmt: skip
    assert products(lines) == len(lines) == 4


def test_what_is_compiled_is_what_runs():
    """All that the default heuristic may choose, at all precisions, with and without a ladder."""
    for target in TARGETS:
        strict = "ieee" if target == "gfx942" else "tf32x3"
        found = [p.constants for p in programs(target) if "LADDER" in p.constants]
        kinds = {(c["PRECISION"], c["LADDER"], c["RESIDENT"]) for c in found if c["DIM"] == 500}
        assert kinds == {(strict, "low", False)} | {
            ("tf32", ladder, held) for ladder in ("", "half") for held in (False, True)
        }
        kinds = {(c["PRECISION"], c["LADDER"], c["RESIDENT"]) for c in found if c["DIM"] == 128}
        assert kinds == {
            (precision, ladder, resident)
            for precision, ladder in ((strict, ""), ("tf32", ""), ("tf32", "half"))
            for resident in (False, True)
        }
    assert reference_width == LADDER_WIDTH


@pytest.mark.parametrize("precision", MATMUL_PRECISIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_precisions_are_those_of_the_operators(target, precision, monkeypatch):
    arch = TARGETS[target].arch
    if target == "gfx942":
        monkeypatch.setattr(torch.version, "hip", "6.2")
        found = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: divmod(arch, 10))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    expected = operators.precision(torch.float32, torch.device("cuda"))
    assert options_of(target, precision, 512).precision == expected


@pytest.mark.parametrize(
    ("stack", "shared", "products", "fault"),
    [(MOST_SPILLED + 8, 0, {"HMMA": 1}, f"spills {MOST_SPILLED + 8} bytes per thread"),
     (-1, 0, {"HMMA": 1}, "does not say how much it spills"),
     (0, 10**6, {"HMMA": 1}, "needs 1000000 bytes of shared memory"),
     (0, 0, {}, "without tensor cores")],
)  # fmt: skip
def test_faults(stack, shared, products, fault):
    (found,) = Report("program", "sm_90", 100, stack, shared, products).faults()
    assert fault in found
    assert not Report("program", "sm_90", 100, MOST_SPILLED, 0, {"HMMA": 1}).faults()
    assert Report("program", "sm_90", 100, 0, 0, {"HMMA": 1}, whole_tile=True).faults()


CODE = """
.L_x_1:
        /*0010*/                   {outer} ;
.L_x_2:
        /*0020*/                   HMMA.1688.F32.TF32 R80, R80, R94, R68 ;
        /*0030*/                   {inner} ;
        /*0040*/              @!P5 BRA `(.L_x_2) ;
        /*0050*/                   {outer} ;
.L_x_3:
        /*0060*/                   {sums} ;
        /*0070*/               @P1 BRA `(.L_x_3) ;
        /*0080*/               @P2 BRA `(.L_x_4) ;
        /*0090*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00a0*/                   EXIT ;
"""


def test_spills_within_products():
    spill, other = "LDL.64 R4, [R1+0x10]", "LDG.E R4, desc[UR28][R22.64]"
    assert spilled_in_products(CODE.format(outer=spill, inner=other, sums=spill)) == 0
    assert spilled_in_products(CODE.format(outer=other, inner=spill, sums=other)) == 1
    report = Report("program", "sm_90", 255, 8, 0, {"HMMA": 1}, inner=1)
    assert report.faults() == ["spills within the loops of its products (1 instructions)"]


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_stages_of_float16_fit_the_shared_memory(rows):
    """Factors in fp32 of the one product that stays so, and a weight's, of all stages but one."""
    for program in programs("sm_90", [500], ["medium"], ["cooperative"], rows=rows):
        config, padded = program.config, program.constants["P"]
        assert program.constants["BM"] == rows
        stage = 4 * config.depth * (rows + padded)
        assert stage * (config.stages - 1) <= TARGETS["sm_90"].shared


def test_tiles_of_more_rows():
    """As the default heuristic may choose them; schedule step has its own."""
    (program, *_) = programs("sm_90", [500], ["high"], ["cooperative"], rows=32)
    chosen = default_config(612, Layout(500, 4), 3, 132, adjoint=False, capability=90)
    assert program.config == chosen
    assert program.constants["BM"] == 32
    assert not program.constants["RESIDENT"]
    found = programs("sm_90", [500], ["high"], ["step"], rows=32)
    assert found == programs("sm_90", [500], ["high"], ["step"])


def test_options_that_are_none(capsys):
    assert main(["--rows", "24"]) == 2
    assert "rows: got 24, expected a power of two" in capsys.readouterr().err


def test_a_width_that_groups_do_not_divide(capsys):
    assert main(["--dim", "30"]) == 2
    assert "groups: got 4 for dim 30, expected a divisor of it" in capsys.readouterr().err
