"""Launching a program: what it allocates, which schedule it gets, and what is said if it fails.

Nothing is tuned here and nothing waits for the device: shapes, options and what was tuned before
(`kernels.tuning`) decide.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from . import tuning
from .config import COUNTERS, MAX_PADDED, SCHEDULES, Config, SolveOptions, shipped
from .cost import default_config
from .ended import Ended
from .layout import Layout
from .primitives import interpreted
from .schedule import SUMS as _SUMS
from .solver import SAVED as _SAVED

T = TypeVar("T")

SUMS, SAVED = int(_SUMS.value), int(_SAVED.value)

logger = logging.getLogger(__name__)

_asked: Config | str | None = None
_held: dict[tuple[Any, ...], int] = {}
_watching: list[Compiled] | None = None
_configs: list[Config] | None = None
_refused: set[tuple[Any, ...]] = set()
"""Tuned configurations that did not compile, see `_refusal`."""
_told = False


@contextmanager
def using(config: Config | str) -> Iterator[None]:
    """Solves and adjoints run with this config, or with a schedule's, where none is passed.

    For the whole process, as the backward pass runs in a thread of its own on a GPU.
    """
    global _asked
    before, _asked = _asked, config
    try:
        yield
    finally:
        _asked = before


@dataclass(frozen=True)
class Compiled:
    """What a program that was launched needs: per thread registers and spilled bytes or words, as
    Triton counts, and bytes of shared memory."""

    name: str
    registers: int
    spills: int
    shared: int


@contextmanager
def ran() -> Iterator[list[Config]]:
    """Collects the configs that solves ran in meanwhile, after any fallback."""
    global _configs
    before, _configs = _configs, []
    try:
        yield _configs
    finally:
        _configs = before


@contextmanager
def watching() -> Iterator[list[Compiled]]:
    """Collects what the programs launched meanwhile need; nothing in the interpreter."""
    global _watching
    before, _watching = _watching, []
    try:
        yield _watching
    finally:
        _watching = before


def product_precision(precision: str) -> str:
    """What the device functions are told for an option of `kernels.config.PRECISIONS`."""
    return "rounded" if precision == "low" and interpreted() else precision


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 0 where programs are interpreted."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def device_name(device: torch.device) -> str:
    """What tuned files call a device."""
    if device.type != "cuda":
        return "Triton interpreter"
    return torch.cuda.get_device_name(device)


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device, as 90; 0 for others."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True)
class Plan:
    """One solve: K blocks of R rows of width d, on a device.

    Attributes:
        layout, blocks, rows, options, config, device: what was asked for.
        solve, modalities: which of `kernels.tuning.SOLVES`, and N.
        tuned: whether the config is a tuned one.
        size: R', R rounded up to whole programs; programs: along the rows.
    """

    layout: Layout
    blocks: int
    rows: int
    options: SolveOptions
    config: Config
    device: torch.device
    solve: str
    modalities: int
    tuned: bool = False

    @staticmethod
    def new(
        layout: Layout, blocks: int, rows: int, options: SolveOptions, config: Config | None,
        device: torch.device, solve: str, modalities: int,
    ) -> Plan:  # fmt: skip
        """Checks the width and chooses a config where none is given.

        The one of `using`, else the one tuned for the device, else what the cost model says.

        Raises:
            ValueError: for a group wider than a tile may be, and for programs that would wait for
                one another in the interpreter, which runs them one after the other.
        """
        if layout.padded > MAX_PADDED:
            raise ValueError(
                f"dim {layout.dim} in {layout.groups} groups: got {layout.group} channels per "
                f"group, the GPU programs (schedules {', '.join(SCHEDULES)}) have at most "
                f"{MAX_PADDED}; DEQFUSION_BACKEND=reference has no limit"
            )
        asked = config or _asked
        if isinstance(asked, str):
            asked = shipped(
                asked, adjoint="adjoint" in solve, capability=capability(device),
                padded=layout.padded,
            )  # fmt: skip
        tuned = False
        if asked is None:
            asked = _tuned(device, solve, layout, modalities, options, rows)
            tuned = asked is not None
            if not tuned and device.type == "cuda" and rows and blocks:
                _tell_untuned(device, solve, rows, layout, options)
        if asked is None:
            asked = untuned(rows, layout, blocks, device, solve)
        if _would_wait(asked, layout):
            raise ValueError(
                f"schedule: got cooperative with {layout.groups} groups in Triton's interpreter, "
                "expected row or step (with one group, cooperative as well)"
            )
        return Plan(layout, blocks, rows, options, asked, device, solve, modalities, tuned)

    @property
    def programs(self) -> int:
        """Row blocks."""
        return -(-self.rows // self.config.rows)

    @property
    def shape(self) -> str:
        """In words, for errors."""
        return f"{self.blocks} x {self.rows} rows of {self.layout.dim}"

    @property
    def size(self) -> int:
        """R', rows of the scratch tensors."""
        return self.programs * self.config.rows

    @property
    def cooperative(self) -> bool:
        """Whether programs wait for one another."""
        return self.config.schedule == "cooperative"

    @property
    def groups(self) -> int:
        """Programs per row block and block."""
        return 1 if self.config.schedule == "row" else self.layout.groups

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised scratch."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def rows_of(self, *leading: int) -> Tensor:
        """Scratch (*leading, R', W)."""
        return self.empty(*leading, self.size, self.layout.width)

    def history(self, counters: Tensor) -> tuple[Tensor, ...]:
        """f, g, anchors, gram, partials, counters and saved of the solver.

        counters: `COUNTERS` zeros. Of meetings, one per row block; in schedule step the first
        counts the row blocks that have ended.
        """
        slots = self.options.slots
        f, g = (self.rows_of(max(slots, 1), self.blocks) for _ in range(2))
        # Per row block four planes in fp32 and two in bfloat16, `kernels.solver`.
        anchors = self.rows_of(self.blocks, 5) if self.options.climbs else f
        gram = self.empty(self.groups, self.blocks, self.size, slots, slots)
        if self.config.schedule == "row":
            return f, g, anchors, gram, gram, gram, gram
        if self.cooperative and self.blocks * self.programs > COUNTERS:
            counters = counters.new_zeros(self.blocks * self.programs)
        partials = self.empty(2 * SUMS, self.layout.groups, self.blocks, self.size)
        saved = partials
        if self.config.schedule == "step":
            saved = self.empty(
                self.blocks, self.programs, self.groups, SAVED, self.config.rows, dtype=torch.int32
            )
        return f, g, anchors, gram, partials, counters, saved

    def numbers(self) -> tuple[float | int, ...]:
        """rows, padded rows, max_steps, rtol, atol, ridge, mixing."""
        o = self.options
        return self.rows, self.size, o.max_steps, o.rtol, o.atol, o.ridge, o.mixing

    def constants(self) -> dict[str, Any]:
        """What every solve program is specialised on."""
        o, c = self.options, self.config
        return {
            "DIM": self.layout.dim, "G": self.layout.groups, "P": self.layout.padded,
            "BM": c.rows, "BK": min(c.depth, self.layout.padded), "M": o.slots,
            "RELATIVE": o.relative, "PRECISION": product_precision(o.precision),
            "LADDER": product_precision("low") if o.climbs else "",
            "COOPERATIVE": self.cooperative,
        }  # fmt: skip

    def run(
        self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any],
        phases: tuple[int, int, int],
    ) -> None:  # fmt: skip
        """Launches a solve program over all row blocks.

        Args:
            kernel, arguments, constants: but for `numbers` and `constants`, which are added.
            phases: of the kernel's start, step and end.

        Raises:
            NotResident: if the plan is cooperative and the device cannot hold its programs at once.
        """
        grid = (self.programs, self.blocks, self.groups)
        counters = arguments[-2]
        arguments = (*arguments, *self.numbers())
        constants = {**constants, **self.constants()}

        def once(phase: int, **extra: Any) -> None:
            given = {**constants, "PHASE": phase}
            launch(kernel, grid, arguments, given, self.config, self.shape, extra)

        if self.config.schedule == "step":
            try:
                self._run_step(once, counters, phases)
            except BaseException:
                # What was counted would end the next solve with the same parameters too early.
                counters[:1].zero_()
                raise
        elif self.cooperative and self.device.type == "cuda":
            extra = {"launch_cooperative_grid": True}
            key = {**constants, "PHASE": 0, **extra}
            held = resident(kernel, arguments, key, self.config, self.device)
            if math.prod(grid) > held:
                raise NotResident(f"{math.prod(grid)} programs, the device holds {held} at once")
            once(0, **extra)
        else:
            once(0)

    def _run_step(
        self, once: Callable[[int], None], counters: Tensor, phases: tuple[int, int, int]
    ) -> None:
        start, step, end = phases
        for phase in range(1, start + 1):
            once(phase)
        ended = Ended(counters, self.blocks * self.programs)
        for _ in range(self.most_steps):
            if ended():
                break
            for phase in range(start + 1, start + step + 1):
                once(phase)
        for phase in range(start + step + 1, start + step + end + 1):
            once(phase)

    @property
    def most_steps(self) -> int:
        """Evaluations of a row block at most: rows that wait do not evaluate, others may."""
        return self.options.max_steps * (2 if self.options.climbs else 1)


