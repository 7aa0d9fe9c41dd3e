"""One process or several: what each holds, which of them writes, and what happens if one is lost.

Several are started by torchrun: gloo between processors, NCCL between GPUs. With "ddp" every
process has the whole model, with "fsdp" (PyTorch's FSDP2) a share of every parameter. Each takes
its part of every batch, and gradients are averaged by samples, so that the curve is that of one
process with the same batches. The first process reads and writes the run's folder; the others get
what it read.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from .recipe import Config, Recipe

T = TypeVar("T")
# What messages of lost connections have in common.
_CONNECTION = ("SIGTERM", "gloo", "NCCL", "Connection closed", "Connection reset")
# Whether this process has joined others, which `leave` has to know.
_joined = False


class LostProcessError(RuntimeError):
    """Another process of a distributed run has ended or cannot be reached."""


@dataclass(frozen=True)
class Process:
    """This process among those of a run.

    Attributes:
        device: what it computes on.
        rank, world: its number, from 0, and how many there are.
        strategy: "single", "ddp" or "fsdp".
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    strategy: str = "single"

    @property
    def first(self) -> bool:
        """Whether this is the process that reads, writes and prints."""
        return self.rank == 0

    def share(self, rows: Tensor, least: int = 1) -> tuple[Tensor, float]:
        """Return this process's part of a batch, and the weight that its mean loss has.

        The mean over processes of weight times loss is the mean over the batch's samples. Where
        there are fewer than `least` for each, fewer processes have all of them, and the others get
        `least` of weight 0, since they have to take part.
        """
        if self.world == 1:
            return rows, 1.0
        sharing = max(1, min(self.world, len(rows) // least))
        own = rows.tensor_split(sharing)[self.rank] if self.rank < sharing else rows[:0]
        return (own if len(own) else rows[:least]), len(own) * self.world / len(rows)

    def of_first(self, read: Callable[[], T]) -> T:
        """Let the first process do something, and return its result in every process.

        Where it fails, its error ends the first process, and the others end silently.
        """
        if self.world == 1:
            return read()
        result: list[Any] = [None, False]
        try:
            if self.first:
                result = [read(), True]
        finally:
            dist.broadcast_object_list(result, src=0, device=self.device)
        if not result[1]:
            raise SystemExit(2)
        return result[0]

    def total(self, values: Tensor) -> Tensor:
        """Sum a tensor over the processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return what each process has, by rank."""
        gathered = [value]
        if self.world > 1:
            gathered = [None] * self.world
            dist.all_gather_object(gathered, value)
        return gathered

    def wrap(self, step: nn.Module, recipe: Recipe, model: nn.Module) -> nn.Module:
        """Return the module to call: `step` itself, or what keeps its gradients in agreement."""
        if self.strategy == "fsdp":
            # Half a second to import: not while arguments are parsed, nor in a single process.
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            for shard in recipe.shards(model):
                fully_shard(shard, mesh=mesh)
            fully_shard(step, mesh=mesh)
        if self.strategy == "ddp":
            return DistributedDataParallel(step)
        return step

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers, such as running means of a batch norm."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


@contextmanager
def processes(config: Config) -> Iterator[Process]:
    """Join the processes that torchrun started, or be the only one.

    Raises:
        ValueError: `strategy` or `device` does not fit where this runs.
        LostProcessError: inside, another process ended.
    """
    global _joined
    strategy, world = config["strategy"], int(os.environ.get("WORLD_SIZE", "1"))
    device = device_of(config)
    if strategy == "single":
        if world > 1:
            raise ValueError(
                f"strategy: got 'single' in one of {world} processes, expected 'ddp' or 'fsdp'"
            )
        yield Process(device)
        return
    if "RANK" not in os.environ:
        raise ValueError(
            f"strategy: got {strategy!r} in a single process, expected to be started by "
            "`torchrun --nproc-per-node K -m deqfusion.cli train ...`"
        )
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    _joined = True
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield Process(device, rank, world, strategy)
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        # Without the place in gloo's sources, and its advice.
        reason = re.sub(r"^\[\S*\] ", "", str(error).strip().splitlines()[0]).partition(". ")[0]
        raise LostProcessError(
            f"process {rank} of {world}: another process has ended or cannot be reached ({reason})"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process, also where gloo's threads are still at work, as the last thing it does.

    A thread of gloo takes Python's lock to release the tensors of a collective, and may do so after
    the collective has returned. Before Python 3.14 a thread that waits for the lock when the
    interpreter ends is unwound, which C++ answers with "terminate called without an active
    exception" and SIGABRT. `destroy_process_group` ends the threads with the last reference to the
    group alone, and caches of `DTensor` and defaults of `torch.distributed.nn` keep some. So a
    process that has been one of several ends without the interpreter's end, after what was
    registered with `atexit`, and any other by `sys.exit`.

    Args:
        code: the exit code.
    """
    if not _joined:
        sys.exit(code)
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _stop(number: int, frame: object) -> NoReturn:
    # torchrun ends the others so, where one is lost, often before they notice themselves.
    raise RuntimeError(f"{_CONNECTION[0]}: stopped by its launcher")


def device_of(config: Config) -> torch.device:
    """Return the device that a configuration names; "auto": CUDA's where there is one.

    Raises:
        ValueError: it is not there.
    """
    name = config["device"]
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch finds none here, expected 'cpu' or 'auto'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _is_of_connection(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return any(word in str(error) for word in _CONNECTION)


def whole(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU of a tensor, or of one of which every process has a share."""
    tensor = tensor.detach()
    if _is_share(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return tensor.to("cpu", copy=True)


def like(target: Tensor, value: Tensor) -> Tensor:
    """Return a whole value as `target` is held: on its device, or this process's share of it."""
    value = value.to(target.device)
    if _is_share(target):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, target.device_mesh, target.placements)  # type: ignore[attr-defined]
    return value


def _is_share(tensor: Tensor) -> bool:
    # Where nothing has imported its module, nothing is a `DTensor`.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters and buffers, whole and on the CPU."""
    return {name: whole(value) for name, value in model.state_dict().items()}


def load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `whole_state` returned."""
    held = model.state_dict()
    model.load_state_dict({name: like(held[name], value) for name, value in state.items()})
