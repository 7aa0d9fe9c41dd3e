r"""The fusion block prepared for iterating, and its linearisation at a point.

    s   = sum_i M_i sigma(W_g z + c_i)         (identity gate: (sum_i M_i) W_g z + sum_i M_i c_i)
    v   = F (W_f (s z) + b_f) + x_f
    f   = GN_f(ReLU(v))                        (tail "norm_relu": ReLU(GN_f(v)))

c_i (N, R, d) holds the modalities' part of the gate, M_i the presence and dropout factors on it, F
the dropout factor; z is (1, R, d). The VJP with s and s' = sum_i M_i sigma' saved once:

    r = N_f(lambda w_f) [v > 0]         y = (F r) W_f         J^T lambda = y s + (y z s') W_g
"""

from __future__ import annotations

import torch
from torch import Tensor

from deqfusion.reference.cell import CellOptions, FusionParameters, gate_weights, within_range
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
    """What all rows of a solve share; each weight with a leading dimension 1."""

    def __init__(self, p: FusionParameters, o: CellOptions) -> None:
        self.options = o
        self.gate = Weight(gate_weights(p, o)[0].unsqueeze(0))
        self.weight = Weight(p.weight.unsqueeze(0))
        self.bias = p.bias
        self.w, self.b = p.norm_weight, p.norm_bias


class FusionBlock:
    """f of the fusion block for given gate constants and injection.

    Args:
        constants: (N, R, d), c_i.
        injection: (R, d), x_f.
        p: parameters in the dtype of the tensors.
        o: cell options.
        gate_mask: (N, R, 1 or d) or None, M_i.
        fusion_mask: (R, d) or None, F.
    """

    def __init__(
        self,
        constants: Tensor,
        injection: Tensor,
        p: FusionParameters,
        o: CellOptions,
        gate_mask: Tensor | None = None,
        fusion_mask: Tensor | None = None,
    ) -> None:
        self.c = _Constants(p, o)
        self.shape = torch.Size((1, *injection.shape))
        injection = injection.unsqueeze(0)
        self.fusion_mask = None if fusion_mask is None else fusion_mask.unsqueeze(0)
        bias = self.c.bias if fusion_mask is None else self.c.bias * fusion_mask
        # ReLU would hide an infinite negative injection: such a row has no answer either.
        injection = torch.where(injection.isfinite(), injection, torch.nan)
        scaled, factor = injected_within_range(injection, o.num_groups, o.tail == "relu_norm")
        self.injection = scaled + bias
        self.unscaled = None if factor is None else injection + bias
        self.constants, self.gate_mask = constants, gate_mask
        self.modalities, self.factor = constants.shape[0], gate_mask
        self.slope: Tensor | None = None
        if o.gate == "identity":
            # The sum over modalities is linear: one tensor and one factor stand for all N.
            if gate_mask is None:
                self.slope = constants.new_full((1, 1, 1), constants.shape[0])
                self.constants = constants.sum(0, keepdim=True)
            else:
                self.slope = gate_mask.sum(0, keepdim=True)
                self.constants = (constants * gate_mask).sum(0, keepdim=True)
                self.gate_mask = None

    def _map(self, function: object) -> FusionBlock:
        other = object.__new__(FusionBlock)
        other.c, other.modalities = self.c, self.modalities
        names = "injection", "unscaled", "constants", "gate_mask", "fusion_mask", "slope", "factor"
        for name in names:
            value = getattr(self, name)
            whole = value is None or value.shape[1] == 1 != self.shape[1]
            setattr(other, name, value if whole else function(value))  # type: ignore[operator]
        other.shape = other.injection.shape
        return other

    def blocks(self, start: int, stop: int) -> FusionBlock:
        """The block itself, of which there is one."""
        return self

    def rows(self, start: int, stop: int) -> FusionBlock:
        """The same block for the rows start to stop."""
        return self._map(lambda x: x[:, start:stop])

    def take(self, index: Tensor) -> FusionBlock:
        """The same block for the rows index (1, S)."""
        return self._map(lambda x: take_rows(x, index))

    def gate_sum(self, p: Tensor) -> Tensor:
        """s (1, R, d) from p = W_g z (1, R, d)."""
        if self.slope is not None:
            return torch.addcmul(self.constants, p, self.slope)
        a = torch.add(self.constants, p).sigmoid_()
        if self.gate_mask is not None:
            a.mul_(self.gate_mask)
        return a.sum(0, keepdim=True)

    def __call__(self, z: Tensor | None) -> Tensor:
        """f(z) for z (1, R, d), or f(0) for None."""
        if z is None:
            return self._output(self.injection)
        return self._output(self.injected(self.gate_sum(self.c.gate.forward(z)).mul_(z)))

    def anchored(self, z: Tensor) -> tuple[Tensor, Anchor]:
        """f(z), and (z, W_g z, u = s z, v) for `near`."""
        p = self.c.gate.forward(z)
        u = self.gate_sum(p).mul_(z)
        v = self.injected(u)
        return self._output(v), (z, p, u, v)

    def near(self, z: Tensor, anchor: Anchor | None) -> Tensor:
        """f(z) with bfloat16 products of differences from an anchor, or from zeros."""
        c = self.c
        if anchor is None:
            u = self.gate_sum(c.gate.forward_low(z)).mul_(z)
            v, start = c.weight.forward_low(u), self.injection
        else:
            z0, p0, u0, start = anchor
            u = self.gate_sum(c.gate.forward_low(z - z0).add_(p0)).mul_(z)
            v = c.weight.forward_low(u.sub_(u0))
        if self.fusion_mask is not None:
            v.mul_(self.fusion_mask)
        return self._output(v.add_(start))

    def injected(self, u: Tensor, injection: Tensor | None = None) -> Tensor:
        """v from u; injection: of the block, or another in its place."""
        injection = self.injection if injection is None else injection
        if self.fusion_mask is None:
            return self.c.weight.forward(u, injection)
        return self.c.weight.forward(u).mul_(self.fusion_mask).add_(injection)

    def _output(self, v: Tensor) -> Tensor:
        """f from v."""
        c, o = self.c, self.c.options
        v = centre_(v.relu(), o.num_groups) if o.tail == "relu_norm" else centre(v, o.num_groups)
        v = multiply_groups_(v, inverse_deviation(v, o.num_groups))
        f = torch.addcmul(c.b, v, c.w)
        return f.relu_() if o.tail == "norm_relu" else f

    def linearize(self, z: Tensor) -> FusionLinearization:
        """The linear map J^T of the block at z (1, R, d)."""
        return FusionLinearization(self, z)


