"""Integer products and transformer blocks on a GPU (the kernels are in :mod:`mmptq.runtime.gpu_kernels`)."""
from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from .blocks import IntegerBlock
from .coders import AdaLog, Change, Coder, DeMax, Uniform
from .errors import NoIntegerForm
from .gpu_kernels import ADALOG, DEMAX, KEYS, UNIFORM, attend_kernel, encode_normalized_kernel, multiply_kernel
from .kernels import Attention
from .matmul import EXACT
from .products import Steps
from .windows import places

Result = TypeVar('Result')


def launch(kernel: Any, programs: tuple[int, ...], *args: Any, **options: int) -> None:
    """Runs a kernel on the GPU of its first argument; multiplications and additions round one after the other, as in the simulation."""
    with torch.cuda.device_of(args[0]):
        kernel[programs](*args, enable_fp_fusion=False, **options)


def tried(run: Callable[[], Result]) -> Result:
    """What a first launch gives.

    Raises:
        NoIntegerForm: If it fails: Triton's compiler raises errors of several kinds, and what a GPU lacks is known only then.
    """
    try:
        return run()
    except Exception as error:
        reason = f'a kernel of Triton failed: {type(error).__name__}: {error}'
        logging.getLogger('mmengine').warning(f'{reason}; what it is for runs without it')
        raise NoIntegerForm(reason) from error


class GpuProduct:
    """uint8 codes times int8 weights on tensor cores (:class:`mmptq.runtime.products.Product`).

    A weight's integers that int8 does not hold become ``w + excess``, with an excess for each output, and the sums gain its product with
    the sum of the codes. Codes of 8 bits are multiplied as ``code - 128``.

    Args:
        integers: The weight's, (out, in), of at most 255 from the least to the largest of an output.
        zero_point: Of the codes.
        most: The largest code.

    Raises:
        NoIntegerForm: If the sums are not those of an int64 product, which is tried once.
    """

    at_once = takes_change = True

    def __init__(self, integers: Tensor, zero_point: int, most: int) -> None:
        integers = integers.to(torch.int64)
        excess = (integers.amax(1) - 127).clamp(min=0) + (integers.amin(1) + 128).clamp(max=0)
        self.weight = (integers - excess[:, None]).to(torch.int8).contiguous()
        self.above = 128 if most > 127 else 0
        self.lacking = ((self.above - zero_point) * integers.sum(1)).to(torch.int32)
        self.excess, self.has_excess = excess.to(torch.int32), bool(excess.any())
        self.none = torch.zeros(len(integers), device=integers.device)
        self._check(integers, zero_point, most)

    def _check(self, integers: Tensor, zero_point: int, most: int) -> None:
        codes = torch.randint(0, most + 1, (70, integers.shape[1]), generator=torch.Generator().manual_seed(0)).to(integers.device)
        expected = (codes - zero_point).double() @ integers.double().T
        found = tried(lambda: self(codes.to(torch.uint8), torch.ones_like(self.none), None))
        if not torch.equal(found, expected.float()):
            raise NoIntegerForm('Triton has no exact product for its shape')

    def __call__(self, codes: Tensor, gain: Tensor, offset: Tensor | None, steps: Steps | None = None, gelu: bool = False) -> Tensor:
        """See :class:`mmptq.runtime.products.Product`."""
        out = gain.new_empty(len(codes), len(self.weight), dtype=torch.float32 if steps is None else torch.uint8)
        self._run(codes, gain, offset, out, steps, gelu=gelu)
        return out

    def add_to(self, x: Tensor, codes: Tensor, gain: Tensor, offset: Tensor | None) -> None:
        """See :class:`mmptq.runtime.products.Product`."""
        self._run(codes, gain, offset, x, None, residual=x)

    def added(self, x: Tensor, codes: Tensor, gain: Tensor, offset: Tensor | None) -> Tensor:
        """A tensor (rows, out), contiguous float32, with the product added to it."""
        out = torch.empty_like(x)
        self._run(codes, gain, offset, out, None, residual=x)
        return out

    def _run(self, codes: Tensor, gain: Tensor, offset: Tensor | None, out: Tensor, steps: Steps | None, gelu: bool = False,
             residual: Tensor | None = None) -> None:
        outputs, inputs = self.weight.shape
        if codes.shape[1] != inputs or out.shape != (len(codes), outputs):  # a kernel would read beyond them
            raise QuantizationError(f'a product of {inputs} inputs and {outputs} outputs got codes of shape {tuple(codes.shape)} for a '
                                    f'tensor of shape {tuple(out.shape)}')
        rows, depth = 128, 128 if inputs % 128 == 0 else 64 if inputs % 64 == 0 else 32
        if inputs <= 128:
            depth = max(32, power_of_two(inputs))
        most_columns = 128 if inputs >= 384 else 64  # with fewer inputs other programs have to hide what a tile waits for
        columns = min(most_columns, max(16, power_of_two(outputs)))
        scale, zero, most, change = steps or Steps(1.0, 0, 255)
        launch(multiply_kernel, (math.ceil(len(codes) / rows) * math.ceil(outputs / columns),),
               codes.contiguous(), self.weight, self.lacking, self.excess, gain, self.none if offset is None else offset,
               *(change or (self.none, self.none)), self.none if residual is None else residual, out, len(codes), 1 / scale, float(zero),
               float(most), outputs, inputs, rows, columns, depth, self.above, self.has_excess, gelu, residual is not None,
               steps is not None, change is not None, num_warps=8 if columns == 128 else 4)


