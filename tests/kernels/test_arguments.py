"""What a launch is given, and that a second launch of the same goes past Triton."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import itertools

from deqfusion.kernels import compiled, launch
from deqfusion.kernels.arguments import (
    ALIGNED,
    PACKED,
    SCRATCH,
    Constants,
    Part,
    Scratch,
    specialisation,
    tensors,
)
from deqfusion.kernels.config import Config, SolveOptions
from deqfusion.kernels.layout import Layout

CPU = torch.device("cpu")


def test_parts_of_a_buffer():
    flat = torch.arange(64, dtype=torch.float32)
    part = Part(PACKED, 64, (2, 3, 4))
    whole = part.tensor((flat, flat))
    assert torch.equal(whole, flat[16:40].view(2, 3, 4))
    assert whole.data_ptr() == flat.data_ptr() + part.offset
    for row, expected in zip(part.rows(), whole, strict=True):
        assert torch.equal(row.tensor((flat, flat)), expected)
    assert Part(SCRATCH, 128, (0, 3), torch.bfloat16).tensor((flat,)).shape == (0, 3)
    mixed = tensors((flat, part, 3), (flat, flat))
    assert mixed[0] is flat
    assert torch.equal(mixed[1], whole)
    assert mixed[2] == 3


def test_scratch_does_not_overlap_and_is_known_the_next_time():
    known = [()]
    asked = [((3, 5), torch.float32), ((), torch.int32), ((7,), torch.bfloat16), ((0,), torch.int8)]
    first = Scratch(known)
    parts = [first.part(*each) for each in asked]
    assert all(part.offset % ALIGNED == 0 for part in parts)
    assert all(a.end <= b.offset for a, b in itertools.pairwise(parts))
    flat = first.allocate(CPU)
    assert flat.numel() * 4 >= parts[-1].end
    for i, part in enumerate(parts):
        part.tensor((flat,)).fill_(i)
    assert [int(part.tensor((flat,)).float().sum()) for part in parts] == [0, 1, 14, 0]
    again = Scratch(known)
    assert all(again.part(*each) is part for each, part in zip(asked, parts, strict=True))
    # Another solve may ask for something else.
    other = Scratch(known)
    assert other.part(*asked[0]) is parts[0]
    assert other.part((9,), torch.float32) not in parts
    assert other.allocate(CPU).numel() * 4 >= parts[1].offset + 36


def test_equal_constants_have_one_number():
    one = Constants({"A": 1, "B": "x"})
    assert one.number == Constants({"A": 1, "B": "x"}).number
    others = Constants({"A": 2, "B": "x"}), Constants({"A": 1, "C": "x"})
    assert len({one.number, *(each.number for each in others)}) == 3


def test_what_triton_compiles_anew_for():
    x = torch.zeros(40)
    part, buffer = Part(SCRATCH, 32, (4,)), torch.zeros(64)
    base, addresses = specialisation((x, part, 5, 0.5), (buffer,))
    assert addresses == [x.data_ptr(), buffer.data_ptr() + 32, 5, 0.5]
    # Of another size or value it is the same program, and it is again for the same kind of thing.
    assert specialisation((x[4:], part, 7, 2.5), (torch.zeros(99),))[0] == base
    other = [
        ((x[1:], part, 5, 0.5), (buffer,)), ((x.to(torch.bfloat16), part, 5, 0.5), (buffer,)),
        ((x, part, 16, 0.5), (buffer,)),
        ((x, part, 1, 0.5), (buffer,)), ((x, part, 1 << 40, 0.5), (buffer,)),
        ((x, part, 5, 1), (buffer,)), ((x, part, 5, 0.5), (buffer[1:],)),
        ((x, Part(SCRATCH, 32, (4,), torch.int32), 5, 0.5), (buffer,)),
    ]  # fmt: skip
    kinds = [tuple(specialisation(*each)[0]) for each in other]
    assert len({tuple(base), *kinds}) == len(other) + 1


class Program:
    """A compiled program that notes how it is launched."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *given, stream: self.launches.append((grid, given, stream))


class Kernel:
    arg_names = ("x", "y", "n", "SIZE", "PHASE")

    def __init__(self):
        self.compiled = []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.compiled.append((Program(), arguments, options))
            return self.compiled[-1][0]

        return run


def test_the_second_launch_goes_past_triton(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 77)
    monkeypatch.setattr(compiled, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(compiled, "interpreted", lambda: False)
    monkeypatch.setattr(compiled, "_programs", {})
    kernel, buffer, x = Kernel(), torch.zeros(64), torch.zeros(8)

    def run(n, config=Config(), extra=compiled.NOTHING, x=x):  # noqa: B008
        given = x, Part(SCRATCH, 64, (4,)), n
        constants = Constants({"SIZE": 4, "PHASE": 0})
        return compiled.launched(kernel, (2, 3), given, constants, config, extra, (buffer,))

    program = run(5)
    ((_, arguments, options),) = kernel.compiled
    assert torch.is_tensor(arguments[1])
    assert options == {"SIZE": 4, "PHASE": 0, "num_warps": 8, "num_stages": 2}
    assert run(7) is program
    expected = x.data_ptr(), buffer.data_ptr() + 64, 7, 4, 0
    assert program.launches == [((2, 3, 1), expected, 77)]
    # What Triton compiles anew for goes to Triton, and so does a cooperative launch.
    for changed in (
        {"n": 16}, {"n": 5, "x": torch.zeros(9)[1:]}, {"n": 5, "config": Config(warps=4)},
        {"n": 5, "extra": compiled.COOPERATIVE},
    ):  # fmt: skip
        count = len(kernel.compiled)
        assert run(**changed) is not program
        assert len(kernel.compiled) == count + 1
    assert kernel.compiled[-1][2]["launch_cooperative_grid"] is True


def test_a_cooperative_launch_looks_at_its_arguments_once(monkeypatch):
    """At small sizes the host is the bound: what tells which program fits tells which to launch."""
    counts = []

    def counted(*arguments):
        counts.append(len(arguments[0]))
        return specialisation(*arguments)

    monkeypatch.setattr(launch, "specialisation", counted)
    monkeypatch.setattr(compiled, "specialisation", counted)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(compiled, "interpreted", lambda: False)
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 77)
    monkeypatch.setattr(compiled, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(compiled, "_programs", {})
    held = []

    class Held(dict):
        def __contains__(self, key):
            held.append(key)
            return True

        def __getitem__(self, key):
            return 64

    monkeypatch.setattr(compiled, "_held", Held())
    plan = launch.Plan(
        Layout(32, 2), 1, 40, SolveOptions(), Config("cooperative"), torch.device("cpu"),
        "fusion", 1,
    )  # fmt: skip
    kernel, x = Kernel(), torch.zeros(8)
    kernel.__name__ = "some_kernel"
    for _ in range(2):
        plan.run(kernel, (x, plan.empty(4), x, x), {"SIZE": 4}, (1, 3, 1), x)
    assert counts == [4 + len(plan.numbers())] * 2
    assert held[0] == held[1]
    (((grid, _, _)),) = kernel.compiled[0][0].launches
    assert grid == (3, 1, 2)


def test_scratch_is_fp32_whatever_the_default_dtype_is():
    scratch = Scratch([()])
    scratch.part((3, 5), torch.float32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        buffer = scratch.allocate(torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    assert buffer.dtype == torch.float32
    assert buffer.numel() >= 15
