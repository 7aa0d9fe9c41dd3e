"""``deqfusion doctor``: what is installed, what runs where and why, and whether it works.

What is reported is looked up, not assumed: the implementations are those registered with PyTorch's
dispatcher for each operator, and the self-test solves a small problem on every device and checks
its answer with one step of the cell in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shutil
import sys
import time
from importlib import metadata
from typing import Any

import torch

import deqfusion
import deqfusion.kernels as kernels
from deqfusion import ops
from deqfusion.kernels import tuning
from deqfusion.reference.solve import bfloat16_instructions

__all__ = ["collect", "register_commands", "render", "run", "self_test"]

PACKAGES = ("torch", "triton", "numpy", "einops", "safetensors", "scikit-learn", "matplotlib")
VARIABLES = (
    "DEQFUSION_BACKEND",
    "DEQFUSION_CACHE",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
# Devices that operators can be registered for, with the dispatcher's key.
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_REFUSED = "none: every solve is refused"
COMPILERS = ("c++", "g++", "clang++", "cl")


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def operators() -> dict[str, list[str]]:
    """Return the devices that each operator of the library is registered for.

    Returns:
        From the operator's qualified name to names of devices, sorted by name.
    """
    names = sorted(
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("deqfusion::")
    )
    return {
        name: [
            device
            for device, key in DISPATCH_KEYS.items()
            if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        ]
        for name in names
    }


def gpus() -> list[dict[str, Any]]:
    """Return name, compute capability and memory of every GPU that torch can use."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def implementations(registered: dict[str, list[str]]) -> dict[str, dict[str, str]]:
    """Say for each kind of device which implementation its solves run on, and why.

    Args:
        registered: what `operators` returned.

    Returns:
        From the kind of device to ``implementation`` and ``reason``.
    """
    try:
        chosen = {device: ops.implementation(device) for device in DISPATCH_KEYS}
    except ValueError as error:
        return {
            device: {"implementation": _REFUSED, "reason": str(error)} for device in DISPATCH_KEYS
        }
    result = {}
    for device in DISPATCH_KEYS:
        without = [name for name, devices in registered.items() if device not in devices]
        if without or not registered:
            answer = ("none", f"not registered: {', '.join(without) or 'any operator'}")
        elif chosen[device] == "triton":
            answer = _programs(device)
        elif ops.backend() == "reference":
            answer = ("reference", "DEQFUSION_BACKEND=reference asks for it")
        else:
            answer = ("reference", "the implementation for CPU tensors, in PyTorch")
        if device == "cuda" and not without and not torch.cuda.is_available():
            answer = ("no device", f"with one, {': '.join(answer)}")
        result[device] = dict(zip(("implementation", "reason"), answer, strict=True))
    return result


def _programs(device: str) -> tuple[str, str]:
    """Implementation and reason where the programs are to run."""
    usable, reason = kernels.status()
    if not usable:
        return _REFUSED, reason
    if kernels.interpreted():
        return "triton", f"in Triton's interpreter, which is for tests and slow; {reason}"
    if device == "cpu":
        return _REFUSED, "TRITON_INTERPRET=1 is not set"
    return "triton", reason


def ladder() -> dict[str, Any]:
    """Say whether ``ladder="auto"`` uses bfloat16 products on this processor, and why (not)."""
    kind = bfloat16_instructions()
    if kind is not None:
        reason = f"bfloat16 products in hardware: {kind}"
    else:
        reason = "no bfloat16 products in hardware (AMX, AVX512-BF16 or SVE): float32 throughout"
    return {"on": kind is not None, "reason": reason}


