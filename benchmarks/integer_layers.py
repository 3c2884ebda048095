"""Single operations in integers against float32, by kind and shape: from a float input
to a float output, in turn in every round.

    python benchmarks/integer_layers.py [--rounds 15] [--bits 8] [--json FILE]

Shapes are those of a Swin-T backbone and an FPN at 800x1216, of a DeiT-Tiny at 512x512;
weights and inputs are random, ranges from minimum to maximum. A fused block leaves out
what an operation by itself needs most of its time for: float inputs and outputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import parser, report
from torch import Tensor, nn

from mmptq.layers import QuantConv2d, QuantLinear, QuantMatMul, QuantOp
from mmptq.quantizers import Quantizer, UniformQuantizer
from mmptq.runtime.choice import choose_backend
from mmptq.runtime.convert import integer_form

LINEAR = {
    'qkv, stage 1': (60800, 96, 288),
    'fc1, stage 1': (60800, 96, 384),
    'fc2, stage 1': (60800, 384, 96),
    'fc1, stage 3': (3800, 384, 1536),
    'fc2, stage 3': (3800, 1536, 384),
    'fc2, stage 4': (950, 3072, 768),
    'fc1, DeiT-Tiny': (1025, 192, 768),
}
"""Rows, inputs, outputs."""
CONV = {
    'patch embedding': (3, 96, 4, 4, 0, (800, 1216)),
    'FPN output': (256, 256, 3, 1, 1, (200, 304)),
    'FPN output, coarse': (256, 256, 3, 1, 1, (25, 38)),
}
"""Channels in and out, kernel, stride, padding, size."""
PRODUCT = {
    'qk, stage 1': (1276, 3, 49, 32, 49),
    'pv, stage 1': (1276, 3, 49, 49, 32),
    'qk, DeiT-Tiny': (1, 3, 1025, 64, 1025),
    'pv, DeiT-Tiny': (1, 3, 1025, 1025, 64),
}
"""Windows, heads, rows, inner, columns."""


def ranged(quantizer: Quantizer, x: Tensor) -> None:
    """Sets a quantizer to the range of a tensor."""
    values = quantizer.grouped(x)
    params = quantizer.range_params(values.amin(1), values.amax(1))
    quantizer.set(
        **{name: quantizer.ungrouped(value[None])[0] for name, value in params.items()}
    )


def calibrated(
    op: QuantOp, roles: dict[str, Tensor], axes: dict[str, int], bits: int
) -> QuantOp:
    """An operation with uniform quantizers of the ranges of its operands, of weights
    symmetric ones.
    """
    op.set_quantizers(
        dict.fromkeys(roles, 'linear'),
        {
            role: UniformQuantizer(
                bits, axis=axes.get(role), symmetric=role == 'weight'
            )
            for role in roles
        },
    )
    for role, x in roles.items():
        ranged(op.quantizer(role), x)
    return op.eval()


def sides(
    bits: int,
) -> dict[tuple[str, str], tuple[Callable[[], Any], Callable[[], Any], str]]:
    """By kind and name: the operation in float, in integers, and its path."""
    found: dict[
        tuple[str, str], tuple[QuantOp, tuple[Tensor, ...], Callable[..., Any]]
    ] = {}
    for name, (rows, inner, out) in LINEAR.items():
        x, layer = torch.randn(rows, inner), nn.Linear(inner, out)
        op = calibrated(
            QuantLinear.from_float(layer),
            dict(input=x, weight=layer.weight.detach()),
            dict(weight=-2),
            bits,
        )
        found['linear', f'{name}: {rows} x {inner} x {out}'] = (op, (x,), layer)
    for name, (channels, out, kernel, stride, padding, size) in CONV.items():
        x, conv = (
            torch.randn(1, channels, *size),
            nn.Conv2d(channels, out, kernel, stride, padding),
        )
        op = calibrated(
            QuantConv2d.from_float(conv),
            dict(input=x, weight=conv.weight.detach()),
            dict(weight=-4),
            bits,
        )
        found[
            'conv',
            f'{name}: {channels} x {out}, {kernel}x{kernel}, {size[0]}x{size[1]}',
        ] = (op, (x,), conv)
    for name, (windows, heads, rows, inner, columns) in PRODUCT.items():
        left, right = (
            torch.randn(windows, heads, rows, inner),
            torch.randn(windows, heads, inner, columns),
        )
        op = calibrated(
            QuantMatMul(), dict(left=left, right=right), dict(left=-3, right=-3), bits
        )
        found[
            'product', f'{name}: {windows} x {heads} x ({rows} x {inner} x {columns})'
        ] = (op, (left, right), torch.matmul)
    result: dict[tuple[str, str], tuple[Callable[[], Any], Callable[[], Any], str]] = {}
    for key, (op, inputs, plain) in found.items():
        integer = integer_form(op, choose_backend(torch.device('cpu')))
        result[key] = (partial(plain, *inputs), partial(integer, *inputs), integer.path)
    return result


@torch.no_grad()
def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('--rounds', type=int, default=15)
    args.add_argument('--bits', type=int, default=8)
    options = args.parse_args()
    torch.manual_seed(0)
    rows = []
    for (kind, name), (plain, integer, path) in sides(options.bits).items():
        times: dict[str, list[float]] = {'float': [], 'integer': []}
        for number in range(options.rounds + 3):
            for side, run in (('float', plain), ('integer', integer)):
                started = time.perf_counter()
                run()
                if number >= 3:
                    times[side].append(1e3 * (time.perf_counter() - started))
        ratio = statistics.median(
            a / b for a, b in zip(times['float'], times['integer'], strict=True)
        )
        rows.append(
            {
                'kind': kind,
                'shape': name,
                'float32, ms': statistics.median(times['float']),
                'integer, ms': statistics.median(times['integer']),
                'times as fast': ratio,
                'path': path,
            }
        )
    about = dict(
        scope='single operations',
        bits=dict(weight=options.bits, activation=options.bits),
        calibration='the input itself',
    )
    report(
        f'operations in integers, W{options.bits}A{options.bits}',
        rows,
        about,
        options.json,
    )


if __name__ == '__main__':
    main()
