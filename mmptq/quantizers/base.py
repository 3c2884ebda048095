"""The quantizer that all others are: parameters that are absent until calibrated, an
encoder and a decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import QuantizationError

Params = dict[str, Tensor]


CHUNK = 2**16
"""Elements that a chain of element-wise operations takes at a time on a CPU: they stay
in its cache.
"""


Change = Callable[[Tensor], Tensor]
"""A change of a tensor before it is quantized, by the last dimension only
(:mod:`mmptq.layers.rescale`).
"""


def in_chunks(
    chain: Callable[[Tensor, Tensor], object],
    x: Tensor,
    split: bool = True,
    before: Change | None = None,
) -> Tensor:
    """A new tensor that ``chain(piece, out)`` fills, by pieces of the first dimension;
    without gradient, since rounding has none.

    ``before`` is applied to each piece first.
    """
    x = x.detach()
    out = torch.empty_like(x)
    if not split or x.ndim == 0 or x.device.type != 'cpu' or x.numel() <= CHUNK:
        chain(before(x) if before else x, out)
    else:
        rows = max(1, x.shape[0] * CHUNK // x.numel())
        for piece, target in zip(x.split(rows), out.split(rows), strict=True):
            chain(before(piece) if before else piece, target)
    return out


def is_traced() -> bool:
    """Whether torch.export or torch.compile is looking: they understand the plain
    formulas, and fuse them themselves.
    """
    return hasattr(torch.compiler, 'is_compiling') and torch.compiler.is_compiling()


@dataclass(frozen=True)
class Grid:
    """Parameters to choose from.

    Attributes:
        params: By name: shape (n, groups), or (n, 1) where all groups try the same.
        spacing: Distance between neighbouring scales, (groups,).
        stage: How many grids came before this one.
    """

    params: Params
    spacing: Tensor
    stage: int = 0


class Calibrated(nn.Module):
    """A module whose parameters are absent until they are calibrated. Without them it
    is the identity.

    Parameters are buffers, ``None`` until :meth:`set` or a checkpoint provides them, so
    that there is no other state: a float checkpoint and a quantized one load into the
    same module.
    """

    param_names: ClassVar[tuple[str, ...]]
    place: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in self.param_names:
            self.register_buffer(name, None)
        # Goes where the module goes, so that parameters from a checkpoint land on its
        # device.
        self.register_buffer('place', torch.empty(0), persistent=False)

    @property
    def params(self) -> Params | None:
        """The parameters by name, or None before calibration."""
        params = {name: getattr(self, name) for name in self.param_names}
        return None if any(value is None for value in params.values()) else params

    def set(self, **params: Tensor) -> None:
        """Sets all parameters.

        Raises:
            ValueError: If a parameter is missing, unknown, or has a :meth:`fault`.
        """
        if set(params) != set(self.param_names):
            raise ValueError(
                f'{type(self).__name__} takes the parameters {self.param_names}, not'
                f' {tuple(params)}'
            )
        for name, value in params.items():
            fault = self.fault(name, value)
            if fault:
                raise ValueError(f'{type(self).__name__}: {name} {fault}')
            setattr(self, name, value.detach().clone())

    def fault(self, name: str, value: Tensor) -> str | None:
        """Why a value cannot be that of a parameter, if it is so.

        Here: another number of dimensions than :meth:`param_ndim`, another type than
        float32 or float64, values that are not finite, a scale that is not positive or
        too small to divide by.
        """
        if value.ndim != self.param_ndim():
            return (
                f'has the shape {tuple(value.shape)}, not {self.param_ndim()}'
                ' dimensions'
            )
        if value.dtype not in (torch.float32, torch.float64):
            return f'is of type {value.dtype}, not float32'
        if not torch.isfinite(value).all():
            return 'is not finite'
        if name == 'scale' and not (value > 0).all():
            return 'is not positive'
        if name == 'scale' and not (value >= torch.finfo(value.dtype).tiny).all():
            return 'is too small to divide by'
        return None

    def clear(self) -> None:
        """Forgets the parameters: the module is the identity again."""
        for name in self.param_names:
            setattr(self, name, None)

    def param_ndim(self) -> int:
        """Number of dimensions of each parameter."""
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # Raised, not collected: who loads with strict=False passes over what is
        # collected.
        for name in self.param_names:
            value = state_dict.get(prefix + name)
            fault = None if value is None else self.fault(name, value)
            if (
                fault is None
                and value is not None
                and value.is_floating_point()
                and value.dtype != self.place.dtype
            ):
                fault = f'is of type {value.dtype}, not {self.place.dtype}'
            if fault:
                raise QuantizationError(
                    f'{prefix}{name} {fault}, as {type(self).__name__} needs it'
                )
        # A buffer that is None is not in the module's state: make room for what the
        # checkpoint brings.
        for name in self.param_names:
            value = state_dict.get(prefix + name)
            present = getattr(self, name)
            if value is not None and (present is None or present.shape != value.shape):
                setattr(self, name, torch.empty_like(value, device=self.place.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def calibrated_parts(module: nn.Module) -> dict[str, Calibrated]:
    """All modules in a module that need parameters, by name."""
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, Calibrated) and child.param_names
    }


class Quantizer(Calibrated):
    """Maps a tensor to integer codes and back.

    Parameters broadcast against the tensor: shape ``()`` when ``axis`` is None, else
    ``(n, 1, ..., 1)`` with ``n`` at ``axis``.

    Args:
        bits: Width of a code, 2 to 8.
        axis: Negative axis of the tensor along which parameters differ (output
            channels, heads), or None for one set.

    Raises:
        ValueError: If ``bits`` is not an integer in 2..8, or ``axis`` is not negative.
    """

    uniform: ClassVar[bool] = False
    """Whether codes are multiples of a step, so that integers can multiply them."""
    signed: ClassVar[bool] = True
    """Whether values below zero have codes of their own; if not, a recipe may name it
    only where there are hardly any.
    """
    dynamic: ClassVar[bool] = False
    """Whether ranges come from each tensor itself, so that there is nothing to search;
    parameters are from :meth:`observed`.
    """

    groups: int | None = None
    """How many sets of parameters there are along ``axis`` (output channels, heads),
    where that is known.
    """

    def __init__(self, bits: int, axis: int | None = None) -> None:
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise ValueError(f'bits must be an integer from 2 to 8, not {bits!r}')
        if axis is not None and axis >= 0:
            raise ValueError(
                f'axis counts from the end and must be negative, not {axis}'
            )
        self.bits = bits
        self.axis = axis

    @property
    def levels(self) -> int:
        """Number of codes N = 2^bits."""
        return 2**self.bits

    @property
    def effective_bits(self) -> float:
        """The logarithm to base 2 of the number of values that a code can mean."""
        return float(self.bits)

    def param_ndim(self) -> int:
        return 0 if self.axis is None else -self.axis

    def fault(self, name: str, value: Tensor) -> str | None:
        """As in :class:`Calibrated`; also a number of sets of parameters that the
        tensor does not have.
        """
        if value.ndim == self.param_ndim() and self.axis is not None:
            groups = value.shape[0] if self.groups is None else self.groups
            shape = (groups, *[1] * (self.param_ndim() - 1))
            if value.shape != shape or not groups:
                return f'has the shape {tuple(value.shape)}, not {shape}'
        return super().fault(name, value)

    def encode(self, x: Tensor, **params: Tensor) -> Tensor:
        """Integer codes of ``x``, int16, the shape of ``x``."""
        raise NotImplementedError

    def decode(self, codes: Tensor, **params: Tensor) -> Tensor:
        """The values that the codes stand for, in the dtype of the scale."""
        raise NotImplementedError

    def fake_quantize(
        self, x: Tensor, before: Change | None = None, **params: Tensor
    ) -> Tensor:
        """``decode(encode(before(x)))``, by a faster way where there is one with the
        same bits.
        """
        return self.decode(self.encode(before(x) if before else x, **params), **params)

    def rounder(self, x: Tensor) -> Callable[..., Tensor]:
        """:meth:`fake_quantize` with many parameters at once, for a search.

        Args:
            x: Shape (groups, batch, rows, inner).

        Returns:
            A function of parameters of shape (n, groups) or (n, 1), by name, that gives
            (groups, batch, n, rows, inner).
        """
        raise NotImplementedError

    def range_params(self, low: Tensor, high: Tensor) -> Params:
        """Parameters that cover ``[low, high]``; both tensors broadcast against the
        quantized one.
        """
        raise NotImplementedError

    def observed(self, samples: Sequence[Tensor]) -> Params:
        """The parameters of a dynamic quantizer, from samples of what it will quantize."""
        raise NotImplementedError

    def forward(self, x: Tensor, before: Change | None = None) -> Tensor:
        params = self.params
        if params is None or is_traced():
            x = before(x) if before else x
            return (
                x if params is None else self.decode(self.encode(x, **params), **params)
            )
        return self.fake_quantize(x, before=before, **params)

    def candidates(
        self, values: Tensor, count: int, present: Params | None = None
    ) -> Grid:
        """A first grid of parameters to choose from.

        Args:
            values: What will be quantized, (groups, values).
            count: Size of the grid, about.
            present: The parameters so far, (groups,).
        """
        raise NotImplementedError

    def refine(
        self, grid: Grid, errors: Tensor, values: Tensor, count: int, width: int
    ) -> Grid | None:
        """A finer grid around the best of a grid, or None if there is none.

        Args:
            grid: The grid that was scored.
            errors: The error of each of its members, (n, groups).
            values: What will be quantized, (groups, values).
            count: Size of the new grid, about.
            width: Members to keep.
        """
        raise NotImplementedError

    def grouped(self, x: Tensor) -> Tensor:
        """A tensor as (groups, values): a row for each set of parameters."""
        return (
            x.reshape(1, -1)
            if self.axis is None
            else x.movedim(self.axis, 0).flatten(1)
        )

    def ungrouped(self, params: Tensor) -> Tensor:
        """Parameters (..., groups) in the shape that broadcasts against the quantized
        tensor.
        """
        if self.axis is None:
            return params.squeeze(-1)
        return params.view(*params.shape, *[1] * (-self.axis - 1))

    def extra_repr(self) -> str:
        return f'bits={self.bits}' + (
            '' if self.axis is None else f', axis={self.axis}'
        )


class Float(Quantizer):
    """Leaves a tensor as it is, in float. For a site that a recipe does not quantize;
    ``bits`` is ignored.
    """

    param_names = ()

    def __init__(self, bits: int = 8, axis: int | None = None) -> None:
        super().__init__(bits, axis)
        self.bits = 32

    def forward(self, x: Tensor, before: Change | None = None) -> Tensor:
        return before(x) if before else x


def best_of(grid: Grid, errors: Tensor, width: int) -> Params:
    """The ``width`` members of a grid with the least errors, by group: parameters of
    shape (width, groups).
    """
    order = errors.sort(dim=0, stable=True).indices[
        :width
    ]  # stable: of equals, the first
    return {
        name: value.expand(errors.shape).gather(0, order)
        for name, value in grid.params.items()
    }


def beside(params: Tensor) -> Tensor:
    """Parameters (n, groups) as they broadcast against values (groups, batch, 1, rows,
    inner).
    """
    return params.t().contiguous()[:, None, :, None, None]


def around(center: Tensor, spacing: Tensor, count: int) -> Tensor:
    """``count`` positive scales within half a spacing of each of (m, groups) scales: (m
    count, groups).
    """
    offsets = (
        torch.linspace(-0.5, 0.5, count, dtype=center.dtype, device=center.device)[
            :, None
        ]
        * spacing
    )  # (count, groups)
    scales = (center[:, None] + offsets).flatten(0, 1)
    return torch.where(scales > 0, scales, center.repeat_interleave(count, 0))