def tuned(found_gpus: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the files of tuned choices that are in force, by name of the device.

    Returns:
        For the processor and every GPU a list of ``file`` and ``entries``, their number; empty
        where the defaults are used.
    """
    names = dict.fromkeys((tuning.host_name(), *(gpu["name"] for gpu in found_gpus)))
    return {
        name: [
            {"file": str(path), "entries": entries} for path, entries in tuning.in_force(name)
        ]
        for name in names
    }  # fmt: skip


def self_test(device: str) -> dict[str, Any]:
    """Solve a small problem forward and backward, and check the answer in float64.

    In Triton's interpreter, which takes most of a second for a step, the problem is smaller still,
    there is no first call, and a line on standard error says that it takes a while.

    Args:
        device: where to run.

    Returns:
        ``ok``; ``steps``, the largest count over rows and blocks; ``residual``, the largest
        relative residual of the returned state, evaluated in float64; ``tolerance``;
        ``milliseconds`` for forward and backward after a first call; ``error``, None or what
        went wrong.
    """
    rows, dim, modalities = 16, 64, 3
    interpreted = _interpreted(torch.device(device).type)
    if interpreted:
        rows, dim, modalities = 4, 32, 2
        message = f"deqfusion: self-test on {device} in Triton's interpreter, about 15 seconds"
        print(message, file=sys.stderr, flush=True)
    tolerance = 1e-3
    outcome: dict[str, Any] = {"ok": False, "tolerance": tolerance, "error": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fusion = deqfusion.DEQFusion(dim, modalities, solver=deqfusion.Anderson(tol=tolerance))
        features = torch.randn(modalities, rows, dim)
    fusion, features = fusion.to(device), features.to(device).requires_grad_()
    try:
        if not interpreted:
            fusion(features).sum().backward()
        started = time.perf_counter()
        eq = fusion.equilibrium(features)
        (gradient,) = torch.autograd.grad(eq.fused.sum(), features)
        # Reading the gradient waits for the device.
        finite = bool(torch.isfinite(gradient).all())
        outcome["milliseconds"] = round(1e3 * (time.perf_counter() - started), 2)
        eq.stats.raise_for_status()
        with torch.no_grad():
            state = eq.state.double()
            mapped = copy.deepcopy(fusion).double().cell(state, features.double())
            residual = float(((mapped - state).norm(dim=-1) / mapped.norm(dim=-1)).max())
    except (RuntimeError, ValueError) as error:
        return {**outcome, "error": " ".join(str(error).split()) or type(error).__name__}
    outcome["steps"] = int(eq.stats.steps.max())
    outcome["residual"] = residual
    # A NaN residual fails the comparison too.
    if not residual <= tolerance:
        outcome["error"] = f"residual {residual:.1e}, expected at most {tolerance:.0e}"
    elif not finite:
        outcome["error"] = "the gradient is not finite"
    outcome["ok"] = outcome["error"] is None
    return outcome


def _interpreted(device: str) -> bool:
    """Whether solves on a kind of device run in Triton's interpreter."""
    try:
        return ops.implementation(device) == "triton" and kernels.interpreted()
    except ValueError:
        return False


def missing(found_gpus: list[dict[str, Any]]) -> list[str]:
    """List what is not there, and what does not work without it."""
    absent = []
    if not found_gpus:
        absent.append("GPU that torch can use: CUDA tensors cannot be made here")
    usable, reason = kernels.status()
    if not usable:
        absent.append(f"GPU programs: {reason}")
    if installed_version("torchdeq") is None:
        absent.append("torchdeq: `deqfusion bench` leaves it out (pip install 'deqfusion[bench]')")
    if not any(map(shutil.which, COMPILERS)):
        absent.append("C++ compiler: torch.compile cannot build code for the CPU")
    return absent


def collect() -> dict[str, Any]:
    """Look everything up and run the self-test on every device.

    Returns:
        The report as plain JSON values.
    """
    registered = operators()
    found_gpus = gpus()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "versions": {
            "deqfusion": deqfusion.__version__,
            "python": platform.python_version(),
            **{name: installed_version(name) for name in PACKAGES},
        },
        "system": platform.platform(),
        "processor": {
            "name": tuning.host_name(),
            "cores": len(affinity(0)) if affinity else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "bf16_instructions": bfloat16_instructions(),
        },
        "gpus": found_gpus,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "operators": registered,
        "implementations": implementations(registered),
        "ladder": ladder(),
        "tuned": tuned(found_gpus),
        "self_test": {
            device: self_test(device) for device in ("cpu", *(gpu["device"] for gpu in found_gpus))
        },
        "missing": missing(found_gpus),
    }


def render(report: dict[str, Any]) -> str:
    """Write a report as text for a person.

    Args:
        report: what `collect` returned.
    """
    lines: list[tuple[str, str]] = []
    versions = report["versions"]
    lines.append(
        ("versions", ", ".join(f"{n} {v or 'not installed'}" for n, v in versions.items()))
    )
    processor = report["processor"]
    lines.append(("system", report["system"]))
    lines.append(
        (
            "processor",
            f"{processor['name']}, {processor['cores']} cores, {processor['threads']} torch "
            f"threads, {processor['capability']}",
        )
    )
    for gpu in report["gpus"]:
        text = f"{gpu['device']} {gpu['name']}, capability {gpu['capability']}"
        lines.append(("GPU", f"{text}, {gpu['memory_gib']} GiB"))
    if report["environment"]:
        variables = (f"{name}={value}" for name, value in report["environment"].items())
        lines.append(("environment", ", ".join(variables)))
    for name, devices in report["operators"].items():
        lines.append(("operator", f"{name}: {', '.join(devices) or 'no device'}"))
    for device, answer in report["implementations"].items():
        lines.append(("runs on", f"{device}: {answer['implementation']} ({answer['reason']})"))
    switch = "on" if report["ladder"]["on"] else "off"
    lines.append(("ladder", f"{switch}: {report['ladder']['reason']}"))
    for name, files in report["tuned"].items():
        texts = [f"{file['entries']} entries of {file['file']}" for file in files]
        nothing = "nothing, the defaults are used (`deqfusion autotune` measures)"
        lines.append(("tuned", f"{name}: {', '.join(texts) or nothing}"))
    for device, test in report["self_test"].items():
        if test["ok"]:
            text = (
                f"every row converged in at most {test['steps']} steps, residual "
                f"{test['residual']:.1e} (tolerance {test['tolerance']:.0e}), "
                f"{test['milliseconds']:.1f} ms forward and backward"
            )
        else:
            text = test["error"]
        lines.append(("self-test", f"{device}: {'ok' if test['ok'] else 'FAILED'}: {text}"))
    lines += [("missing", text) for text in report["missing"]]
    width = max(len(label) for label, _ in lines)
    out, previous = [], None
    for label, text in lines:
        out.append(f"{label if label != previous else '':<{width}}  {text}")
        previous = label
    return "\n".join(out)


def run(options: argparse.Namespace) -> int:
    """Print the report.

    Args:
        options: with ``json``, whether to print JSON instead of text.

    Returns:
        0, or 1 if the self-test failed on some device.
    """
    report = collect()
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if all(test["ok"] for test in report["self_test"].values()) else 1


def register_commands(subparsers: Any) -> None:
    """Add ``doctor`` to the subparsers of an argument parser."""
    description = "say what is installed, what runs where and why, and whether it works"
    parser = subparsers.add_parser("doctor", help=description, description=description + ".")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)
