"""The memory of a training step does not depend on how many steps a solve may take."""

import os
import subprocess
import sys

import pytest
import torch

from deqfusion import Anderson, DEQFusion, Implicit

# The tolerance is out of reach, so that a solve goes on until it stagnates or runs out of steps.
# One state is 512 x 256 x 4 bytes x 4 blocks = 2 MB, and what a step computes on the way to the
# next is several times that: keeping it for 20 steps more would cost well over 100 MB.
PEAK = """
import resource, sys, torch
from deqfusion import Anderson, DEQFusion, Implicit
torch.set_num_threads(1)
torch.manual_seed(0)
solver = Anderson(tol=1e-30, max_steps=int(sys.argv[1]))
fusion = DEQFusion(256, 3, solver=solver, adjoint=Implicit(solver))
features = torch.randn(3, 512, 256, requires_grad=True)
fusion(features).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_megabytes(max_steps: int) -> int:
    """Peak resident memory of one training step in a process of its own."""
    command = [sys.executable, "-c", PEAK, str(max_steps)]
    # Blocks from 64 KiB on go back to the system when freed: what is resident is what is in use,
    # and not what the C library keeps between solves of different sizes.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, env=environment
    )
    return int(result.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_peak_memory_of_a_training_step():
    few, many = peak_megabytes(10), peak_megabytes(200)
    assert many < few + 32, f"peak {few} MB at max_steps=10, {many} MB at 200"


def saved_bytes(max_steps: int) -> int:
    """Bytes of distinct storage that the forward pass keeps for the backward pass."""
    torch.manual_seed(0)
    solver = Anderson(tol=1e-30, max_steps=max_steps)
    fusion = DEQFusion(64, 3, solver=solver, adjoint=Implicit(solver))
    features = torch.randn(3, 32, 64, requires_grad=True)
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused = fusion(features)
    fused.sum().backward()
    return sum(storages.values())


def test_saved_for_backward():
    few, many = saved_bytes(10), saved_bytes(200)
    assert few > 0
    assert many == few
