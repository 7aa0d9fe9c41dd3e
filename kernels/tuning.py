"""Tuned choices: a JSON file per device, shipped ones and the user's, and what to take from them.

    kernels/configs/SLUG.json    shipped with the package, for devices that were measured
    CACHE/configs/SLUG.json      the user's, which win

SLUG is the device's name in lower case with dashes. CACHE is `DEQFUSION_CACHE`, or the platform's
folder for caches: `XDG_CACHE_HOME` or ~/.cache, ~/Library/Caches, %LOCALAPPDATA%, and in it
`deqfusion`. An entry says what was solved (`Problem`), the best choice and the runner-up with
times and spreads, and on what they were measured. Rows are kept in buckets, the powers of two; a
lookup takes the nearest bucket, in logarithms, within a factor of 4 in rows: farther off nothing is
known, and the cost model chooses.

Files are read once per process, at the first lookup, or again after `save` or `forget`. Nothing of
it touches a device or allocates a tensor, so that under a CUDA graph's capture it is as good as
anywhere else. One that is damaged, of
something else or of a newer version is reported once and ignored, and set aside rather than
overwritten when results are saved. One that the system does not let read is reported once and
ignored as well, but left where it is: it may be whole, and somebody else's. Saving merges under a
lock and moves a whole file into place: tuners that run side by side keep each other's results, and
readers never see half a file.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from .config import MAX_PADDED, SCHEDULES, Config

__all__ = [
    "SOLVES",
    "Entry",
    "Host",
    "Problem",
    "Timed",
    "Unusable",
    "bucket",
    "cache_folder",
    "forget",
    "generation",
    "host_name",
    "in_force",
    "lookup",
    "prepare",
    "read",
    "save",
    "slug",
    "user_file",
]

logger = logging.getLogger(__name__)

FORMAT, VERSION = "deqfusion-tuned", 2
SHIPPED = Path(__file__).resolve().parent / "configs"
SOLVES = ("modality", "fusion", "modality adjoint", "fusion adjoint")
"""What the GPU programs solve; "host" stands for all of them by the CPU implementation."""

MOST_ROWS = 1 << 40
FARTHEST = 4
"""Factor in rows up to which an entry says anything."""

_reported: set[Path] = set()
_generation = 0


@dataclass(frozen=True)
class Host:
    """Choices of the CPU implementation.

    Args:
        compact_below: rows that ended leave the work when fewer than this share still run.
    """

    compact_below: float


Choice = Config | Host


@dataclass(frozen=True)
class Problem:
    """What an entry is for.

    Attributes:
        solve: one of `SOLVES`, or "host".
        dim, groups, modalities: d, G, N.
        precision: `SolveOptions.products`; for "host" the dtype.
        memory: evaluations that the solver keeps, on which registers and bytes depend:
            `SolveOptions.slots`; for "host" m.
        threads: of torch, within operators, for "host"; else 0.
        rows: R; of an entry its bucket.
    """

    solve: str
    dim: int
    groups: int
    modalities: int
    precision: str
    memory: int
    threads: int
    rows: int


@dataclass(frozen=True)
class Timed:
    """A choice and its times.

    Attributes:
        config: the choice.
        memory, ladder: of the solver that it ran with.
        seconds: median time of a solve to the verified residual; on a GPU with a cold L2 cache.
        p20, p80: percentiles of the same samples.
        warm: the median with a warm L2 cache.
    """

    config: Choice
    memory: int
    ladder: bool
    seconds: float
    p20: float
    p80: float
    warm: float


@dataclass(frozen=True)
class Entry:
    """The best choice for a problem, and where it comes from.

    Attributes:
        problem, best: what is solved, and how: the default where nothing was faster by more than
            the noise.
        runner_up, default: the second best, and what would have run untuned; None: none was timed.
        residual: largest relative residual of the answer in fp64 (of an adjoint: error of dL/dx).
        tolerance: what it was to be.
        device, driver, torch, triton, date: measured on, with and when.
    """

    problem: Problem
    best: Timed
    runner_up: Timed | None
    default: Timed | None
    residual: float
    tolerance: float
    device: str
    driver: str
    torch: str
    triton: str
    date: str


class Unusable(ValueError):
    """A file that is not of this format; the message says what was got and expected."""


# --- where ---------------------------------------------------------------------------------------


def slug(device: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"


@functools.cache
def host_name() -> str:
    """The processor's name, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n"):
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where the user's results are kept.

    Raises:
        OSError: if there is no `DEQFUSION_CACHE` and the user has no home.
    """
    asked = os.environ.get("DEQFUSION_CACHE")
    if asked:
        return Path(asked).expanduser()
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(f"no folder for caches ({error}): set DEQFUSION_CACHE to one") from error
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "deqfusion"


def user_file(device: str) -> Path:
    """The user's file of a device; raises OSError as `cache_folder` does."""
    return cache_folder() / "configs" / f"{slug(device)}.json"


