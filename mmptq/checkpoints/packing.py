"""Weights as b-bit integers: the bits themselves, and the state of a quantized model
with such weights.

A packed weight is a stream of bits: code i takes bits ``i b`` to ``(i + 1) b - 1``, the
lowest first, and bit j of the stream is bit ``j mod 8`` of byte ``j // 8``, the lowest
first again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from ..layers import QuantOp, Rescale
from ..quantizers import AdaLogQuantizer, Calibrated, Quantizer, UniformQuantizer
from ..quantizers.adalog import decode_table
from ..quantizers.dispatch import entry_for
from ..quantizers.uniform import decode_uniform


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes of any integer type and shape, from 0 to ``2^bits - 1``, as a stream of
    bits: uint8, (ceil(codes bits / 8),).
    """
    length = packed_length(codes.numel(), bits)
    words = codes.new_zeros(-(-codes.numel() // 8) * 8, dtype=torch.int64)
    words[: codes.numel()] = codes.reshape(-1)
    # Eight codes make a word of ``bits`` bytes.
    word = (words.view(-1, 8) << torch.arange(8, device=codes.device) * bits).sum(1)
    return (
        (word[:, None] >> torch.arange(bits, device=codes.device) * 8)
        .bitwise_and_(255)
        .to(torch.uint8)
        .view(-1)[:length]
    )


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of a stream of bits (:func:`pack_codes`): int16,
    (count,).
    """
    words = packed.new_zeros(-(-count // 8) * bits, dtype=torch.int64)
    words[: packed.numel()] = packed
    word = (words.view(-1, bits) << torch.arange(bits, device=packed.device) * 8).sum(1)
    return (
        (word[:, None] >> torch.arange(8, device=packed.device) * bits)
        .bitwise_and_(2**bits - 1)
        .to(torch.int16)
        .view(-1)[:count]
    )


def packed_length(count: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return -(-count * bits // 8)


def pack_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a calibrated model, its quantized weights packed.

    Returns:
        Tensors by name, on the CPU, and their layout: ``weights``, by name the ``bits``
        and the ``shape`` of each packed one, and ``adalog``, the names of the
        quantizers with tables.

    Raises:
        QuantizationError: If a weight has no packed form, naming it.
    """
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    weights, adalog = {}, []
    for name, op in model.named_modules(remove_duplicate=False):
        if not isinstance(op, QuantOp):
            continue
        for role, quantizer in op.quantizers().items():
            make = entry_for(TABLES, quantizer)
            if make is not None and quantizer.params is not None:
                adalog.append(f'{name}.{role}_quantizer')
                tensors[f'{adalog[-1]}.shift'], tensors[f'{adalog[-1]}.mantissa'] = (
                    make(quantizer)
                )
        if 'weight' in op.roles and op.quantizer('weight').param_names:
            weight = op.get_parameter('weight').detach()
            codes = weight_codes(op, weight, name)
            tensors[f'{name}.weight'] = pack_codes(codes, op.quantizer('weight').bits)
            weights[f'{name}.weight'] = dict(
                bits=op.quantizer('weight').bits, shape=list(weight.shape)
            )
            rescale = getattr(op, 'rescale', None)
            gain = rescale.correction(weight) if isinstance(rescale, Rescale) else None
            if gain is not None:
                tensors[f'{name}.rescale.gain'] = gain.detach()
    # safetensors takes no two names for the same memory.
    return {
        name: value.cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }, dict(weights=weights, adalog=adalog)


def weight_codes(op: QuantOp, weight: Tensor, name: str) -> Tensor:
    """The codes of an operation's weight, rescaled as it is read, int16.

    Raises:
        QuantizationError: If they do not say all of the quantized weight.
    """
    quantizer: Quantizer = op.quantizer('weight')
    params, rescale = quantizer.params, getattr(op, 'rescale', None)
    decode = entry_for(WEIGHTS, quantizer)
    if decode is None or params is None:
        kinds = ' or '.join(kind.__name__ for kind in WEIGHTS)
        raise QuantizationError(
            f'the weight of {name} cannot be packed: its quantizer is to be a'
            f' calibrated {kinds} (those that mmptq.checkpoints.packing.WEIGHTS has),'
            f' not {quantizer}'
        )
    read = weight if rescale is None else rescale.weight(weight)
    codes = quantizer.encode(read, **params)
    values = decode(codes, **params)
    kept = as_kept(values, rescale.scale if isinstance(rescale, Rescale) else None)
    again = kept if rescale is None else rescale.weight(kept)
    if not (
        torch.equal(values, quantizer(read)) and torch.equal(values, quantizer(again))
    ):
        raise QuantizationError(
            f'the weight of {name} cannot be packed: its scales, from'
            f' {float(params["scale"].min()):.3g} on, are at the end of what float32'
            ' can hold'
        )
    return codes


def as_kept(weight: Tensor, rescale: Tensor | None) -> Tensor:
    """A quantized weight as the operation keeps it, before the rescale r of its
    columns, which brings it into the same code again.
    """
    return weight if rescale is None else weight / rescale


def tables(q: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """AdaLog's two tables of integer inference
    (:func:`mmptq.quantizers.adalog.decode_table`), int16, (levels,) each.
    """
    shift, mantissa, _ = decode_table(q, levels)
    return shift.to(torch.int16), mantissa.to(torch.int16)


def adalog_tables(quantizer: AdaLogQuantizer) -> tuple[Tensor, Tensor]:
    """Those of a calibrated quantizer."""
    assert quantizer.q is not None
    return tables(quantizer.q, quantizer.levels)


WEIGHTS: dict[type[Quantizer], Callable[..., Tensor]] = {
    UniformQuantizer: decode_uniform
}
"""What the codes of a packed weight are worth, from codes and parameters, by the class
of its quantizer.
"""

TABLES: dict[type[Quantizer], Callable[[Any], tuple[Tensor, Tensor]]] = {
    AdaLogQuantizer: adalog_tables
}
"""The tables of integer inference that are stored beside the parameters of a quantizer,
by its class.
"""


def unpack_state(
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Mapping[str, Any]],
    adalog: list[str],
) -> dict[str, Tensor]:
    """The state of a quantized model from that with packed weights
    (:func:`pack_state`).

    Raises:
        QuantizationError: If tensors are missing or do not fit, naming the first of
            them.
    """
    state = dict(tensors)
    for name in adalog:
        found = [state.pop(f'{name}.{part}', None) for part in ('shift', 'mantissa')]
        q = _taken(tensors, f'{name}.q')
        for part, value, expected in zip(
            ('shift', 'mantissa'),
            found,
            tables(q, 0 if found[0] is None else found[0].numel()),
            strict=True,
        ):
            _require(
                value is not None and torch.equal(value, expected),
                f'{name}.{part} is not the table that belongs to its q',
            )
    for name, layout in weights.items():
        state[name] = _unpacked(tensors, name, layout['bits'], tuple(layout['shape']))
    return state


def _unpacked(
    tensors: Mapping[str, Tensor], name: str, bits: int, shape: tuple[int, ...]
) -> Tensor:
    """A weight as the operation keeps it, float."""
    packed, count = _taken(tensors, name), math.prod(shape)
    _require(
        packed.dtype == torch.uint8 and packed.shape == (packed_length(count, bits),),
        f'{name} is to hold {count} codes of {bits} bits in'
        f' {packed_length(count, bits)} bytes, and has the shape {tuple(packed.shape)}'
        f' and type {packed.dtype}',
    )
    operation = name.removesuffix('.weight')
    scale = _taken(tensors, f'{operation}.weight_quantizer.scale')
    zero_point = _taken(tensors, f'{operation}.weight_quantizer.zero_point')
    quantizer = UniformQuantizer(bits, axis=None if scale.ndim == 0 else -len(shape))
    quantizer.groups = shape[0]
    _fits(
        quantizer, f'{operation}.weight_quantizer', scale=scale, zero_point=zero_point
    )
    codes = unpack_codes(packed, bits, count).view(shape)
    weight = decode_uniform(codes, scale, zero_point)
    if f'{operation}.rescale.scale' not in tensors:
        return weight
    parts = {
        part: _taken(tensors, f'{operation}.rescale.{part}')
        for part in ('scale', 'shift', 'gain')
    }
    _fits(Rescale(shape[1], shape[0]), f'{operation}.rescale', **parts)
    return as_kept(weight, parts['scale'])


def _taken(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    _require(name in tensors, f'{name} is missing')
    return tensors[name]


def _fits(part: Calibrated, name: str, **params: Tensor) -> None:
    for key, value in params.items():
        fault = part.fault(key, value)
        _require(fault is None, f'{name}.{key} {fault}')


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise QuantizationError(otherwise)
