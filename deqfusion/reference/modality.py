r"""The modality blocks prepared for iterating, and their linearisation at a point.

    u   = W_1 z + b_1           h = ReLU(GN_1(u))
    q   = W_2 h + (x + b_2)     t = GN_2(q)  (+ z)
    f   = GN_3(ReLU(t))

All tensors are (N, R, d). The VJP runs backwards through the same lines, with the activations
saved once:

    p   = N_3(lambda w_3) [t > 0]      r = N_2(p w_2) W_2 [h > 0]
    J^T lambda = N_1(r w_1) W_1  (+ p)

with N_j the VJP of the j-th normalisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deqfusion.reference.cell import CellOptions, ModalityParameters
from deqfusion.reference.iterate import Anchor
from deqfusion.reference.norm import (
    NormVJP,
    centre,
    centre_,
    injected_within_range,
    inverse_deviation,
    multiply_groups_,
)
from deqfusion.reference.product import Weight, take_rows


class _Constants:
    """What all rows of a solve share: weights and affine parameters (N, 1, d)."""

    def __init__(self, p: ModalityParameters, o: CellOptions) -> None:
        self.parameters, self.options = p, o
        self.weight1, self.weight2 = Weight(p.weight1), Weight(p.weight2)
        self.bias1 = p.bias1.unsqueeze(1)
        self.bias2 = p.bias2.unsqueeze(1)
        self.w1, self.w2, self.w3 = (
            w.unsqueeze(1) for w in (p.norm1_weight, p.norm2_weight, p.norm3_weight)
        )
        self.b1, self.b2, self.b3 = (
            b.unsqueeze(1) for b in (p.norm1_bias, p.norm2_bias, p.norm3_bias)
        )


class ModalityBlock:
    """f of the modality blocks for given features.

    Args:
        x: (N, R, d) features in the dtype that the solve computes in.
        p: parameters in the same dtype.
        o: cell options.
    """

    def __init__(self, x: Tensor, p: ModalityParameters, o: CellOptions) -> None:
        self.shape = x.shape
        self.c = _Constants(p, o)
        x, self.factor = injected_within_range(x, o.num_groups)
        self.injection = x + self.c.bias2

    def blocks(self, start: int, stop: int) -> ModalityBlock:
        """The modalities start to stop, with weights of their own."""
        p = ModalityParameters(*(t[start:stop] for t in self.c.parameters))
        part = slice(start, stop)
        return self._map(lambda t: t[part], _Constants(p, self.c.options))

    def rows(self, start: int, stop: int) -> ModalityBlock:
        """The same block for the rows start to stop."""
        return self._map(lambda t: t[:, start:stop], self.c)

    def take(self, index: Tensor) -> ModalityBlock:
        """The same block for the rows index (N, S)."""
        return self._map(lambda t: take_rows(t, index), self.c)

    def _map(self, function: Callable[[Tensor], Tensor], c: _Constants) -> ModalityBlock:
        other = object.__new__(ModalityBlock)
        other.c, other.injection = c, function(self.injection)
        other.factor = None
        if self.factor is not None:
            other.factor = function(self.factor.squeeze(-1)).unsqueeze(-1)
        other.shape = other.injection.shape
        return other

    def __call__(self, z: Tensor | None) -> Tensor:
        """f(z) for z (N, R, d), or f(0) for None."""
        c = self.c
        if z is None:
            # The same hidden row for all: no product of (R, d).
            h = self._hidden(centre(c.bias1, c.options.num_groups))
            q = c.weight2.forward(h) + self.injection
        else:
            h = self._hidden(centre_(c.weight1.forward(z, c.bias1), c.options.num_groups))
            q = c.weight2.forward(h, self.injection)
        return self._output(centre_(q, c.options.num_groups), z)

    def anchored(self, z: Tensor) -> tuple[Tensor, Anchor]:
        """f(z), and (z, u, h, q) for `near`."""
        c, groups = self.c, self.c.options.num_groups
        u = c.weight1.forward(z, c.bias1)
        h = self._hidden(centre(u, groups))
        q = c.weight2.forward(h, self.injection)
        return self._output(centre(q, groups), z), (z, u, h, q)

    def near(self, z: Tensor, anchor: Anchor | None) -> Tensor:
        """f(z) with bfloat16 products of differences from an anchor, or from zeros."""
        c, groups = self.c, self.c.options.num_groups
        if anchor is None:
            u = c.weight1.forward_low(z).add_(c.bias1)
            q = c.weight2.forward_low(self._hidden(centre_(u, groups))).add_(self.injection)
        else:
            z0, u0, h0, q0 = anchor
            u = c.weight1.forward_low(z - z0).add_(u0)
            h = self._hidden(centre_(u, groups))
            q = c.weight2.forward_low(h.sub_(h0)).add_(q0)
        return self._output(centre_(q, groups), z)

    def _hidden(self, centred: Tensor) -> Tensor:
        """h from centred u, which it overwrites."""
        c, groups = self.c, self.c.options.num_groups
        h = multiply_groups_(centred, inverse_deviation(centred, groups))
        return torch.addcmul(c.b1, h, c.w1).relu_()

    def _output(self, centred: Tensor, z: Tensor | None) -> Tensor:
        """f from centred q, which it overwrites; z for the skip connection."""
        c, groups = self.c, self.c.options.num_groups
        t = multiply_groups_(centred, inverse_deviation(centred, groups))
        t = torch.addcmul(c.b2, t, c.w2)
        if c.options.skip and z is not None:
            t.add_(z)
        t = centre_(t.relu_(), groups)
        t = multiply_groups_(t, inverse_deviation(t, groups))
        return torch.addcmul(c.b3, t, c.w3)

    def linearize(self, z: Tensor) -> ModalityLinearization:
        """The linear map J^T of the block at z (N, R, d)."""
        return ModalityLinearization(self, z)


class ModalityLinearization:
    """J^T of a modality block at z, with what the parameter gradients need.

    Args:
        block: the block of these rows.
        z: (N, R, d), finite.
    """

    def __init__(self, block: ModalityBlock, z: Tensor) -> None:
        c, o = block.c, block.c.options
        groups = o.num_groups
        self.c, self.z = c, z
        u = centre_(c.weight1.forward(z, c.bias1), groups)
        self.norm1 = NormVJP(u, inverse_deviation(u, groups))
        y = torch.addcmul(c.b1, self.norm1.normalized(), c.w1)
        self.h = y.relu()
        self.open1 = y > 0
        q = centre_(c.weight2.forward(self.h, block.injection), groups)
        self.norm2 = NormVJP(q, inverse_deviation(q, groups), block.factor)
        t = torch.addcmul(c.b2, self.norm2.normalized(), c.w2)
        if o.skip:
            t.add_(z)
        self.open2 = t > 0
        t = centre_(t.relu_(), groups)
        self.norm3 = NormVJP(t, inverse_deviation(t, groups))
        # ReLU masks times the affine weight that follows them: one product per step instead of two.
        self.gain1 = self.open1 * c.w1
        self.gain2 = self.open2.to(z.dtype) if o.skip else self.open2 * c.w2

    def take(self, index: Tensor) -> ModalityLinearization:
        """The iteration's part of the linearisation for the rows index (N, S)."""
        other = object.__new__(ModalityLinearization)
        other.c = self.c
        other.norm1, other.norm2, other.norm3 = (
            n.take(index) for n in (self.norm1, self.norm2, self.norm3)
        )
        other.gain1, other.gain2 = take_rows(self.gain1, index), take_rows(self.gain2, index)
        return other

    def vjp(self, gradient: Tensor, low: bool = False) -> Tensor:
        """J^T gradient for gradient (N, R, d)."""
        c = self.c
        p = self.norm3(gradient * c.w3).mul_(self.gain2)
        r = c.weight2.transposed(self.norm2(p * c.w2 if c.options.skip else p), low)
        out = c.weight1.transposed(self.norm1(r.mul_(self.gain1)), low)
        return out.add_(p) if c.options.skip else out

    def parameter_vjp(self, gradient: Tensor) -> tuple[Tensor, ModalityParameters]:
        """Gradients of <gradient, f> with respect to x (N, R, d) and to the parameters.

        The sums over rows run in the order of the rows; weight gradients are matrix products.
        """
        c = self.c
        xhat1, xhat2, xhat3 = (n.normalized() for n in (self.norm1, self.norm2, self.norm3))
        p = self.norm3(gradient * c.w3).mul_(self.open2)
        q = self.norm2(p * c.w2)
        r = c.weight2.transposed(q).mul_(self.open1)
        s = self.norm1(r * c.w1)
        grads = ModalityParameters(
            weight1=torch.bmm(s.transpose(1, 2), self.z),
            bias1=s.sum(1),
            norm1_weight=(r * xhat1).sum(1),
            norm1_bias=r.sum(1),
            weight2=torch.bmm(q.transpose(1, 2), self.h),
            bias2=q.sum(1),
            norm2_weight=(p * xhat2).sum(1),
            norm2_bias=p.sum(1),
            norm3_weight=(gradient * xhat3).sum(1),
            norm3_bias=gradient.sum(1),
        )
        return q, grads
