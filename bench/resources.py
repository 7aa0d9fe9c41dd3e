"""What one run takes beside time: memory at its peak, and launches.

On a GPU memory is that of torch's allocator (`torch.cuda.max_memory_allocated`) above what was
allocated before the run, and launches are counted by the profiler: calls of the host that launch
something (a graph's replay is one), and kernels that the device ran. On a CPU memory is the largest
sum of what torch's allocator gave and took back, by the profiler, above what it held before the
run; scratch of oneDNN and NumPy is not in it, and there are no launches. Parameters, features and
what a contender allocates once (a graph's tensors) are not in it on either.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch

CPU_MEMORY = "torch's CPU allocator, by its profiler"
GPU_MEMORY = "torch.cuda.max_memory_allocated"

# The profiler's library announces every start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def measure(function: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Runs a function that has run before, and says what it took.

    Args:
        function: what to run, twice on a GPU.
        device: where it works.

    Returns:
        "memory": {"bytes", "how"}; "launches": {"host", "kernels"}, None on a CPU.
    """
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    if device.type != "cuda":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            function()
        return {"memory": {"bytes": _peak(_events(recorded)), "how": CPU_MEMORY}, "launches": None}
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize(device)
    return {"memory": {"bytes": peak, "how": GPU_MEMORY}, "launches": _launches(_events(recorded))}


def _events(recorded: Any) -> list[Any]:
    """The profiler's raw events, which its tables only sum up."""
    return list(recorded.profiler.kineto_results.events())


def _peak(events: list[Any]) -> int:
    """Largest sum of allocations less releases, in the order of time."""
    changes = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def _launches(events: list[Any]) -> dict[str, int]:
    """Launching calls of the host, and kernels of the device."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    host = kernels = 0
    for event in events:
        name = event.name()
        if event.device_type() == DeviceType.CPU:
            # cudaLaunchKernel, cuLaunchKernelEx, cudaGraphLaunch, hipModuleLaunchKernel, ...
            host += name.startswith(("cuda", "cu", "hip")) and "Launch" in name
        else:
            kernels += not name.startswith(("Memcpy", "Memset"))
    return {"host": host, "kernels": kernels}
