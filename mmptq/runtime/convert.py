"""A calibrated model, its products computed in integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..backbones.convert import replace_modules
from ..errors import QuantizationError
from ..layers import QuantConv2d, QuantLinear, QuantMatMul, QuantOp
from ..quantizers import Quantizer
from .backend import Backend
from .base import IntegerOp, has_hooks
from .choice import choose_backend
from .conv import IntegerConv2d
from .errors import NoIntegerForm
from .forms import fused_forms, is_merging
from .linear import IntegerLinear
from .matmul import IntegerMatMul
from .merging import IntegerMerging, merged_order


def integer_matmul(op: QuantMatMul, backend: Backend) -> IntegerMatMul:
    """A product of two activations, which is the same on every device."""
    return IntegerMatMul(op)


INTEGER: dict[type[QuantOp], Callable[[Any, Backend], IntegerOp]] = {
    QuantLinear: IntegerLinear,
    QuantConv2d: IntegerConv2d,
    QuantMatMul: integer_matmul,
}
"""What stands for a quantized operation, by its class."""


def to_integer(model: nn.Module, fuse: bool = True) -> dict[str, str]:
    """Replaces the quantized operations of a calibrated model, in place, by integer
    ones.

    The model is for inference only afterwards.

    Args:
        model: The model, in evaluation mode.
        fuse: Whether whole blocks are replaced where a fused form is known (on a CPU,
            or a GPU with Triton).

    Returns:
        How each operation runs, by name; ``simulated: REASON`` where it stays as it
        was.

    Raises:
        QuantizationError: If the model has no quantized operations, is not calibrated,
            in training mode, not in float32, or on several devices.
    """
    ops = {name: op for name, op in model.named_modules() if isinstance(op, QuantOp)}
    check_ready(model, ops)
    backend = choose_backend(next(model.parameters()).device)
    mergings: dict[Any, Any] = {
        module.reduction: module
        for module in model.modules()
        if fuse and backend.fuses_maps and is_merging(module)
    }
    replaced: dict[nn.Module, nn.Module] = {}
    paths = {}
    for name, op in ops.items():
        try:
            if has_hooks(op):
                raise NoIntegerForm('it has forward hooks')
            if isinstance(op, QuantLinear) and op in mergings:
                reduction = IntegerLinear(
                    op, backend, merged_order(mergings[op].in_channels)
                )
                replaced[mergings[op]] = IntegerMerging(mergings[op], reduction).eval()
                paths[name] = reduction.path
            else:
                replaced[op] = integer = integer_form(op, backend).eval()
                paths[name] = integer.path
        except NoIntegerForm as reason:
            paths[name] = f'simulated: {reason}'
    replace_modules(model, replaced)
    model.requires_grad_(False)  # integer products have no gradient
    if fuse:
        replace_modules(
            model,
            {part: form.eval() for part, form in fused_forms(model, backend).items()},
        )
    return paths


def integer_form(op: QuantOp, backend: Backend) -> IntegerOp:
    """The integer operation that stands for a quantized one.

    Raises:
        NoIntegerForm: If it has none; the text is the reason.
    """
    if type(op) not in INTEGER:
        raise NoIntegerForm(
            f'{type(op).__name__} has no entry in mmptq.runtime.convert.INTEGER'
        )
    return INTEGER[type(op)](op, backend)


def check_ready(model: nn.Module, ops: dict[str, QuantOp]) -> None:
    """That a model with such operations can be converted.

    Raises:
        QuantizationError: If not, see :func:`to_integer`.
    """
    if not ops and any(isinstance(module, IntegerOp) for module in model.modules()):
        raise QuantizationError(f'{type(model).__name__} runs in integers already')
    if not ops:
        raise QuantizationError(
            f'{type(model).__name__} has no quantized operations; '
            'quantize it first (mmptq quantize)'
        )
    missing = [
        f'{name}.{child}'
        for name, op in ops.items()
        for child, part in op.named_children()
        if isinstance(part, Quantizer) and part.param_names and part.params is None
    ]
    if missing:
        raise QuantizationError(
            f'{len(missing)} quantizers are not calibrated, the first is {missing[0]}; '
            'calibrate the model first '
            '(mmptq quantize)'
        )
    if model.training:
        raise QuantizationError('the model is in training mode; call its eval() first')
    others = {
        str(value.dtype) for value in model.parameters() if value.is_floating_point()
    } - {'torch.float32'}
    if others:
        raise QuantizationError(
            f'the model has parameters of {", ".join(sorted(others))}; '
            'integers need float32: call its float() first'
        )
    devices = {
        str(value.device)
        for value in (*model.parameters(), *model.buffers())
        if value.numel()
    }
    if len(devices) > 1:
        raise QuantizationError(
            f'the model is on several devices: {", ".join(sorted(devices))}; move it to'
            ' one first'
        )
