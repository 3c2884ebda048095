"""The quantizer that all others are: parameters that are absent until calibrated, an encoder and a decoder."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]


CHUNK = 2**16
"""Elements that a chain of element-wise operations takes at a time on a CPU: they stay in its cache."""


def in_chunks(chain: Callable[[Tensor, Tensor], object], x: Tensor, split: bool = True) -> Tensor:
    """A new tensor that ``chain(piece, out)`` fills, by pieces of the first dimension; without gradient, since rounding has none."""
    x = x.detach()
    out = torch.empty_like(x)
    if not split or x.ndim == 0 or x.device.type != 'cpu' or x.numel() <= CHUNK:
        chain(x, out)
    else:
        rows = max(1, x.shape[0] * CHUNK // x.numel())
        for piece, target in zip(x.split(rows), out.split(rows), strict=True):
            chain(piece, target)
    return out


def is_traced() -> bool:
    """Whether torch.export or torch.compile is looking: they understand the plain formulas, and fuse them themselves."""
    return hasattr(torch.compiler, 'is_compiling') and torch.compiler.is_compiling()


class Quantizer(nn.Module):
    """Maps a tensor to integer codes and back. Without parameters it is the identity.

    Parameters are buffers, ``None`` until :meth:`set` or a checkpoint provides them, so that there is no other state:
    a float checkpoint and a quantized one load into the same module. They broadcast against the tensor: shape ``()``
    when ``axis`` is None, else ``(n, 1, ..., 1)`` with ``n`` at ``axis``.

    Args:
        bits: Width of a code, 2 to 8.
        axis: Negative axis of the tensor along which parameters differ (output channels, heads), or None for one set.

    Raises:
        ValueError: If ``bits`` is not an integer in 2..8, or ``axis`` is not negative.
    """

    param_names: ClassVar[tuple[str, ...]]
    place: Tensor

    def __init__(self, bits: int, axis: int | None = None) -> None:
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise ValueError(f'bits must be an integer from 2 to 8, not {bits!r}')
        if axis is not None and axis >= 0:
            raise ValueError(f'axis counts from the end and must be negative, not {axis}')
        self.bits = bits
        self.axis = axis
        for name in self.param_names:
            self.register_buffer(name, None)
        # Goes where the module goes, so that parameters from a checkpoint land on its device.
        self.register_buffer('place', torch.empty(0), persistent=False)

    @property
    def levels(self) -> int:
        """Number of codes N = 2^bits."""
        return 2**self.bits

    @property
    def params(self) -> Params | None:
        """The parameters by name, or None before calibration."""
        params = {name: getattr(self, name) for name in self.param_names}
        return None if any(value is None for value in params.values()) else params

    def set(self, **params: Tensor) -> None:
        """Sets all parameters; each must be finite, and a scale positive.

        Raises:
            ValueError: If a parameter is missing, unknown, not finite, or a scale that is not positive.
        """
        if set(params) != set(self.param_names):
            raise ValueError(f'{type(self).__name__} takes the parameters {self.param_names}, not {tuple(params)}')
        for name, value in params.items():
            if not torch.isfinite(value).all():
                raise ValueError(f'{type(self).__name__}: {name} is not finite')
            if name == 'scale' and not (value > 0).all():
                raise ValueError(f'{type(self).__name__}: scale is not positive')
            setattr(self, name, value.detach().clone())

    def clear(self) -> None:
        """Forgets the parameters: the quantizer is the identity again."""
        for name in self.param_names:
            setattr(self, name, None)

    def encode(self, x: Tensor, **params: Tensor) -> Tensor:
        """Integer codes of ``x``, int16, the shape of ``x``."""
        raise NotImplementedError

    def decode(self, codes: Tensor, **params: Tensor) -> Tensor:
        """The values that the codes stand for, in the dtype of the scale."""
        raise NotImplementedError

    def fake_quantize(self, x: Tensor, **params: Tensor) -> Tensor:
        """``decode(encode(x))``, by a faster way where there is one with the same bits."""
        return self.decode(self.encode(x, **params), **params)

    def range_params(self, low: Tensor, high: Tensor) -> Params:
        """Parameters that cover ``[low, high]``; both tensors broadcast against the quantized one."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        params = self.params
        if params is None:
            return x
        if is_traced():
            return self.decode(self.encode(x, **params), **params)
        return self.fake_quantize(x, **params)

    def candidates(self, values: Tensor, count: int) -> Params:
        """A grid of parameters to choose from.

        Args:
            values: What will be quantized, by group (see :meth:`grouped`).
            count: Size of the grid, about.

        Returns:
            Parameters of shape (n, groups).
        """
        raise NotImplementedError

    def grouped(self, x: Tensor) -> Tensor:
        """A tensor as (groups, values): a row for each set of parameters."""
        return x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).flatten(1)

    def ungrouped(self, params: Tensor) -> Tensor:
        """Parameters (..., groups) in the shape that broadcasts against the quantized tensor."""
        if self.axis is None:
            return params.squeeze(-1)
        return params.view(*params.shape, *[1] * (-self.axis - 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A buffer that is None is not in the module's state: make room for what the checkpoint brings.
        for name in self.param_names:
            value = state_dict.get(prefix + name)
            if value is not None and value.ndim != (0 if self.axis is None else -self.axis):
                args[-1].append(f'{prefix}{name}: shape {tuple(value.shape)} does not fit {self}')
            elif value is not None and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(value, device=self.place.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f'bits={self.bits}' + ('' if self.axis is None else f', axis={self.axis}')