def _tuned(
    device: torch.device, solve: str, layout: Layout, modalities: int, options: SolveOptions,
    rows: int,
) -> Config | None:  # fmt: skip
    """What was tuned for this device, where that is known and compiles."""
    name = device_name(device)
    found = tuning.lookup(
        name, solve, layout.dim, layout.groups, modalities, options.products, options.slots, 0,
        tuning.bucket(rows),
    )  # fmt: skip
    if not isinstance(found, Config) or _refusal(name, solve, layout, options, found) in _refused:
        return None
    return None if _would_wait(found, layout) else found


def _refusal(
    name: str, solve: str, layout: Layout, options: SolveOptions, config: Config
) -> tuple[Any, ...]:
    """A tuned config and what it was not compiled with."""
    return name, solve, layout, options.products, options.slots, config


def _would_wait(config: Config, layout: Layout) -> bool:
    """Whether programs would wait for one another in the interpreter: it runs one after another."""
    return config.schedule == "cooperative" and layout.groups > 1 and interpreted()


def untuned(rows: int, layout: Layout, blocks: int, device: torch.device, solve: str) -> Config:
    """What runs where nothing was tuned."""
    return default_config(
        rows, layout, blocks, processors(device), adjoint="adjoint" in solve,
        capability=capability(device),
    )  # fmt: skip


