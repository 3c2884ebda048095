"""What a quantized model is and what it cost: rows a layer, sizes, the table at the end."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import nn

from ..backbones.convert import layers_with_products
from ..calibration import operations
from ..layers import QuantOp

MIB = 2**20
HEADLINES = ('bbox_mAP', 'segm_mAP', 'mIoU', 'aAcc', 'top1')
"""Metrics shown in the table, by the end of their name; all where there is none of these."""


def layer_rows(model: nn.Module, skipped: Mapping[str, str], sqnr_db: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """One row for every linear layer, convolution and attention product of a model, quantized or not.

    Args:
        model: The model.
        skipped: By layer or product: why it stays float.
        sqnr_db: By quantized operation, see :class:`mmptq.calibration.BlockResult`.
    """
    rows = []
    ops: dict[str, nn.Module] = dict(operations(model))
    floats = {name: layer for name, layer in layers_with_products(model).items() if name not in ops}
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    for name, module in sorted((ops | floats).items(), key=lambda item: order[item[0]]):
        if isinstance(module, QuantOp):
            quantizers = module.quantizers()
            rows.append(dict(name=name, kind=module.kind, site='/'.join(s for s in module.sites.values() if s != 'weight'),
                             bits={role: quantizer.bits for role, quantizer in quantizers.items()},
                             effective_bits={role: round(quantizer.effective_bits, 3) for role, quantizer in quantizers.items()},
                             quantizer={role: type(quantizer).__name__ for role, quantizer in quantizers.items()},
                             uniform={role: quantizer.uniform for role, quantizer in quantizers.items()},
                             sqnr_db=sqnr_db.get(name), reason=skipped.get(name)))
        else:
            rows.append(dict(name=name, kind=type(module).__name__, site=None, bits=None, effective_bits=None, quantizer=None, uniform=None,
                             sqnr_db=None, reason=skipped[name]))
    return rows


def model_size(model: nn.Module) -> dict[str, float]:
    """Size of the weights, MiB: all in float32, and with quantized ones packed at their bits.

    A scale (float32) and a zero point (one byte) are counted for each channel.
    """
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    saved = 0.0
    for module in model.modules():
        if isinstance(module, QuantOp) and 'weight' in module.roles:
            weight, quantizer = module.get_parameter('weight'), module.quantizer('weight')
            channels = 1 if quantizer.axis is None else weight.shape[quantizer.axis]
            saved += weight.numel() * (4 - quantizer.bits / 8) - 5 * channels
    return dict(float_mib=round(total / MIB, 3), quantized_mib=round((total - saved) / MIB, 3))


def result_table(summaries: Sequence[Mapping[str, Any]], title: str = 'measured') -> Table:
    """Float and quantized results side by side; the float row is the first summary's."""
    first = summaries[0]
    calibration = first['calibration']
    table = Table(title=escape(
        f'{title}: scope {first["scope"]}, calibrated on {calibration["images"]} images of {calibration["dataset"]} '
        f'{calibration["split"]}' + (' (leak)' if calibration['leak'] else '')))
    metrics = _headlines(first['quantized'] or first['float'])
    for column in ('recipe', 'W/A/softmax', 'backend', *metrics, 'size MiB', 'eval s', 'calib s'):
        table.add_column(escape(column), justify='left' if column in ('recipe', 'backend') else 'right', no_wrap=True)
    if first['float']:
        table.add_row('float', '32 bit', '', *_values(first['float'], metrics), f'{first["size"]["float_mib"]:.2f}',
                      f'{first["float"]["seconds"]:.1f}', '')
    for summary in summaries:
        bits = summary['bits']
        quantized = summary['quantized']
        table.add_row(summary['recipe']['name'], f'{bits["weight"]}/{bits["activation"]}/{bits["softmax"]}',
                      quantized['backend'] if quantized else '-', *(_values(quantized, metrics) if quantized else ['-'] * len(metrics)),
                      f'{summary["size"]["quantized_mib"]:.2f}', f'{quantized["seconds"]:.1f}' if quantized else '-',
                      f'{summary["calibration"]["seconds"]:.1f}')
    return table


def _headlines(result: Mapping[str, Any] | None) -> list[str]:
    if not result:
        return []
    names = list(result['metrics'])
    return [name for name in names if name.endswith(HEADLINES)] or names


def _values(result: Mapping[str, Any], metrics: list[str]) -> list[str]:
    values = [result['metrics'][name] for name in metrics]
    return ['-' if value is None else f'{value:.4g}' for value in values]
