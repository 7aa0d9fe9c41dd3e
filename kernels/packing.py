r"""Packed parameters, kept as long as the parameters have not changed.

What the programs read of a block: weights transposed (products with W^T, forward) and as they are
(products with W, backward), in fp32 and, for the cheap steps of the precision ladder, in bfloat16;
and its vectors, stacked. `packed` returns them from a cache whose key is where the parameters lie
and their versions, which every in-place operation raises. An entry holds on to its parameters, so
that their memory is not given to others while it lives; the last `ENTRIES` are kept.

Not kept: under CUDA-graph capture (a replay must pack what the parameters then are) and for
inference tensors (which have no version). A write past the version counter (`parameter.data`) is
not seen: `clear()` forgets everything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Layout

ENTRIES = 16

_cache: OrderedDict[tuple[object, ...], tuple[tuple[int, ...], Sequence[Tensor], Packed]]
_cache = OrderedDict()
_lock = Lock()


class Packed(NamedTuple):
    """Weights (J, K, W, W) and vectors (K, V, W), packed (`kernels.layout`).

    Attributes:
        forward: fp32, (J, K, in, out), for products x W^T.
        backward: fp32, (J, K, out, in), for products x W; empty if not asked for.
        low: bfloat16 copy of `forward` or `backward`, whichever iterates; empty if not asked for.
        vectors: fp32.
    """

    forward: Tensor
    backward: Tensor
    low: Tensor
    vectors: Tensor


def pack(
    weights: Sequence[Tensor], vectors: Sequence[Tensor], layout: Layout, backward: bool, low: bool
) -> Packed:
    """Packs weights (K, d, d) each and vectors (K, d) each."""
    stacked = torch.stack([w.float() for w in weights])
    forward = layout.pack_weight(stacked)
    back = forward.transpose(-1, -2).contiguous() if backward else forward.new_empty(0)
    iterated = back if backward else forward
    cheap = iterated.to(torch.bfloat16) if low else forward.new_empty(0, dtype=torch.bfloat16)
    stack = layout.pack(torch.stack([v.float() for v in vectors], 1))
    return Packed(forward, back, cheap, stack)


def packed(
    weights: Sequence[Tensor], vectors: Sequence[Tensor], layout: Layout, backward: bool, low: bool
) -> Packed:
    """`pack`, or what it returned for the same parameters as they are now."""
    tensors = (*weights, *vectors)
    if any(t.is_inference() for t in tensors) or _capturing(tensors[0]):
        return pack(weights, vectors, layout, backward, low)
    places = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)
    key = (places, layout, backward, low, tensors[0].device)
    versions = tuple(t._version for t in tensors)
    with _lock:
        found = _cache.get(key)
        if found is not None and found[0] == versions:
            _cache.move_to_end(key)
            return found[2]
    made = pack(weights, vectors, layout, backward, low)
    with _lock:
        _cache[key] = (versions, [t.detach() for t in tensors], made)
        _cache.move_to_end(key)
        while len(_cache) > ENTRIES:
            _cache.popitem(last=False)
    return made


def clear() -> None:
    """Forgets all packed parameters."""
    with _lock:
        _cache.clear()


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()