def _tell_untuned(
    device: torch.device, solve: str, rows: int, layout: Layout, options: SolveOptions
) -> None:
    """Says so, once in a process."""
    global _told
    if not _told:
        _told = True
        logger.warning(
            "%s: nothing tuned for the %s of %d rows of %d with memory %d, so the cost model "
            "chooses; `deqfusion autotune` measures", device_name(device), solve, rows, layout.dim,
            options.memory,
        )  # fmt: skip


class NotResident(RuntimeError):
    """A cooperative launch has more programs than the device can hold at once."""


class NotCompiled(RuntimeError):
    """A program cannot be compiled for the device."""


def solved(plan: Plan, run: Callable[[Plan], T]) -> T:
    """run(plan), or a plan in its place that can run.

    A cooperative plan too large for its device runs in schedule row instead; a tuned one that does
    not compile (of other options than were tuned, or changed by hand) in the cost model's config.

    Raises:
        torch.OutOfMemoryError: as it is, with a note on the shape and the config.
    """
    try:
        result = run(plan)
        if _configs is not None:
            _configs.append(plan.config)
        return result
    except NotResident:
        return solved(replace(plan, config=replace(plan.config, schedule="row")), run)
    except NotCompiled as error:
        if not plan.tuned:
            raise
        # The one looked up: it may have become one of schedule row since.
        found = _tuned(
            plan.device, plan.solve, plan.layout, plan.modalities, plan.options, plan.rows
        )
        name, config = device_name(plan.device), found or plan.config
        _refused.add(_refusal(name, plan.solve, plan.layout, plan.options, config))
        logger.warning("%s; so the tuned config is not used", error)
        config = untuned(plan.rows, plan.layout, plan.blocks, plan.device, plan.solve)
        return solved(replace(plan, config=config, tuned=False), run)
    except torch.OutOfMemoryError as error:
        error.add_note(f"in a solve of {plan.shape} with {plan.config}")
        raise


def resident(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], config: Config,
    device: torch.device,
) -> int:  # fmt: skip
    """Programs that the device can hold at once, by registers, shared memory and threads."""
    key = (kernel.__name__, tuple(sorted(constants.items())), config, device.index)
    if key in _held:
        return _held[key]
    with _compiling(kernel, arguments, config):
        compiled = kernel.warmup(
            *arguments, grid=(1,), **constants, num_warps=config.warps, num_stages=config.stages
        )
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


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any],
    config: Config, shape: str, extra: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Launches a kernel.

    Raises:
        NotCompiled: if it cannot be compiled for the device: names program, config and device.
        Errors of the launch itself, as they are, with a note on the shape and the config.
    """
    options = {"num_warps": config.warps, "num_stages": config.stages, **(extra or {})}
    try:
        with _compiling(kernel, arguments, config):
            compiled = kernel[grid](*arguments, **constants, **options)
    except NotCompiled:
        raise
    except Exception as error:
        error.add_note(f"in {kernel.__name__} with {config}, {shape}")
        raise
    if _watching is not None and compiled is not None:
        needs = compiled.n_regs, compiled.n_spills, compiled.metadata.shared
        _watching.append(Compiled(kernel.__name__, *needs))


@contextmanager
def _compiling(kernel: Any, arguments: tuple[Any, ...], config: Config) -> Iterator[None]:
    """Errors of the compiler name program, config and device."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, CompilationError | OutOfResources | PTXASError)
        # What the compiler's passes raise is told by its text alone.
        if not known and "PassManager" not in str(error):
            raise
        raise NotCompiled(
            f"{kernel.__name__} with {config} cannot be compiled for {_device(arguments)}: "
            f"{str(error).splitlines()[0]}; DEQFUSION_BACKEND=reference does without it"
        ) from error


def _device(arguments: tuple[Any, ...]) -> str:
    device = arguments[0].device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
