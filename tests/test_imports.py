"""What importing does, in fresh processes, and which way imports point."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Where each part stands: a module imports its own level and those to the right of it, never one
# to the left. Parts that are not named here (options, checks, results) serve all others.
LEVELS = (
    ("cli", "doctor", "__main__"),
    ("analysis",),
    ("tasks", "bench", "tuning"),
    ("engine",),
    ("models",),
    ("data", "metrics", "plots", "fusions", "compat", "testing"),
    ("module",),
    ("functional",),
    ("ops",),
    ("reference", "kernels"),
)
RANK = {part: rank for rank, level in enumerate(LEVELS) for part in level}


def run_python(program: str, cwd: Path | None = None, **variables: str) -> str:
    """Run a program in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **variables},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, package: str) -> Iterator[str]:
    """Yield the absolute name of every module that a file imports, at whatever depth.

    Args:
        path: the file.
        package: name of the package that the file is in.
    """
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield base
            # `from package import module` imports a module too.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def installed_files() -> list[tuple[Path, str]]:
    """Every source file with the name of the package that it installs into."""
    files = []
    for folder, package in (
        ("deqfusion", "deqfusion"),
        ("kernels", "deqfusion.kernels"),
        ("bench", "deqfusion.bench"),
    ):
        for path in sources(folder):
            inside = path.parent.relative_to(ROOT / folder).parts
            files.append((path, ".".join((package, *inside))))
    return files


def part_of(module: str) -> str | None:
    """The part of the library that a module belongs to: the name below ``deqfusion``."""
    names = module.split(".")
    return names[1] if names[0] == "deqfusion" and len(names) > 1 else None


def test_import_is_quiet_and_changes_nothing() -> None:
    program = """
import os, sys, warnings
warnings.simplefilter("error")
import torch
def state():
    return (dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            torch.initial_seed(), torch.get_rng_state().tolist())
before, loaded = state(), set(sys.modules)
import deqfusion
assert state() == before
assert not torch.cuda.is_initialized()
heavy = ("sklearn", "matplotlib", "scipy", "tqdm", "triton", "torchdeq")
assert not [name for name in heavy if name in set(sys.modules) - loaded]
"""
    assert run_python(program) == ""


@pytest.mark.parametrize("command", ["train", "analyze"])
def test_parsing_the_training_commands_imports_nothing_heavy(command: str) -> None:
    program = f"""
import sys
from deqfusion.cli import build_parser
build_parser({command!r})
heavy = ("torch.distributed.fsdp", "torch.distributed.tensor", "matplotlib", "scipy", "sklearn")
print([name for name in heavy if name in sys.modules])
"""
    assert run_python(program) == "[]"


def test_works_where_triton_cannot_be_imported() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
import deqfusion
import deqfusion.kernels
fusion = deqfusion.DEQFusion(8, 2)
fused = fusion([torch.randn(3, 8), torch.randn(3, 8)])
fused.sum().backward()
assert torch.isfinite(fused).all() and fusion.fusion_weight.grad is not None
print(deqfusion.kernels.status()[1])
"""
    assert "Triton cannot be imported" in run_python(program)


def test_kernels_stand_alone() -> None:
    program = """
import sys
import kernels
assert not [name for name in sys.modules if name.split(".")[0] in ("deqfusion", "triton")]
usable, reason = kernels.status()
assert usable is (kernels.triton_version() is not None), reason
print(kernels.triton_version())
"""
    printed = run_python(program, cwd=ROOT, PYTHONPATH=str(ROOT))
    assert printed == run_python(
        "import importlib.util as u\n"
        "print(__import__('triton').__version__ if u.find_spec('triton') else None)"
    )


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda path: path.name)
def test_kernels_import_nothing_of_the_library(path: Path) -> None:
    inside = path.parent.relative_to(ROOT / "kernels").parts
    package = ".".join(("deqfusion.kernels", *inside))
    foreign = [
        name
        for name in imports(path, package)
        if name.split(".")[0] == "deqfusion" and not f"{name}.".startswith("deqfusion.kernels.")
    ]
    assert foreign == []


@pytest.mark.parametrize("path", sources("deqfusion/reference"), ids=lambda path: path.name)
def test_reference_knows_no_triton_and_no_kernels(path: Path) -> None:
    for name in imports(path, "deqfusion.reference"):
        assert name.split(".")[0] != "triton"
        assert part_of(name) != "kernels"


def test_imports_point_one_way() -> None:
    against = []
    for path, package in installed_files():
        module = package if path.name == "__init__.py" else f"{package}.{path.stem}"
        # A folder's `__main__` is an entry point like the command line, whatever the folder.
        own = "__main__" if path.name == "__main__.py" else part_of(module)
        if own not in RANK:
            continue
        for name in imports(path, package):
            other = part_of(name)
            if other in RANK and RANK[other] < RANK[own]:
                against.append(f"{path.relative_to(ROOT)} imports {name}")
    assert against == []


def test_no_import_by_the_names_of_the_checkout() -> None:
    """`kernels` and `bench` are names of other packages, except in a checkout."""
    against = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, package in installed_files()
        for name in imports(path, package)
        if name.split(".")[0] in ("kernels", "bench", "tests")
    ]
    assert against == []
