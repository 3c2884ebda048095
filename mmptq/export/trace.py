"""A backbone as an ONNX graph in which every quantized operation is one node, to be
replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from ..layers import QuantConv2d, QuantLinear, QuantOp

DOMAIN = 'mmptq'
"""The domain of these nodes; their type is the operation's kind, their attribute
``name`` its name in the backbone.
"""
OPSET = 21
"""The first with 4-bit integers."""


class _Maps(nn.Module):
    """A backbone whose output is a tuple."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(self.backbone(image))


def as_tuple(maps: Any) -> tuple[Tensor, ...]:
    """The feature maps that a backbone returned."""
    return (maps,) if isinstance(maps, Tensor) else tuple(maps)


def trace(backbone: nn.Module, image: Tensor, dynamic: bool) -> onnx.ModelProto:
    """The graph of a backbone, of input ``image`` and outputs ``map_0``, ``map_1``, ...

    Args:
        backbone: In evaluation mode.
        image: An example, (batch, 3, height, width).
        dynamic: Whether height and width are to be free.

    Raises:
        QuantizationError: If torch cannot export it, or not with free height and width.
    """
    sides = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} if dynamic else None
    with torch.no_grad(), instead(backbone, _node):
        try:
            program = torch.export.export(
                _Maps(backbone), (image,), dynamic_shapes=(sides,), strict=False
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=['image'],
                verbose=False,
            )
        except Exception as error:  # it runs the backbone's own code
            raise QuantizationError(
                f'torch cannot export {type(backbone).__name__}:'
                f' {type(error).__name__}: {error}'
            ) from error
    assert exported is not None
    model = _plain(exported.model_proto)
    if dynamic and any(
        side.HasField('dim_value')
        for side in model.graph.input[0].type.tensor_type.shape.dim[2:]
    ):
        raise QuantizationError(
            f'{type(backbone).__name__} takes images of one size only when torch'
            ' exports it: leave --dynamic out'
        )
    return model


@contextmanager
def instead(backbone: nn.Module, compute: Callable[..., Tensor]) -> Iterator[None]:
    """Within it every quantized operation runs ``compute(op, name, *inputs)`` in the
    place of its forward.
    """
    operations = {
        name: op for name, op in backbone.named_modules() if isinstance(op, QuantOp)
    }
    for name, op in operations.items():
        op.forward = partial(compute, op, name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for op in operations.values():
            del op.forward


def _node(op: QuantOp, name: str, *inputs: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        f'{DOMAIN}::{op.kind}',
        inputs,
        {'name': name},
        dtype=inputs[0].dtype,
        shape=_shape(op, *inputs),
        version=1,
    )


def _shape(op: QuantOp, *inputs: Tensor) -> tuple[int, ...]:
    """Of an operation's output."""
    x = inputs[0]
    if isinstance(op, QuantLinear):
        return *x.shape[:-1], op.out_features
    if not isinstance(op, QuantConv2d):
        return *x.shape[:-1], inputs[1].shape[-1]
    padding = op._reversed_padding_repeated_twice  # left, right, top, bottom
    sides = [
        (
            x.shape[2 + i]
            + padding[2 - 2 * i]
            + padding[3 - 2 * i]
            - op.dilation[i] * (op.kernel_size[i] - 1)
            - 1
        )
        // op.stride[i]
        + 1
        for i in (0, 1)
    ]
    return x.shape[0], op.out_channels, *sides


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without what torch says of the place in the source that each part is from."""
    graph = model.graph
    for part in (
        model,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.initializer,
    ):
        part.ClearField('doc_string')
        part.ClearField('metadata_props')
    graph.ClearField('value_info')
    outputs = {value.name: f'map_{number}' for number, value in enumerate(graph.output)}
    for value in graph.output:
        value.name = outputs[value.name]
    for node in graph.node:
        node.input[:] = [outputs.get(name, name) for name in node.input]
        node.output[:] = [outputs.get(name, name) for name in node.output]
    return model
