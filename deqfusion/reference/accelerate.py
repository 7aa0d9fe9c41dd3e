r"""From the last evaluations to the next iterate: Picard, Anderson, Broyden, on rows (K, R, d).

Each accelerator keeps its history on the device, in the dtype of the state (fp32 or fp64), and
knows three calls: `propose(step, z, f, g)` returns the next iterate after the evaluation f = f(z),
g = f - z; `restart(rows, step)` forgets the history of the rows of a mask (K, R) before `step`;
`take(index)` keeps the rows index (K, S).

Anderson solves, per row, with Gram matrix H_ij = <g_i, g_j> of the last n <= m residuals,

    (H + ridge * tr(H) / n * I) a = 1,    a <- a / sum(a),
    z_next = beta sum_j a_j f_j + (1 - beta) sum_j a_j z_j

which are the weights of the bordered system of Walker and Ni. One row of H is new per step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deqfusion.reference.product import take_rows

# Relative ridge by dtype, where the user gives none: below what rounding leaves of the Gram matrix
# (about 1e-7 of its largest entry in fp32), to keep the elimination from dividing by zero.
DEFAULT_RIDGE = {torch.float32: 1e-8, torch.float64: 1e-15}


class Picard:
    """z + damping * (f - z)."""

    def __init__(self, damping: float) -> None:
        self.damping = damping

    def propose(self, step: int, z: Tensor | None, f: Tensor, g: Tensor) -> Tensor:
        """The damped step."""
        if self.damping == 1.0:
            return f
        return f.add(g, alpha=self.damping - 1.0)

    def restart(self, rows: Tensor, step: int) -> None:
        """There is no history."""

    def take(self, index: Tensor) -> None:
        """There is nothing to take."""


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
        self.f: list[Tensor] = []
        self.g: list[Tensor] = []
        self.steps: list[int] = []
        self.gram: Tensor | None = None
        self.first: Tensor | None = None

    def propose(self, step: int, z: Tensor | None, f: Tensor, g: Tensor) -> Tensor:
        """The mixed iterate; f and g (K, R, d) are kept, not copied."""
        if self.gram is None:
            self.gram = f.new_zeros(self.memory, self.memory, *f.shape[:2])
        slot = step % self.memory
        if slot == len(self.f):
            self.f.append(f)
            self.g.append(g)
            self.steps.append(step)
        else:
            self.f[slot], self.g[slot], self.steps[slot] = f, g, step
        n = len(self.g)
        dots = torch.stack([torch.linalg.vecdot(other, g) for other in self.g])
        self.gram[slot, :n] = dots
        self.gram[:n, slot] = dots
        if len(self.f) == 1:
            return f if self.mixing == 1.0 else f.add(g, alpha=self.mixing - 1.0)
        weights = self.weights(slot).unsqueeze(-1)
        out = self.f[0] * weights[0]
        for j in range(1, len(self.f)):
            out.addcmul_(self.f[j], weights[j])
        if self.mixing != 1.0:
            for j, residual in enumerate(self.g):
                out.addcmul_(residual, weights[j], value=self.mixing - 1.0)
        return out

    def weights(self, newest: int) -> Tensor:
        """a (n, K, R), summing to 1 over n."""
        assert self.gram is not None
        n = len(self.f)
        gram = self.gram[:n, :n].permute(2, 3, 0, 1)
        kept = None
        if self.first is not None:
            steps = torch.tensor(self.steps, device=gram.device)
            kept = steps >= self.first.unsqueeze(-1)
            gram = gram * (kept.unsqueeze(-1) & kept.unsqueeze(-2))
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        ridge = DEFAULT_RIDGE[gram.dtype] if self.ridge is None else self.ridge
        if self.relative:
            shift = diagonal.mean(-1, keepdim=True) * ridge
        else:
            shift = torch.full_like(diagonal[..., :1], ridge)
        shift = shift.expand_as(diagonal)
        ones = torch.ones_like(diagonal)
        if kept is not None:
            # A forgotten entry is decoupled: diagonal 1, right-hand side 0.
            shift = torch.where(kept, shift, 1.0)
            ones = kept.to(gram.dtype)
        a = torch.linalg.solve_ex(gram + torch.diag_embed(shift), ones.unsqueeze(-1))[0].squeeze(-1)
        a = a / a.sum(-1, keepdim=True)
        plain = torch.zeros_like(a)
        plain[..., newest] = 1.0
        a = torch.where(a.isfinite().all(-1, keepdim=True), a, plain)
        return a.permute(2, 0, 1)

    def restart(self, rows: Tensor, step: int) -> None:
        """Evaluations before `step` no longer count for `rows` (K, R)."""
        if self.first is None:
            self.first = torch.zeros(rows.shape, dtype=torch.long, device=rows.device)
        self.first = torch.where(rows, step, self.first)
        if self.gram is not None:
            # A forgotten entry may hold NaN, which a factor 0 would keep.
            self.gram = torch.where(rows, 0.0, self.gram)
            clear = rows.unsqueeze(-1)
            self.f = [torch.where(clear, 0.0, f) for f in self.f]
            self.g = [torch.where(clear, 0.0, g) for g in self.g]

    def take(self, index: Tensor) -> None:
        """Keeps the rows index (K, S)."""
        self.f = [take_rows(f, index) for f in self.f]
        self.g = [take_rows(g, index) for g in self.g]
        if self.gram is not None:
            self.gram = self.gram.gather(3, index.expand(self.memory, self.memory, -1, -1))
        if self.first is not None:
            self.first = self.first.gather(1, index)


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

    def propose(self, step: int, z: Tensor | None, f: Tensor, g: Tensor) -> Tensor:
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

    def restart(self, rows: Tensor, step: int) -> None:
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
