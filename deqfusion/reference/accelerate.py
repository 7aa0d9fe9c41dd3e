r"""From the last evaluations to the next iterate: Picard, Anderson, Broyden, on rows (K, R, d).

Each accelerator keeps its history on the device, in the dtype of the state (fp32 or fp64).

Anderson solves, per row, with Gram matrix H_ij = <g_i, g_j> of the last n <= m residuals,

    (H + ridge * tr(H) / n * I) a = 1,    a <- a / sum(a),
    z_next = beta sum_j a_j f_j + (1 - beta) sum_j a_j z_j

which are the weights of the bordered system of Walker and Ni. One row of H is new per step.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deqfusion.reference.product import take_rows

# Relative ridge by dtype, where the user gives none: below what rounding leaves of the Gram matrix
# (about 1e-7 of its largest entry in fp32), to keep the elimination from dividing by zero.
DEFAULT_RIDGE = {torch.float32: 1e-8, torch.float64: 1e-15}


class Accelerator(Protocol):
    """From the evaluations of a solve to its next iterate."""

    def propose(self, z: Tensor | None, f: Tensor, g: Tensor) -> Tensor:
        """The next iterate after f = f(z), g = f - z (K, R, d), which are kept, not copied."""
        ...

    def restart(self, rows: Tensor) -> None:
        """Forgets the history of the rows of a mask (K, R)."""
        ...

    def take(self, index: Tensor) -> None:
        """Keeps the rows index (K, S)."""
        ...

    def fresh(self) -> Accelerator:
        """Another of the same options, without a history."""
        ...


class Picard:
    """z + damping * (f - z)."""

    def __init__(self, damping: float) -> None:
        self.damping = damping

    def propose(self, z: Tensor | None, f: Tensor, g: Tensor) -> Tensor:
        """The damped step."""
        if self.damping == 1.0:
            return f
        return f.add(g, alpha=self.damping - 1.0)

    def restart(self, rows: Tensor) -> None:
        """There is no history."""

    def take(self, index: Tensor) -> None:
        """There is nothing to take."""

    def fresh(self) -> Picard:
        """Itself: there is no history."""
        return self


class Anderson:
    """Mixing of the last `memory` >= 1 evaluations.

    Args:
        memory: m.
        ridge: None chooses by dtype.
        relative: whether the ridge is relative to the mean diagonal of H.
        mixing: beta.
    """

    def __init__(self, memory: int, ridge: float | None, relative: bool, mixing: float) -> None:
        self.memory, self.ridge, self.relative, self.mixing = memory, ridge, relative, mixing
        # Entry j of the lists, of the Gram matrix (K, R, m, m) and of `valid` (K, R, m) are the
        # same evaluation, the oldest first. `valid` None: all entries are.
        self.f: list[Tensor] = []
        self.g: list[Tensor] = []
        self.gram: Tensor | None = None
        self.valid: Tensor | None = None

    def propose(self, z: Tensor | None, f: Tensor, g: Tensor) -> Tensor:
        """The mixed iterate."""
        if self.gram is None:
            self.gram = f.new_zeros(*f.shape[:2], self.memory, self.memory)
        if len(self.f) == self.memory:
            del self.f[0], self.g[0]
            self.gram[..., :-1, :-1] = self.gram[..., 1:, 1:].clone()
            if self.valid is not None:
                self.valid[..., :-1] = self.valid[..., 1:].clone()
        self.f.append(f)
        self.g.append(g)
        n = len(self.g)
        if self.valid is not None:
            self.valid[..., n - 1] = True
        dots = torch.stack([torch.linalg.vecdot(other, g) for other in self.g], -1)
        self.gram[..., n - 1, :n] = dots
        self.gram[..., :n, n - 1] = dots
        if n == 1:
            return f if self.mixing == 1.0 else f.add(g, alpha=self.mixing - 1.0)
        weights = self.weights().unsqueeze(2).unbind(-1)
        out = self.f[0] * weights[0]
        for entry, weight in zip(self.f[1:], weights[1:], strict=True):
            out.addcmul_(entry, weight)
        if self.mixing != 1.0:
            for entry, weight in zip(self.g, weights, strict=True):
                out.addcmul_(entry, weight, value=self.mixing - 1.0)
        return out

    def weights(self) -> Tensor:
        """a (K, R, n), summing to 1 over n."""
        assert self.gram is not None
        n = len(self.f)
        gram = self.gram[..., :n, :n].clone()
        valid = None if self.valid is None else self.valid[..., :n]
        if valid is not None:
            gram.masked_fill_(~(valid.unsqueeze(-1) & valid.unsqueeze(-2)), 0.0)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        ridge = DEFAULT_RIDGE[gram.dtype] if self.ridge is None else self.ridge
        if not self.relative:
            diagonal += ridge
        elif valid is None:
            diagonal += diagonal.mean(-1, keepdim=True) * ridge
        else:
            count = valid.sum(-1, keepdim=True).clamp_min(1)
            diagonal += diagonal.sum(-1, keepdim=True) / count * ridge
        ones = gram.new_ones(*gram.shape[:-1], 1)
        if valid is not None:
            # A forgotten entry is decoupled: diagonal 1, right-hand side 0.
            diagonal.masked_fill_(~valid, 1.0)
            ones = valid.to(gram.dtype).unsqueeze(-1)
        a = torch.linalg.solve_ex(gram, ones)[0].squeeze(-1)
        a /= a.sum(-1, keepdim=True)
        if gram.device.type != "cpu" or not bool(a.sum().isfinite()):
            plain = torch.zeros_like(a)
            plain[..., -1] = 1.0
            a = torch.where(a.isfinite().all(-1, keepdim=True), a, plain)
        return a

    def restart(self, rows: Tensor) -> None:
        """The entries so far no longer count for `rows` (K, R)."""
        if self.gram is None:
            return
        if self.valid is None:
            self.valid = torch.ones_like(self.gram[..., 0], dtype=torch.bool)
        self.valid = self.valid & ~rows.unsqueeze(-1)
        # A forgotten entry may hold NaN, which a weight 0 would keep.
        clear = rows.unsqueeze(-1)
        self.gram = torch.where(clear.unsqueeze(-1), 0.0, self.gram)
        self.f = [torch.where(clear, 0.0, f) for f in self.f]
        self.g = [torch.where(clear, 0.0, g) for g in self.g]

    def take(self, index: Tensor) -> None:
        """Keeps the rows index (K, S)."""
        self.f = [take_rows(f, index) for f in self.f]
        self.g = [take_rows(g, index) for g in self.g]
        if self.gram is not None:
            self.gram = take_rows(self.gram.flatten(2), index).unflatten(-1, (self.memory, -1))
        if self.valid is not None:
            self.valid = take_rows(self.valid, index)

    def fresh(self) -> Anderson:
        """Another of the same options, without a history."""
        return Anderson(self.memory, self.ridge, self.relative, self.mixing)


class Broyden:
    r"""Limited-memory good Broyden: the inverse Jacobian of f(z) - z is -I + sum_j u_j v_j^T.

    With s = z_k - z_{k-1}, y = g_k - g_{k-1} and B the current inverse, the update is
    u = (s - B y) / <B^T s, y>, v = B^T s, and the next iterate z - B g. A row whose memory is used
    up starts again from -I.

    Args:
        memory: rank-one updates kept.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.u: list[Tensor] = []
        self.v: list[Tensor] = []
        self.last: tuple[Tensor, Tensor] | None = None

    def propose(self, z: Tensor | None, f: Tensor, g: Tensor) -> Tensor:
        """The quasi-Newton step."""
        here = torch.zeros_like(f) if z is None else z
        if len(self.u) == self.memory:
            self.u, self.v, self.last = [], [], None
        if self.last is not None:
            s, y = here - self.last[0], g - self.last[1]
            v = -s
            for uj, vj in zip(self.u, self.v, strict=True):
                v.addcmul_(vj, torch.linalg.vecdot(uj, s).unsqueeze(-1))
            denominator = torch.linalg.vecdot(v, y).unsqueeze(-1)
            u = (s - self._inverse(y)) / denominator
            usable = u.isfinite().all(-1, keepdim=True) & v.isfinite().all(-1, keepdim=True)
            self.u.append(torch.where(usable, u, 0.0))
            self.v.append(torch.where(usable, v, 0.0))
        self.last = here, g
        return here - self._inverse(g)

    def _inverse(self, x: Tensor) -> Tensor:
        out = -x
        for u, v in zip(self.u, self.v, strict=True):
            out.addcmul_(u, torch.linalg.vecdot(v, x).unsqueeze(-1))
        return out

    def restart(self, rows: Tensor) -> None:
        """Back to -I for `rows`; no update is drawn from the step that led here."""
        clear = rows.unsqueeze(-1)
        self.u = [torch.where(clear, 0.0, u) for u in self.u]
        self.v = [torch.where(clear, 0.0, v) for v in self.v]
        if self.last is not None:
            # A difference from NaN is not finite, and an update that is not finite is dropped.
            self.last = (torch.where(clear, torch.nan, self.last[0]), self.last[1])

    def take(self, index: Tensor) -> None:
        """Keeps the rows index (K, S)."""
        self.u = [take_rows(u, index) for u in self.u]
        self.v = [take_rows(v, index) for v in self.v]
        if self.last is not None:
            self.last = (take_rows(self.last[0], index), take_rows(self.last[1], index))

    def fresh(self) -> Broyden:
        """Another of the same options, without a history."""
        return Broyden(self.memory)