class GpuNorm:
    """Codes of a layer norm.

    Args:
        norm: The layer norm.
        change: Of its output.
        coder: Of that.
    """

    def __init__(self, norm: nn.LayerNorm, change: Change | None, coder: Uniform) -> None:
        self.channels, self.eps = norm.normalized_shape[0], norm.eps
        ones, zeros = (value(self.channels, device=coder.scale.device) for value in (torch.ones, torch.zeros))
        self.vectors = (ones if norm.weight is None else norm.weight.detach(), zeros if norm.bias is None else norm.bias.detach(),
                        *vectors(change, ones))
        self.coder = float(coder.inverse), float(coder.zero), float(coder.most)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """From rows (rows, channels), contiguous float32, to uint8 in the first rows of ``out``."""
        width = power_of_two(self.channels)
        rows = max(1, 4096 // width)
        launch(encode_normalized_kernel, (math.ceil(len(x) / rows),), x, *self.vectors, out, len(x), self.eps, *self.coder, self.channels,
               width, rows, num_warps=4)


class GpuAttention:
    """An attention between its layers.

    Args:
        attention: What it computes, with a uniform coder of its output.
        heads: Their number.
        channels: Of a head.
        window: Size and shift of the windows; None: one window.

    Raises:
        NoIntegerForm: For more than one maximum of DeMax, and heads of more channels than float32 has exact sums of.
    """

    def __init__(self, attention: Attention, heads: int, channels: int, window: tuple[int, int] | None) -> None:
        if channels * 255**2 >= EXACT:
            raise NoIntegerForm(f'heads of {channels} channels')
        self.heads, self.channels, self.window = heads, channels, window
        coder, probabilities, device = attention.output, attention.probabilities, attention.gain.device
        assert isinstance(coder, Uniform)
        self.kind, more, self.last, self.half = described(probabilities)
        rows = [value for span in attention.spans for value in span] + [attention.scale, attention.gain, *more]
        self.rows = torch.stack([each_of(torch.as_tensor(value, dtype=torch.float32, device=device), heads) for value in rows])
        self.table = probabilities.table.nan_to_num() if isinstance(probabilities, AdaLog) else self.rows
        self.bias = None if attention.bias is None else attention.bias.transpose(attention.keys, -1).contiguous()
        self.change = vectors(attention.change, torch.ones(heads * channels, device=device))
        self.coder = float(coder.inverse), float(coder.zero), float(coder.most)

    def __call__(self, steps: Tensor, images: int, hw_shape: tuple[int, int] | None) -> Tensor:
        """From steps of queries, keys and values (images tokens + 1, 3 heads channels), the last row for padding, uint8, to codes for the
        next layer, (images tokens, heads channels), uint8.
        """
        tokens = (len(steps) - 1) // images
        out = steps.new_empty(len(steps) - 1, self.heads * self.channels)
        if self.window is None or hw_shape is None:
            token = region = self.rows  # not read
            windows, length, shifted = 1, tokens, False
        else:
            token, region = places(*hw_shape, *self.window, steps.device)
            (windows, length), shifted = token.shape, self.window[1] > 0
        width = max(16, power_of_two(self.channels))
        keys = min(KEYS, max(16, 8192 // width), max(16, power_of_two(length)))  # more would not fit into a GPU's shared memory
        queries = min(64, keys)
        staged = self.kind != ADALOG and length > keys  # Triton 3.6 cannot pipeline a product with looked-up values
        launch(attend_kernel, (images * windows, self.heads, math.ceil(length / queries)),
               steps, self.rows, self.rows if self.bias is None else self.bias, token, region, self.table, *self.change, out,
               images, tokens, length, windows, *self.coder, self.last,
               self.heads, self.channels, width, queries, keys, self.window is not None, self.bias is not None, shifted, self.kind,
               self.half, 0 if self.window is None else length, num_warps=4, num_stages=2 if staged else 1)
        return out


class GpuBlock(IntegerBlock):
    """A block on a GPU: all images at once, seven passes over memory.

    Raises:
        NoIntegerForm: If one of its parts is not what the kernels are written for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer in (self.proj, self.fc1):
            if not isinstance(layer.coder, Uniform):
                raise NoIntegerForm(f'a kernel for {type(layer.coder).__name__} before a layer')
        assert isinstance(self.qkv.coder, Uniform) and isinstance(self.fc1.coder, Uniform)
        self.first = GpuNorm(self.norm1, self.qkv.change, self.qkv.coder)
        self.second = GpuNorm(self.norm2, self.fc1.change, self.fc1.coder)
        self.between = GpuAttention(self.attention, self.heads, self.proj.in_features // self.heads, self.window)
        size = (1, KEYS + 1) if self.window is None else (self.window[0], self.window[0])
        tried(lambda: self._images(torch.zeros(1, math.prod(size), self.qkv.in_features, device=self.padding.device), size))

    def _images(self, x: Tensor, hw_shape: tuple[int, int] | None) -> Tensor:
        rows = x.view(-1, x.shape[-1]).float()
        codes = self.padding.new_empty(len(rows) + 1, self.qkv.in_features)
        codes[-1:] = self.padding
        self.first(rows, codes)
        attended = self.between(self.heads_steps(codes), len(x), hw_shape)
        rows = self.proj.product.added(rows, attended, self.proj.gain, self.proj.offset)  # type: ignore[attr-defined]
        self._feed_forward(rows)
        return rows.view(x.shape).to(x.dtype)

    def _codes_for_feed_forward(self, x: Tensor) -> Tensor:
        codes = self.padding.new_empty(len(x), self.fc1.in_features)
        self.second(x, codes)
        return codes


def described(coder: Coder) -> tuple[int, tuple[Tensor | float, Tensor | float], float, bool]:
    """Of a coder of probabilities: its kind, two numbers for each head, its last code, and whether side data are float16.

    Raises:
        NoIntegerForm: For other kinds, and for more than one maximum of DeMax.
    """
    if isinstance(coder, Uniform):
        return UNIFORM, (coder.scale, coder.most - coder.zero), float(coder.most), False
    if isinstance(coder, AdaLog):
        return ADALOG, (coder.full.reciprocal(), coder.rate), float(coder.last), False
    if isinstance(coder, DeMax) and coder.maxima == 1:
        return DEMAX, (0.0, 0.0), float(coder.most), coder.half
    raise NoIntegerForm('two or more maxima of DeMax' if isinstance(coder, DeMax) else 'float probabilities')


def vectors(change: Change | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and shift of a change for each channel of a vector; without a change one and zero."""
    return (torch.ones_like(like), torch.zeros_like(like)) if change is None else (each_of(change.factor, len(like)),
                                                                                    each_of(change.shift, len(like)))


def each_of(values: Tensor, count: int) -> Tensor:
    """One value for each of so many, (count,), from these or from one."""
    return values.reshape(-1).expand(count).contiguous()


def power_of_two(number: int) -> int:
    """The next one that is not less."""
    return 1 << (number - 1).bit_length()
