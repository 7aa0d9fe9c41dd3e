"""Compiling a program and launching what is compiled, by Triton the first time only.

Triton looks up by all arguments of a launch which program to run, which for forty takes ten times
as long as the launch. Here what it found is kept by a shorter key (`kernels.arguments`).
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError

from .arguments import Constants, Special, specialisation, tensors
from .config import Config
from .primitives import interpreted

_held: dict[tuple[Any, ...], int] = {}
_programs: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], Any]] = {}
"""By what they are specialised on: compiled, what follows the arguments, and the kernel, whose id
is part of the key."""
NOTHING: Mapping[str, Any] = MappingProxyType({})
COOPERATIVE: Mapping[str, Any] = MappingProxyType({"launch_cooperative_grid": True})
_FAST = torch.version.hip is None
"""Whether the keys of `_programs` are complete: for AMD Triton looks at more."""


class NotCompiled(RuntimeError):
    """A program cannot be compiled for the device."""


def resident(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], config: Config,
    device: torch.device, buffers: Sequence[Tensor] = (), special: Special | None = None,
) -> int:  # fmt: skip
    """Programs that the device can hold at once, by registers, shared memory and threads.

    special: `specialisation` of the arguments, where that is known.
    """
    number = (constants if isinstance(constants, Constants) else Constants(constants)).number
    kinds, _ = special or specialisation(arguments, buffers)
    key = (number, kernel.__name__, config.warps, config.stages, device.index, *kinds)
    if key in _held:
        return _held[key]
    arguments = tensors(arguments, buffers)
    with _compiling(kernel, arguments, config):
        compiled = kernel.warmup(
            *arguments, grid=(1,), **constants, **COOPERATIVE, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
        compiled._init_handles()
    properties = torch.cuda.get_device_properties(device)
    threads = config.warps * properties.warp_size
    registers = -(-compiled.n_regs // 8) * 8 * threads
    each = min(
        getattr(properties, "regs_per_multiprocessor", 65536) // max(registers, 1),
        properties.shared_memory_per_multiprocessor // (compiled.metadata.shared + 1024),
        properties.max_threads_per_multi_processor // threads,
        16,
    )
    _held[key] = each * properties.multi_processor_count
    return _held[key]


def launched(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any],
    config: Config, extra: Mapping[str, Any], buffers: Sequence[Tensor],
    special: Special | None = None,
) -> Any:  # fmt: skip
    """Launches a kernel, compiled if need be, and returns it compiled; None in the interpreter.

    special: as of `resident`.
    """
    key = None
    if _FAST and not interpreted():
        number = (constants if isinstance(constants, Constants) else Constants(constants)).number
        try:
            active = driver.active
            device = active.get_current_device()
        except Exception as error:
            # With the first program Triton compiles what it talks to the driver through.
            raise _not_compiled(kernel, arguments, config, error) from error
        kinds, addresses = special or specialisation(arguments, buffers)
        key = (number, id(kernel), device, config.warps, config.stages, bool(extra), *kinds)
        known = _programs.get(key)
        if known is not None:
            compiled, rest, _ = known
            run = compiled[(*grid, 1, 1)[:3]]
            run(*addresses, *rest, stream=active.get_current_stream(device))
            return compiled
    options = {"num_warps": config.warps, "num_stages": config.stages, **extra}
    arguments = tensors(arguments, buffers)
    with _compiling(kernel, arguments, config):
        compiled = kernel[grid](*arguments, **constants, **options)
    if key is not None and compiled is not None:
        # The launcher wants something in the place of every constant, and reads none.
        rest = tuple(constants.get(name) for name in kernel.arg_names[len(arguments) :])
        _programs[key] = compiled, rest, kernel
    return compiled


@contextmanager
def _compiling(kernel: Any, arguments: tuple[Any, ...], config: Config) -> Iterator[None]:
    """Errors of the compilers name program, config and device."""
    try:
        yield
    except (CompilationError, OutOfResources, PTXASError, subprocess.CalledProcessError) as error:
        raise _not_compiled(kernel, arguments, config, error) from error
    except Exception as error:
        # What the compiler's passes raise is told by its text alone, and so is that there is no C
        # compiler, which Triton needs for its launchers.
        if "PassManager" not in str(error) and "C compiler" not in str(error):
            raise
        raise _not_compiled(kernel, arguments, config, error) from error


def _not_compiled(
    kernel: Any, arguments: tuple[Any, ...], config: Config, error: Exception
) -> NotCompiled:
    said = (str(error) or repr(error)).splitlines()[0]
    return NotCompiled(
        f"{kernel.__name__} with {config} cannot be compiled for {_device(arguments)}: {said}; "
        "DEQFUSION_BACKEND=reference does without it"
    )


def _device(arguments: tuple[Any, ...]) -> str:
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
