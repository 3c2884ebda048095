"""The calibrated backbone as an ONNX file (docs/onnx.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from ..checkpoints.writing import write_atomically
from ..errors import QuantizationError
from ..layers import QuantOp
from ..version import __version__
from .graph import Call, replace_operations
from .trace import as_tuple, instead, trace

TOLERANCE = 1e-3
"""The largest relative difference, in the Euclidean norm, that is taken for the same.
"""
EDGE = 2.0**-18
"""A value that is nearer than this, relatively, to the edge between two codes may have
either: 32 times float32's precision.
"""


class Difference(NamedTuple):
    """How far ONNX Runtime is from torch.

    Attributes:
        step: The largest relative difference of any step on the same input: of a
            quantized operation, but for values on the edge between two codes; of what
            is computed between two of them; of the feature maps from the last of them.
        where: The name of that step.
        end_to_end: The largest relative difference of a feature map from the image
            alone. Two programs that differ in the last bit of a value on an edge differ
            by a whole step from there on, and with few bits by more and more.
        floor: As end_to_end, of torch from itself where the output of each operation
            changes in its last bit.
    """

    step: float
    where: str
    end_to_end: float
    floor: float


def build_graph(
    backbone: nn.Module, image: Tensor, dynamic: bool = False
) -> tuple[onnx.ModelProto, list[Call]]:
    """The graph of a calibrated backbone, checked by ``onnx.checker``, and its
    quantized operations.

    Args:
        backbone: In evaluation mode, on the CPU.
        image: An example, (batch, 3, height, width).
        dynamic: Whether height and width are to be free.

    Raises:
        QuantizationError: If it cannot be exported.
    """
    model = trace(backbone, image, dynamic)
    calls = replace_operations(model, backbone)
    model.producer_name, model.producer_version = 'mmptq', __version__
    onnx.checker.check_model(model, full_check=True)
    return model, calls


@torch.no_grad()
def compare(
    model: onnx.ModelProto, calls: Sequence[Call], backbone: nn.Module, image: Tensor
) -> Difference:
    """Runs an image by ONNX Runtime and by torch, from end to end and step by step.

    For the steps torch gets the output of each operation from ONNX Runtime and goes on
    with it.
    """
    found = _run(model, image, [])
    maps = as_tuple(backbone(image))
    end_to_end = max(
        relative(found[f'map_{number}'], value) for number, value in enumerate(maps)
    )
    with instead(
        backbone,
        lambda op, name, *inputs: (
            type(op).forward(op, *inputs) * (1 + torch.finfo(image.dtype).eps)
        ),
    ):
        floor = max(map(relative, as_tuple(backbone(image)), maps))
    found = _run(
        model,
        image,
        list(
            dict.fromkeys(
                name for call in calls for name in (*call.inputs, call.output)
            )
        ),
    )
    remaining = list(calls)
    steps: dict[str, float] = {}

    def step(op: QuantOp, name: str, *inputs: Tensor) -> Tensor:
        call = next(call for call in remaining if call.name == name)
        remaining.remove(call)
        given = [found[value] for value in call.inputs]
        steps[f'the input of {call.name}'] = max(map(relative, given, inputs))
        steps[call.name] = relative(
            found[call.output],
            *(
                type(op).forward(
                    op, *(x + shift * (x.abs() + x.abs().mean()) for x in given)
                )
                for shift in (0, EDGE, -EDGE)
            ),
        )
        return found[call.output]

    with instead(backbone, step):
        maps = as_tuple(backbone(image))
    steps |= {
        f'feature map {number}': relative(found[f'map_{number}'], value)
        for number, value in enumerate(maps)
    }
    where = max(steps, key=lambda name: steps[name])
    return Difference(steps[where], where, end_to_end, floor)


def export_onnx(
    backbone: nn.Module, path: Path, shape: tuple[int, int], dynamic: bool = False
) -> list[Difference]:
    """Writes a calibrated backbone as an ONNX file, if ONNX Runtime computes the same
    as torch.

    Args:
        backbone: In evaluation mode, on the CPU.
        path: The file, written whole or not at all.
        shape: Height and width of the images.
        dynamic: Whether they are to be free; then another shape is compared as well.

    Returns:
        What was found at each shape.

    Raises:
        QuantizationError: If it cannot be exported, or ONNX Runtime differs from torch
            by more than :data:`TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, (shape[0] + 64, shape[1] + 128)] if dynamic else [shape]
    images = [torch.randn(1, 3, *each, generator=generator) for each in shapes]
    model, calls = build_graph(backbone, images[0], dynamic)
    found = [compare(model, calls, backbone, image) for image in images]
    for (height, width), difference in zip(shapes, found, strict=True):
        if not difference.step <= TOLERANCE:
            raise QuantizationError(
                f'{path} was not written: at {height}x{width} {difference.where} by'
                f' ONNX Runtime differs from torch by {difference.step:.1e}, more than'
                f' {TOLERANCE:g}'
            )
    write_atomically(
        path, lambda temporary: Path(temporary).write_bytes(model.SerializeToString())
    )
    return found


def relative(found: Tensor, expected: Tensor, *others: Tensor) -> float:
    """``|a - b| / |b|`` in the Euclidean norm, each difference less those of the others
    from b; infinite for other shapes.
    """
    if found.shape != expected.shape:
        return float('inf')
    excess = (found - expected).abs()
    for other in others:
        excess = excess - (other - expected).abs()
    return float(
        excess.clamp(min=0).norm()
        / expected.norm().clamp(min=torch.finfo(expected.dtype).tiny)
    )


def _run(
    model: onnx.ModelProto, image: Tensor, values: Sequence[str]
) -> dict[str, Tensor]:
    """The feature maps by ONNX Runtime, and some values of the graph."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    tapped.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in values
        if name not in known
    )
    session = onnxruntime.InferenceSession(
        tapped.SerializeToString(), providers=['CPUExecutionProvider']
    )
    names = [value.name for value in session.get_outputs()]
    found: list[np.ndarray] = session.run(names, {'image': image.numpy()})
    return {
        'image': image,
        **{
            name: torch.from_numpy(value)
            for name, value in zip(names, found, strict=True)
        },
    }