def _files(device: str) -> list[Path]:
    """In the order of their weight, the user's last."""
    files = [SHIPPED / f"{slug(device)}.json"]
    with suppress(OSError):
        files.append(user_file(device))
    return files


# --- reading -------------------------------------------------------------------------------------

Check = tuple[Callable[[Any], bool], str]


def _whole(low: int, high: int) -> Check:
    return lambda v: type(v) is int and low <= v <= high, f"a whole number from {low} to {high}"


def _number(low: float, high: float) -> Check:
    # A comparison with NaN is false.
    return lambda v: type(v) in (int, float) and low <= v <= high, f"a number from {low} to {high}"


def _power(low: int, high: int) -> Check:
    kind = f"a power of two from {low} to {high}"
    return lambda v: type(v) is int and low <= v <= high and not v & (v - 1), kind


def _one_of(*values: str) -> Check:
    return lambda v: isinstance(v, str) and v in values, f"one of {', '.join(values)}"


_TEXT: Check = (lambda v: isinstance(v, str) and 0 < len(v) <= 200, "a text")
_FLAG: Check = (lambda v: type(v) is bool, "true or false")
_OBJECT: Check = (lambda v: isinstance(v, dict), "an object")
_OBJECT_OR_NULL: Check = (lambda v: v is None or isinstance(v, dict), "an object or null")
_SECONDS = _number(0, 1e6)
_PROBLEM = {
    "solve": _one_of(*SOLVES, "host"), "dim": _whole(1, 1 << 20), "groups": _whole(1, 1 << 20),
    "modalities": _whole(1, 1 << 20), "precision": _TEXT, "memory": _whole(0, 1 << 20),
    "threads": _whole(0, 1 << 20), "rows": _power(1, MOST_ROWS),
}  # fmt: skip
_CONFIG = {
    "schedule": _one_of(*SCHEDULES), "rows": _power(16, 1024), "depth": _power(16, MAX_PADDED),
    "warps": _power(1, 32), "stages": _whole(1, 16),
}  # fmt: skip
_HOST = {"compact_below": _number(0, 1)}
_TIMED = {
    "config": _OBJECT, "memory": _whole(0, 1 << 20), "ladder": _FLAG, "seconds": _SECONDS,
    "p20": _SECONDS, "p80": _SECONDS, "warm": _SECONDS,
}  # fmt: skip
_ENTRY = {
    "problem": _OBJECT, "best": _OBJECT, "runner_up": _OBJECT_OR_NULL, "default": _OBJECT_OR_NULL,
    "residual": _number(0, 1e6), "tolerance": _number(0, 1e6), "device": _TEXT, "driver": _TEXT,
    "torch": _TEXT, "triton": _TEXT, "date": _TEXT,
}  # fmt: skip


def _checked(value: Any, fields: Mapping[str, Check], where: str) -> dict[str, Any]:
    """`value` as an object of exactly these fields."""
    if not isinstance(value, dict) or value.keys() != fields.keys():
        got = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise Unusable(f"{where}: got {got[:100]}, expected an object of {', '.join(fields)}")
    for name, (accepts, expected) in fields.items():
        if not accepts(value[name]):
            raise Unusable(f"{where}.{name}: got {value[name]!r:.100}, expected {expected}")
    return value


def _timed(value: Any, host: bool, where: str) -> Timed:
    fields = _checked(value, _TIMED, where)
    config = _checked(fields["config"], _HOST if host else _CONFIG, f"{where}.config")
    return Timed(**{**fields, "config": Host(**config) if host else Config(**config)})


def _entry(value: Any, where: str) -> Entry:
    fields = _checked(value, _ENTRY, where)
    problem = Problem(**_checked(fields["problem"], _PROBLEM, f"{where}.problem"))
    timed = {
        name: None if fields[name] is None else _timed(
            fields[name], problem.solve == "host", f"{where}.{name}"
        )
        for name in ("best", "runner_up", "default")
    }  # fmt: skip
    return Entry(**{**fields, "problem": problem, **timed})


