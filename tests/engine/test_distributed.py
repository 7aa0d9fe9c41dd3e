"""Two processes on one machine: the curve of one, and what happens when one of them is killed."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from deqfusion.cli import main
from deqfusion.engine.distributed import Process
from deqfusion.engine.runs import read_tensors

# 32 rows to train on: batches of 11, 11 and 10, which two processes share unevenly.
_OPTIONS = ["--dim", "16", "--num-groups", "1", "--modalities", "1,2", "--tol", "1e-4"]
_OPTIONS += [
    "--batch-size",
    "11",
    "--jacobian-weight",
    "0",
    "--learning-rate",
    "1e-2",
    "--device",
    "cpu",
    "--quiet",
]
# Sums in another order: losses agree to rounding, and a row at the tolerance may take a step more.
_TOLERANCES = {
    "train_loss": {"rel": 1e-5},
    "validation_loss": {"rel": 1e-5},
    "validation_accuracy": {"rel": 1e-9},
    "steps": {"abs": 0.1},
}


def _arguments(folder, out, epochs, *more):
    options = ["--data-dir", str(folder), "--out", str(out), "--epochs", str(epochs)]
    return ["train", "rosmap", *options, *_OPTIONS, *more]


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(arguments, world=2, program=("-m", "deqfusion.cli")):
    """Start the processes as torchrun does."""
    port = str(_free_port())
    processes = []
    for rank in range(world):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(world),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        command = [sys.executable, *program, *arguments]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def _curve(out):
    with (out / "log.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_have_the_curve_of_one(folder, tmp_path, strategy):
    assert main(_arguments(folder, tmp_path / "one", 3)) == 0
    processes = start(_arguments(folder, tmp_path / "two", 3, "--strategy", strategy))
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # The first process alone speaks and writes.
    assert "accuracy" in outputs[0][0]
    assert outputs[1][0] == ""
    one, two = _curve(tmp_path / "one"), _curve(tmp_path / "two")
    assert len(one) == len(two) == 3
    # Longer runs drift apart, where a row is at its tolerance and takes a step more in one of them.
    for expected, got in zip(one, two, strict=True):
        for name, tolerance in _TOLERANCES.items():
            assert float(got[name]) == pytest.approx(float(expected[name]), **tolerance), name
    assert float(one[-1]["train_loss"]) != pytest.approx(float(one[0]["train_loss"]), rel=1e-2)
    models = [
        read_tensors(tmp_path / name / "model.safetensors", "model") for name in ("one", "two")
    ]
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("strategy", "lost"), [("ddp", 1), ("fsdp", 0)])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(folder, tmp_path, strategy, lost):
    out = tmp_path / "out"
    epochs = 300
    processes = start(_arguments(folder, out, epochs, "--strategy", strategy))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((out / "log.csv").exists() and len(_curve(out)) > 3):
        time.sleep(0.05)
    processes[lost].send_signal(signal.SIGKILL)
    _, errors = processes[1 - lost].communicate(timeout=120)
    processes[lost].communicate()
    assert processes[1 - lost].returncode == 1
    said = [line for line in errors.splitlines() if line.startswith("deqfusion: ")]
    assert len(said) == 1, errors
    assert f"process {1 - lost} of 2: another process has ended or cannot be reached" in said[0]
    assert f"--resume continues {out}" in said[0]
    kept = len(read_tensors(out / "checkpoint.safetensors", "checkpoint")["history"])
    assert 3 < kept < epochs
    # A single process goes on with it.
    before = _curve(out)[:kept]
    again = _arguments(folder, out, kept + 2, "--resume", "--strategy", "single")
    assert main(again) == 0
    assert _curve(out)[: len(before)] == before
    assert len(_curve(out)) == kept + 2


# In place of the training, a collective whose tensor gloo's thread releases, slowly and in Python,
# while the program ends: by itself, refused, or by an error of the code.
_SLOW_RELEASE = """
import atexit, time
import torch, torch.distributed as dist
from deqfusion.cli import run
from deqfusion.engine import command

class Slow:
    def __del__(self):
        for _ in range(300):
            time.sleep(0.01)

def train_loaded(recipe, loaded, model, run, process, progress):
    global held
    held = dist.group.WORLD  # As caches of DTensor do.
    dist.barrier()
    if process.first:
        time.sleep(0.5)
    tensor = torch.ones(1)
    tensor.released_with = Slow()
    work = dist.all_reduce(tensor, async_op=True)
    del tensor
    if process.first:
        work.wait()
    else:
        del work
        time.sleep(1)
    {ending}

command.train_loaded = train_loaded
command._print_metrics = lambda *args: print("metrics", end="")
atexit.register(print, "; at exit", end="")
run()
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [("return {}", 0), ("raise ValueError('refused')", 2), ("raise KeyError('fault')", 1)],
)
def test_processes_end_while_gloo_still_releases_a_tensor(folder, tmp_path, ending, code):
    program = ("-c", _SLOW_RELEASE.replace("{ending}", ending))
    arguments = _arguments(folder, tmp_path / "out", 1, "--strategy", "ddp")
    processes = start(arguments, program=program)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [code, code], outputs
    assert [out for out, _ in outputs] == [
        "metrics; at exit" if code == 0 else "; at exit",
        "; at exit",
    ]
    for _, errors in outputs:
        lines = errors.splitlines()
        if code == 1:
            assert "Traceback" in lines[0]
            assert "KeyError: 'fault'" in lines[-1]
        else:
            assert lines == (["deqfusion: error: refused"] if code else [])


def test_a_strategy_needs_its_processes(folder, tmp_path, capsys, monkeypatch):
    assert main(_arguments(folder, tmp_path / "out", 1, "--strategy", "ddp")) == 2
    assert "strategy: got 'ddp' in a single process, expected to be" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(_arguments(folder, tmp_path / "out", 1)) == 2
    assert "strategy: got 'single' in one of 2 processes, expected" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(_arguments(folder, tmp_path / "out", 1, "--device", "cuda")) == 2
    assert "device: got 'cuda', but torch finds none here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("count", "least"), [*((count, 1) for count in (1, 2, 3, 7)), (2, 2), (3, 2), (5, 2), (7, 2)]
)
def test_shares_of_a_batch_have_its_mean(count, least):
    rows, world = torch.arange(count) + 1, 3
    mean = 0.0
    for rank in range(world):
        own, weight = Process(torch.device("cpu"), rank, world, "ddp").share(rows, least)
        assert len(own) >= least
        mean += weight * own.double().mean().item() / world
    assert mean == pytest.approx(rows.double().mean().item())
