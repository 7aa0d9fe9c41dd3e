"""What a launch is given: parts of buffers, constants, and what of it Triton compiles anew for.

A solve needs many tensors for itself alone, and has one: its kernels take addresses in it (`Part`).
Which parts there are, and what a program is specialised on, is the same at every solve of a shape,
and is put together once: at small sizes a solve is over before a hundred such things are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNED = 512
"""Bytes, as those of tensors that PyTorch allocates on a GPU."""

SCRATCH, PACKED = 0, 1
"""Buffers of a solve: its own, and its block's packed parameters."""


class Part:
    """A contiguous part of a buffer of a launch.

    Args:
        buffer: which one; offset: bytes from its start, a multiple of 16.
        shape, dtype: of the tensor that it is.
    """

    __slots__ = ("_rows", "buffer", "dtype", "end", "offset", "shape")

    def __init__(
        self, buffer: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> None:
        self.buffer, self.offset, self.shape, self.dtype = buffer, offset, shape, dtype
        self.end = offset + math.prod(shape) * dtype.itemsize
        self._rows: tuple[Part, ...] | None = None

    def tensor(self, buffers: Sequence[Tensor]) -> Tensor:
        """The same as a tensor."""
        flat = buffers[self.buffer].view(torch.uint8)[self.offset : self.end]
        return flat.view(self.dtype).view(self.shape)

    def rows(self) -> tuple[Part, ...]:
        """Parts along the first dimension."""
        if self._rows is None:
            count, *rest = self.shape
            size = (self.end - self.offset) // max(count, 1)
            starts = [self.offset + i * size for i in range(count)]
            self._rows = tuple(Part(self.buffer, at, tuple(rest), self.dtype) for at in starts)
        return self._rows


class Scratch:
    """Parts of one buffer, in the order in which a solve asks for them.

    Args:
        known: a list of one tuple, the parts of an earlier solve that asks for the same.
    """

    __slots__ = ("_at", "_known", "_parts")

    def __init__(self, known: list[tuple[Part, ...]]) -> None:
        self._known, self._parts, self._at = known, known[0], 0

    def part(self, shape: tuple[int, ...], dtype: torch.dtype) -> Part:
        """The next part."""
        at, parts = self._at, self._parts
        self._at = at + 1
        if at < len(parts):
            part = parts[at]
            if part.shape == shape and part.dtype is dtype:
                return part
        start = -(-parts[at - 1].end // ALIGNED) * ALIGNED if at else 0
        part = Part(SCRATCH, start, shape, dtype)
        self._parts = (*parts[:at], part)
        return part

    def allocate(self, device: torch.device) -> Tensor:
        """The buffer of all parts so far, fp32."""
        parts = self._parts[: self._at]
        self._known[0] = parts
        size = -(-parts[-1].end // 4) if parts else 0
        return torch.empty(size, dtype=torch.float32, device=device)


_numbers: dict[tuple[Any, ...], int] = {}
_next = itertools.count()


class Constants(dict[str, Any]):
    """What a program is specialised on, by name; equal ones have the same number."""

    __slots__ = ("number",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.number = _numbers.setdefault(tuple(self.items()), next(_next))


def tensors(arguments: Sequence[Any], buffers: Sequence[Tensor]) -> tuple[Any, ...]:
    """Arguments with tensors for parts."""
    return tuple(a.tensor(buffers) if type(a) is Part else a for a in arguments)


Special = tuple[list[Any], list[Any]]


def specialisation(arguments: Sequence[Any], buffers: Sequence[Tensor]) -> Special:
    """What Triton may compile anew for, and the arguments with addresses for tensors and parts.

    Tensors by dtype and whether they begin at a multiple of 16 bytes, and by device, as Triton
    refuses those of another; whole numbers by width, and whether they are 1 or multiples of 16.
    """
    kinds: list[Any] = []
    addresses: list[Any] = []
    starts = []
    for buffer in buffers:
        start = buffer.data_ptr()
        starts.append(start)
        kinds += (buffer.get_device(), start & 15)
    for value in arguments:
        kind = type(value)
        if kind is Part:
            kinds.append(value.dtype)
            addresses.append(starts[value.buffer] + value.offset)
        elif kind is int:
            kinds += (value == 1, value & 15 == 0, value.bit_length() > 31)
            addresses.append(value)
        elif isinstance(value, Tensor):
            address = value.data_ptr()
            kinds += (value.dtype, value.get_device(), address & 15 == 0)
            addresses.append(address)
        else:
            kinds.append(kind)
            addresses.append(value)
    return kinds, addresses
