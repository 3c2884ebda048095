"""A quantized operation as ONNX nodes: quantized and dequantized operands (Q/DQ) around
the product, or integers multiplied as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ..checkpoints.packing import weight_codes
from ..errors import QuantizationError
from ..layers import GeluShift, QuantConv2d, QuantLinear, QuantOp, Rescale
from ..quantizers import (
    AdaLogQuantizer,
    DeMaxQuantizer,
    Float,
    Quantizer,
    UniformQuantizer,
)
from ..quantizers.adalog import R, decode_values
from ..quantizers.dispatch import entry_for, entry_for_pair
from .trace import DOMAIN, OPSET

NARROW = 4
"""Weights of so many bits or fewer are INT4, others INT8."""


class Call(NamedTuple):
    """Where an operation is in a graph: its name in the backbone, and the names of its
    inputs and output in the graph.
    """

    name: str
    inputs: tuple[str, ...]
    output: str


def replace_operations(model: onnx.ModelProto, backbone: nn.Module) -> list[Call]:
    """Puts the nodes of each quantized operation in the place of the one that stands
    for it (:func:`mmptq.export.trace.trace`).

    Returns:
        The operations in the order in which they run.

    Raises:
        QuantizationError: If an operation has no form in ONNX, naming it.
    """
    nodes, calls = [], []
    for node in model.graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        call = Call(node.attribute[0].s.decode(), tuple(node.input), node.output[0])
        pieces = Operation(call)
        pieces.build(backbone.get_submodule(call.name), *call.inputs)  # type: ignore[arg-type]
        nodes += pieces.nodes
        model.graph.initializer.extend(pieces.constants)
        calls.append(call)
    del model.graph.node[:], model.opset_import[:]
    model.graph.node.extend(nodes)
    model.opset_import.extend([helper.make_opsetid('', OPSET)])
    return calls


class Operation:
    """The nodes and constants of one quantized operation; all their names begin with
    its own.
    """

    def __init__(self, call: Call) -> None:
        # A layer may run more than once: its output tells the calls apart.
        self.name, self.output, self.prefix = (
            call.name,
            call.output,
            f'{call.name}/{call.output}',
        )
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def build(self, op: QuantOp, *inputs: str) -> None:
        """Makes the nodes of an operation on some inputs.

        Raises:
            QuantizationError: If it has no form in ONNX.
        """
        if isinstance(op, QuantLinear):
            self.linear(op, inputs[0])
        elif isinstance(op, QuantConv2d):
            self.convolution(op, inputs[0])
        else:
            self.product(op, *inputs)
        self.nodes[-1].output[0] = self.output

    def linear(self, op: QuantLinear, x: str) -> None:
        """``x W^T + bias``, both factors dequantized."""
        x = self.quantized(self.rescaled(x, op.rescale), op.quantizer('input'))
        product = self.node(
            'MatMul', x, self.node('Transpose', self.weight(op), perm=(1, 0))
        )
        read = op.weight if op.rescale is None else op.rescale.weight(op.weight)
        bias = op.corrected_bias(op.quantizer('weight')(read))
        if bias is not None:
            self.node('Add', product, self.constant('bias', bias))

    def convolution(self, op: QuantConv2d, x: str) -> None:
        """A convolution, both factors dequantized; its padding is zero, which is exact."""
        if op.padding_mode != 'zeros':
            raise QuantizationError(
                f'{self.name} pads by {op.padding_mode}: only convolutions that pad'
                ' with zeros can be exported'
            )
        left, right, top, bottom = op._reversed_padding_repeated_twice
        inputs = [self.quantized(x, op.quantizer('input')), self.weight(op)]
        if op.bias is not None:
            inputs.append(self.constant('bias', op.bias))
        self.node(
            'Conv',
            *inputs,
            kernel_shape=op.kernel_size,
            strides=op.stride,
            dilations=op.dilation,
            group=op.groups,
            pads=[top, left, bottom, right],
        )

    def product(self, op: QuantOp, left: str, right: str) -> None:
        """The product of two activations: of integers if both are uniform, of
        dequantized values if not.
        """
        first, second = op.quantizer('left'), op.quantizer('right')
        write = entry_for_pair(PRODUCTS, first, second) or Operation.of_values
        write(self, left, first, right, second)

    def of_values(
        self, left: str, first: Quantizer, right: str, second: Quantizer
    ) -> None:
        """The product of dequantized values."""
        self.node('MatMul', self.quantized(left, first), self.quantized(right, second))

    def of_integers(
        self, left: str, first: UniformQuantizer, right: str, second: UniformQuantizer
    ) -> None:
        """The product of integers, times what one of them is worth."""
        integers = self.integers(
            self.codes(left, first)[0], self.codes(right, second)[0], second, first
        )
        assert first.scale is not None and second.scale is not None
        unit = self.constant('unit', first.scale * second.scale)
        self.node('Mul', self.node('Cast', integers, to=TensorProto.FLOAT), unit)

    def integers(
        self,
        left: str,
        right: str,
        second: UniformQuantizer,
        first: UniformQuantizer | None = None,
    ) -> str:
        """``(A - a)(B - b) = A B - b (A 1) - a (1 (B - b))``, INT32; zero points a (0
        without a quantizer) and b may differ by head.

        ONNX Runtime 1.32 multiplies no dequantized activations of which each head has
        its own zero point.
        """
        zero_point = self.zero_point(second)
        wide = self.node('Cast', left, to=TensorProto.INT32)
        rows = self.node(
            'Mul',
            self.node('ReduceSum', wide, self.constant('last', np.array([-1]))),
            zero_point,
        )
        integers = self.node('Sub', self.node('MatMulInteger', left, right), rows)
        if first is None:
            return integers
        centered = self.node(
            'Sub', self.node('Cast', right, to=TensorProto.INT32), zero_point
        )
        columns = self.node(
            'ReduceSum', centered, self.constant('last_but_one', np.array([-2]))
        )
        return self.node(
            'Sub', integers, self.node('Mul', columns, self.zero_point(first))
        )

    def zero_point(self, quantizer: UniformQuantizer) -> str:
        """A zero point as it broadcasts against the codes, INT32."""
        assert quantizer.zero_point is not None
        return self.constant('zero_point', quantizer.zero_point.to(torch.int32))

    def quantized(self, x: str, quantizer: Quantizer) -> str:
        """What a quantizer makes of an activation."""
        write = entry_for(ACTIVATIONS, quantizer)
        if write is None:
            raise QuantizationError(
                f'{self.name}: {type(quantizer).__name__} has no entry in'
                ' mmptq.export.graph.ACTIVATIONS, so that it has no form in ONNX'
            )
        return write(self, x, quantizer)

    def dequantized(self, x: str, quantizer: UniformQuantizer) -> str:
        """The codes of an activation, dequantized."""
        codes, scale, zero_point = self.codes(x, quantizer)
        return self.node(
            'DequantizeLinear', codes, scale, zero_point, **_axis(quantizer)
        )

    def unchanged(self, x: str, quantizer: Float) -> str:
        """An activation that a recipe leaves in float."""
        return x

    def codes(self, x: str, quantizer: UniformQuantizer) -> tuple[str, str, str]:
        """The codes of an activation in UINT8, their scale and their zero point."""
        assert quantizer.scale is not None and quantizer.zero_point is not None
        self.check_zero_point(quantizer)
        scale = self.constant('scale', quantizer.scale.squeeze())
        zero_point = self.constant(
            'zero_point', quantizer.zero_point.squeeze().numpy().astype(np.uint8)
        )
        codes = self.node('QuantizeLinear', x, scale, zero_point, **_axis(quantizer))
        if quantizer.bits < 8:
            codes = self.node(
                'Clip',
                codes,
                '',
                self.constant('last_code', np.array(quantizer.levels - 1, np.uint8)),
            )
        return codes, scale, zero_point

    def logarithmic(self, x: str, quantizer: AdaLogQuantizer) -> str:
        """AdaLog: codes by a logarithm, values by a look-up table."""
        assert quantizer.scale is not None and quantizer.q is not None
        ratio = self.node(
            'Clip',
            self.node('Div', x, self.constant('scale', quantizer.scale)),
            self.constant('zero', 0.0),
            self.constant('one', 1.0),
        )
        logarithm = self.node(
            'Mul',
            self.node('Log', ratio),
            self.constant('steps', -R / float(quantizer.q) / math.log(2)),
        )
        codes = self.node(
            'Min',
            self.node('Round', logarithm),
            self.constant('zero_code', float(quantizer.zero_code)),
        )
        table = decode_values(
            quantizer.scale, quantizer.q, quantizer.levels, quantizer.strict
        )
        return self.node(
            'Gather',
            self.constant('table', table),
            self.node('Cast', codes, to=TensorProto.INT32),
        )

    def without_maxima(
        self, x: str, demax: DeMaxQuantizer, values: str, quantizer: Quantizer
    ) -> None:
        """``P V = D (codes (V - z)) s + m V[j]``
        (:func:`mmptq.quantizers.demax.product`), the product one of integers.
        """
        if not isinstance(quantizer, UniformQuantizer):
            raise QuantizationError(
                f'{self.name}: the right operand of a product with DeMax must be'
                f' uniform, not {quantizer}'
            )
        assert quantizer.scale is not None
        zero, one = self.constant('zero', 0.0), self.constant('one', 1.0)
        maximum, position = self.several(
            'TopK', 2, x, self.constant('maxima', np.array([demax.maxima]))
        )
        rest = self.node(
            'ScatterElements', x, position, self.node('Mul', maximum, zero), axis=-1
        )
        second = self.node('ReduceMax', rest, self.constant('last', np.array([-1])))
        step = self.node(
            'Div', second, self.constant('levels', float(demax.levels - 1))
        )
        if demax.side == 'float16':
            maximum, step = (
                self.node(
                    'Cast',
                    self.node('Cast', side, to=TensorProto.FLOAT16),
                    to=TensorProto.FLOAT,
                )
                for side in (maximum, step)
            )
        usable = self.node(
            'Greater', step, self.constant('tiny', float(np.finfo(np.float32).tiny))
        )
        step = self.node('Where', usable, step, zero)
        scaled = self.node(
            'Mul', rest, self.node('Reciprocal', self.node('Where', usable, step, one))
        )
        codes = self.node(
            'Clip',
            self.node('Round', scaled),
            zero,
            self.constant('last_code', float(demax.levels - 1)),
        )
        codes = self.node('Cast', codes, to=TensorProto.UINT8)

        value_codes, scale, zero_point = self.codes(values, quantizer)
        integers = self.node(
            'Cast', self.integers(codes, value_codes, quantizer), to=TensorProto.FLOAT
        )
        result = self.node(
            'Mul',
            integers,
            self.node('Mul', step, self.constant('unit', quantizer.scale)),
        )

        values = self.node(
            'DequantizeLinear', value_codes, scale, zero_point, **_axis(quantizer)
        )
        columns = self.node(
            'Concat',
            self.constant('ones', np.ones(3, np.int64)),
            self.node('Shape', values, start=-1),
            axis=0,
        )
        maxima = self.several(
            'Split', demax.maxima, maximum, axis=-1, num_outputs=demax.maxima
        )
        positions = self.several(
            'Split', demax.maxima, position, axis=-1, num_outputs=demax.maxima
        )
        for largest, place in zip(maxima, positions, strict=True):
            gathered = self.node(
                'GatherElements', values, self.node('Expand', place, columns), axis=-2
            )
            result = self.node('Add', result, self.node('Mul', largest, gathered))

    def rescaled(self, x: str, rescale: Rescale | GeluShift | None) -> str:
        """What a rescale makes of an input."""
        if (
            isinstance(rescale, Rescale)
            and rescale.scale is not None
            and rescale.shift is not None
        ):
            x = self.node(
                'Mul', x, self.constant('rescale', rescale.scale.reciprocal())
            )
            return self.node('Sub', x, self.constant('shift', rescale.shift))
        if isinstance(rescale, GeluShift) and rescale.shift is not None:
            return self.node('Add', x, self.constant('shift', rescale.shift))
        return x

    def weight(self, op: QuantLinear | QuantConv2d) -> str:
        """An operation's weight, stored in integers and dequantized; float where its
        recipe has it so.
        """
        quantizer = op.quantizer('weight')
        if not quantizer.param_names:
            rescale = getattr(op, 'rescale', None)
            return self.constant(
                'weight', op.weight if rescale is None else rescale.weight(op.weight)
            )
        codes = weight_codes(op, op.weight.detach(), self.name).numpy()
        assert (
            isinstance(quantizer, UniformQuantizer)
            and quantizer.scale is not None
            and quantizer.zero_point is not None
        )
        middle = quantizer.levels // 2
        self.check_zero_point(quantizer)
        zero_point = quantizer.zero_point.squeeze().numpy() - middle
        dtype = helper.tensor_dtype_to_np_dtype(
            TensorProto.INT4 if quantizer.bits <= NARROW else TensorProto.INT8
        )
        stored, zero = (
            self.constant('weight', (codes - middle).astype(dtype)),
            self.constant('weight_zero_point', zero_point.astype(dtype)),
        )
        axis = {} if quantizer.axis is None else {'axis': 0}
        if isinstance(op.quantizer('input'), UniformQuantizer):
            return self.node(
                'DequantizeLinear',
                stored,
                self.constant('weight_scale', quantizer.scale.squeeze()),
                zero,
                **axis,
            )
        # Where a weight goes straight from here to a product with a float input, ONNX
        # Runtime rounds that to 8 bits of its own.
        one = self.constant('one', torch.ones_like(quantizer.scale.squeeze()))
        return self.node(
            'Mul',
            self.node('DequantizeLinear', stored, one, zero, **axis),
            self.constant('weight_scale', quantizer.scale),
        )

    def check_zero_point(self, quantizer: UniformQuantizer) -> None:
        """Raises QuantizationError if a zero point is no code, which ONNX wants it to
        be.
        """
        assert quantizer.zero_point is not None
        if (
            not 0
            <= int(quantizer.zero_point.min())
            <= int(quantizer.zero_point.max())
            < quantizer.levels
        ):
            raise QuantizationError(
                f'{self.name} has a zero point beyond its {quantizer.levels} codes: it'
                ' has no form in ONNX'
            )

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output, which it returns."""
        return self.several(kind, 1, *inputs, **attributes)[0]

    def several(
        self, kind: str, outputs: int, *inputs: str, **attributes: Any
    ) -> list[str]:
        """Adds a node with some outputs, which it returns."""
        name = f'{self.prefix}/{kind}_{len(self.nodes)}'
        names = [name, *(f'{name}_{number}' for number in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, inputs, names, name, **attributes))
        return names

    def constant(self, name: str, value: Tensor | np.ndarray[Any, Any] | float) -> str:
        """Adds a constant, float32 if it is a number."""
        name = f'{self.prefix}/{name}_{len(self.constants)}'
        array = (
            value.detach().numpy()
            if isinstance(value, Tensor)
            else np.asarray(value, None if hasattr(value, 'dtype') else np.float32)
        )
        self.constants.append(
            numpy_helper.from_array(
                np.ascontiguousarray(array).reshape(array.shape), name
            )
        )
        return name


def _axis(quantizer: Quantizer) -> dict[str, int]:
    return {} if quantizer.axis is None else {'axis': quantizer.axis}


ACTIVATIONS: dict[type[Quantizer], Callable[[Operation, str, Any], str]] = {
    UniformQuantizer: Operation.dequantized,
    AdaLogQuantizer: Operation.logarithmic,
    Float: Operation.unchanged,
}
"""What a quantizer makes of an activation, by its class."""

PRODUCTS: dict[tuple[type, type], Callable[[Operation, str, Any, str, Any], None]] = {
    (UniformQuantizer, UniformQuantizer): Operation.of_integers,
    (DeMaxQuantizer, Quantizer): Operation.without_maxima,
}
"""Products of two activations that are more than one of values, by the classes of both
quantizers.
"""