def read(path: Path) -> list[Entry]:
    """The entries of a file.

    Raises:
        FileNotFoundError: there is none.
        OSError: the system does not let it be read.
        Unusable: it is not of this format, of this version and of the device that its name says;
            one field that is unknown, missing or out of range is enough.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Unusable(f"is not JSON ({str(error)[:100]})") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise Unusable(f'expected a JSON object with "format": "{FORMAT}"')
    if value.get("version") != VERSION:
        raise Unusable(f"got version {value.get('version')!r:.100}, expected {VERSION}")
    if value.keys() != {"format", "version", "entries"} or not isinstance(value["entries"], list):
        raise Unusable("expected a JSON object of format, version and a list of entries")
    entries = [_entry(entry, f"entries[{i}]") for i, entry in enumerate(value["entries"])]
    for entry in entries:
        if slug(entry.device) != path.stem:
            raise Unusable(f"got an entry of {entry.device!r}, expected those of {path.stem}")
    return entries


def _usable(path: Path) -> list[Entry] | None:
    """The entries of a file; None where there is none, or one that is not usable, said once."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (Unusable, OSError) as error:
        if path not in _reported:
            _reported.add(path)
            reason = str(error)
            if isinstance(error, OSError):
                reason = f"cannot be read ({error.strerror})"
            logger.warning("%s: %s; ignored, as if it were not there", path, reason)
        return None


# --- looking up ----------------------------------------------------------------------------------


def bucket(rows: int) -> int:
    """The nearest power of two in logarithms."""
    return 1 << round(math.log2(max(rows, 1)))


@functools.lru_cache(maxsize=64)
def _table(device: str) -> dict[tuple[Any, ...], dict[int, Choice]]:
    """Choices by problem but for its rows, and by those."""
    table: dict[tuple[Any, ...], dict[int, Choice]] = {}
    for path in _files(device):
        for entry in _usable(path) or ():
            *kind, rows = asdict(entry.problem).values()
            table.setdefault(tuple(kind), {})[rows] = entry.best.config
    return table


@functools.lru_cache(maxsize=4096)
def lookup(
    device: str, solve: str, dim: int, groups: int, modalities: int, precision: str, memory: int,
    threads: int, rows: int,
) -> Choice | None:  # fmt: skip
    """The tuned choice for a problem, or None: of the nearest bucket, if that is within a factor
    of `FARTHEST` in rows.

    Args:
        device: its name.
        solve, dim, groups, modalities, precision, memory, threads, rows: as in `Problem`; rows of
            any number.

    Reads files the first time that a device is asked for, and after that nothing.
    """
    found = _table(device).get((solve, dim, groups, modalities, precision, memory, threads))
    if not found:
        return None
    nearest = min(found, key=lambda at: (abs(math.log2(at / max(rows, 1))), at))
    few, many = sorted((nearest, bucket(rows)))
    return found[nearest] if many <= FARTHEST * few else None


def forget() -> None:
    """Reads the files again at the next lookup."""
    global _generation
    _generation += 1
    lookup.cache_clear()
    _table.cache_clear()


def generation() -> int:
    """How often `forget` was called: what was looked up before is not to be relied on."""
    return _generation


def in_force(device: str) -> list[tuple[Path, int]]:
    """The files that lookups for a device use, and how many entries each has."""
    found = ((path, _usable(path)) for path in _files(device))
    return [(path, len(entries)) for path, entries in found if entries is not None]


# --- saving --------------------------------------------------------------------------------------


def prepare(path: Path) -> None:
    """Checks that `save` can read and write a file, before minutes of measuring.

    Raises:
        OSError: if not.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(f"{path.parent}: cannot be written ({error.strerror})") from error
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected a file or none")
    for file, mode in ((path, "rb"), (_lock_of(path), "r+b")):
        try:
            with suppress(FileNotFoundError), open(file, mode):
                pass
        except OSError as error:
            what = "read" if mode == "rb" else "written"
            raise type(error)(f"{file}: cannot be {what} ({error.strerror})") from error


def save(entries: Iterable[Entry], path: Path) -> None:
    """Adds entries to a file, in place of those for the same problems.

    A file that is not usable is kept beside it, with `.bad` at the end of its name.

    Raises:
        OSError: if it cannot be written, or is there and cannot be read: then it stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_lock_of(path)):
        try:
            kept = read(path)
        except FileNotFoundError:
            kept = []
        except Unusable as error:
            kept, aside = [], _free(path)
            os.replace(path, aside)
            logger.warning("%s: %s; kept as %s", path, error, aside.name)
        merged = {entry.problem: entry for entry in (*kept, *entries)}
        ordered = sorted(merged.values(), key=lambda entry: tuple(asdict(entry.problem).values()))
        value = {"format": FORMAT, "version": VERSION, "entries": [asdict(e) for e in ordered]}
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(json.dumps(value, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            # mkstemp's files are private; results are for everyone who may read the folder.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    forget()


def _free(path: Path) -> Path:
    """A name for what is set aside."""
    names = (f"{path.name}.bad{number or ''}" for number in range(1000))
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock of the system on a file, which is let go should the process end."""
    with open(path, "a+b") as file:
        _lock(file)
        # Closing the file lets it go.
        yield


def _lock(file: IO[bytes]) -> None:
    if sys.platform == "win32":
        import msvcrt

        while True:
            # Gives up after ten attempts, a second apart.
            with suppress(OSError):
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                return
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
