"""Launching a program: what it allocates, which schedule it gets, and what is said if it fails.

Nothing is tuned here and nothing waits for the device: shapes, options and what was tuned before
(`kernels.tuning`) decide.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import tuning
from .arguments import Constants, Part, Scratch, Special, specialisation
from .compiled import COOPERATIVE, NOTHING, NotCompiled, launched, resident
from .config import COUNTERS, Config, SolveOptions, in_registers, shipped
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
    """What the device functions are told for PRECISION or LADDER."""
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
        size: R', R rounded up to whole programs; programs: along the rows, the row blocks.
        groups: programs per row block and block.
        cooperative: whether programs wait for one another.
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
    programs: int = field(init=False)
    size: int = field(init=False)
    groups: int = field(init=False)
    cooperative: bool = field(init=False)
    _constants: dict[tuple[Any, ...], Constants] = field(init=False, repr=False, compare=False)
    _known: list[tuple[Part, ...]] = field(init=False, repr=False, compare=False)
    _scratch: Scratch = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        own, schedule = self.__dict__, self.config.schedule
        own["programs"] = -(-self.rows // self.config.rows)
        own["size"] = self.programs * self.config.rows
        own["groups"] = 1 if schedule == "row" else self.layout.groups
        own["cooperative"] = schedule == "cooperative"
        own["_constants"], own["_known"] = {}, [()]
        own["_scratch"] = Scratch(self._known)

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
        return _planned(
            layout, blocks, rows, options, config or _asked, device, solve, modalities,
            tuning.generation(), len(_refused),
        )  # fmt: skip

    def again(self) -> Plan:
        """The same plan for another solve, whose scratch is its own."""
        plan = object.__new__(Plan)
        plan.__dict__.update(self.__dict__)
        plan.__dict__["_scratch"] = Scratch(self._known)
        return plan

    @property
    def shape(self) -> str:
        """In words, for errors."""
        return f"{self.blocks} x {self.rows} rows of {self.layout.dim}"

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Part:
        """Uninitialised scratch."""
        return self._scratch.part(shape, dtype)

    def rows_of(self, *leading: int) -> Part:
        """Scratch (*leading, R', W)."""
        return self.empty(*leading, self.size, self.layout.width)

    def scratch(self, planes: int) -> Part:
        """Per row block and block of its own, of BM x W elements: so many planes, the slots of the
        history twice (f, then g), and what 16 bits take
        (`kernels.solver`). Next to one another, so that one address leads to all."""
        planes += 2 * max(self.options.slots, 1) + self.options.planes
        return self.rows_of(self.blocks, planes)

    def meetings(self, counters: Part) -> tuple[Part | Tensor, ...]:
        """gram, partials, counters and saved of the solver and its schedule.

        counters: `COUNTERS` zeros. Of meetings, one per row block; in schedule step the first
        counts the row blocks that have ended.
        """
        slots = self.options.slots
        gram = self.empty(self.groups, self.blocks, self.size, slots, slots)
        if self.config.schedule == "row":
            return gram, gram, gram, gram
        meetings: Part | Tensor = counters
        if self.cooperative and self.blocks * self.programs > COUNTERS:
            meetings = torch.zeros(
                self.blocks * self.programs, dtype=torch.int32, device=self.device
            )
        partials = self.empty(2 * SUMS, self.layout.groups, self.blocks, self.size)
        saved = partials
        if self.config.schedule == "step":
            saved = self.empty(
                self.blocks, self.programs, self.groups, SAVED, self.config.rows, dtype=torch.int32
            )
        return gram, partials, meetings, saved

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
            "RELATIVE": o.relative, "PRECISION": product_precision(o.exact),
            "LADDER": product_precision(o.cheap),
            "COOPERATIVE": self.cooperative,
            "RESIDENT": in_registers(c, self.layout.padded, o.slots, o.climbs),
        }  # fmt: skip

    def run(
        self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any],
        phases: tuple[int, int, int], packed: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Launches a solve program over all row blocks.

        Args:
            kernel, arguments, constants: but for `numbers` and `constants`, which are added.
            phases: of the kernel's start, step and end.
            packed: parameters.

        Returns:
            The buffers that parts are of, scratch and packed parameters.

        Raises:
            NotResident: if the plan is cooperative and the device cannot hold its programs at once.
        """
        grid = (self.programs, self.blocks, self.groups)
        counters = arguments[-2]
        arguments = (*arguments, *self.numbers())
        buffers = self._scratch.allocate(self.device), packed

        def once(
            phase: int, extra: Mapping[str, Any] = NOTHING, special: Special | None = None
        ) -> None:
            given = self._specialised(kernel, constants, phase)
            launch(kernel, grid, arguments, given, self.config, self.shape, extra, buffers, special)

        if self.config.schedule == "step":
            if isinstance(counters, Part):
                counters = counters.tensor(buffers)
            try:
                self._run_step(once, counters, phases)
            except BaseException:
                # What was counted would end the next solve with the same parameters too early.
                counters[:1].zero_()
                raise
        elif self.cooperative and not interpreted():
            given = self._specialised(kernel, constants, 0)
            special = specialisation(arguments, buffers)
            held = resident(kernel, arguments, given, self.config, self.device, buffers, special)
            least = self.blocks * self.groups
            if held < least:
                raise NotResident(f"{least} programs at least, the device holds {held} at once")
            # As many row blocks for each program, or one less.
            rounds = -(-self.programs // (held // least))
            grid = (-(-self.programs // rounds), *grid[1:])
            once(0, COOPERATIVE, special)
        else:
            once(0)
        return buffers

    def _specialised(self, kernel: Any, constants: dict[str, Any], phase: int) -> Constants:
        """All that a program is specialised on."""
        key = (kernel.__name__, phase, *constants.values())
        found = self._constants.get(key)
        if found is None:
            found = Constants({**constants, **self.constants(), "PHASE": phase})
            self._constants[key] = found
        return found

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


@functools.lru_cache(maxsize=1024)
def _planned(
    layout: Layout, blocks: int, rows: int, options: SolveOptions, asked: Config | str | None,
    device: torch.device, solve: str, modalities: int, *_: int,
) -> Plan:  # fmt: skip
    """As `Plan.new`; what follows tells whether what is tuned, or refused, has changed."""
    layout.check()
    if isinstance(asked, str):
        asked = shipped(
            asked, adjoint="adjoint" in solve, capability=capability(device), padded=layout.padded,
            half=options.cheap == "half",
        )  # fmt: skip
    tuned = False
    if asked is None:
        asked = _tuned(device, solve, layout, modalities, options, rows)
        tuned = asked is not None
        if not tuned and device.type == "cuda" and rows and blocks:
            _tell_untuned(device, solve, rows, layout, options)
    if asked is None:
        asked = untuned(rows, layout, blocks, device, solve, options)
    if _would_wait(asked, layout):
        raise ValueError(
            f"schedule: got cooperative with {layout.groups} groups in Triton's interpreter, "
            "expected row or step (with one group, cooperative as well)"
        )
    return Plan(layout, blocks, rows, options, asked, device, solve, modalities, tuned)


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


def untuned(
    rows: int, layout: Layout, blocks: int, device: torch.device, solve: str,
    options: SolveOptions,
) -> Config:  # fmt: skip
    """What runs where nothing was tuned."""
    return default_config(
        rows, layout, blocks, processors(device), adjoint="adjoint" in solve,
        capability=capability(device), half=options.cheap == "half",
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


def solved(plan: Plan, run: Callable[[Plan], T]) -> T:
    """run(plan), or a plan in its place that can run.

    A cooperative plan too large for its device runs in schedule row instead; a tuned one that does
    not compile (of other options than were tuned, or changed by hand) in the cost model's config.

    Raises:
        torch.OutOfMemoryError: as it is, with a note on the shape and the config.
    """
    try:
        result = run(plan.again())
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
        config = untuned(plan.rows, plan.layout, plan.blocks, plan.device, plan.solve, plan.options)
        return solved(replace(plan, config=config, tuned=False), run)
    except torch.OutOfMemoryError as error:
        error.add_note(f"in a solve of {plan.shape} with {plan.config}")
        raise


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any],
    config: Config, shape: str, extra: Mapping[str, Any] = NOTHING,
    buffers: Sequence[Tensor] = (), special: Special | None = None,
) -> None:  # fmt: skip
    """Launches a kernel.

    Args:
        arguments: tensors, parts of `buffers`, and numbers.
        extra: options of the launch itself, for Triton.
        special: `specialisation` of the arguments, where that is known.

    Raises:
        NotCompiled: if it cannot be compiled for the device: names program, config and device.
        Errors of the launch itself, as they are, with a note on the shape and the config.
    """
    try:
        compiled = launched(kernel, grid, arguments, constants, config, extra, buffers, special)
    except NotCompiled:
        raise
    except Exception as error:
        error.add_note(f"in {kernel.__name__} with {config}, {shape}")
        raise
    if _watching is not None and compiled is not None:
        needs = compiled.n_regs, compiled.n_spills, compiled.metadata.shared
        _watching.append(Compiled(kernel.__name__, *needs))
