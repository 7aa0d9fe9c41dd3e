"""The wheel: what it holds, and that it works in a clean environment beside another `kernels`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from dataclasses import asdict, astuple
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deqfusion.kernels import tuning
from deqfusion.kernels.config import Config

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]


TIMED = tuning.Timed(Config("step", rows=32), 5, False, 2e-4, 1e-4, 3e-4, 1e-4)
SHIPPED = tuning.Entry(
    tuning.Problem("fusion", 500, 4, 3, "fp32", 6, 0, 512), TIMED, None, None, 1e-4, 1e-3,
    "Some device", "1", "2", "3", "2026-01-01",
)  # fmt: skip
"""As of a device that was measured."""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return its standard output; the test fails with its standard error."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def packages_on_disk() -> set[str]:
    """Names of all packages, by where their ``__init__.py`` lies."""
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inside)))
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy: setuptools would leave its build folders in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS.values():
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    # Tuned configurations are data: none is shipped before a device was measured.
    (source / "kernels" / "configs").mkdir(exist_ok=True)
    shipped = {
        "format": tuning.FORMAT, "version": tuning.VERSION, "entries": [asdict(SHIPPED)],
    }  # fmt: skip
    (source / "kernels" / "configs" / "some-device.json").write_text(json.dumps(shipped))
    out = tmp_path_factory.mktemp("dist")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"),
        *("--no-build-isolation", "--wheel-dir", out, source),
        cwd=source,
    )
    wheels = list(out.glob("*.whl"))
    assert len(wheels) == 1
    return wheels[0]


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of a new environment that holds the wheel, and the dependencies by reference.

    A ``.pth`` file adds this environment's packages behind the new one's. The ``.pth`` files of
    the added folder are not read, so an editable installation there stays out of sight.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    site = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    return python


def test_every_package_is_listed() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    expected = {"deqfusion/py.typed", "deqfusion/kernels/configs/some-device.json"}
    shipped = (ROOT / "kernels" / "configs").glob("*.json")
    expected |= {f"deqfusion/kernels/configs/{path.name}" for path in shipped}
    for package in packages_on_disk():
        base = max((name for name in FOLDERS if f"{package}.".startswith(f"{name}.")), key=len)
        inside = package.split(".")[len(base.split(".")) :]
        folder = ROOT.joinpath(FOLDERS[base], *inside)
        target = package.replace(".", "/")
        expected |= {f"{target}/{path.name}" for path in folder.glob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    info = metadata.removesuffix("METADATA")
    assert {name for name in names if not name.startswith(info)} == expected
    assert f"{info}licenses/LICENSE" in names
    assert "License-Expression: MIT" in text
    assert "Requires-Python: >=3.11" in text


def test_wheel_works_beside_a_package_named_kernels(clean_python: Path, tmp_path: Path) -> None:
    for name in ("kernels", "bench"):
        stranger = tmp_path / name
        stranger.mkdir()
        (stranger / "__init__.py").write_text("OWNER = 'somebody else'\n")
    program = f"""
import sys
import kernels, bench
assert kernels.OWNER == bench.OWNER == "somebody else"
import torch
import deqfusion, deqfusion.kernels, deqfusion.bench
for module in (deqfusion, deqfusion.kernels, deqfusion.bench):
    assert module.__file__.startswith(sys.prefix), module.__file__
    assert not module.__file__.startswith({str(ROOT)!r})
assert not hasattr(deqfusion.kernels, "OWNER") and not hasattr(deqfusion.bench, "OWNER")
torch.manual_seed(0)
eq = deqfusion.DEQFusion(64, 2).equilibrium(torch.randn(2, 4, 64))
assert eq.fused.shape == (4, 64) and bool(eq.stats.converged.all())
"""
    run(clean_python, "-c", program, cwd=tmp_path)


def test_a_shipped_configuration_is_looked_up_where_the_wheel_is_installed(
    clean_python: Path, tmp_path: Path
) -> None:
    program = f"""
from deqfusion.kernels import tuning
config = tuning.lookup({SHIPPED.device!r}, *{astuple(SHIPPED.problem)[:-1]}, 612)
assert (config.schedule, config.rows) == ("step", 32), config
((path, count),) = tuning.in_force({SHIPPED.device!r})
assert count == 1 and path == tuning.SHIPPED / "some-device.json"
"""
    run("env", f"DEQFUSION_CACHE={tmp_path}", clean_python, "-c", program, cwd=tmp_path)


def test_installed_command_and_metadata(clean_python: Path, tmp_path: Path) -> None:
    command = clean_python.parent / "deqfusion"
    version = PROJECT["project"]["version"]
    assert run(command, "--version", cwd=tmp_path) == f"deqfusion {version}\n"
    program = "import deqfusion; print(deqfusion.__version__)"
    assert run(clean_python, "-c", program, cwd=tmp_path) == f"{version}\n"


def test_constraints_pin_exact_versions_and_name_no_place() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin), pin
    assert pins == sorted(pins, key=lambda pin: canonicalize_name(pin.split("==")[0]))


def test_constraints_satisfy_every_requirement() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[canonicalize_name(name)] = version
    project = PROJECT["project"]
    required = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in project["optional-dependencies"].values():
        required += extra
    for text in required:
        requirement = Requirement(text)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(version), f"{text} against {version}"
