"""The store of tuned choices, and that launches look there: without a device, all of it."""

import dataclasses
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deqfusion.kernels import interpreted, launch, solves, tuning
from deqfusion.kernels.config import Config, SolveOptions
from deqfusion.kernels.cost import default_config
from deqfusion.kernels.layout import Layout
from deqfusion.kernels.tuning import Entry, Host, Problem, Timed
from tests.kernels.problems import Problem as Small

DEVICE = "NVIDIA Imaginary 9000"
COOPERATIVE = Config("cooperative", 32, 64, 4, 3)
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="of CPU tensors")


def entry(config=COOPERATIVE, device=DEVICE, **changes):
    kind = {"solve": "modality", "dim": 500, "groups": 4, "modalities": 3,
            "precision": "tf32x3+low", "memory": 5, "threads": 0, "rows": 512}  # fmt: skip
    best = Timed(config, 5, True, 1e-4, 9e-5, 2e-4, 8e-5)
    return Entry(
        Problem(**{**kind, **changes}), best, None, best, 9e-4, 1e-3, device, "570.1", "2.13.0",
        "3.7.1", "2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def looked_up(rows=512, device=DEVICE, **changes):
    problem = dataclasses.asdict(entry(**changes).problem)
    return tuning.lookup(device, **{**problem, "rows": rows})


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """An empty store of one's own; nothing was said or refused so far."""
    monkeypatch.setenv("DEQFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning, "_reported", set())
    monkeypatch.setattr(launch, "_refused", set())
    monkeypatch.setattr(launch, "_told", False)
    tuning.forget()
    yield tuning.user_file(DEVICE)
    tuning.forget()


def test_what_is_saved_is_read(store):
    host = entry(Host(0.9), solve="host", precision="float32")
    host = dataclasses.replace(host, runner_up=host.best, default=None)
    tuning.save([entry(), host], store)
    assert tuning.read(store) == [host, entry()]
    assert store.name == "nvidia-imaginary-9000.json"
    text = store.read_text()
    assert text.endswith("}\n")
    # For people: a field a line.
    assert '\n     "schedule": "cooperative",\n' in text
    assert sorted(p.name for p in store.parent.iterdir()) == [f".{store.name}.lock", store.name]


def test_results_are_seen_at_once_by_the_process_that_saved_them(store):
    assert looked_up() is None
    tuning.save([entry()], store)
    assert looked_up() == COOPERATIVE
    tuning.save([entry(Config("row"))], store)
    assert looked_up() == Config("row")
    assert tuning.in_force(DEVICE) == [(store, 1)]
    assert looked_up(device="another") is None
    for name, other in (
        ("solve", "fusion"), ("dim", 512), ("groups", 2), ("modalities", 2), ("precision", "tf32"),
        ("memory", 4), ("threads", 1),
    ):  # fmt: skip
        assert looked_up(**{name: other}) is None


def test_nearest_bucket_in_logarithms(store):
    few, many = Config("row"), Config("step", 64)
    tuning.save([entry(few, rows=16), entry(many, rows=1024)], store)
    for rows, expected in ((4, few), (16, few), (64, few), (256, many), (1024, many), (4096, many)):
        assert looked_up(rows) == expected
    tuning.save([entry(many, rows=64)], store)
    assert [looked_up(rows) for rows in (31, 32, 33)] == [few, few, many]
    assert [tuning.bucket(rows) for rows in (0, 1, 3, 5, 6, 612, 1 << 30)] == [
        1, 1, 4, 4, 8, 512, 1 << 30,
    ]  # fmt: skip


def test_nothing_is_known_of_rows_that_are_far_off(store):
    """Within a factor of 4, by buckets: 5792 rows are in that of 4096, and 5793 are not."""
    tuning.save([entry(rows=1024)], store)
    for rows in (182, 256, 4096, 5792):
        assert looked_up(rows) == COOPERATIVE
    for rows in (0, 1, 181, 5793, 8192, 1 << 20):
        assert looked_up(rows) is None


def test_the_users_entries_win_over_those_shipped(store):
    shipped = tuning.SHIPPED / store.name
    tuning.save([entry(Config("row")), entry(Config("step"), rows=16)], shipped)
    assert looked_up(512) == Config("row")
    tuning.save([entry()], store)
    assert looked_up(512) == COOPERATIVE
    assert looked_up(16) == Config("step")
    assert tuning.in_force(DEVICE) == [(shipped, 2), (store, 1)]


def changed(**changes):
    value = {"format": "deqfusion-tuned", "version": 2,
             "entries": [dataclasses.asdict(entry())]}  # fmt: skip
    for path, new in changes.items():
        *names, last = path.split("__")
        at = value["entries"][0] if names or last in value["entries"][0] else value
        for name in names:
            at = at[name]
        at[last] = new
    return json.dumps(value)


BROKEN = {
    "empty": ("", "is not JSON"),
    "cut": (changed()[:-20], "is not JSON"),
    "binary": ("\x00\xff", "is not JSON"),
    "nested": ("[" * 100_000, "is not JSON"),
    "list": ("[]", "expected a JSON object"),
    "foreign": ('{"configs": {}}', "expected a JSON object"),
    "newer": (changed(version=3), "got version 3, expected 2"),
    "older": (changed(version=1), "got version 1, expected 2"),
    "unknown": (changed(problem__colour="red"), "problem: got solve"),
    "missing": (changed(best__config={}), "best.config: got"),
    "flag": (changed(best__memory=True), "best.memory: got True"),
    "text": (changed(problem__dim="500"), "problem.dim: got '500'"),
    "rows": (changed(problem__rows=500), "rows: got 500, expected a power of two"),
    "tile": (changed(best__config__rows=1 << 20), "config.rows: got"),
    "schedule": (changed(best__config__schedule="fast"), "expected one of row"),
    "nan": (changed(best__seconds=float("nan")), "best.seconds: got nan"),
    "device": (changed(device="another"), "got an entry of 'another'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_are_not_usable(case, store, caplog):
    """Said once, ignored, and set aside rather than overwritten."""
    text, message = BROKEN[case]
    store.parent.mkdir(parents=True)
    store.write_text(text, encoding="latin-1")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert looked_up() is None
            tuning.forget()
        assert tuning.in_force(DEVICE) == []
    (record,) = caplog.records
    assert record.name == "deqfusion.kernels.tuning"
    assert message in record.getMessage()
    assert str(store) in record.getMessage()
    tuning.save([entry()], store)
    assert looked_up() == COOPERATIVE
    aside = store.with_name(f"{store.name}.bad")
    assert aside.read_text(encoding="latin-1") == text
    # A second one has a name of its own.
    store.write_text("")
    tuning.save([entry()], store)
    assert aside.read_text(encoding="latin-1") == text
    assert store.with_name(f"{store.name}.bad1").read_text() == ""


def test_a_folder_in_place_of_the_file(store, caplog):
    store.mkdir(parents=True)
    assert looked_up() is None
    assert "cannot be read" in caplog.text
    with pytest.raises(IsADirectoryError, match="expected a file or none"):
        tuning.prepare(store)


def test_a_save_that_fails_leaves_the_file_as_it_was(store, monkeypatch):
    tuning.save([entry()], store)
    before = store.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tuning.save([entry(Config("row"))], store)
    assert store.read_text() == before
    assert sorted(p.name for p in store.parent.iterdir()) == [f".{store.name}.lock", store.name]


@pytest.mark.skipif(os.name != "posix", reason="of modes as POSIX has them")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_results_are_for_those_who_may_read_the_folder(mask, mode, store):
    before = os.umask(mask)
    try:
        tuning.save([entry()], store)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert store.stat().st_mode & 0o777 == mode


def test_a_file_that_may_not_be_read_is_left_alone(store, monkeypatch, caplog):
    """It may be whole: nothing is set aside, and nothing written in its place."""
    tuning.save([entry()], store)
    before = store.read_text()
    tuning.forget()
    inner = tuning.Path.read_bytes

    def denied(path):
        if path == store:
            raise PermissionError(13, "Permission denied")
        return inner(path)

    with monkeypatch.context() as patch:
        patch.setattr(tuning.Path, "read_bytes", denied)
        for _ in range(2):
            assert looked_up() is None
            tuning.forget()
        assert caplog.text.count("cannot be read (Permission denied); ignored") == 1
        with pytest.raises(PermissionError, match="Permission denied"):
            tuning.save([entry(Config("row"), rows=16)], store)
    assert store.read_text() == before
    assert sorted(p.name for p in store.parent.iterdir()) == [f".{store.name}.lock", store.name]


@pytest.mark.parametrize("lock", [False, True])
def test_a_file_that_may_not_be_read_is_refused_beforehand(lock, store, monkeypatch):
    tuning.save([entry()], store)
    denied = store.with_name(f".{store.name}.lock") if lock else store
    inner = open

    def opened(file, *rest):
        if file == denied:
            raise PermissionError(13, "Permission denied")
        return inner(file, *rest)

    monkeypatch.setattr(tuning, "open", opened, raising=False)
    with pytest.raises(PermissionError, match=rf"{denied.name}: cannot be \w+ \(Permission denied"):
        tuning.prepare(store)


def test_side_by_side_nobody_loses_results(store):
    """Ten entries of each of four processes that save them one by one."""
    program = """
import sys
from tests.kernels.test_tuning import entry
from deqfusion.kernels import tuning
start, path = int(sys.argv[1]), tuning.user_file("NVIDIA Imaginary 9000")
for number in range(10):
    tuning.save([entry(dim=4 * (10 * start + number + 1))], path)
"""
    root = str(os.path.abspath(f"{__file__}/../../.."))
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(start)], cwd=root)
        for start in range(4)
    ]
    assert [process.wait() for process in running] == [0] * 4
    assert [e.problem.dim for e in tuning.read(store)] == [4 * (k + 1) for k in range(40)]


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {}, "home/.cache/deqfusion"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/deqfusion"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "home/Library/Caches/deqfusion"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/deqfusion"),
        ("linux", {"DEQFUSION_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own"),
    ],
)
def test_where_results_are_kept(system, variables, expected, monkeypatch):
    for name in ("DEQFUSION_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tuning.sys, "platform", system)
    monkeypatch.setattr(tuning.Path, "home", lambda: tuning.Path("home"))
    assert tuning.cache_folder() == tuning.Path(expected)


def test_without_a_home_there_is_no_file_of_the_users(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DEQFUSION_CACHE")
    monkeypatch.setattr(tuning.Path, "home", homeless)
    assert looked_up() is None
    with pytest.raises(OSError, match="set DEQFUSION_CACHE"):
        tuning.user_file(DEVICE)


# --- launches ------------------------------------------------------------------------------------

OPTIONS = SolveOptions()


def plan(rows=3, config=None, dim=16, groups=1, **known):
    known = {"solve": "modality", "modalities": 2, **known}
    device = torch.device("cpu")
    return launch.Plan.new(Layout(dim, groups), 2, rows, OPTIONS, config, device, **known)


def small_entry(config, **changes):
    kind = {"dim": 16, "groups": 1, "modalities": 2, "precision": "ieee", "rows": 4}
    name = launch.device_name(torch.device("cpu"))
    return entry(config, name, **{**kind, **changes})


@pytest.fixture
def tuned():
    def save(config, **changes):
        found = small_entry(config, **changes)
        tuning.save([found], tuning.user_file(found.device))

    return save


@needs_interpreter
def test_precedence(tuned):
    default = default_config(3, Layout(16, 1), 2, 0, adjoint=False, capability=0)
    assert plan().config == default
    assert not plan().tuned
    tuned(COOPERATIVE)
    assert plan().config == COOPERATIVE
    assert plan().tuned
    # With more groups programs would wait for one another, which the interpreter cannot.
    tuned(COOPERATIVE, groups=2)
    assert not plan(groups=2).tuned
    assert plan(solve="modality adjoint").config != COOPERATIVE
    assert plan(solve="fusion").config != COOPERATIVE
    with launch.using("step"):
        assert plan().config.schedule == "step"
        assert plan(config=Config(rows=64)).config == Config(rows=64)
        assert not plan().tuned
    assert plan(config=Config(rows=64)).config == Config(rows=64)


@needs_interpreter
def test_a_solve_runs_as_tuned(tuned, monkeypatch):
    problem = Small.new()
    ran = []
    inner = launch.launch

    def recording(kernel, grid, arguments, constants, config, *rest):
        ran.append(config)
        return inner(kernel, grid, arguments, constants, config, *rest)

    monkeypatch.setattr(launch, "launch", recording)

    def solve():
        ran.clear()
        return solves.solve_modality(problem.features, problem.modality, 2, False, OPTIONS)

    expected = solve()
    assert set(ran) == {plan(groups=2).config}
    tuned(Config("row", 32, 16, 4, 1), groups=2)
    got = solve()
    assert set(ran) == {Config("row", 32, 16, 4, 1)}
    torch.testing.assert_close(got.state, expected.state)


@needs_interpreter
def test_a_tuned_config_that_does_not_compile_is_left_alone(tuned, caplog):
    """Once: the next solve does not try it again."""
    bad = Config("cooperative", 512)
    tuned(bad)
    tried = []

    def run(given):
        tried.append(given.config)
        if given.config.rows == 512:
            # As if its programs were too many, too.
            kind = launch.NotResident if given.config.schedule != "row" else launch.NotCompiled
            raise kind("out of shared memory")
        return given.config

    assert launch.solved(plan(), run) == plan().config
    assert [(config.schedule, config.rows) for config in tried] == [
        ("cooperative", 512), ("row", 512), ("row", 16),
    ]  # fmt: skip
    assert plan().config != bad
    assert caplog.text.count("out of shared memory") == 1
    with pytest.raises(launch.NotCompiled):
        launch.solved(plan(config=Config(rows=512, schedule="row")), run)


def test_a_default_on_a_gpu_is_said_once(monkeypatch, caplog):
    """And never of what is interpreted, nor where there is nothing to solve."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(launch, "device_name", lambda device: DEVICE)
    monkeypatch.setattr(launch, "capability", lambda device: 90)
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    options = SolveOptions(precision="tf32x3", ladder=True)

    def new(rows, device, config=None):
        layout = Layout(500, 4)
        return launch.Plan.new(layout, 3, rows, options, config, device, "modality", 3)

    with caplog.at_level(logging.WARNING):
        new(512, torch.device("cpu"))
        new(0, device)
        new(512, device, Config())
        with launch.using("row"):
            new(512, device)
        assert not caplog.records
        new(512, device)
        new(64, device)
    (record,) = caplog.records
    assert record.name == "deqfusion.kernels.launch"
    said = "nothing tuned for the modality of 512 rows of 500 with memory 5, so"
    assert said in record.getMessage()
    assert DEVICE in record.getMessage()
    assert "deqfusion autotune" in record.getMessage()
    tuning.save([entry()], tuning.user_file(DEVICE))
    assert new(600, device).config == COOPERATIVE


def test_the_first_look_up_touches_no_tensor(store, caplog):
    """Under a graph's capture it is as good as anywhere: it reads a file, and that is all."""
    tuning.save([entry()], store)
    tuning.SHIPPED.mkdir()
    (tuning.SHIPPED / store.name).write_text("damaged")
    ran = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.append(function)
            return function(*args, **(kwargs or {}))

    with Recording():
        assert looked_up() == COOPERATIVE
        assert not ran
        torch.zeros(1)
    assert len(ran) == 1
    assert "is not JSON" in caplog.text
    # Nor can it call a device: it knows nothing of torch.
    assert not [name for name, value in vars(tuning).items() if value is torch or name == "triton"]


def test_looking_up_reads_no_file_twice(store, monkeypatch):
    tuning.save([entry()], store)
    assert looked_up() == COOPERATIVE

    def never(*_):
        raise AssertionError("read")

    monkeypatch.setattr(tuning, "read", never)
    for rows in (512, 512, 2048, 128):
        assert looked_up(rows) == COOPERATIVE
    assert looked_up(3) is None


def test_what_programs_need_is_watched(monkeypatch):
    """As the compiler reports it; the interpreter has nothing to report."""

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            return lambda *_, **__: self.compiled

    class Binary:
        n_regs, n_spills = 128, 4
        metadata = type("Metadata", (), {"shared": 4096})

    kernel = Kernel()
    with launch.watching() as seen:
        for kernel.compiled in (Binary(), None):
            launch.launch(kernel, (1,), (), {}, Config(), "some rows")
    assert seen == [launch.Compiled("kernel", 128, 4, 4096)]
    kernel.compiled = Binary()
    launch.launch(kernel, (1,), (), {}, Config(), "some rows")
    assert len(seen) == 1