class FusionLinearization:
    """J^T of the fusion block at z, with what the parameter gradients need.

    Args:
        block: the block of these rows.
        z: (1, R, d), finite.
    """

    def __init__(self, block: FusionBlock, z: Tensor) -> None:
        c, o = block.c, block.c.options
        self.c, self.z, self.block = c, z, block
        p = c.gate.forward(z)
        if block.slope is not None:
            self.s = block.gate_sum(p)
            self.t = z * block.slope
        else:
            a = torch.add(block.constants, p).sigmoid_()
            slope = a * (1 - a)
            if block.gate_mask is not None:
                a, slope = a * block.gate_mask, slope * block.gate_mask
            self.s = a.sum(0, keepdim=True)
            self.t = z * slope.sum(0, keepdim=True)
        self.u = self.s * z
        # What is beside a large number is scaled with it: else its sign would be the product's.
        v, scale = block.injected(self.u, block.unscaled), None
        if o.tail == "relu_norm":
            self.open = v > 0
        if block.unscaled is not None:
            v, scale = within_range(v, o.num_groups, o.tail == "relu_norm")
        if o.tail == "relu_norm":
            v = centre_(v.relu_(), o.num_groups)
            self.norm = NormVJP(v, inverse_deviation(v, o.num_groups), scale)
        else:
            v = centre_(v, o.num_groups)
            self.norm = NormVJP(v, inverse_deviation(v, o.num_groups), scale)
            self.open = torch.addcmul(c.b, self.norm.normalized(), c.w) > 0
        # Factors before and after the normalisation's VJP.
        relu_last = o.tail == "norm_relu"
        self.before = self.open * c.w if relu_last else c.w
        after = None if relu_last else self.open.to(z.dtype)
        if block.fusion_mask is not None:
            after = block.fusion_mask if after is None else after * block.fusion_mask
        self.after = after

    def take(self, index: Tensor) -> FusionLinearization:
        """The iteration's part of the linearisation for the rows index (1, S)."""
        other = object.__new__(FusionLinearization)
        other.c = self.c
        other.norm = self.norm.take(index)
        other.s, other.t = take_rows(self.s, index), take_rows(self.t, index)
        other.before = self.before if self.before.dim() == 1 else take_rows(self.before, index)
        other.after = None if self.after is None else take_rows(self.after, index)
        return other

    def vjp(self, gradient: Tensor, low: bool = False) -> Tensor:
        """J^T gradient for gradient (1, R, d)."""
        r = self.norm(gradient * self.before)
        if self.after is not None:
            r.mul_(self.after)
        y = self.c.weight.transposed(r, low)
        return self.c.gate.transposed(y * self.t, low).addcmul_(y, self.s)

    def parameter_vjp(self, gradient: Tensor) -> tuple[Tensor, Tensor, FusionParameters]:
        """Gradients of <gradient, f>: c_i (N, R, d), x_f (R, d) and the parameters.

        The gate weight's gradient is that of the factor of z_f (d, d); the gate bias is part of
        c_i, so its gradient is left to the caller.
        """
        c, block = self.c, self.block
        relu_last = c.options.tail == "norm_relu"
        if relu_last:
            gradient = gradient * self.open
        xhat = self.norm.normalized()
        r = self.norm(gradient * c.w)
        if not relu_last:
            r = r * self.open
        masked = r if block.fusion_mask is None else r * block.fusion_mask
        y = c.weight.transposed(masked)
        yz = y * self.z
        gate = (y * self.t).squeeze(0)
        if block.slope is None:
            a = torch.add(block.constants, c.gate.forward(self.z)).sigmoid_()
            a = a * (1 - a)
            if block.gate_mask is not None:
                a.mul_(block.gate_mask)
            constants = a.mul_(yz)
        elif block.factor is not None:
            constants = yz * block.factor
        else:
            constants = yz.expand(block.modalities, -1, -1)
        grads = FusionParameters(
            gate_weight=gate.t() @ self.z.squeeze(0),
            gate_bias=gate.new_empty(0),
            weight=masked.squeeze(0).t() @ self.u.squeeze(0),
            bias=masked.sum((0, 1)),
            norm_weight=(gradient * xhat).sum((0, 1)),
            norm_bias=gradient.sum((0, 1)),
        )
        return constants, r.squeeze(0), grads
