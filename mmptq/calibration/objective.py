"""The error of an operation's output, as a function of the rounding of one of its
operands.

Every operation is a product ``V U^T`` (:meth:`mmptq.layers.QuantOp.factors`). Let the
rows v of one factor be rounded, ``d = Q(v) - v``, while the other one is ``U``,
quantized or not. The squared error of the output against a target ``Y`` is

    E = sum_v || (v + d) U^T - y ||^2 = sum_v  d M d^T + 2 d l^T + const,
    M = U^T U,    l = (v U^T - y) U

so that a candidate costs rows x inner^2, however many rows U has. For a weight, M and l
are sums over tokens (:class:`Gram`), which stream over images. A search screens its
candidates by M in the form ``F F^T + diag(rho)``, F of a few columns (:class:`Screen`),
and compares the survivors by the exact sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..quantizers import Params, Quantizer

PIECE = 2**20
"""Elements that are rounded and scored at a time: they stay in a processor's cache. A
GPU takes more.
"""


@dataclass(frozen=True)
class Objective:
    """The squared error of a product against a target, for candidates of one factor's
    quantizer.

    Attributes:
        values: Rows v, (groups, batch, rows, inner); a group shares a quantizer's
            parameters.
        root: ``U^T``, (groups or 1, batch, inner, columns); or M itself, with columns =
            inner, where ``is_gram``.
        residual: ``V U^T - Y``, (groups, batch, rows, columns); or l, where
            ``is_gram``.
        is_gram: Whether M and l are given.
        counts: What each row counts, (batch, rows), if not the same.
    """

    values: Tensor
    root: Tensor
    residual: Tensor
    is_gram: bool = False
    counts: Tensor | None = None

    def gram(self, columns: Tensor) -> Tensor:
        """``M`` times (groups or 1, batch, inner, n)."""
        return (
            self.root @ columns
            if self.is_gram
            else self.root @ (self.root.transpose(-1, -2) @ columns)
        )

    def diagonal(self) -> Tensor:
        """Of M, (groups or 1, batch, inner)."""
        return (
            self.root.diagonal(dim1=-2, dim2=-1)
            if self.is_gram
            else self.root.square().sum(-1)
        )

    def linear(self) -> Tensor:
        """l, (groups, batch, rows, inner)."""
        return (
            self.residual
            if self.is_gram
            else self.residual @ self.root.transpose(-1, -2)
        )

    def aim(self) -> Tensor:
        """Y, (groups, batch, rows, columns), where U is given."""
        return self.values @ self.root - self.residual

    def errors(self, quantizer: Quantizer, params: Params) -> Tensor:
        """E for each candidate, up to a constant where ``is_gram``.

        Args:
            quantizer: Rounds the values.
            params: Its candidates, (n, groups).

        Returns:
            (n, groups), float64.
        """
        return _scores(self.values, self.counts, quantizer, params, self._error_of)

    def _error_of(
        self, group: slice, batch: slice, rows: slice
    ) -> Callable[[Tensor], Tensor]:
        v, residual = (
            x[group, batch, rows][:, :, None] for x in (self.values, self.residual)
        )
        root = _shared(self.root, group, batch)

        def error(rounded: Tensor) -> Tensor:
            delta = rounded.sub_(v)
            product = _times(delta, root)
            if self.is_gram:
                return product.add_(residual, alpha=2).mul_(delta).sum(-1)
            product.add_(residual)
            return product.mul_(product).sum(-1)

        return error


@dataclass(frozen=True)
class Screen:
    """An objective whose M is ``F F^T + diag(rho)``: near it, and many times as cheap.
    Its error is

        sum_v || Q(v) F - t ||^2  +  sum_v || (Q(v) - b) diag(rho)^1/2 ||^2

    Attributes:
        values: As in :class:`Objective`.
        factor: F, (groups or 1, batch, inner, rank), or None.
        target: t, (groups, batch, rows, rank), or None.
        rest: rho, (groups or 1, batch, inner), or None.
        best: b, like the values, or None.
        counts: As in :class:`Objective`.
    """

    values: Tensor
    factor: Tensor | None = None
    target: Tensor | None = None
    rest: Tensor | None = None
    best: Tensor | None = None
    counts: Tensor | None = None

    def errors(self, quantizer: Quantizer, params: Params) -> Tensor:
        """The error of each candidate, up to a constant; see :meth:`Objective.errors`."""
        return _scores(self.values, self.counts, quantizer, params, self._error_of)

    def _error_of(
        self, group: slice, batch: slice, rows: slice
    ) -> Callable[[Tensor], Tensor]:
        factor, rest = (
            x if x is None else _shared(x, group, batch)
            for x in (self.factor, self.rest)
        )
        target, best = (
            x if x is None else x[group, batch, rows][:, :, None]
            for x in (self.target, self.best)
        )

        def error(rounded: Tensor) -> Tensor:
            total = rounded.new_zeros(())
            if factor is not None and target is not None:
                product = _times(rounded, factor).sub_(target)
                total = product.mul_(product).sum(-1)
            if rest is not None and best is not None:
                rounded.sub_(best)
                total = total + _times(rounded.mul_(rounded), rest[..., None])[..., 0]
            return total

        return error


def screen(objective: Objective, rank: int) -> Screen:
    """The screen of an objective.

    A group of many rows (an activation) is screened by ``rank`` random projections of
    the output, whose errors average out over the rows. One row (an output channel's
    weights) needs M itself: F from a Nystroem approximation, and the rest by its
    diagonal.
    """
    generator = torch.Generator().manual_seed(0)
    inner, columns = objective.root.shape[-2:]
    if objective.values.shape[1:3].numel() > 1 and not objective.is_gram:
        factor, target = objective.root, objective.aim()
        if rank < columns:
            projection = torch.randn(columns, rank, generator=generator).to(factor)
            factor, target = factor @ projection, target @ projection
        return Screen(objective.values, factor, target, counts=objective.counts)
    plain, dtype = objective, objective.values.dtype
    # In float64: M is often so ill-conditioned (a few massive channels) that in float32
    # the best rows would be noise.
    objective = replace(
        plain,
        values=plain.values.double(),
        root=plain.root.double(),
        residual=plain.residual.double(),
    )
    rank = min(rank, inner)
    basis = (
        torch.randn(inner, rank, generator=generator)
        .to(objective.root)
        .expand(*objective.root.shape[:2], -1, -1)
    )
    for _ in range(2):
        basis = torch.linalg.qr(objective.gram(basis)).Q
    image = objective.gram(basis)  # (.., inner, rank)
    core = basis.transpose(-1, -2) @ image
    eigenvalues, vectors = torch.linalg.eigh((core + core.transpose(-1, -2)) / 2)
    floor = (
        eigenvalues.amax(-1, keepdim=True).clamp(min=torch.finfo(core.dtype).tiny)
        * 1e-6
    )
    factor = (
        image
        @ vectors
        * eigenvalues.clamp(min=floor).rsqrt()[..., None, :]
        * (eigenvalues > floor)[..., None, :]
    )
    diagonal = objective.diagonal()
    rest = (diagonal - factor.square().sum(-1)).clamp(min=0)
    damped = (
        rest + 1e-4 * diagonal.mean(-1, keepdim=True) + torch.finfo(rest.dtype).tiny
    )  # (.., inner)
    # The best rows are v - l M^-1, by Woodbury: (D + F F^T)^-1 = D^-1 - D^-1 F (I + F^T
    # D^-1 F)^-1 F^T D^-1
    scaled = factor / damped[..., None]
    small = torch.eye(rank).to(factor) + factor.transpose(-1, -2) @ scaled
    start = objective.linear() / damped[..., None, :]
    step = start - torch.linalg.solve(
        small, (start @ factor).transpose(-1, -2)
    ).transpose(-1, -2) @ scaled.transpose(-1, -2)
    best = objective.values - step
    target = best @ factor
    return Screen(
        plain.values, factor.to(dtype), target.to(dtype), rest.to(dtype), best.to(dtype)
    )


def own_error(values: Tensor, counts: Tensor | None = None) -> Screen:
    """The squared error of the rounded values themselves, (groups, batch, rows, inner);
    ``counts`` are (groups, batch, inner).
    """
    values = values.contiguous()
    return Screen(
        values,
        rest=(
            values.new_ones(1, values.shape[1], values.shape[3])
            if counts is None
            else counts
        ),
        best=values,
    )


class Gram:
    """Sums over tokens for one linear operation: ``A = X_q^T X_q`` and ``C = X_q^T (X_q
    - X)``, in float64.

    They decide the output error of any weight: ``M = A`` and ``l = w C^T`` with ``X_q``
    the quantized inputs and X the float ones. Tokens are multiplied by the thousand in
    the input's dtype, and these products are added in float64.
    """

    TOKENS = 4096

    def __init__(self) -> None:
        self.a: Tensor | None = None
        self.c: Tensor | None = None
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, error: Tensor) -> None:
        """Adds tokens: rounded inputs (heads, tokens, inner), and how far they are from
        the float ones.
        """
        self.waiting.extend(
            zip(x.split(self.TOKENS, 1), error.split(self.TOKENS, 1), strict=True)
        )
        if sum(part.shape[1] for part, _ in self.waiting) >= self.TOKENS:
            self.flush()

    def flush(self) -> None:
        """Adds what waits."""
        pieces = (
            self.waiting
            if self.waiting and self.waiting[0][0].shape[1] >= self.TOKENS
            else [
                (
                    torch.cat([x for x, _ in self.waiting], 1),
                    torch.cat([error for _, error in self.waiting], 1),
                )
            ]
        )
        for x, error in pieces:
            a, c = (
                (x.transpose(-1, -2) @ x).double(),
                (x.transpose(-1, -2) @ error).double(),
            )
            self.a = a if self.a is None else self.a.add_(a)
            self.c = c if self.c is None else self.c.add_(c)
        self.waiting = []

    def objective(self, weight: Tensor, groups: int) -> Objective:
        """The objective of a weight (heads, columns, inner) whose quantizer has
        ``groups`` sets of parameters, columns or 1.
        """
        if self.waiting:
            self.flush()
        assert self.a is not None and self.c is not None
        linear = (weight.double() @ self.c.transpose(-1, -2)).to(weight.dtype)
        root = shared_by_channels(self.a.to(weight.dtype), weight, groups)
        return Objective(
            by_channel(weight, groups).contiguous(),
            root,
            by_channel(linear, groups),
            is_gram=True,
        )


def by_channel(rows: Tensor, groups: int) -> Tensor:
    """Rows of output channels (heads, columns, inner) as (groups, batch, rows, inner)."""
    return rows[None] if groups == 1 else rows.reshape(groups, 1, 1, -1)


def shared_by_channels(root: Tensor, weight: Tensor, groups: int) -> Tensor:
    """What all channels of a head share, (heads, ...), as (groups or 1, batch, ...)."""
    if groups == 1 or len(root) == 1:
        return root[None]
    return root.repeat_interleave(weight.shape[1], 0)[:, None]


def _scores(
    values: Tensor,
    counts: Tensor | None,
    quantizer: Quantizer,
    params: Params,
    error_of: Callable[[slice, slice, slice], Callable[[Tensor], Tensor]],
) -> Tensor:
    """The errors of all candidates, (n, groups) in float64, by pieces.

    ``error_of(groups, batch, rows)`` gives the function from rounded values (groups,
    batch, n, rows, inner), which it may change, to their errors (groups, batch, n,
    rows).
    """
    groups, batch, rows, inner = values.shape
    count = next(iter(params.values())).shape[0]
    limit = PIECE if values.device.type == 'cpu' else 2**9 * PIECE
    r = max(
        1, min(rows, limit // 8 // inner)
    )  # an eighth, so that a piece holds several candidates
    b = max(1, min(batch, limit // 8 // (inner * r)))
    g = max(1, min(groups, limit // 8 // (inner * r * b)))
    n = max(1, limit // (inner * r * b * g))
    errors = torch.zeros(count, groups, dtype=torch.float64, device=values.device)
    for group in _slices(groups, g):
        own = {
            name: value if value.shape[1] == 1 else value[:, group]
            for name, value in params.items()
        }
        for one in _slices(batch, b):
            for row in _slices(rows, r):
                rounder, error = (
                    quantizer.rounder(values[group, one, row]),
                    error_of(group, one, row),
                )
                for few in _slices(count, n):
                    rounded = rounder(
                        **{name: value[few] for name, value in own.items()}
                    )
                    each = error(rounded)  # (groups, batch, n, rows)
                    if counts is not None:
                        each = each * counts[one, None, row]
                    errors[few, group] += each.sum((1, 3), dtype=torch.float64).t()
    return errors


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, size, step))


def _shared(x: Tensor, group: slice, batch: slice) -> Tensor:
    return x[:, batch] if x.shape[0] == 1 else x[group, batch]


def _times(delta: Tensor, matrix: Tensor) -> Tensor:
    """(groups, batch, n, rows, inner) times (groups or 1, batch, inner, columns)."""
    groups, batch, n, rows, inner = delta.shape
    if matrix.shape[0] == 1 and batch == 1:
        return (delta.reshape(-1, inner) @ matrix[0, 0]).view(
            groups, batch, n, rows, -1
        )
    return (delta.reshape(groups, batch, n * rows, inner) @ matrix).view(
        groups, batch, n, rows, -1
    )
